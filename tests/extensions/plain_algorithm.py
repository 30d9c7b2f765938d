"""An algorithm: REINFORCE with the group's mean as its baseline, and no clipping."""

from torch import Tensor

from forerun.algorithms import Algorithm, PolicyBatch
from forerun.algorithms.advantages import centred_advantages
from forerun.algorithms.losses import TOKEN_MEAN
from forerun.config import TrainConfig


def reinforce(batch: PolicyBatch, config: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """-A log π(y_t), times the off-policy correction."""
    loss = -batch.logprobs * batch.advantages * batch.importance_weights
    return loss, {"policy/surprise": -batch.logprobs.detach().sum()}


REINFORCE = Algorithm(
    centred_advantages,
    reinforce,
    TOKEN_MEAN,
    {"policy/surprise": "Mean surprise of the policy at its own tokens. Unit: nats."},
)
