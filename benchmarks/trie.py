"""Drafts out of siblings and earlier epochs: two epochs of GRPO on the same prompts, by scope of the trie, at T = 1.

    python -m benchmarks.trie [--steps 5] [--epochs 2] [--prompts 4] [--samples 8] [--frozen] [--out FILE]

An epoch is `--steps` steps of `--prompts` prompts, and every epoch has the same steps. Drafts depend on who is decoded
alongside, so each drafter really generates every step, with the policy of that step; the rollouts of scope "prompt"
train the policy. "prompt, fresh" is empty at the beginning of every epoch: it tells what the epochs before bring from
what a policy that has become surer of itself brings to any drafter. All have the same bound on tokens held.

Tokens per round count every policy forward, also those for which nothing was found to draft; the standard error is over
prompts, of differences as well, prompt by prompt. The acceptance length is that of rounds with a draft.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.common import (
    Mean,
    Movement,
    Setting,
    Trajectory,
    difference,
    load_setting,
    mean_of,
    options,
    plain_data,
    tokens_per_round,
    write_result,
)
from forerun.config import TrieConfig
from forerun.draft.trie import TrieDrafter
from forerun.engine import Counters
from forerun.engine.local.engine import LocalEngine
from forerun.loop.generate import Generated
from forerun.report.environment import describe_environment, machine_line
from forerun.tasks import Problem

PROMPT, FRESH, GLOBAL = "prompt", "prompt, fresh", "global"


@dataclass(slots=True)
class Epoch:
    """One drafter's figures in one epoch."""

    by_prompt: list[float] = field(default_factory=list)  # tokens per round
    counters: Counters = field(default_factory=Counters)

    def add(self, generated: Generated) -> None:
        """One step of it."""
        self.by_prompt += tokens_per_round(generated.rollouts)
        self.counters = self.counters.plus(generated.counters)

    def row(self) -> dict[str, Any]:
        """As in the JSON file."""
        c = self.counters
        return {
            "tokens_per_round": asdict(mean_of(self.by_prompt)), "by_prompt": self.by_prompt,
            "acceptance_length": c.acceptance_length, "rounds_with_draft": c.rounds / c.rows, "k_mean": c.k_mean,
            "cumulative_per_position": c.acceptance_per_position, "tokens": c.tokens, "seconds": c.seconds,
        }  # fmt: skip


class Run:
    """Drafters along one trajectory."""

    def __init__(self, setting: Setting, k: int, settings: TrieConfig, frozen: bool) -> None:
        self.setting, self.k, self.frozen = setting, k, frozen
        self.settings = {scope: settings.model_copy(update={"scope": scope}) for scope in ("prompt", "global")}
        self.trajectory, self.movement = Trajectory(setting), Movement(setting.policy)
        self.engines = {PROMPT: self._engine("prompt"), GLOBAL: self._engine("global")}

    def _engine(self, scope: str) -> LocalEngine:
        drafter = TrieDrafter(self.settings[scope])
        return LocalEngine(self.setting.policy, drafter, k=self.k, slots=self.setting.recipe.rollout.slots)

    def epoch(self, number: int, steps: int) -> tuple[dict[str, Epoch], list[dict[str, Any]]]:
        """All steps of an epoch (0-based): figures by drafter, and a row per step.

        In the first epoch a fresh drafter would be the same as the one of scope "prompt", and does not run.
        """
        engines = self.engines if number == 0 else {**self.engines, FRESH: self._engine("prompt")}
        found, rows = {name: Epoch() for name in engines}, []
        for step in range(steps):
            place = number * steps + step  # seeds are of the place, or a frozen policy would repeat itself word by word
            row = self._step(engines, found, self.trajectory.problems(step), place)
            rows.append({"epoch": number + 1, "step": place + 1, **row})
            print(step_line(rows[-1]), flush=True)
        return found, rows

    def _step(
        self, engines: dict[str, LocalEngine], found: dict[str, Epoch], problems: list[Problem], place: int
    ) -> dict[str, Any]:
        """Every drafter generates the step's prompts; then the policy learns."""
        results = {}
        for name, engine in engines.items():
            results[name] = self.trajectory.generate(engine, problems, place)
            found[name].add(results[name])
        entropy = None if self.frozen else self.trajectory.update(results[PROMPT]).entropy
        return {
            "reward": float(results[PROMPT].rewards.float().mean()), "entropy": entropy,
            "weights_moved": self.movement.relative(),
            "tokens_per_round": {name: asdict(mean_of(tokens_per_round(g.rollouts))) for name, g in results.items()},
        }  # fmt: skip


def step_line(row: dict[str, Any]) -> str:
    """One line of the log."""
    lengths = "  ".join(f"{name} {a['mean']:.3f}" for name, a in row["tokens_per_round"].items())
    moved = f"reward {row['reward']:.2f}  moved {row['weights_moved']:.1e}"
    return f"epoch {row['epoch']} step {row['step']:>3}  {moved}  {lengths}"


def contrasts(epochs: Sequence[dict[str, Epoch]]) -> dict[str, dict[str, float]]:
    """Differences of tokens per round, prompt by prompt: scopes in each epoch, and the last epoch against the first."""
    first, last = epochs[0], epochs[-1]
    pairs = {f"epoch {i}: {PROMPT} - {GLOBAL}": (e[PROMPT], e[GLOBAL]) for i, e in enumerate(epochs, 1)}
    if len(epochs) > 1:
        pairs |= {f"{name}: epoch {len(epochs)} - epoch 1": (last[name], first[name]) for name in first}
        pairs |= {f"epoch {len(epochs)}: {PROMPT} - {FRESH}": (last[PROMPT], last[FRESH])}
        pairs |= {f"{FRESH}: epoch {len(epochs)} - epoch 1 of {PROMPT}": (last[FRESH], first[PROMPT])}
    return {name: asdict(difference(a.by_prompt, b.by_prompt)) for name, (a, b) in pairs.items()}


def show(epochs: Sequence[dict[str, Epoch]], differences: dict[str, dict[str, float]]) -> None:
    """Print the table."""
    print("\nepoch  trie            tokens per round   acceptance length  with draft  by position")
    for number, found in enumerate(epochs, 1):
        for name, epoch in found.items():
            row = epoch.row()
            positions = " ".join(f"{a:.2f}" for a in row["cumulative_per_position"])
            rates = f"{row['acceptance_length'] or 1.0:>14.3f} {row['rounds_with_draft']:>14.2f}"
            print(f"{number:>5}  {name:14} {Mean(**row['tokens_per_round'])} {rates}   {positions}")
    for name, value in differences.items():
        print(f"{name:44} {Mean(**value)}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=5, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=4, help="of a step")
    parser.add_argument("--samples", type=int, default=8, help="of a prompt")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--match-min", type=int, help="default: the recipe's")
    parser.add_argument("--max-tokens", type=int, help="bound of what each trie holds; default: the recipe's")
    parser.add_argument("--learning-rate", type=float, help="of the policy; default: the recipe's")
    parser.add_argument("--frozen", action="store_true", help="the policy does not learn")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    setting = load_setting(
        arguments.recipe,
        {
            "seed": arguments.seed, "train.prompts_per_step": arguments.prompts,
            "train.samples_per_prompt": arguments.samples, "train.learning_rate": arguments.learning_rate,
            "speculation.trie.match_min": arguments.match_min, "speculation.trie.max_tokens": arguments.max_tokens,
            "rollout.max_new_tokens": arguments.max_new_tokens,
        },
    )  # fmt: skip
    print(f"{setting.recipe.name}: k = {arguments.k}; {machine_line(describe_environment())}")
    run = Run(setting, arguments.k, setting.recipe.speculation.trie, arguments.frozen)
    epochs, rows = [], []
    for number in range(arguments.epochs):
        found, steps = run.epoch(number, arguments.steps)
        epochs.append(found)
        rows += steps
    differences = contrasts(epochs)
    show(epochs, differences)
    corpora = {name: engine.metrics()["drafter"] for name, engine in run.engines.items()}
    result = {
        "arguments": plain_data(arguments),
        "epochs": [{name: epoch.row() for name, epoch in found.items()} for found in epochs],
        "differences": differences, "corpora": corpora, "rows": rows,
    }  # fmt: skip
    write_result(arguments.out, "trie", setting.recipe, result)


if __name__ == "__main__":
    main()
