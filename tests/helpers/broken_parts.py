"""An engine and an algorithm that are wrong on purpose, named in recipes by their path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from forerun.algorithms import Algorithm, PolicyBatch
from forerun.algorithms.advantages import grpo_advantages
from forerun.algorithms.losses import CLIPPING, TOKEN_MEAN
from forerun.config import TrainConfig
from forerun.engine.local.engine import LocalEngine
from forerun.types import Rollout


class WrongEngine(LocalEngine):
    """Returns the log-probabilities of another model."""

    def stream(self, *arguments: Any, **settings: Any) -> Iterator[Rollout]:
        for rollout in super().stream(*arguments, **settings):
            yield replace(rollout, logprobs=[x - 1.5 for x in rollout.logprobs])


def _root_of_negatives(batch: PolicyBatch, config: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    return batch.logprobs.sqrt(), {"policy/ratio_mean": batch.logprobs.detach().sqrt().sum()}


BROKEN = Algorithm(grpo_advantages, _root_of_negatives, TOKEN_MEAN, CLIPPING)  # its loss is NaN
