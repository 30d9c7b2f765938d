"""Is a drafter that Forerun trained accepted as often in vLLM as in the local engine? Float32, same prompts.

    python -m benchmarks.vllm_acceptance [--recipe quickstart] [--prompts 64] [--tokens 160] [--samples 0] [--out FILE]

vLLM takes the first token of a text from the prefill, without a draft; the local engine drafts that one too. So the
local engine runs twice: as it is, and with vLLM's first token given ("aligned"), where both ought to run the very same
rounds. Ends with status 1 where the aligned tokens per forward differ by more than 2 percent, or a text differs.
With `--samples` n, also at T = 1: n samples a prompt, vLLM's acceptance rule in both, aligned, paired by prompt.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.common import Mean, difference, load_setting, mean_of, tokens_per_round, write_result
from forerun.drafters import Drafter, load_drafter
from forerun.engine import Counters, Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.engine.vllm.adapter import Limits, VllmEngine
from forerun.models import Policy
from forerun.tracking.environment import describe_environment, machine_line
from forerun.types import Rollout

TOLERANCE = 0.02  # of tokens per policy forward


def run(
    engine: LocalEngine | VllmEngine, prompts: list[list[int]], sampling: Sampling
) -> tuple[list[Rollout], Counters]:
    """The texts in the order of the prompts, and what was counted."""
    before = engine.counters.copy()
    rollouts = sorted(engine.stream(prompts, sampling), key=lambda r: r.prompt_index)
    return rollouts, engine.counters.minus(before)


def row(name: str, rollouts: list[Rollout], done: Counters, given: int = 0) -> dict[str, Any]:
    """One line of the table. `given` tokens at the head of each text, one round each, are left out of the first ratio:
    tokens over policy forwards; the counters' ratio is over the rounds that drafted, which local rounds without room do
    not."""
    forwards = sum(r.rounds - given for r in rollouts)
    return {
        "engine": name,
        "tokens": done.tokens,
        "forwards": forwards,
        "tokens_per_forward": sum(len(r.tokens) - given for r in rollouts) / forwards,
        "rounds": done.rounds,
        "tokens_per_round": done.acceptance_length,
        "per_position": done.acceptance_per_position,
        "accepted": sum(sum(r.drafted) for r in rollouts),
        "seconds": done.seconds,
    }


def measure(
    policy: Policy, drafter: Drafter, engine: VllmEngine, prompts: list[list[int]], most: int
) -> dict[str, Any]:
    """All three runs and how far they agree."""
    local = LocalEngine(policy, drafter, k=engine.k, slots=engine.limits.slots)
    sampling = Sampling(most, 0.0, 0)
    theirs, vllm_done = run(engine, prompts, sampling)
    ours, local_done = run(local, prompts, sampling)
    begun = [r for r in theirs if len(r.tokens) > 1]
    aligned, aligned_done = run(
        local, [r.prompt_ids + r.tokens[:1] for r in begun], replace(sampling, max_new_tokens=most - 1)
    )
    same = [a.tokens == b.tokens for a, b in zip(theirs, ours, strict=True)]
    gaps = [
        abs(x - y) for a, b, s in zip(theirs, ours, same, strict=True) if s
        for x, y in zip(a.logprobs, b.logprobs, strict=True)
    ]  # fmt: skip
    rows = [
        row("vllm", theirs, vllm_done, given=1),
        row("local, aligned", aligned, aligned_done),
        row("local", ours, local_done),
    ]
    return {
        "k": engine.k,
        "prompts": len(prompts),
        "rows": rows,
        "difference": rows[0]["tokens_per_forward"] / rows[1]["tokens_per_forward"] - 1,
        "same_texts": sum(same),
        "same_rounds": sum(a.rounds == b.rounds - 1 for a, b in zip(aligned, begun, strict=True)),
        "largest_logprob_gap": max(gaps, default=None),
    }


def measure_sampled(
    policy: Policy, drafter: Drafter, engine: VllmEngine, prompts: list[list[int]], most: int, n: int
) -> dict[str, Any]:
    """Both engines at T = 1 with the same rule; the local one goes on from vLLM's first token."""
    local = LocalEngine(policy, drafter, k=engine.k, rule=engine.rule, slots=engine.limits.slots)
    begun = [r for r in engine.stream(prompts, Sampling(most, 1.0, 1), n) if len(r.tokens) > 1]
    aligned = run(local, [r.prompt_ids + r.tokens[:1] for r in begun], Sampling(most - 1, 1.0, 2))[0]
    rest = [replace(r, rounds=r.rounds - 1, tokens=r.tokens[1:]) for r in begun]
    theirs = tokens_per_round(rest)
    ours = tokens_per_round([replace(a, prompt_index=b.prompt_index) for a, b in zip(aligned, begun, strict=True)])
    return {
        "temperature": 1.0,
        "rule": engine.rule,
        "samples": n,
        "vllm": asdict(mean_of(theirs)),
        "local": asdict(mean_of(ours)),
        "difference": asdict(difference(theirs, ours)),
    }


def show(result: dict[str, Any]) -> None:
    """The table."""
    for line in result["rows"]:
        positions = " ".join(f"{a:.3f}" for a in line["per_position"])
        print(
            f"{line['engine']:15} {line['forwards']:6} forwards, {line['tokens_per_forward']:.4f} tokens each; "
            f"{line['rounds']} rounds with drafts, {line['tokens_per_round']:.4f} tokens each  "
            f"positions {positions}  {line['seconds']:.1f} s"
        )
    print(
        f"tokens per forward differ by {result['difference']:+.2%} (aligned); {result['same_texts']} of "
        f"{result['prompts']} texts and the rounds of {result['same_rounds']} agree; largest gap of a log-probability "
        f"{result['largest_logprob_gap']:.1g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    setting = load_setting(arguments.recipe, {"policy.dtype": "float32", "policy.device": "cpu"})
    speculation = setting.recipe.speculation
    drafter = load_drafter(setting.policy, speculation)
    if drafter is None:
        sys.exit(f"The recipe '{setting.recipe.name}' does not speculate")
    prompts = setting.held_out(arguments.prompts)
    machine = machine_line(describe_environment())
    print(f"{setting.recipe.name}: k = {speculation.tokens}, {len(prompts)} prompts; {machine}")
    started = time.perf_counter()
    context = max(map(len, prompts)) + arguments.tokens
    limits = Limits(slots=setting.recipe.rollout.slots, context=context)
    engine = VllmEngine.from_live(setting.policy, drafter, speculation, limits=limits)
    print(f"vLLM started in {time.perf_counter() - started:.0f} s", flush=True)
    result = measure(setting.policy, drafter, engine, prompts, arguments.tokens)
    show(result)
    if arguments.samples:
        sampled = measure_sampled(setting.policy, drafter, engine, prompts, arguments.tokens, arguments.samples)
        means = {name: Mean(**sampled[name]) for name in ("vllm", "local", "difference")}
        print(f"T = 1, rule {engine.rule}: " + ", ".join(f"{name} {mean}" for name, mean in means.items()))
        result["sampled"] = sampled
    write_result(arguments.out, "vllm_acceptance", setting.recipe, result)
    sys.exit(abs(result["difference"]) > TOLERANCE or result["same_texts"] < len(prompts))


if __name__ == "__main__":
    main()
