"""Forerun: reinforcement-learning post-training with lossless speculative rollouts.

`import forerun` loads nothing heavy; torch and Transformers come with the first call.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forerun.engine.base import RolloutEngine

__version__ = "0.1.0"
__all__ = ["load_engine", "train"]


def train(recipe: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the reinforcement-learning loop of a recipe and return its summary (the content of `summary.json`).

    Args:
        recipe: name of a shipped recipe ("quickstart") or path of a YAML file.
        overrides: dotted keys and their values, e.g. `{"train.steps": 5}`.

    Raises:
        forerun.errors.UserError: one sentence on what is wrong with the recipe, the model or the data.
    """
    from forerun.config import load_recipe
    from forerun.config.paths import check_paths
    from forerun.report.console import Console, follow
    from forerun.training.run import run

    settings = load_recipe(recipe, overrides or {})
    check_paths(settings)
    return follow(run(settings), Console(settings.train.steps))


def load_engine(
    engine: str,
    *,
    policy: str,
    dtype: str = "auto",
    speculation: dict[str, Any] | None = None,
    slots: int = 32,
) -> RolloutEngine:
    """Load a rollout engine for a policy.

    Args:
        engine: "local" or "vllm".
        policy: folder or hub name of a Hugging Face causal language model, or a known alias.
        dtype: "float32", "bfloat16" or "auto" (bfloat16 where the hardware multiplies it natively).
        speculation: the `speculation` block of a recipe as a dict; None generates plainly.
        slots: sequences that are decoded side by side.

    Returns:
        An engine whose `generate(prompts, max_new_tokens=, temperature=, n=, seed=)` returns rollouts in the order of
        the prompts, n each.
    """
    from forerun.engine import load

    return load(engine, policy=os.path.expanduser(policy), dtype=dtype, speculation=speculation, slots=slots)
