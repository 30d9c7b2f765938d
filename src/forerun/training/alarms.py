"""What must not go on in silence while a run goes: an engine that computes another policy, updates that are skipped.

`mismatch/kl` compares engine and learner on the same tokens, both by one weight version, so it is rounding and nothing
else: about 1e-9 nats per token between float32 engines, 1e-4 to 3e-3 in bfloat16, 0.02 with bfloat16 sums split over
ranks. Engines that computed another model gave 1.4 to 2.3. Hence `rollout.mismatch_warn` and `rollout.mismatch_stop`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from forerun.config import Recipe
from forerun.errors import UserError
from forerun.learner.objective import Objective


class Alarms:
    """Of one run. `observe` takes a step in, `check` ends the run; what must be said is in `warnings` until taken."""

    def __init__(self, recipe: Recipe) -> None:
        self.rollout, self.train = recipe.rollout, recipe.train
        self.warnings: list[str] = []
        self._mismatched = 0  # steps in a row above `mismatch_stop`
        self._warned = False  # of the present stretch above `mismatch_warn`
        self._null: set[str] = set()  # metrics that were not finite
        self._fault = ""

    def observe(self, step: int, metrics: Mapping[str, float | None], objective: Objective) -> None:
        """A step's metrics (counted from 1), NaN and infinities among them, and what they come from."""
        self._observe_mismatch(step, metrics.get("mismatch/kl"))
        self._observe_skips(step, metrics, objective)
        self.observe_finite(step, metrics)

    def observe_finite(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Metrics that are not finite numbers are warned of once each."""
        bad = {name for name, value in metrics.items() if value is not None and not math.isfinite(value)}
        if new := sorted(bad - self._null):
            self.warnings.append(f"Not finite at step {step}, and recorded as null: {', '.join(new)}")
            self._null |= bad

    def check(self) -> None:
        """Raises UserError when the run must not go on."""
        if self._fault:
            raise UserError(self._fault)

    def _observe_mismatch(self, step: int, kl: float | None) -> None:
        if kl is None:
            return
        settings = self.rollout
        high = not kl <= settings.mismatch_warn  # also NaN
        self._mismatched = self._mismatched + 1 if not kl <= settings.mismatch_stop else 0
        said = (
            f"mismatch/kl is {kl:.3g} nats per token at step {step}: engine and learner, with the same weights, "
            "disagree on the policy's probabilities"
        )
        if high and not self._warned:
            self.warnings.append(
                f"{said} (rollout.mismatch_warn={settings.mismatch_warn:g}). Rounding makes at most about 0.02"
            )
        self._warned = high
        if self._mismatched >= settings.mismatch_steps:
            self._fault = (
                f"{said}, for {self._mismatched} steps in a row more than rollout.mismatch_stop="
                f"{settings.mismatch_stop:g}: the rollouts are another model's. Look for the cause with forerun "
                "verify, use another rollout.engine, or raise rollout.mismatch_stop"
            )

    def _observe_skips(self, step: int, metrics: Mapping[str, float | None], objective: Objective) -> None:
        if metrics.get("draft/skipped_updates"):
            self.warnings.append(
                f"The drafter's gradient was not finite at step {step}; it was not updated. If this goes on, lower "
                "draft.online_learning_rate or set speculation.train=off"
            )
        if not (skipped := metrics.get("policy/skipped_updates")):
            return
        self.warnings.append(f"{skipped:.0f} policy updates of step {step} were skipped. {objective.skip_reason}")
        if objective.skipped_in_row >= self.train.max_skipped_updates:
            self._fault = (
                f"{objective.skipped_in_row} policy updates in a row were skipped, the last in step {step} "
                f"(train.max_skipped_updates={self.train.max_skipped_updates}). {objective.skip_reason}"
            )
