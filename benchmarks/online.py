"""A drafter of the policy's own rollouts against one of foreign text, frozen and with online updates, over RL steps.

    python -m benchmarks.online --drafter-out out-of-domain [--steps 20] [--prompts 4] [--samples 8] [--out FILE]

Speculation is lossless, so the drafter does not influence the policy's way. One GRPO run is made, and four EAGLE-3
drafters go along: in-domain and out-of-domain, each as it was and each updated after every step as
`speculation.train=every-1` does, by the same class. Each step's rollouts judge all four before any of them learns from
those rollouts: exact acceptance sum min(p, q) per draft position of token rejection, by teacher forcing on every token
(`heads.py`); the standard error is over the window's prompts. Before the first and after the last step each
drafter also generates on held-out prompts in the engine, by the recipe's acceptance rule.

The out-of-domain drafter is a head trained on worked GSM8K solutions with the policy as teacher: as many completion
tokens, epochs and tokens per step as the in-domain one's config.json names, but a larger draft vocabulary, so that
missing words are not what holds it back. The policy forward is run anew for the judgement and once per origin for the
updates: origins differ in draft vocabulary, and time is not what is measured here.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
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
from forerun.config import DraftConfig, TaskConfig
from forerun.drafters.eagle3 import Eagle3Drafter, new_head
from forerun.drafters.training.heads import mean_acceptance, run_teacher, train_head, unrolled_losses
from forerun.drafters.training.trainer import EpochDone, Pair, Training, TrainingSetup, Validation
from forerun.engine.local.engine import LocalEngine
from forerun.learner.cotrain import CoTrainer
from forerun.learner.sft import solved_examples
from forerun.models.load import artifact
from forerun.models.logprobs import TokenBatch
from forerun.tasks import load_task
from forerun.tracking.environment import describe_environment, machine_line
from forerun.training.prompts import encode
from forerun.types import Rollout

TEXTS = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"


@dataclass(frozen=True, slots=True)
class Shadow:
    """A drafter that goes along; `trainer` is None when it stays as it is."""

    name: str
    drafter: Eagle3Drafter
    trainer: CoTrainer | None = None


def shadows_of(setting: Setting, origin: str, frozen: Eagle3Drafter) -> list[Shadow]:
    """A drafter as it is, and a copy that learns."""
    recipe, policy = setting.recipe, setting.policy
    online = Eagle3Drafter(copy.deepcopy(frozen.head), policy)
    trainer = CoTrainer(online, policy, "every-1", recipe.draft, recipe.rollout.temperature, recipe.seed)
    return [Shadow(f"{origin}, frozen", frozen), Shadow(f"{origin}, online", online, trainer)]


# ---- the out-of-domain drafter ----


def settings_of(folder: Path, default: DraftConfig) -> tuple[DraftConfig, int]:
    """How a drafter was trained, and on how many completion tokens; `default` where its config.json is silent."""
    about = json.loads((folder / "config.json").read_text()).get("forerun", {})
    return DraftConfig.model_validate(about.get("training", default.model_dump())), int(about.get("tokens", 32_000))


def foreign_pairs(setting: Setting, texts: Path, tokens: int) -> list[Pair]:
    """Questions and worked solutions in GSM8K's layout, shuffled, until the solutions have `tokens` tokens."""
    problems = load_task(TaskConfig(name="gsm8k", path=str(texts), size=10_000), setting.recipe.seed).problems("train")
    chosen = random.Random(setting.recipe.seed).sample(problems, min(len(problems), 1 + tokens // 50))
    pairs: list[Pair] = []
    for prompt, solution in solved_examples(
        setting.policy, chosen, lambda problem: encode(problem, setting.recipe, setting.policy)
    ):
        if tokens <= 0:
            break
        pairs.append((prompt, solution))
        tokens -= len(solution)
    return pairs


def train_foreign(setting: Setting, texts: Path, config: DraftConfig, tokens: int, folder: Path) -> Eagle3Drafter:
    """Train a head on foreign text with the policy as teacher and write it to `folder`."""
    policy = setting.policy
    pairs = foreign_pairs(setting, texts, tokens)
    head = new_head(policy, pairs, config)
    setup = TrainingSetup(pairs, config, setting.recipe.rollout.temperature, setting.recipe.seed)
    print(f"training the out-of-domain drafter on {len(pairs)} texts", flush=True)
    best, steps = shown(train_head(head, policy, setup), config.epochs)
    drafter = Eagle3Drafter(head.to(policy.dtype), policy)
    about = {
        "policy": policy.name, "adapter": setting.recipe.policy.adapter, "texts": texts.name, "pairs": len(pairs),
        "tokens": sum(len(c) for _, c in pairs), "steps": steps, "training": config.model_dump(mode="json"),
        "acceptance_per_position": best.per_position, "tokens_per_round": best.length,
    }  # fmt: skip
    drafter.save(folder, about)
    return drafter


def shown(training: Training[Validation], epochs: int) -> tuple[Validation, int]:
    """Print every validation of a training; the best one, and the optimizer steps."""
    started, steps = time.perf_counter(), 0
    while True:
        try:
            event = next(training)
        except StopIteration as end:
            return end.value, steps
        if isinstance(event, EpochDone):
            seconds = time.perf_counter() - started
            print(f"  epoch {event.epoch}/{epochs}, {seconds:.0f} s, on held-out texts: {event.result}", flush=True)
        else:
            steps = event.step


def foreign_drafter(setting: Setting, arguments: argparse.Namespace) -> Eagle3Drafter | None:
    """Load it where its folder is there, else train it; None, with a printed reason, where neither is possible."""
    folder: Path | None = arguments.drafter_out
    if folder is not None and (folder / "config.json").exists():
        return Eagle3Drafter.load(folder, setting.policy)
    if folder is None or not arguments.texts.exists():
        print(f"no out-of-domain drafter: it needs --drafter-out, and {arguments.texts} where that is to be trained")
        return None
    config, tokens = settings_of(artifact(arguments.drafter_in), setting.recipe.draft)
    changes = {"vocab": arguments.vocab_out, "epochs": arguments.epochs_out or config.epochs}
    return train_foreign(
        setting, arguments.texts, config.model_copy(update=changes), arguments.tokens_out or tokens, folder
    )


# ---- judging and learning ----


@torch.no_grad()
def judged(
    setting: Setting, origins: Sequence[Sequence[Shadow]], rollouts: Sequence[Rollout], k: int, most: int
) -> dict[str, list[Validation]]:
    """Exact acceptance of every shadow on at most `most` rollouts of every prompt: name -> one entry per prompt."""
    temperature, config = setting.recipe.rollout.temperature, setting.recipe.draft.model_copy(update={"depth": k})
    results: dict[str, list[Validation]] = {shadow.name: [] for origin in origins for shadow in origin}
    for prompt in sorted({r.prompt_index for r in rollouts}):
        pairs = [(r.prompt_ids, r.tokens) for r in rollouts if r.prompt_index == prompt][:most]
        for origin in origins:  # of one origin all have the same taps and draft vocabulary, hence the same teacher
            teacher = run_teacher(origin[0].drafter.head, setting.policy, pairs, temperature)
            for shadow in origin:
                passes = unrolled_losses(shadow.drafter.head, setting.policy, teacher, config, temperature)
                results[shadow.name].append(mean_acceptance([passes]))
    return results


def coverage(drafter: Eagle3Drafter, rollouts: Sequence[Rollout]) -> float:
    """Share of the rollouts' tokens that the draft vocabulary holds: updates cannot change it."""
    tokens = torch.tensor([token for r in rollouts for token in r.tokens])
    return float(torch.isin(tokens, drafter.vocabulary.cpu()).float().mean())


def learn(trajectory: Trajectory, trainers: Sequence[CoTrainer], generated: Any, step: int) -> float:
    """One update of the policy and of every trained drafter, in the loop's order; returns the policy's entropy."""
    for trainer in trainers:
        trainer.begin(step)

    def forward(model: Any, batch: TokenBatch) -> torch.Tensor:
        logits = [trainer.forward(model, batch) for trainer in trainers]
        return logits[0]

    scored = trajectory.update(generated, forward)
    for trainer in trainers:
        trainer.update(step, generated.rollouts, scored.entropies)
    return scored.entropy


def in_engine(setting: Setting, shadow: Shadow, k: int, prompts: list[list[int]]) -> dict[str, Any]:
    """Tokens per round of real speculative generation on held-out prompts, one sample each."""
    recipe = setting.recipe
    engine = LocalEngine(
        setting.policy, shadow.drafter, k=k, rule=recipe.speculation.verify, slots=recipe.rollout.slots
    )
    lengths = tokens_per_round(list(engine.stream(prompts, setting.sampling(recipe.seed + 7))))
    rates = engine.counters.acceptance_per_position
    return {"tokens_per_round": asdict(mean_of(lengths)), "by_prompt": lengths, "cumulative_per_position": rates}


def engine_row(
    setting: Setting, shadows: Sequence[Shadow], k: int, prompts: list[list[int]], when: str
) -> dict[str, Any]:
    """`in_engine` of all shadows."""
    rows = {}
    for shadow in shadows:
        rows[shadow.name] = row = in_engine(setting, shadow, k, prompts)
        print(f"{when}, in the engine: {shadow.name:22} {Mean(**row['tokens_per_round'])} tokens per round", flush=True)
    return rows


# ---- the run ----


def run(setting: Setting, origins: Sequence[Sequence[Shadow]], steps: int, k: int, most: int) -> list[dict[str, Any]]:
    """The trajectory: one row per step."""
    trajectory, rows = Trajectory(setting), []
    shadows = [shadow for origin in origins for shadow in origin]
    engine = LocalEngine(
        setting.policy, shadows[0].drafter, k=k, rule=setting.recipe.speculation.verify,
        slots=setting.recipe.rollout.slots,
    )  # fmt: skip
    movement = Movement(setting.policy)
    trainers = [shadow.trainer for shadow in shadows if shadow.trainer is not None]
    for step in range(steps):
        started = time.perf_counter()
        generated = trajectory.generate(engine, trajectory.problems(step), step)
        found = judged(setting, origins, generated.rollouts, k, most)
        entropy = learn(trajectory, trainers, generated, step)
        rows.append(
            {
                "step": step + 1, "reward": float(generated.rewards.float().mean()), "entropy": entropy,
                "length": generated.tokens / len(generated.rollouts),
                "engine_acceptance_length": generated.counters.acceptance_length,
                "coverage": {origin[0].name: coverage(origin[0].drafter, generated.rollouts) for origin in origins},
                "weights_moved": movement.relative(), "seconds": time.perf_counter() - started,
                "acceptance": {name: acceptance(values) for name, values in found.items()},
            }
        )  # fmt: skip
        print(step_line(rows[-1]), flush=True)
    print(f"tokens in the draft vocabulary, last step: {rows[-1]['coverage']}")
    return rows


def acceptance(values: Sequence[Validation]) -> dict[str, Any]:
    """Of one shadow at one step."""
    lengths = [v.length for v in values]
    depth = min(len(v.per_position) for v in values)
    positions = [sum(v.per_position[j] for v in values) / len(values) for j in range(depth)]
    return {**asdict(mean_of(lengths)), "by_prompt": lengths, "per_position": positions}


def step_line(row: dict[str, Any]) -> str:
    """One line of the log."""
    lengths = "  ".join(f"{name} {a['mean']:.3f}" for name, a in row["acceptance"].items())
    return (
        f"step {row['step']:>3}  reward {row['reward']:.2f}  entropy {row['entropy']:.3f}  moved "
        f"{row['weights_moved']:.1e}  {lengths}  {row['seconds']:.0f} s"
    )


def windows(rows: Sequence[dict[str, Any]], width: int) -> dict[str, Any]:
    """Means over the first and the last `width` steps, and what training and origin change in each of them."""
    names = list(rows[0]["acceptance"])
    result: dict[str, Any] = {}
    for when, part in (("first", rows[:width]), ("last", rows[-width:])):
        values = {name: [x for row in part for x in row["acceptance"][name]["by_prompt"]] for name in names}
        table: dict[str, Any] = {name: asdict(mean_of(values[name])) for name in names}
        table |= {f"{a} - {b}": asdict(difference(values[a], values[b])) for a, b in contrasts(names)}
        result[when] = {"steps": len(part), "reward": asdict(mean_of([r["reward"] for r in part])), **table}
    return result


def contrasts(names: Sequence[str]) -> list[tuple[str, str]]:
    """Online against frozen of each origin, and of both kinds one origin against the other."""
    pairs = [(names[i + 1], names[i]) for i in range(0, len(names), 2)]
    return pairs + ([(names[0], names[2]), (names[1], names[3])] if len(names) == 4 else [])


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="0: only train the out-of-domain drafter")
    parser.add_argument("--prompts", type=int, default=4, help="of a step")
    parser.add_argument("--samples", type=int, default=8, help="of a prompt")
    parser.add_argument("--judged", type=int, default=4, help="samples of a prompt that judge the drafters")
    parser.add_argument("--held-out", type=int, default=24, help="prompts for the engine, before and after")
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--drafter-in", default="quickstart-eagle3", help="folder or shipped artifact")
    parser.add_argument("--drafter-out", type=Path, help="folder; where it is not there yet, it is trained and written")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="JSONL in GSM8K's layout")
    parser.add_argument("--tokens-out", type=int, help="completion tokens to train on; default: as the in-domain one")
    parser.add_argument("--epochs-out", type=int, help="default: as the in-domain one")
    parser.add_argument("--vocab-out", type=int, default=1024, help="draft vocabulary of the out-of-domain drafter")
    parser.add_argument("--learning-rate", type=float, help="of the policy; default: the recipe's")
    parser.add_argument("--draft-learning-rate", type=float, help="of the online updates; default: the recipe's")
    parser.add_argument("--window", type=int, default=5, help="steps that first and last are the means of")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    setting = load_setting(
        arguments.recipe,
        {
            "seed": arguments.seed, "train.prompts_per_step": arguments.prompts,
            "train.samples_per_prompt": arguments.samples, "train.learning_rate": arguments.learning_rate,
            "train.steps": arguments.steps, "draft.online_learning_rate": arguments.draft_learning_rate,
            "rollout.max_new_tokens": arguments.max_new_tokens,
        },
    )  # fmt: skip
    print(f"{setting.recipe.name}: k = {arguments.k}; {machine_line(describe_environment())}")
    inside = Eagle3Drafter.load(artifact(arguments.drafter_in), setting.policy)
    outside = foreign_drafter(setting, arguments)
    if arguments.steps == 0:
        return
    origins = [shadows_of(setting, "in-domain", inside)]
    origins += [] if outside is None else [shadows_of(setting, "out-of-domain", outside)]
    shadows, prompts = [s for origin in origins for s in origin], setting.held_out(arguments.held_out)
    frozen = [s for s in shadows if s.trainer is None]  # before the first step the others are the same
    start = engine_row(setting, frozen, arguments.k, prompts, "at the start")
    rows = run(setting, origins, arguments.steps, arguments.k, arguments.judged)
    end = engine_row(setting, shadows, arguments.k, prompts, "at the end")
    table = windows(rows, min(arguments.window, arguments.steps))
    show(table)
    result = {
        "arguments": plain_data(arguments),
        "out_of_domain": "measured" if outside else "left out: no drafter and no texts",
        "engine_start": start, "engine_end": end, "windows": table, "rows": rows,
    }  # fmt: skip
    write_result(arguments.out, "online", setting.recipe, result)


def show(table: dict[str, Any]) -> None:
    """Print the windows."""
    print(
        f"\ntokens per round, teacher-forced    first {table['first']['steps']} steps    last {table['last']['steps']}"
    )
    for name in [name for name in table["first"] if name != "steps"]:
        print(f"{name:46} {Mean(**table['first'][name])}   {Mean(**table['last'][name])}")


if __name__ == "__main__":
    main()
