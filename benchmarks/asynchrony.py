"""Generation ahead of learning against one after the other: rewards, step seconds, and the bound that holds for both.

    python -m benchmarks.asynchrony --folder FOLDER [--steps 30] [--seeds 0,1,2] [--modes sync,lag1,in_flight] [--out F]

Whole runs of a recipe, each a process of its own with `OMP_NUM_THREADS=1`: learner and engine compute with one thread
each, in turn (sync: one core is idle) or at the same time (lag 1; in_flight: a new version takes over in mid-sample). A
run that FOLDER holds already is not made again, so several of these commands can share the work, and `--out` writes
the table of all that is there. `sync_all` is the synchronous run with all the machine's threads, which it has no idle
time to hide in. Where generation is the shorter of the two, new versions hardly ever arrive in mid-sample; with two
slots it is the longer one, and they do (`in_flight_2`). A sample does not depend on the number of slots.

Rewards are those of training: fresh problems each step, the same for every mode of a seed. Windows of steps are
compared seed by seed, so that the problems' difficulty cancels; the standard error is over the steps of all seeds.
Seconds are medians over a run's steps without the first two. The bound of a lag run is the longer of the learner's
work (prepare, logprob, train) and the engine's, both as that run itself measured them, side by side: a step that is as
long has nothing left to hide. How much the side-by-side slows either one down is the other half of the distance to the
synchronous run's stages.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import Mean, difference, mean_of, write_result
from forerun.config import load_recipe, parse_overrides

MODES: dict[str, list[str]] = {
    "sync": [],
    "sync_all": [],
    "lag1": ["loop.lag=1", "rollout.replicas=1"],
    "in_flight": ["loop.lag=1", "loop.in_flight=true", "rollout.replicas=1"],
    "in_flight_2": ["loop.lag=1", "loop.in_flight=true", "rollout.replicas=1", "rollout.slots=2"],
}
LEARNER = ("prepare", "logprob", "train")
WARM = 2  # steps without which times are taken


def run(recipe: str, mode: str, seed: int, steps: int, folder: Path, overrides: Sequence[str]) -> None:
    """One run in a process of its own; its metrics are kept as `mode-seed.jsonl`."""
    kept, log = folder / f"{mode}-{seed}.jsonl", folder / f"{mode}-{seed}.log"
    if kept.exists():
        return
    runs = folder / "runs" / f"{mode}-{seed}"
    words = [
        f"runs={runs}", f"seed={seed}", f"train.steps={steps}", "compare.steps=0", "eval.prompts=0",
        *overrides, *MODES[mode],
    ]  # fmt: skip
    threads = {} if mode == "sync_all" else {"OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        subprocess.run(
            [sys.executable, "-m", "forerun.cli", "train", recipe, *words], check=True, stdout=out, stderr=out,
            env=os.environ | threads,
        )  # fmt: skip
    kept.write_text((runs / "latest" / "metrics.jsonl").read_text())


def rows_of(folder: Path, mode: str, seed: int) -> list[dict[str, Any]]:
    """The steps of a run; none where it has not been made."""
    kept = folder / f"{mode}-{seed}.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    return [row for row in rows if "reward/mean" in row]


def seconds(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over a run's steps, and the bound."""

    def median(values: list[float]) -> float:
        return statistics.median(values)

    warm = rows[WARM:] or rows
    step = median([r["time/step"] for r in warm])
    engine = median([r["time/step"] - r["time/engine_idle"] for r in warm])
    learner = median([sum(r[f"time/{stage}"] for stage in LEARNER) for r in warm])
    exposed = median([r["time/exposed_generation"] for r in warm])
    overlapped = warm[-1].get("async/lag_max") is not None
    bound = max(engine, learner) if overlapped else engine + learner
    return {"step": step, "exposed_generation": exposed, "engine": engine, "learner": learner, "bound": bound}


def windows(found: dict[str, dict[int, list[dict[str, Any]]]], width: int) -> list[dict[str, Any]]:
    """Rewards of every mode in windows of `width` steps, and each mode's distance from the first one's."""
    seeds = sorted(set.intersection(*(set(runs) for runs in found.values())))
    first, *others = found
    steps = min(len(rows) for runs in found.values() for rows in runs.values())
    result = []
    for start in range(0, steps - width + 1, width):
        values = {
            mode: [row["reward/mean"] for s in seeds for row in runs[s][start : start + width]]
            for mode, runs in found.items()
        }
        row: dict[str, Any] = {"steps": [start + 1, start + width], "seeds": seeds}
        row["reward"] = {mode: asdict(mean_of(v)) for mode, v in values.items()}
        row["difference"] = {f"{m} - {first}": asdict(difference(values[m], values[first])) for m in others}
        row["by_seed"] = {
            m: [statistics.mean(v[i * width :][:width]) for i in range(len(seeds))] for m, v in values.items()
        }
        result.append(row)
    return result


def off_policy(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How old the tokens were, and what that did to their probabilities.

    `mixed_after_learning` is the share of rollouts that changed versions in mid-sample in a step that follows an update
    with a gradient, `steps_mixed_after_learning` the number of such steps: the other versions are all alike.
    """
    names = ("async/lag_mean", "async/lag_max", "async/mixed_rollouts", "spec/acceptance_length")
    found = {n: statistics.mean(r[n] for r in rows) for n in names if all(r.get(n) is not None for r in rows)}
    for name in ("mismatch/kl", "async/kl"):  # of the steps that have it
        values = [r[name] for r in rows if r.get(name) is not None]
        found |= {name: statistics.mean(values)} if values else {}
    if "async/mixed_rollouts" not in found:
        return found
    mixed = [row["async/mixed_rollouts"] for before, row in pairwise(rows) if before.get("policy/grad_norm", 0.0) > 0]
    steps = sum(share > 0 for share in mixed)
    return found | {"mixed_after_learning": sum(mixed) / len(rows), "steps_mixed_after_learning": steps}


def table(folder: Path, modes: Sequence[str], seeds: Sequence[int], width: int) -> dict[str, Any]:
    """All that has been run, printed."""
    found = {m: {s: rows for s in seeds if (rows := rows_of(folder, m, s))} for m in modes}
    found = {mode: runs for mode, runs in found.items() if runs}
    times = {mode: {str(seed): seconds(rows) for seed, rows in runs.items()} for mode, runs in found.items()}
    print(f"{'seconds':12}" + "".join(f"{name:>20}" for name in next(iter(next(iter(times.values())).values()))))
    for mode, by_seed in times.items():
        for seed, row in by_seed.items():
            print(f"{mode + ' ' + seed:12}" + "".join(f"{value:20.2f}" for value in row.values()))
    several = {mode: runs for mode, runs in found.items() if len(runs) > 1}
    compared = windows(several, width) if len(several) > 1 else []
    for row in compared:
        words = "  ".join(f"{mode} {Mean(**value)}" for mode, value in {**row["reward"], **row["difference"]}.items())
        print(f"steps {row['steps'][0]:>2} to {row['steps'][1]:>2}, reward: {words}")
    lags = {mode: {str(seed): off_policy(rows) for seed, rows in runs.items()} for mode, runs in found.items()}
    for mode, by_seed in lags.items():
        for seed, row in by_seed.items():
            print(f"{mode} {seed}: " + ", ".join(f"{name} {value:.3g}" for name, value in row.items()))
    rewards = {m: {str(s): [r["reward/mean"] for r in rows] for s, rows in runs.items()} for m, runs in found.items()}
    return {"seconds": times, "windows": compared, "off_policy": lags, "rewards": rewards}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--folder", type=Path, required=True, help="of the runs")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--modes", default="sync,lag1,in_flight", help=f"of {', '.join(MODES)}")
    parser.add_argument("--window", type=int, default=10, help="steps")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", help="of the recipe, for every run: train.prompts_per_step=3 ...")
    arguments = parser.parse_args()
    modes, seeds = arguments.modes.split(","), [int(s) for s in arguments.seeds.split(",")]
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for mode in modes:
            run(arguments.recipe, mode, seed, arguments.steps, folder, arguments.overrides)
            print(f"{mode}, seed {seed}: done", flush=True)
    recipe = load_recipe(arguments.recipe, parse_overrides(arguments.overrides))
    write_result(arguments.out, "asynchrony", recipe, table(folder, modes, seeds, arguments.window))


if __name__ == "__main__":
    main()
