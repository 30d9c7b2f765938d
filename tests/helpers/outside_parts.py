"""A drafter and an engine as somebody outside the package would write them: one file, named in a recipe by its path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from forerun.algorithms import Algorithm, PolicyBatch
from forerun.algorithms.advantages import grpo_advantages
from forerun.algorithms.losses import CLIPPING, TOKEN_MEAN
from forerun.config import SpeculationConfig, TrainConfig
from forerun.config.drafters import DrafterConfig
from forerun.drafters import Drafter, Rows
from forerun.drafters.base import deterministic_draft
from forerun.engine import RolloutEngine, Sampling, Weights
from forerun.engine.base import Requests, nothing
from forerun.engine.local.engine import LocalEngine
from forerun.models import Policy
from forerun.types import Draft, Rollout

DRAFTER = "outside_parts:RepeatDrafter"
ENGINE = "outside_parts:CountingEngine"


class RepeatConfig(DrafterConfig):
    """Settings of `RepeatDrafter`."""

    length: int = 2


class RepeatDrafter(Drafter):
    """Drafts the newest token again."""

    name = "repeat"
    Config = RepeatConfig

    def __init__(self, settings: RepeatConfig) -> None:
        self.settings = settings

    @classmethod
    def from_config(cls, policy: Policy, speculation: SpeculationConfig) -> RepeatDrafter:
        return cls(cls.own_settings(speculation))

    def propose(self, rows: Rows, budget: Tensor) -> Draft:
        most = torch.clamp(budget, max=self.settings.length).tolist()
        return deterministic_draft(
            [[token] * n for token, n in zip(rows.last.tolist(), most, strict=True)], budget.device
        )


class WrongEngine(LocalEngine):
    """Returns the log-probabilities of another model."""

    def stream(self, *arguments: Any, **settings: Any) -> Iterator[Rollout]:
        for rollout in super().stream(*arguments, **settings):
            yield replace(rollout, logprobs=[x - 1.5 for x in rollout.logprobs])


def _broken(batch: PolicyBatch, config: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    return batch.logprobs.sqrt(), {"policy/ratio_mean": batch.logprobs.detach().sqrt().sum()}


BROKEN = Algorithm(grpo_advantages, _broken, TOKEN_MEAN, CLIPPING)  # its loss is NaN


class CountingEngine(RolloutEngine):
    """Hands everything to a `LocalEngine` and counts its streams."""

    shares_weights = True

    def __init__(self, inner: LocalEngine) -> None:
        super().__init__(inner.policy, inner.k)
        self.inner, self.streams = inner, 0
        self.counters = inner.counters

    @classmethod
    def from_live(
        cls, policy: Policy, drafter: Drafter | None, speculation: SpeculationConfig, slots: int
    ) -> CountingEngine:
        return cls(LocalEngine.from_live(policy, drafter, speculation, slots))

    @classmethod
    def from_folder(cls, policy: str, dtype: str, speculation: SpeculationConfig, slots: int) -> CountingEngine:
        return cls(LocalEngine.from_folder(policy, dtype, speculation, slots))

    @property
    def rule(self) -> str:
        return self.inner.rule

    def stream(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        n: int = 1,
        only: Requests | None = None,
        between: Callable[[], None] = nothing,
    ) -> Iterator[Rollout]:
        self.streams += 1
        yield from self.inner.stream(prompts, sampling, n, only, between)
        self.timeline = self.inner.timeline

    def load(self, weights: Weights) -> Weights:
        return self.inner.load(weights)

    def pause(self) -> None:
        self.inner.pause()

    def resume(self) -> None:
        self.inner.resume()

    def metrics(self) -> dict[str, Any]:
        return {**self.inner.metrics(), "streams": self.streams}
