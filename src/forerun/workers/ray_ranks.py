"""The learner's ranks as Ray actors, wherever Ray finds room for them.

What a rank does, and how the driver hears of it, is as on one machine (`worker.py`, `distributed.py`); an actor
calls back as a replica's does (`ray.py`) and gets the weights over that connection. The ranks meet at a store that
rank 0 opens at a port of its own, and speak to each other over the network on which Ray reaches their machines. They
write and read checkpoints themselves: every one of them must see the run folder, which is tried before anything else.
Left out: sending the weights once per machine.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from forerun.config import ClusterConfig, Recipe
from forerun.engine.worker import Lost, Patience
from forerun.errors import UserError
from forerun.tracking.files import disk_errors
from forerun.workers.local import Job, Launcher, Place, Ranks, RanksLost
from forerun.workers.ray import LOOPBACK, Call, NotPlaced, Room, call_back, connect
from forerun.workers.scratch import ScratchFolder

WEIGHTS = "weights.pt"


def launcher(recipe: Recipe, run_folder: Path) -> Launcher | None:
    """Where the recipe's ranks begin; None: on this machine, without Ray.

    Raises:
        UserError: Ray is not installed, or its cluster cannot be reached.
    """
    if recipe.cluster.address == "none" or recipe.train.ranks == 1:
        return None
    return RanksOnCluster(recipe.cluster, run_folder, recipe.rollout.replicas)


class RanksOnCluster:
    """The `Launcher` of Ray actors."""

    def __init__(self, cluster: ClusterConfig, run_folder: Path, replicas: int = 0) -> None:
        """`replicas`: for which a private Ray keeps room."""
        self.cluster, self.run_folder, self.replicas = cluster, run_folder, replicas

    def start(self, job: Job) -> Ranks:
        """See `Launcher`. The resources of all ranks are reserved together."""
        if job.device.type == "cuda" and not self.cluster.gpus_per_rank:
            raise UserError(
                f"The policy is on {job.device} and cluster.gpus_per_rank=0 would train it on CPUs; set "
                "cluster.gpus_per_rank=1, or policy.device=cpu"
            )
        return RankActors(connect(self.cluster, self.replicas, job.ranks), self.cluster, job, self.run_folder)


class RankActors:
    """`Ranks` that are Ray actors."""

    def __init__(self, ray: Any, cluster: ClusterConfig, job: Job, run_folder: Path) -> None:
        """Ask for them."""
        self.connections: list[Connection] = []
        self.run_folder = run_folder
        self._room = Room(ray, cluster, job.ranks, cluster.cpus_per_rank, cluster.gpus_per_rank)
        patience, local = Patience(job.silence_s, job.start_s), cluster.address == "local"
        self._calls = [self._room.call(RankActor, patience, rank, local) for rank in range(job.ranks)]
        self._ended: dict[int, str] = {}

    @property
    def pids(self) -> list[int]:
        """See `Ranks`."""
        return [call.process.pid for call in self._calls]

    def settle(self, weights: Path) -> list[Place]:
        """See `Ranks`. Raises UserError also when a rank does not see the run folder."""
        for rank, call in enumerate(self._calls):
            self.connections.append(self._answered(rank, call, weights))
        with shown(self.run_folder) as (file, words):
            for rank, connection in enumerate(self.connections):
                self._try_folder(rank, connection, file, words)
        meeting = self._calls[0].process.said["meeting"]
        device = "cuda:0" if self._room.gpus else "cpu"  # Ray shows an actor its own GPU alone
        folders = [call.process.said["folder"] for call in self._calls]
        return [Place(device, self._room.threads, f"{folder}/{WEIGHTS}", meeting) for folder in folders]

    def ended(self) -> dict[int, str]:
        """See `Ranks`."""
        for rank, call in enumerate(self._calls):
            if rank not in self._ended and (how := call.process.end(0.0)):
                self._ended[rank] = how
        return self._ended

    def last_line(self, rank: int) -> str:
        """See `Ranks`: Ray keeps it, on the rank's machine."""
        return ""

    def close(self) -> None:
        """See `Ranks`."""
        for connection in self.connections:
            connection.close()
        for call in self._calls:
            call.server.close()
            call.process.kill()
        self._room.close()

    def _answered(self, rank: int, call: Call, weights: Path) -> Connection:
        """Raises UserError where the cluster has no room, RanksLost."""
        try:
            return call.answered({WEIGHTS: weights})
        except NotPlaced as reason:
            raise UserError(f"Rank {rank} of the learner {reason}") from None
        except Lost as reason:
            raise RanksLost(f"Rank {rank} of the learner {reason}; all {len(self._calls)} were ended") from None

    def _try_folder(self, rank: int, connection: Connection, file: Path, words: str) -> None:
        """Raises UserError when the rank does not see the file, RanksLost."""
        try:
            connection.send((str(file), words))
            fault = connection.recv()
        except (EOFError, OSError) as error:
            raise RanksLost(f"Rank {rank} of the learner cannot be talked to: {type(error).__name__}") from None
        if fault:
            raise UserError(
                f"Rank {rank} of the learner {fault} the run folder {file.parent}, where ranks "
                "keep their checkpoints; set runs to a folder that all machines share under the same path"
            )


@contextmanager
def shown(folder: Path) -> Iterator[tuple[Path, str]]:
    """A file of a name and with words that nobody else can know, in a folder for the while."""
    file, words = folder.absolute() / f".seen-{secrets.token_hex(8)}", secrets.token_hex(16)
    try:
        with disk_errors(file):
            file.write_text(words)
        yield file, words
    finally:
        file.unlink(missing_ok=True)


def fault_of(file: Path, words: str) -> str:
    """What a rank cannot do with the folder of a file with these words; "" when it can do all that it must."""
    try:
        seen = file.read_text() == words
    except OSError:
        seen = False
    if not seen:
        return "does not see"
    return "" if os.access(file.parent, os.W_OK | os.X_OK) else "may not write to"


class RankActor:
    """A rank's process on its machine."""

    def run(self, host: str, port: int, key: bytes, rank: int, local: bool) -> None:
        """Call back, get ready to meet the others, and carry out orders until the driver is gone; ends the process."""
        from forerun.learner.worker import run_rank

        address = own_address(local)
        if name := interface_of(address):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)  # gloo asks for the host's name else, often a loopback
        store, meeting = open_meeting(address) if rank == 0 else (None, "")
        folder = ScratchFolder()
        said = {"meeting": meeting, "folder": str(folder.path)}
        connection = call_back(host, port, key, folder.path, said)
        file, words = connection.recv()
        connection.send(fault_of(Path(file), words))
        run_rank(connection, store, folder.close)


def own_address(local: bool) -> str:
    """Of this machine, as others reach it."""
    import ray

    return LOOPBACK if local else str(ray.util.get_node_ip_address())


def interface_of(address: str) -> str | None:
    """The network interface that has an address; None where none has."""
    import psutil

    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if address in (a.address for a in addresses)), None)


def open_meeting(address: str) -> tuple[Any, str]:
    """A store at a free port of an address, and how the other ranks find it."""
    from torch.distributed import TCPStore

    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, f"tcp://{address}:{port}"
