"""Which GPU each worker gets: on this machine by a fixed order, elsewhere from Ray.

The driver's policy is on one GPU. The learner's ranks take the others in order, replicas take those after the ranks;
where there are too few, the driver's GPU comes last among the ranks', and replicas share with ranks. Two replicas never
share a GPU: each would take the memory for itself. Ray places fractions of GPUs where that is wanted.
"""

from __future__ import annotations

import os

import torch

from forerun.errors import UserError
from forerun.workers.handle import Launcher

VISIBLE = "CUDA_VISIBLE_DEVICES"


def gpu_order(gpus: int, driver: int | None) -> list[int]:
    """The driver's GPU last; None: it is on a CPU."""
    return sorted(range(gpus), key=lambda gpu: gpu == driver)


def rank_gpus(gpus: int, driver: int, ranks: int) -> list[int]:
    """A GPU for each rank of the learner, one for all of them. Raises UserError when there are fewer."""
    if gpus < ranks:
        raise UserError(
            f"train.ranks={ranks} needs a GPU for each rank, and this machine has {gpus}; set train.ranks to at most "
            "that"
        )
    return gpu_order(gpus, driver)[:ranks]


def replica_gpus(gpus: int, driver: int | None, ranks: int, replicas: int) -> list[int]:
    """A GPU for each replica, those of ranks last; ranks: with GPUs of their own. Raises UserError."""
    if gpus < replicas:
        raise UserError(
            f"rollout.replicas={replicas} needs a GPU for each replica, and this machine has {gpus}; set "
            f"rollout.replicas={gpus}, or let replicas share: cluster.address=local "
            f"cluster.gpus_per_replica={gpus / replicas:.2g}"
        )
    order = gpu_order(gpus, driver)
    return [*order[ranks:], *order[:ranks]][:replicas]


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as its workers are to name them."""
    count = torch.cuda.device_count()
    names = [name for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return names[:count] if names else [str(gpu) for gpu in range(count)]


def check_replicas_on_ray(policy: torch.device, launcher: Launcher) -> None:
    """Raises UserError when the policy is on a GPU and Ray would give its replicas none."""
    if launcher.remote and policy.type == "cuda" and not launcher.gpus:
        raise UserError(
            f"The policy is on {policy} and cluster.gpus_per_replica=0 would decode on CPUs; set "
            "cluster.gpus_per_replica=1, or policy.device=cpu"
        )


def replica_environments(
    engine: str, policy: torch.device, ranks: int, replicas: int
) -> tuple[list[dict[str, str]], list[int]]:
    """What each replica on this machine sees of its GPUs, and the numbers of those that share one with the learner.

    Args:
        policy: where the driver's policy is. The local engine of a replica is on a CPU where that is; vLLM computes on
            what it was built for.

    Raises:
        UserError: there are fewer GPUs than replicas.
    """
    names, on_gpu = visible_gpus(), policy.type == "cuda"
    if not on_gpu and (engine == "local" or not names):
        return [{VISIBLE: ""}] * replicas, []
    driver = (policy.index or 0) if on_gpu else None
    learners = gpu_order(len(names), driver)[:ranks] if on_gpu and ranks > 1 else []
    chosen = replica_gpus(len(names), driver, len(learners), replicas)
    sharing = [number for number, gpu in enumerate(chosen) if gpu == driver or gpu in learners]
    return [{VISIBLE: names[gpu]} for gpu in chosen], sharing
