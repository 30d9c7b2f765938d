"""Make what ships in src/forerun/artifacts: the quickstart's cold start and its drafter. About 40 minutes on 2 cores.

    python scripts/make_artifacts.py [cold-start] [drafter]

Both come from the quickstart recipe with the settings below, through the same code that `forerun train` (stage
`cold_start`) and `forerun draft` run. manifest.json records checksums, settings and the numbers that were measured.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from forerun.artifacts import FOLDER, sha256, shipped
from forerun.config import load_recipe
from forerun.engine import Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.models import load_policy
from forerun.report.console import Console, follow
from forerun.tasks import load_task
from forerun.training.drafter import train_drafter
from forerun.training.metrics import evaluation
from forerun.training.prompts import Request, encode, prepare_policy
from forerun.training.rollout import generate

COLD_START, DRAFTER = "quickstart-cold-start", "quickstart-eagle3"
SEED = 10_000  # other problems than those of the quickstart's own seeds
COLD_START_SETTINGS = {"steps": 140, "batch": 16, "learning_rate": 1e-3, "rank": 32, "answer_only": 0.4}
DEPTH = 5  # draft positions that the head is trained for; the rest is the recipe's


def make_cold_start() -> None:
    """Train the adapter and measure the policy that it makes."""
    changes = {"policy.adapter": None, "seed": SEED, "task.size": 4000, "speculation": {"method": "none"}}
    recipe = load_recipe("quickstart", {**changes, "cold_start": COLD_START_SETTINGS})
    with tempfile.TemporaryDirectory() as scratch:
        policy = follow(prepare_policy(recipe, load_task(recipe.task, recipe.seed), Path(scratch)), Console(0))
        keep(COLD_START, Path(scratch) / "cold_start", ["adapter_config.json", "adapter_model.safetensors"])
    record(COLD_START, "cold-start", {"settings": COLD_START_SETTINGS, "seed": SEED, **measure(policy, recipe)})


def make_drafter() -> None:
    """Train the head on rollouts of the policy after its cold start."""
    changes = {"seed": SEED, "draft.depth": DEPTH, "speculation.draft": None, "rollout.slots": 32}
    recipe = load_recipe("quickstart", changes)
    policy = load_policy(recipe.policy.model, recipe.policy.dtype, recipe.policy.device, recipe.policy.adapter)
    with tempfile.TemporaryDirectory() as scratch:
        work = train_drafter(recipe, policy, load_task(recipe.task, recipe.seed), Path(scratch))
        about = follow(work, Console(0))
        keep(DRAFTER, Path(scratch), ["config.json", "model.safetensors"])
    record(DRAFTER, "drafter", dict(about))


def measure(policy: Any, recipe: Any) -> dict[str, float]:
    """Held-out reward of a policy, sampled and greedy, and its negative log-likelihood of its own samples."""
    task = load_task(recipe.task)
    problems = task.problems("eval")[:256]
    prompts = [encode(p, recipe, policy) for p in problems]
    engine = LocalEngine(policy, slots=32)
    results: dict[str, float] = {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        sampling = Sampling(recipe.rollout.max_new_tokens, temperature, 7)
        work = generate(engine, policy, task, Request(problems, prompts, sampling), 1)
        made = follow(work, Console(0))
        numbers = evaluation(made)
        results[f"reward_{name}"] = round(numbers["eval/reward"], 4)
        if temperature:
            nats = -sum(sum(r.logprobs) for r in made.rollouts) / made.tokens
            results |= {"nats_per_token": round(nats, 4), "tokens_per_answer": round(numbers["eval/length"], 1)}
    print(f"cold start: {results}")
    return results


def keep(name: str, source: Path, files: list[str]) -> None:
    """Copy an artifact's files into the package."""
    target = FOLDER / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in files:
        shutil.copyfile(source / file, target / file)
    for path in target.glob("*.safetensors"):
        halve(path)


def halve(path: Path) -> None:
    """Store float32 tensors as bfloat16: a machine without bfloat16 units trains in float32 and ships the same file."""
    tensors = load_file(path)
    save_file({n: t.bfloat16() if t.dtype == torch.float32 else t for n, t in tensors.items()}, path)


def record(name: str, part: str, numbers: dict[str, Any]) -> None:
    """Enter an artifact into the manifest."""
    folder = FOLDER / name
    files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    size = sum(path.stat().st_size for path in folder.iterdir())
    entry = {"files": files, "bytes": size, "made_by": f"python scripts/make_artifacts.py {part}", **numbers}
    text = json.dumps({**shipped(), name: entry}, indent=2, sort_keys=True) + "\n"
    (FOLDER / "manifest.json").write_text(text, encoding="utf-8")


def main() -> None:
    parts = sys.argv[1:] or ["cold-start", "drafter"]
    if "cold-start" in parts:
        make_cold_start()
    if "drafter" in parts:
        make_drafter()


if __name__ == "__main__":
    main()
