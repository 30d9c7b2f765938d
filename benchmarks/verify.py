"""What verifying one round costs: token and block rules on bfloat16 logits, as JSON.

The yardstick beside them is one float32 softmax of the same target rows, the least that a dense implementation does;
compare machines by the ratio to it. (On CPU that kernel has a faster exponential, wrong by 1e-6, than the rules use.)
With --policy the policy's own forward of the same rows, batch x (k + 1) behind a cached context, stands beside them.

    python -m benchmarks.verify --batch 32 --k 3 --vocabulary 49152 --policy smollm2-135m --out verify.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forerun.acceptance.chain import RULES, verify
from forerun.acceptance.random import Purpose, inverse_cdf_log, uniforms
from forerun.models import load_policy
from forerun.models.cache import SlotCache, SlotPass
from forerun.models.forward import PolicyForward
from forerun.types import Draft, VerifyInput


def synthetic_round(batch: int, k: int, vocabulary: int, draft_vocabulary: int, device: str) -> VerifyInput:
    """Input of a rule at temperature 1: a draft that is the target plus noise, restricted to its vocabulary."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(batch, k + 1, vocabulary, generator=generator) * 3
    known = torch.arange(vocabulary)[:: max(1, vocabulary // draft_vocabulary)][:draft_vocabulary].contiguous()
    noisy = target[:, :k, known] + torch.randn(batch, k, len(known), generator=generator) * 0.6
    log_q = noisy.log_softmax(-1)
    seeds, positions = torch.arange(batch), torch.arange(k).expand(batch, -1)
    u = uniforms(seeds, positions, Purpose.DRAFT)
    tokens = known[inverse_cdf_log(log_q.flatten(0, 1), u.flatten()).view(batch, k)]
    draft = Draft(
        tokens.to(device),
        torch.full((batch,), k, device=device),
        log_q.to(device),
        None if len(known) == vocabulary else known.to(device),
    )
    accept = uniforms(seeds, positions, Purpose.ACCEPT).to(device)
    residual = uniforms(seeds, positions[:, :1], Purpose.RESIDUAL)[:, 0].to(device)
    return VerifyInput(target.bfloat16().to(device), draft, torch.ones(batch, device=device), accept, residual)


def median_ms(call: Callable[[], object], repeats: int, device: str) -> float:
    """Median wall milliseconds of a call, after two that do not count."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[2:])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time every rule with sampled and one-hot drafts."""
    inputs = synthetic_round(
        options.batch, options.k, options.vocabulary, options.draft_vocabulary or options.vocabulary, options.device
    )
    logits, draft = inputs.target_logits, inputs.draft
    one_hot = Draft(draft.tokens, draft.lengths)
    dense = torch.empty(
        logits.shape, dtype=torch.float32, device=options.device
    )  # kept, or paging it in would dominate
    dense_ms = median_ms(
        lambda: torch.softmax(logits, -1, dtype=torch.float32, out=dense), options.repeats, options.device
    )
    rows = []
    for rule in RULES:
        for proposal, given in (("sampled", draft), ("one-hot", one_hot)):
            call = partial(verify, rule, replace(inputs, draft=given))
            verdict, cost_ms = call(), median_ms(call, options.repeats, options.device)
            accepted = verdict.accepted.double().mean().item()
            rows.append(
                {
                    "rule": rule,
                    "draft": proposal,
                    "ms": round(cost_ms, 3),
                    "dense_softmaxes": round(cost_ms / dense_ms, 3),
                    "accepted_tokens": round(accepted, 3),
                }
            )
    return {"dense_softmax_ms": round(dense_ms, 3), "rules": rows}


def forward_ms(options: argparse.Namespace) -> tuple[float, str]:
    """Median milliseconds of the policy's forward of the rows that are verified, and its number format."""
    policy = load_policy(options.policy, "auto", options.device)
    forward, rows = PolicyForward(policy, ()), options.k + 1
    cache = SlotCache(options.batch, options.context + rows)
    read = torch.ones(options.batch, options.context, dtype=torch.int64, device=options.device)
    starts = torch.zeros(options.batch, dtype=torch.int64, device=options.device)
    forward(read, SlotPass(cache, 0, starts, options.context, options.context, fresh=True), head=False)
    tokens, at, end = read[:, :rows], starts + options.context, options.context + rows
    call = partial(_forward, forward, tokens, cache, at, end)
    return median_ms(call, options.repeats, options.device), str(policy.dtype)[6:]


def _forward(forward: PolicyForward, tokens: Tensor, cache: SlotCache, starts: Tensor, end: int) -> None:
    forward(tokens, SlotPass(cache, 0, starts, tokens.shape[1], end))


def with_forward(options: argparse.Namespace, measured: dict[str, Any]) -> dict[str, Any]:
    """Every rule's share of the policy's forward, where a policy is named."""
    if options.policy is None:
        return measured
    policy_ms, dtype = forward_ms(options)
    rows = [{**row, "share_of_forward": round(row["ms"] / policy_ms, 4)} for row in measured["rules"]]
    return {**measured, "rules": rows, "policy_forward_ms": round(policy_ms, 3), "policy_dtype": dtype}


def main() -> None:
    """Measure, print JSON, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--draft-vocabulary", type=int, default=0, help="0: the whole vocabulary")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--policy", help="model whose forward of the same rows is timed too")
    parser.add_argument("--context", type=int, default=96, help="tokens in the cache, for --policy")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = {name: value for name, value in vars(options).items() if name != "out"}
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    text = json.dumps({"setting": setting, "machine": machine, **with_forward(options, measure(options))}, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
