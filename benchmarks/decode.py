"""Plain decoding is not a straw man: the local engine's tokens/s against `transformers.generate`, same model, one run.

    python -m benchmarks.decode [--model NAME] [--batches 1,8,32] [--tokens 64] [--out FILE]

Both decode greedily to exactly `--tokens` tokens from the same prompts, with the same weights and number format. They
take turns, five times each; medians. The engine's general forward (`fused=False`: Transformers' own modules over our
cache) stands beside its fused one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from forerun.engine import Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.models import Policy, load_policy
from forerun.tracking.environment import describe_environment, machine_line


def prompts_of(policy: Policy, batch: int) -> list[list[int]]:
    """Sums of varying length, as in the quickstart."""
    questions = [f"What is {' + '.join(str(11 + 7 * i + j) for j in range(3 + i % 3))}?" for i in range(batch)]
    return [policy.encode(question) for question in questions]


def with_engine(policy: Policy, prompts: list[list[int]], tokens: int, fused: bool) -> Callable[[], None]:
    """One call decodes everything once."""
    engine = LocalEngine(policy, slots=len(prompts), fused=fused)
    sampling = Sampling(tokens, 0.0, ignore_eos=True)

    def run() -> None:
        made = list(engine.stream(prompts, sampling))
        assert all(len(r.tokens) == tokens for r in made)

    return run


def with_transformers(policy: Policy, prompts: list[list[int]], tokens: int) -> Callable[[], None]:
    """Left-padded, as `generate` wants it."""
    width = max(map(len, prompts))
    pad = policy.tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

    def run() -> None:
        out = policy.model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=pad
        )
        assert out.shape[1] == width + tokens

    return run


def median_seconds(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Seconds of each, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(policy: Policy, batch: int, tokens: int, repeats: int) -> dict[str, Any]:
    """tokens/s of all three at one batch."""
    prompts = prompts_of(policy, batch)
    runs = {
        "engine": with_engine(policy, prompts, tokens, fused=True),
        "engine_general": with_engine(policy, prompts, tokens, fused=False),
        "transformers": with_transformers(policy, prompts, tokens),
    }
    rates = {name: batch * tokens / s for name, s in median_seconds(runs, repeats).items()}
    return {"batch": batch, **rates, "ratio": rates["engine"] / rates["transformers"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    policy = load_policy(arguments.model, arguments.dtype)
    environment = describe_environment()
    print(f"{arguments.model}, {policy.dtype}, {arguments.tokens} tokens, greedy; {machine_line(environment)}")
    print(f"{'batch':>5} {'engine':>10} {'general':>10} {'generate':>10}  tokens/s, engine / generate")
    rows = []
    for batch in map(int, arguments.batches.split(",")):
        row = measure(policy, batch, arguments.tokens, arguments.repeats)
        rows.append(row)
        print(
            f"{batch:>5} {row['engine']:>10.1f} {row['engine_general']:>10.1f} {row['transformers']:>10.1f}"
            f"  {row['ratio']:.2f}x"
        )
    if arguments.out:
        result = {"benchmark": "decode", "model": arguments.model, "dtype": str(policy.dtype), "rows": rows}
        arguments.out.write_text(json.dumps({**result, "environment": environment}, indent=2) + "\n")


if __name__ == "__main__":
    main()
