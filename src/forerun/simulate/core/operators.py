"""Times of the operators of one forward pass, and of the whole pass, on one replica.

Seconds, bytes, FLOP. `batch` counts sequences on the replica, `queries` the rows that each adds (1 plain, k+1 to
verify), `context` the tokens that each has cached; all three may be numpy arrays and broadcast. Equations: table in
`docs/simulator.md`. Not modelled: overlap of communication with computation, pipeline bubbles, quantisation kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import numpy as np
from numpy.typing import NDArray

from forerun.errors import UserError
from forerun.simulate.core.hardware import Hardware, peak_flops
from forerun.simulate.core.shapes import ModelShape

Numbers = float | NDArray[np.float64]

WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "fp32": 4.0}
RUNTIME_BYTES = 3.9e9  # activations, graphs and communication buffers per GPU (aiconfigurator: 3.5 GB + NCCL 0.34-0.39)
MEMORY_SHARE = 0.92  # of the memory that an engine takes (vLLM's default)
NETWORK_LATENCY_S = 10e-6  # point to point across nodes
DISPATCH_LATENCY_S = 13e-6  # expert all-to-all, as the two below: GB200 NVLink tables
DISPATCH_SHARE = 0.46
COMBINE_RATIO = 1.15
EXPERT_OVERHEAD_S = 10e-6
EXPERT_BANDWIDTH_SHARE = 0.85
EXPERT_COMPUTE_SHARE = 0.40
EXPERT_IMBALANCE = 1.2  # busiest expert group over the mean, power-law routing
ELEMENTWISE_PASSES = 10  # sweeps over the hidden state: norms, rotary, residual, activation
ELEMENTWISE_SHARE = 0.6
# Which operator a constant of `Tuning` scales.
OPERATORS = {
    "host_s": "host",
    "sequence_s": "host",
    "overhead": "launches",
    "memory": "weights",
    "cache": "cache reads",
    "compute": "matrix compute and prefill",
    "link": "collectives",
    "experts": "experts",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """A replica on its GPUs: attention cut `tensor` ways and copied `data` times, experts cut `expert` ways."""

    tensor: int = 1
    data: int = 1
    expert: int = 1

    @property
    def gpus(self) -> int:
        """GPUs of the replica."""
        return self.tensor * self.data


@dataclass(frozen=True, slots=True)
class Tuning:
    """Constants of an engine: host seconds, and factors on the operator times (1: as in the kernel tables)."""

    host_s: float = 1.5e-3  # per iteration: schedule, prepare, sample
    sequence_s: float = 6e-6  # per iteration and running sequence
    overhead: float = 1.0  # on the fixed part of every kernel (captured graphs: below 1)
    memory: float = 1.0  # on weight-bound matrix products
    cache: float = 1.0  # on cache reads
    compute: float = 1.0  # on compute-bound matrix products and prefill attention
    link: float = 1.0  # on collectives
    experts: float = 1.0  # on expert layers


@dataclass(frozen=True, slots=True)
class Replica:
    """One copy of the policy on its GPUs, driven by one engine."""

    model: ModelShape
    gpu: Hardware
    layout: Layout = field(default_factory=Layout)
    precision: str = "bf16"
    cache_value_bytes: float = 2.0
    tuning: Tuning = field(default_factory=Tuning)


def gemm_s(replica: Replica, rows: Numbers, columns: float, depth: float) -> Numbers:
    """Eq. 1: `a + max(2mNK / (e_c F), bytes / (e_b W))` seconds for [rows, depth] x [depth, columns]."""
    gpu, tuning, fit = replica.gpu, replica.tuning, replica.gpu.gemm[replica.precision]
    compute_s = 2.0 * rows * columns * depth / (fit.compute_share * peak_flops(gpu, replica.precision))
    weight_bytes = WEIGHT_BYTES[replica.precision]
    moved_bytes = weight_bytes * (rows * depth + columns * depth) + 2.0 * rows * columns
    memory_s = moved_bytes / (fit.bandwidth_share * gpu.memory_bytes_per_s)
    return tuning.overhead * fit.overhead_s + np.maximum(tuning.compute * compute_s, tuning.memory * memory_s)


def collective_s(replica: Replica, group: int, message_bytes: Numbers, passes: float) -> Numbers:
    """Eq. 4: `alpha + passes (n-1)/n bytes / (e V)`; an all-reduce takes two passes, a gather or scatter one."""
    if group <= 1:
        return 0.0 * message_bytes
    gpu = replica.gpu
    size = min((n for n in gpu.all_reduce if n >= group), default=max(gpu.all_reduce))
    latency_s, share = gpu.all_reduce[size]
    if group > size:
        latency_s *= np.log2(group) / np.log2(size)
    rate = gpu.link_bytes_per_s
    if group > gpu.link_domain:
        latency_s, rate = latency_s + NETWORK_LATENCY_S, gpu.network_bytes_per_s
    return replica.tuning.link * (latency_s + passes * (group - 1) / group * message_bytes / (share * rate))


def _projections_s(replica: Replica, rows: Numbers) -> Numbers:
    """The matrix products around attention, for the rows of one attention copy."""
    model, tp = replica.model, replica.layout.tensor
    h, heads = model.hidden, model.heads / tp
    if model.latent is None:
        qkv_columns = (heads + 2 * max(model.kv_heads / tp, 1)) * model.head_dim
        return gemm_s(replica, rows, qkv_columns, h) + gemm_s(replica, rows, h, heads * model.head_dim)
    la = model.latent
    down_s = gemm_s(replica, rows, la.query_rank + la.cache_rank + la.rope_dim, h)
    up_s = gemm_s(replica, rows, heads * (la.nope_dim + la.rope_dim), la.query_rank)
    absorbed_s = gemm_s(replica, rows, heads * la.cache_rank, la.nope_dim) * (1 + la.value_dim / la.nope_dim)
    return down_s + up_s + absorbed_s + gemm_s(replica, rows, h, heads * la.value_dim)


def attention_s(replica: Replica, batch: Numbers, queries: Numbers, context: Numbers) -> Numbers:
    """Eq. 2: one layer's decode or verify attention; the cache is read once per sequence whatever `queries` is."""
    model, gpu, tp, tuning = replica.model, replica.gpu, replica.layout.tensor, replica.tuning
    if model.latent is None:
        values = 2 * max(model.kv_heads / tp, 1) * model.head_dim
        flops = 4.0 * batch * queries * context * (model.heads / tp) * model.head_dim
    else:
        values = model.cache_values_per_layer
        flops = (
            2.0 * batch * queries * context * (model.heads / tp) * (2 * model.latent.cache_rank + model.latent.rope_dim)
        )
    read_s = (
        batch * context * values * replica.cache_value_bytes / (gpu.attention_bandwidth_share * gpu.memory_bytes_per_s)
    )
    compute_s = flops / (gpu.prefill_flops_share * gpu.flops["bf16"])
    return tuning.overhead * gpu.attention_overhead_s + np.maximum(tuning.cache * read_s, tuning.compute * compute_s)


def prefill_attention_s(replica: Replica, tokens: Numbers) -> Numbers:
    """Eq. 3: one layer's causal attention over a prompt of `tokens`."""
    model, gpu = replica.model, replica.gpu
    width = model.head_dim if model.latent is None else model.latent.nope_dim + model.latent.rope_dim
    flops = 2.0 * model.heads / replica.layout.tensor * width * tokens**2
    fixed_s = replica.tuning.overhead * gpu.attention_overhead_s
    return fixed_s + replica.tuning.compute * flops / (gpu.prefill_flops_share * gpu.flops["bf16"])


def distinct_experts(count: float, active: float, rows: Numbers) -> Numbers:
    """Eq. 6: expected number of different experts among `count` when each of `rows` picks `active` different ones."""
    return count * (1.0 - (1.0 - active / count) ** rows)


def experts_s(replica: Replica, rows: Numbers) -> Numbers:
    """Eq. 5: one layer of experts for all `rows` of the replica, the busiest GPU's share."""
    model, gpu, layout, tuning = replica.model, replica.gpu, replica.layout, replica.tuning
    ex = model.experts
    if ex is None:
        return 0.0 * rows
    width = ex.width * layout.expert / layout.gpus
    assignments = rows * ex.active / layout.expert
    matrix = 3.0 * model.hidden * width
    read_bytes = distinct_experts(ex.count, ex.active, rows) / layout.expert * matrix * WEIGHT_BYTES[replica.precision]
    read_s = read_bytes / (EXPERT_BANDWIDTH_SHARE * gpu.memory_bytes_per_s)
    balance = EXPERT_IMBALANCE if layout.expert > 1 else 1.0
    compute_s = balance * 2.0 * assignments * matrix / (EXPERT_COMPUTE_SHARE * peak_flops(gpu, replica.precision))
    shared_s = gemm_s(replica, rows, 3.0 * ex.shared * width, model.hidden) if ex.shared else 0.0
    fixed_s = tuning.overhead * EXPERT_OVERHEAD_S
    return fixed_s + tuning.experts * np.maximum(read_s, tuning.compute * compute_s) + shared_s


def exchange_s(replica: Replica, rows: Numbers) -> Numbers:
    """Eq. 7: tokens to experts and back. Copied attention: dispatch and combine; cut attention: one all-reduce."""
    model, gpu, layout = replica.model, replica.gpu, replica.layout
    if layout.data == 1 or model.experts is None:
        return collective_s(replica, layout.tensor, 2.0 * rows * model.hidden, 2.0)
    ranks = distinct_experts(float(layout.expert), 1.0, float(model.experts.active))  # GPUs that a token is sent to
    rate = gpu.link_bytes_per_s if layout.gpus <= gpu.link_domain else gpu.network_bytes_per_s
    bytes_out = rows / layout.gpus * ranks * model.hidden * WEIGHT_BYTES[replica.precision]
    dispatch_s = DISPATCH_LATENCY_S + bytes_out / (DISPATCH_SHARE * rate)
    combine_s = DISPATCH_LATENCY_S + 2.0 / WEIGHT_BYTES[replica.precision] * bytes_out / (DISPATCH_SHARE * rate)
    return replica.tuning.link * (dispatch_s + COMBINE_RATIO * combine_s)


def _mlp_s(replica: Replica, rows: Numbers) -> Numbers:
    """One dense MLP, cut over all GPUs of the replica."""
    width = replica.model.mlp / replica.layout.tensor
    return gemm_s(replica, rows, 2 * width, replica.model.hidden) + gemm_s(replica, rows, replica.model.hidden, width)


def _layers_s(replica: Replica, batch: Numbers, queries: Numbers, attention: Numbers) -> Numbers:
    """All decoder layers around a given attention time per layer."""
    model, layout = replica.model, replica.layout
    rows, local_rows = batch * queries, batch * queries / layout.data
    sweep_bytes = ELEMENTWISE_PASSES * 2.0 * local_rows * model.hidden
    sweep_s = sweep_bytes / (ELEMENTWISE_SHARE * replica.gpu.memory_bytes_per_s)
    reduce_s = collective_s(replica, layout.tensor, 2.0 * local_rows * model.hidden, 2.0)
    common_s = _projections_s(replica, local_rows) + attention + reduce_s + sweep_s
    dense_s = _mlp_s(replica, local_rows) + collective_s(replica, layout.tensor, 2.0 * local_rows * model.hidden, 2.0)
    total_s = model.layers * common_s + model.dense_layers * dense_s
    if model.experts is not None:
        router_s = gemm_s(replica, local_rows, model.experts.count, model.hidden)
        total_s += (model.layers - model.dense_layers) * (
            router_s + experts_s(replica, rows) + exchange_s(replica, rows)
        )
    return total_s


def head_s(replica: Replica, rows: Numbers) -> Numbers:
    """Vocabulary projection of the rows that are sampled or verified, and the gather of its parts."""
    model, layout = replica.model, replica.layout
    local = rows / layout.data
    gather_s = collective_s(replica, layout.tensor, 2.0 * local * model.vocab, 1.0)
    return gemm_s(replica, local, model.vocab / layout.tensor, model.hidden) + gather_s


def forward_s(replica: Replica, batch: Numbers, queries: Numbers, context: Numbers) -> Numbers:
    """Device seconds of one pass over `batch` sequences of `queries` rows each, head included, host excluded."""
    attention = attention_s(replica, batch / replica.layout.data, queries, context)
    return _layers_s(replica, batch, queries, attention) + head_s(replica, batch * queries)


def prefill_s(replica: Replica, tokens: Numbers) -> Numbers:
    """Device seconds of one prompt of `tokens` on every attention copy at once, one sampled row each."""
    copies = float(replica.layout.data)
    return _layers_s(replica, copies, tokens, prefill_attention_s(replica, tokens)) + head_s(replica, copies)


def host_s(replica: Replica, batch: Numbers) -> Numbers:
    """Seconds of the host per iteration."""
    return replica.tuning.host_s + replica.tuning.sequence_s * batch


def weight_bytes(replica: Replica) -> float:
    """Weight bytes of the replica, copies of attention counted; embedding and head stay in two bytes."""
    model, layout = replica.model, replica.layout
    copied = model.layers * model.attention_params * (layout.data - 1)
    table_bytes = 2.0 * (model.params - model.body_params)
    return (model.body_params + copied) * WEIGHT_BYTES[replica.precision] + table_bytes * layout.data


def _usable_bytes(replica: Replica) -> float:
    """Bytes of one GPU beside the runtime."""
    return MEMORY_SHARE * replica.gpu.memory_bytes - RUNTIME_BYTES


def cache_room_bytes(replica: Replica) -> float:
    """Bytes that weights and runtime leave on the replica; negative where the weights do not fit."""
    return replica.layout.gpus * _usable_bytes(replica) - weight_bytes(replica)


def cache_tokens(replica: Replica, extra_bytes: float = 0.0) -> float:
    """Tokens of cache next to weights, runtime and `extra_bytes` (a drafter). Raises UserError when none fit."""
    model, layout = replica.model, replica.layout
    room_bytes = cache_room_bytes(replica) - extra_bytes
    if room_bytes <= 0:
        per_gpu_bytes = _usable_bytes(replica)
        need_bytes = weight_bytes(replica) + extra_bytes
        enough = 1
        while enough * per_gpu_bytes <= need_bytes:
            enough *= 2
        raise UserError(
            f"{model.name} needs {need_bytes / 1e9:.0f} GB of weights in {replica.precision}, but {layout.gpus} x "
            f"{replica.gpu.name} hold {layout.gpus * per_gpu_bytes / 1e9:.0f} GB beside the runtime: "
            f"use {enough} GPUs per replica."
        )
    copies = layout.tensor if model.latent else max(layout.tensor / model.kv_heads, 1.0)
    return room_bytes / (model.cache_bytes_per_token(replica.cache_value_bytes) * copies)


def check_layout(replica: Replica) -> None:
    """Refuse a layout that does not divide the model or does not fit, with a UserError that names one that works."""
    model, layout = replica.model, replica.layout
    for name, value in (("tensor", layout.tensor), ("data", layout.data), ("expert", layout.expert)):
        if value < 1:
            raise UserError(f"The {name} size of the layout is {value}; it must be 1 at least.")
    if model.heads % layout.tensor:
        near = max(n for n in range(1, layout.tensor + 1) if model.heads % n == 0)
        raise UserError(f"{model.name} has {model.heads} heads, which {layout.tensor} GPUs cannot share; {near} can.")
    if layout.expert > 1 and (model.experts is None or model.experts.count % layout.expert):
        experts = 0 if model.experts is None else model.experts.count
        near = max(n for n in range(1, layout.expert + 1) if experts % n == 0) if experts else 1
        raise UserError(
            f"{model.name} has {experts} experts, which cannot be spread over {layout.expert} groups; {near} works."
        )
    if layout.gpus % layout.expert:
        near = max(n for n in range(1, layout.expert + 1) if layout.gpus % n == 0)
        raise UserError(f"Experts cannot be spread over {layout.expert} of {layout.gpus} GPUs; {near} works.")
    cache_tokens(replica)


def operator_shares(seconds: Callable[[Tuning], NDArray[np.float64]], tuning: Tuning) -> dict[str, NDArray[np.float64]]:
    """Share of each operator in a time: d log `seconds` / d log constant, by finite differences."""
    base, step = seconds(tuning), 1e-3
    shares: dict[str, NDArray[np.float64]] = {}
    for constant in fields(Tuning):
        moved = replace(tuning, **{constant.name: getattr(tuning, constant.name) * (1 + step)})
        operator = OPERATORS[constant.name]
        shares[operator] = shares.get(operator, np.zeros_like(base)) + (seconds(moved) / base - 1) / step
    return shares
