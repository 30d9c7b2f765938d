"""Tensor parallelism: each layer's matrices are split over a group of ranks that run the same rows together.

Which matrix is split how is Transformers' own plan for the model (`model.tp_plan`): the outputs of a column-wise one
are the inputs of a row-wise one, and each attention and MLP needs one all-reduce (Shoeybi et al. 2019, section 3).
Embedding and output head are split by vocabulary; they are one matrix where they are tied. All else (norms) is held by
every rank of the group, which computes the same gradients for it. FSDP2 then shards each rank's part over the other
dimension of the mesh (`fsdp.py`).
Not supported: experts, sequence parallelism, a vocabulary-parallel loss.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from forerun.errors import UserError

# Transformers' names. A norm of single heads sees those of its rank; any dimension may stand for the heads, since all
# that counts is that its weight's gradient is summed over the ranks.
STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "replicated_with_grad_allreduce": lambda: SequenceParallel(sequence_dim=1, use_local_output=True),
}


def plan_of(model: Any, size: int) -> dict[str, str]:
    """The style of every module that is split over `size` ranks, by its name in the model.

    Raises:
        UserError: the model has no such plan, one that is not known here, or does not divide by `size`.
    """
    name, wanted = type(model).__name__, f"train.tensor_parallel={size}"
    patterns: dict[str, str] = dict(getattr(model, "tp_plan", None) or {})
    plan = {m: patterns[p] for m, _ in model.named_modules() if (p := re.sub(r"\.\d+\.", ".*.", m)) in patterns}
    if not plan:
        raise UserError(f"{wanted} needs a plan of Transformers for {name}, which has none; set it to 1")
    unknown = sorted(set(patterns.values()) - STYLES.keys())
    if unknown:
        raise UserError(f"{wanted} does not know how {name} is split by {', '.join(unknown)}; set it to 1")
    names = {module: m for m, module in model.named_modules()}
    if names[model.get_output_embeddings()] in plan:
        plan.setdefault(names[model.get_input_embeddings()], "embedding_rowwise")
    _check_neighbours(model, plan, wanted)
    _check_sizes(model, plan, size)
    return plan


def _check_neighbours(model: nn.Module, plan: Mapping[str, str], wanted: str) -> None:
    """A module next to a column-wise matrix sees its part alone, and a gradient of that part: the plan must name it.

    Raises:
        UserError: it does not, as older plans do not know the norms of single heads.
    """
    for parent in {m.rpartition(".")[0] for m, style in plan.items() if style == "colwise"}:
        module = model.get_submodule(parent)
        left = [f"{parent}.{name}" for name, _ in module.named_parameters(recurse=False)]
        for name, child in module.named_children():
            if any(True for _ in child.parameters()) and f"{parent}.{name}" not in plan:
                left.append(f"{parent}.{name}")
        if left:
            raise UserError(
                f"{wanted}: Transformers' plan for {type(model).__name__} splits {parent} and does not say what "
                f"becomes of {', '.join(left)}; set it to 1, or use a newer version of Transformers"
            )


def _check_sizes(model: Any, plan: Mapping[str, str], size: int) -> None:
    """Raises UserError."""
    config = model.config.get_text_config()
    counts = {"attention heads": config.num_attention_heads, "key/value heads": config.num_key_value_heads}
    modules = dict(model.named_modules())
    counts |= {f"outputs of {m}": modules[m].out_features for m, style in plan.items() if style == "colwise"}
    counts |= {f"inputs of {m}": modules[m].in_features for m, style in plan.items() if style == "rowwise"}
    for what, count in counts.items():
        if count % size:
            raise UserError(
                f"train.tensor_parallel={size} does not divide the {count} {what} of {type(model).__name__}; set it to "
                "a number that does"
            )


def parallelize(unit: nn.Module, start: str, plan: Mapping[str, str], mesh: DeviceMesh) -> None:
    """Split what a unit (`start`: its name in the model, with a dot) holds, in place and without a message.

    Every rank gives whole matrices that are the same on all. Tied ones come apart.
    """
    own = {m.removeprefix(start): STYLES[style]() for m, style in plan.items() if m.startswith(start)}
    own = {name: style for name, style in own.items() if not _is_split(unit.get_submodule(name))}
    parallelize_module(unit, mesh, own, src_data_rank=None)


def _is_split(module: nn.Module) -> bool:
    return any(hasattr(p, "device_mesh") for p in module.parameters(recurse=False))
