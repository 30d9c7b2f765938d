"""Sequences packed into rows against one padded sequence per row: log-probabilities, and tokens per second.

    python -m benchmarks.packing [--prompts 8] [--samples 4] [--repeats 5] [--microbatch-tokens 4096] [--out FILE]

The recipe's policy samples its own training prompts; the same rollouts are then scored, and trained on at a rate of 0,
with `train.packing` off and on, in turns. Printed are the largest difference between the two sets of log-probabilities,
beside it that of padded rows from every sequence alone (no packing: what the order of sums makes), medians of the
seconds, tokens of prompts and completions per second, and the share of padding in what was computed. Both cut the batch
into micro-batches of the recipe's size; padded ones are of rows of like length.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from benchmarks.common import Setting, Trajectory, load_setting, options, plain_data, write_result
from forerun.algorithms.advantages import group_advantages
from forerun.engine.local.engine import LocalEngine
from forerun.events import finish
from forerun.learner.learner import Learner
from forerun.learner.objective import Scored
from forerun.tracking.environment import describe_environment, machine_line
from forerun.training.rollout import RolloutBatch


def learners(setting: Setting) -> dict[str, Learner]:
    """Two over the same policy, which neither changes."""
    config, temperature = setting.recipe.train, setting.recipe.rollout.temperature
    return {
        name: Learner(setting.policy, config.model_copy(update={"packing": packing}), temperature)
        for name, packing in (("padded", False), ("packed", True))
    }


def turn(learner: Learner, generated: RolloutBatch) -> tuple[Scored, float, float]:
    """Seconds of the two passes that a step makes."""
    started = time.perf_counter()
    scored = finish(learner.score(generated.rollouts))
    middle = time.perf_counter()
    advantages = group_advantages(generated.rewards, learner.config.normalize_std).view(-1)
    finish(learner.update(generated.rollouts, advantages, scored, 0.0))
    return scored, middle - started, time.perf_counter() - middle


def alone(setting: Setting, generated: RolloutBatch) -> torch.Tensor:
    """Log-probabilities of one sequence per pass. [M]"""
    config = setting.recipe.train.model_copy(update={"packing": False, "microbatch_tokens": 1})
    learner = Learner(setting.policy, config, setting.recipe.rollout.temperature)
    return torch.cat(finish(learner.score(generated.rollouts)).logprobs)


def distance(first: torch.Tensor, second: torch.Tensor) -> dict[str, float]:
    """The largest difference, and the share of those above 1e-5."""
    gap = (first - second).abs()
    return {"largest": float(gap.max()), "above_1e-5": float((gap > 1e-5).float().mean())}


def computed_tokens(learner: Learner, generated: RolloutBatch) -> int:
    """Of all micro-batches, padding included."""
    everything = range(len(generated.rollouts))
    batches = learner._batches(generated.rollouts, everything, learner.config.packing)
    return sum(batch.input_ids.numel() for _, batch in batches)


def compare(setting: Setting, generated: RolloutBatch, repeats: int) -> dict[str, Any]:
    """Both, in turns."""
    tokens = sum(len(r.prompt_ids) + len(r.tokens) for r in generated.rollouts)
    times: dict[str, list[tuple[float, float]]] = {"padded": [], "packed": []}
    logprobs: dict[str, torch.Tensor] = {}
    both = learners(setting)
    for _ in range(repeats):
        for name, learner in both.items():
            scored, scoring_s, training_s = turn(learner, generated)
            logprobs[name] = torch.cat(scored.logprobs)
            times[name].append((scoring_s, training_s))
    result: dict[str, Any] = {
        "tokens": tokens, "rollouts": len(generated.rollouts), "logprobs": len(logprobs["padded"]),
        "difference": distance(logprobs["packed"], logprobs["padded"]),
        "difference_of_sums": distance(alone(setting, generated), logprobs["padded"]),
    }  # fmt: skip
    for name, learner in both.items():
        score_s, train_s = (statistics.median(column) for column in zip(*times[name], strict=True))
        result[name] = {
            "logprob_s": score_s, "train_s": train_s, "tokens_per_s": tokens / (score_s + train_s),
            "padding": 1 - tokens / computed_tokens(learner, generated),
        }  # fmt: skip
    result["ratio"] = result["packed"]["tokens_per_s"] / result["padded"]["tokens_per_s"]
    return result


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--microbatch-tokens", type=int, help="default: the recipe's")
    arguments = parser.parse_args()
    setting = load_setting(
        arguments.recipe,
        {
            "train.prompts_per_step": arguments.prompts, "train.samples_per_prompt": arguments.samples,
            "rollout.max_new_tokens": arguments.max_new_tokens,
            "train.microbatch_tokens": arguments.microbatch_tokens,
        },
    )  # fmt: skip
    trajectory = Trajectory(setting)
    engine = LocalEngine(setting.policy, slots=arguments.prompts * arguments.samples)
    generated = trajectory.generate(engine, trajectory.problems(0), 0)
    found = compare(setting, generated, arguments.repeats)
    print(machine_line(describe_environment()))
    for name, words in (("difference", "packed from padded"), ("difference_of_sums", "alone from padded")):
        row = found[name]
        print(
            f"{words}, {found['logprobs']} log-probabilities in {str(setting.policy.dtype)[6:]}: largest difference "
            f"{row['largest']:.1e}, {row['above_1e-5']:.2%} above 1e-5"
        )
    for name in ("padded", "packed"):
        row = found[name]
        print(
            f"{name}: {row['logprob_s']:.2f} s log-probabilities, {row['train_s']:.2f} s training, "
            f"{row['tokens_per_s']:.0f} tokens/s, {row['padding']:.0%} of the places are padding"
        )
    print(f"packed over padded: {found['ratio']:.2f}x tokens/s")
    write_result(arguments.out, "packing", setting.recipe, {"arguments": plain_data(arguments), **found})


if __name__ == "__main__":
    main()
