"""What a policy learns from: advantages, losses, off-policy correction. Pure functions, one line per algorithm here.

An algorithm of one's own is an `Algorithm` under an entry point of the group `forerun.algorithms`, or
`train.algorithm: package.module:NAME`.
"""

from forerun.algorithms.advantages import centred_advantages, grpo_advantages
from forerun.algorithms.base import Aggregation, Algorithm, Loss, PolicyBatch
from forerun.algorithms.losses import (
    CLIPPING,
    CONSTANT_LENGTH,
    OBJECTIVE,
    SEQUENCE_MEAN,
    TOKEN_MEAN,
    clipped_loss,
    sequence_clipped_loss,
)
from forerun.registry import Registry

__all__ = ["ALGORITHMS", "Aggregation", "Algorithm", "Loss", "PolicyBatch", "definitions"]

ALGORITHMS = Registry(
    "algorithm",
    {
        "grpo": Algorithm(grpo_advantages, clipped_loss, TOKEN_MEAN, CLIPPING),  # 2402.03300, token-level as 2503.14476
        "dr_grpo": Algorithm(centred_advantages, clipped_loss, CONSTANT_LENGTH, CLIPPING),  # 2503.20783
        "gspo": Algorithm(grpo_advantages, sequence_clipped_loss, SEQUENCE_MEAN, CLIPPING),  # 2507.18071
    },
    members=("advantages", "loss", "aggregation", "metrics"),
)


def definitions(algorithm: str) -> dict[str, str]:
    """Of every metric that an algorithm logs, a sentence and a unit. Raises UserError: there is no such algorithm."""
    return OBJECTIVE | dict(ALGORITHMS.load(algorithm).metrics)
