"""Which GPU each worker gets. There need not be any: the assignment is a function of counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from forerun.config.recipe import ClusterConfig
from forerun.errors import UserError
from forerun.workers import devices
from forerun.workers.devices import check_replicas_on_ray, rank_gpus, replica_environments, replica_gpus
from forerun.workers.local import LocalLauncher
from forerun.workers.ray import RayLauncher, check_gpus_of_replicas

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")


@pytest.mark.parametrize(
    ("gpus", "driver", "ranks", "replicas", "expected"),
    [
        (8, 0, 0, 7, [1, 2, 3, 4, 5, 6, 7]),  # the learner keeps its own
        (8, 7, 0, 7, [0, 1, 2, 3, 4, 5, 6]),
        (8, 0, 0, 8, [1, 2, 3, 4, 5, 6, 7, 0]),  # shared last
        (8, 0, 4, 3, [5, 6, 7]),  # ranks on 1 to 4
        (8, 0, 4, 6, [5, 6, 7, 0, 1, 2]),
        (8, None, 0, 8, list(range(8))),
        (1, 0, 0, 1, [0]),
    ],
)
def test_every_replica_has_a_gpu_of_its_own(
    gpus: int, driver: int | None, ranks: int, replicas: int, expected: list[int]
) -> None:
    assert replica_gpus(gpus, driver, ranks, replicas) == expected


def test_ranks_leave_the_drivers_gpu_for_the_last() -> None:
    assert rank_gpus(8, 0, 4) == [1, 2, 3, 4] and rank_gpus(4, 0, 4) == [1, 2, 3, 0] and rank_gpus(2, 1, 2) == [0, 1]
    with pytest.raises(UserError, match=r"train.ranks=3 needs a GPU for each rank, and this machine has 2"):
        rank_gpus(2, 0, 3)


def test_more_replicas_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match=r"has 2; set rollout.replicas=2, or .*cluster.gpus_per_replica=0.5"):
        replica_gpus(2, 0, 0, 4)


def test_workers_see_their_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names that this process knows it by: a job may own GPUs 4 to 7 of a machine."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv(devices.VISIBLE, "4,5,6,7")
    seen, sharing = replica_environments("local", GPU, 1, 4)
    assert [one[devices.VISIBLE] for one in seen] == ["5", "6", "7", "4"] and sharing == [3]
    seen, sharing = replica_environments("vllm", CPU, 1, 2)
    assert [one[devices.VISIBLE] for one in seen] == ["4", "5"] and sharing == []
    assert replica_environments("local", CPU, 1, 2) == ([{devices.VISIBLE: ""}] * 2, [])
    monkeypatch.delenv(devices.VISIBLE)
    seen, sharing = replica_environments("local", GPU, 2, 2)
    assert [one[devices.VISIBLE] for one in seen] == ["3", "0"] and sharing == [1]


def test_replicas_of_a_cluster_with_gpus_do_not_decode_on_cpus_unasked() -> None:
    for share in (0.0, 0.5):
        launcher = RayLauncher(ClusterConfig(address="local", gpus_per_replica=share), "replica", 2, 1)
        if share:
            check_replicas_on_ray(GPU, launcher)
            check_gpus_of_replicas(share, 8.0)
            continue
        check_replicas_on_ray(CPU, launcher)
        with pytest.raises(UserError, match=r"on cuda:0 and cluster.gpus_per_replica=0 would decode on CPUs"):
            check_replicas_on_ray(GPU, launcher)
        with pytest.raises(UserError, match=r"The cluster has 8 GPUs and cluster.gpus_per_replica=0"):
            check_gpus_of_replicas(share, 8.0)


def test_a_launcher_passes_each_worker_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from forerun.workers import local
    from forerun.workers.handle import Spec

    started: list[dict[str, str]] = []

    def popen(command: list[str], **settings: object) -> None:
        started.append(settings["env"])  # type: ignore[arg-type]
        raise OSError("enough")

    monkeypatch.setattr(local, "subprocess", SimpleNamespace(Popen=popen, DEVNULL=-3))
    launcher = LocalLauncher()
    for number in range(2):
        with pytest.raises(OSError, match="enough"):
            launcher.start(1, Spec("x:y", environments=[{devices.VISIBLE: str(number)}]))
    launcher.close()
    assert [one[devices.VISIBLE] for one in started] == ["0", "1"]
