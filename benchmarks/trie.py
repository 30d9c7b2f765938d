"""Drafts out of siblings and earlier epochs: two epochs of GRPO on the same prompts, by scope of the trie, at T = 1.

    python -m benchmarks.trie [--steps 5] [--epochs 2] [--prompts 4] [--samples 8] [--frozen] [--out FILE]

An epoch is `--steps` steps of `--prompts` prompts, and every epoch has the same steps. The engine generates with scope
"prompt", all samples of a step at once, and the policy learns from them. Every trie then reads the same samples round
by round (`replay`), so that their differences do not carry the noise of different texts. "prompt, fresh" is empty at
the beginning of every epoch: it tells what the epochs before bring from what a policy that has become surer of itself
brings to any drafter. All have the same bound on tokens held.

Tokens per round count every policy forward, also those for which nothing was found to draft; the standard error is over
prompts, of differences as well, prompt by prompt. Drafted tokens are what a round costs beside the forward itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

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
from forerun.drafters import Drafter, Rows
from forerun.drafters.trie import TrieDrafter
from forerun.engine.local.engine import LocalEngine
from forerun.tasks import Problem
from forerun.tracking.environment import describe_environment, machine_line
from forerun.types import Rollout, VerifyResult

PROMPT, FRESH, GLOBAL = "prompt", "prompt, fresh", "global"


@dataclass(slots=True)
class Text:
    """A sample that is read again."""

    sample: Rollout
    place: int = 0  # tokens emitted
    rounds: int = 0
    drafted: int = 0

    @property
    def left(self) -> list[int]:
        return self.sample.tokens[self.place :]


def replay(drafter: Drafter, rollouts: Sequence[Rollout], k: int, limit: int) -> list[Text]:
    """What `drafter` would have done, had it drafted these samples, all begun in one round.

    A one-hot draft stands exactly where it names the token that the policy samples there, so a replay has the law of a
    run, and on the samples of its own run it repeats it round by round.

    Args:
        drafter: of one-hot drafts. limit: the samples' max_new_tokens.
    """
    texts = [Text(r) for r in sorted(rollouts, key=lambda r: (r.prompt_index, r.sample_index))]
    live = list(texts)
    prompts = [t.sample.prompt_ids for t in texts if t.sample.sample_index == 0]
    lengths = torch.tensor([len(p) for p in prompts])
    padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = torch.tensor(prompt)
    drafter.open(len(texts) + len(prompts), padded.shape[1] + limit + k + 1, k)
    drafter.prefill(len(texts), padded, lengths, None)
    for row, text in enumerate(texts):
        drafter.copy(len(texts) + text.sample.prompt_index, row)
    while live:
        _round(drafter, live, k, limit)
        for row in [row for row, text in reversed(list(enumerate(live))) if not text.left]:
            last = live.pop()
            if row < len(live):
                live[row] = last
                drafter.copy(len(live), row)
    return texts


def _round(drafter: Drafter, live: list[Text], k: int, limit: int) -> None:
    """Draft, and emit what stands and the token after it."""
    so_far = [text.sample.prompt_ids + text.sample.tokens[: text.place] for text in live]
    rows = Rows(
        torch.tensor([ids[-1] for ids in so_far]), torch.tensor([len(ids) - 1 for ids in so_far]),
        torch.zeros(len(live), dtype=torch.int64), torch.ones(len(live)),
    )  # fmt: skip
    draft = drafter.propose(rows, torch.tensor([max(0, min(k, limit - t.place - 1)) for t in live]))
    tokens, accepted = torch.zeros(len(live), k + 1, dtype=torch.int64), []
    for row, (text, size) in enumerate(zip(live, draft.lengths.tolist(), strict=True)):
        following = torch.tensor(text.left[: size + 1])
        agree = draft.tokens[row, : min(size, len(following))] == following[:size]
        count = min(int(agree.long().cumprod(0).sum()) + 1, len(following))
        tokens[row, :count] = following[:count]
        accepted.append(count - 1)
        text.place, text.rounds, text.drafted = text.place + count, text.rounds + 1, text.drafted + size
    drafter.observe(rows, VerifyResult(torch.tensor(accepted), tokens, torch.zeros(tokens.shape)), None)


@dataclass(slots=True)
class Epoch:
    """One trie's figures in one epoch."""

    by_prompt: list[float] = field(default_factory=list)  # tokens per round
    texts: list[Text] = field(default_factory=list)

    def add(self, texts: Sequence[Text]) -> None:
        """One step of it."""
        self.texts += texts
        self.by_prompt += tokens_per_round([replace(t.sample, rounds=t.rounds) for t in texts])

    def row(self) -> dict[str, Any]:
        """As in the JSON file."""
        rounds, drafted = sum(t.rounds for t in self.texts), sum(t.drafted for t in self.texts)
        tokens = sum(t.place for t in self.texts)
        return {
            "tokens_per_round": asdict(mean_of(self.by_prompt)), "by_prompt": self.by_prompt,
            "drafted_per_round": drafted / rounds, "accepted_per_drafted": (tokens - rounds) / max(1, drafted),
            "tokens": tokens, "rounds": rounds,
        }  # fmt: skip


class Run:
    """Tries along one trajectory."""

    def __init__(self, setting: Setting, k: int, settings: TrieConfig, frozen: bool) -> None:
        train = setting.recipe.train
        self.setting, self.k, self.frozen = setting, k, frozen
        self.settings = {scope: settings.model_copy(update={"scope": scope}) for scope in ("prompt", "global")}
        self.trajectory, self.movement = Trajectory(setting), Movement(setting.policy)
        slots = train.prompts_per_step * train.samples_per_prompt
        self.engine = LocalEngine(setting.policy, TrieDrafter(self.settings["prompt"]), k=k, slots=slots)
        self.tries = {PROMPT: TrieDrafter(self.settings["prompt"]), GLOBAL: TrieDrafter(self.settings["global"])}

    def epoch(self, number: int, steps: int) -> tuple[dict[str, Epoch], list[dict[str, Any]]]:
        """All steps of an epoch (0-based): figures by trie, and a row per step.

        In the first epoch a fresh trie would be the same as the one of scope "prompt", and does not run.
        """
        tries = self.tries if number == 0 else {**self.tries, FRESH: TrieDrafter(self.settings["prompt"])}
        found, rows = {name: Epoch() for name in tries}, []
        for step in range(steps):
            place = number * steps + step  # seeds are of the place, or a frozen policy would repeat itself word by word
            row = self._step(tries, found, self.trajectory.problems(step), place)
            rows.append({"epoch": number + 1, "step": place + 1, **row})
            print(step_line(rows[-1]), flush=True)
        return found, rows

    def _step(
        self, tries: dict[str, TrieDrafter], found: dict[str, Epoch], problems: list[Problem], place: int
    ) -> dict[str, Any]:
        """The step's samples, read by every trie; then the policy learns."""
        generated = self.trajectory.generate(self.engine, problems, place)
        limit = self.setting.recipe.rollout.max_new_tokens
        lengths = {"engine": asdict(mean_of(tokens_per_round(generated.rollouts)))}
        for name, drafter in tries.items():
            before = len(found[name].by_prompt)
            found[name].add(replay(drafter, generated.rollouts, self.k, limit))
            lengths[name] = asdict(mean_of(found[name].by_prompt[before:]))
        entropy = None if self.frozen else self.trajectory.update(generated).entropy
        return {
            "reward": float(generated.rewards.float().mean()), "entropy": entropy,
            "weights_moved": self.movement.relative(), "tokens_per_round": lengths,
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
    print("\nepoch  trie            tokens per round   drafted per round  accepted of drafted")
    for number, found in enumerate(epochs, 1):
        for name, epoch in found.items():
            row = epoch.row()
            rates = f"{row['drafted_per_round']:>14.3f} {row['accepted_per_drafted']:>18.2f}"
            print(f"{number:>5}  {name:14} {Mean(**row['tokens_per_round'])} {rates}")
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
    parser.add_argument("--floor", type=float, help="default: the recipe's")
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
            "speculation.trie.match_min": arguments.match_min,
            "speculation.trie.floor": arguments.floor, "speculation.trie.max_tokens": arguments.max_tokens,
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
    corpora = {name: drafter.metrics() for name, drafter in run.tries.items()}
    result = {
        "arguments": plain_data(arguments),
        "epochs": [{name: epoch.row() for name, epoch in found.items()} for found in epochs],
        "differences": differences, "corpora": corpora, "rows": rows,
    }  # fmt: skip
    write_result(arguments.out, "trie", setting.recipe, result)


if __name__ == "__main__":
    main()
