"""Workers as Ray actors, on whatever machines Ray finds for them.

Ray places an actor, again after a machine was lost, and ends it. The actor connects back to the driver by TCP with a
key that was drawn for it and travels through Ray, gets copies of the files of its `Spec`, and then runs the same server
as a worker on the driver's machine.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, Literal

from forerun.config import ClusterConfig
from forerun.errors import UserError
from forerun.workers.handle import LOOPBACK, Launcher, NotPlaced, Spec, Worker, WorkerLost, kill_all, limit_blocking
from forerun.workers.scratch import ScratchFolder
from forerun.workers.server import serve
from forerun.workers.wire import receive, receive_file, send, send_file

STORE_BYTES = 100 * 2**20  # for Ray's objects, of which there are next to none
REACH_S = 10.0  # until a cluster's address takes a connection
ALIVE_S = 60  # of silence after which the system asks whether the other machine is still there


def ray_launcher(
    cluster: ClusterConfig, kind: Literal["replica", "rank"], replicas: int, ranks: int
) -> Launcher | None:
    """What starts the replicas or the ranks of a run; None: this machine, without Ray. A single rank is no worker."""
    wanted = replicas if kind == "replica" else ranks - 1
    return RayLauncher(cluster, kind, replicas, ranks) if cluster.address != "none" and wanted else None


class RayLauncher:
    """The `Launcher` of Ray actors. The resources of all replicas, or of all ranks, are reserved together."""

    remote = True

    def __init__(self, cluster: ClusterConfig, kind: Literal["replica", "rank"], replicas: int, ranks: int) -> None:
        """Args: replicas, ranks: of the whole run, for which a private Ray has room."""
        self.cluster, self.replicas, self.ranks = cluster, replicas, ranks
        self.kind = kind
        self.count = replicas if kind == "replica" else ranks
        self.cpus = cluster.cpus_per_replica if kind == "replica" else cluster.cpus_per_rank
        self.gpus = cluster.gpus_per_replica if kind == "replica" else cluster.gpus_per_rank
        self.address = LOOPBACK  # until it starts workers
        self._ray: Any = None
        self._group: Any = None

    def start(self, count: int, spec: Spec) -> list[Worker]:
        """See `Launcher`. Raises UserError when Ray is not installed, or no cluster answers."""
        self._reserve()
        calls = [self._call() for _ in range(count)]
        workers: list[Worker] = []
        try:
            for number, call in enumerate(calls):
                worker, folder = self._answered(call, spec, number)
                workers.append(worker)
                files = {name: f"{folder}/{name}" for name in spec.files}
                worker.make(spec, files, max(1, int(self.cpus)))
        except BaseException:
            kill_all(workers)
            for call in calls:
                call.server.close()
                call.process.kill()
            raise
        return workers

    def close(self) -> None:
        """See `Launcher`; actors in what was reserved end."""
        if self._group is not None and self._ray.is_initialized():
            self._ray.util.remove_placement_group(self._group)
        self._group = None

    def _reserve(self) -> None:
        if self._group is None:
            self._ray = connect(self.cluster, self.replicas, self.ranks)
            if self.cluster.address != "local":
                self.address = str(self._ray.util.get_node_ip_address())
            if self.kind == "replica" and self.cluster.address != "local":
                check_gpus_of_replicas(self.gpus, float(self._ray.cluster_resources().get("GPU", 0)))
            need = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
            self._group = self._ray.util.placement_group([need] * self.count, strategy=self.cluster.placement)

    def _call(self) -> Call:
        """Ask for an actor, which is to call back."""
        ray, key = self._ray, secrets.token_bytes(32)
        server = socket.create_server((self.address, 0))
        place = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self._group)
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "scheduling_strategy": place, "max_restarts": 0}
        actor = ray.remote(WorkerActor).options(**options).remote()
        running = actor.run.remote(*server.getsockname()[:2], key, self.cluster.address == "local")
        return Call(RayProcess(ray, actor, running), server, key)

    def _answered(self, call: Call, spec: Spec, number: int) -> tuple[Worker, str]:
        """Wait for an actor, and send it the files; with its folder for them. Raises WorkerLost."""
        try:
            with call.server:
                mine = self._accept(call, spec.timeouts.start_s)
            limit_blocking(mine, spec.timeouts)
            keep_alive(mine)
            connection = Connection(mine.detach())
            folder = call.greet(connection, spec.files)
        except WorkerLost as lost:
            lost.number = number
            raise
        return Worker(call.process, connection, spec.timeouts), folder

    def _accept(self, call: Call, limit_s: float) -> socket.socket:
        """The actor's connection, unless the actor ends before it makes one. Raises WorkerLost."""
        waited = 0.0
        while waited < limit_s:
            call.server.settimeout(1.0)
            try:
                return call.server.accept()[0]
            except TimeoutError:
                waited += 1.0
            if end := call.process.end(0.0):
                raise WorkerLost(end)
        free = self._ray.available_resources()
        raise NotPlaced(
            f"was not placed in {limit_s:.0f} s: it needs {self.cpus:g} CPUs and {self.gpus:g} GPUs, and the cluster "
            f"has {free.get('CPU', 0):g} and {free.get('GPU', 0):g} free"
        )


@dataclass(slots=True)
class Call:
    """An actor that was asked for, and where it is to call back."""

    process: RayProcess
    server: socket.socket
    key: bytes

    def greet(self, connection: Connection, files: Mapping[str, Path]) -> str:
        """Know the actor by its key, and send it files; its folder for them. Raises WorkerLost."""
        process = self.process
        try:
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
            process.pid, process.node, process.address, folder = receive(connection)
            sent = list(files_in(files))
            send(connection, [(name, path.stat().st_size) for name, path in sent])
            for _, path in sent:
                send_file(connection, path)
        except (OSError, EOFError, AuthenticationError) as error:
            connection.close()
            end = process.end(5.0)
            raise WorkerLost(f"did not get its files: {type(error).__name__} {error}. {end}".rstrip(" .")) from None
        return str(folder)


def call_back(host: str, port: int, key: bytes, folder: Path, address: str) -> Connection:
    """The actor's end of `Call.greet`: connect, say who it is, take the files."""
    mine = socket.create_connection((host, port))
    keep_alive(mine)
    connection = Connection(mine.detach())
    answer_challenge(connection, key)
    deliver_challenge(connection, key)
    send(connection, os.getpid(), node_id(), address, str(folder))
    (files,) = receive(connection)
    for name, size in files:
        receive_file(connection, folder / name, size)
    return connection


def keep_alive(end: socket.socket) -> None:
    """Send small messages at once, and notice when the other machine has gone."""
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # Linux; elsewhere the system's own limit holds
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, ALIVE_S)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, ALIVE_S // 4)


def files_in(files: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """Every file of these files and folders, by its path in the actor's folder."""
    for name, place in files.items():
        inside = sorted(path for path in place.rglob("*") if path.is_file())
        yield from ((f"{name}/{path.relative_to(place)}", path) for path in inside)
        if place.is_file():
            yield name, place


@dataclass(slots=True)
class RayProcess:
    """The `Process` of an actor."""

    ray: Any
    actor: Any
    running: Any  # the future result of `WorkerActor.run`
    pid: int = 0  # on its own machine
    node: str = ""  # that machine's name in the cluster
    address: str = ""  # see `Process`

    def kill(self) -> None:
        """See `Process`."""
        if self.ray.is_initialized():  # else everything of Ray's has ended already
            with suppress(self.ray.exceptions.ActorHandleNotFoundError):  # so has it, with an earlier session of Ray
                self.ray.kill(self.actor, no_restart=True)

    def end(self, timeout_s: float) -> str:
        """See `Process`."""
        try:
            self.ray.get(self.running, timeout=timeout_s)
        except self.ray.exceptions.GetTimeoutError:
            return ""
        except self.ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            fact, _, _ = lines[-1].partition(" Some common causes")  # of any loss
            return f"was lost by the cluster: {fact.rstrip('.')}"
        return "ended"

    def last_line(self) -> str:
        """See `Process`: Ray keeps it, on the actor's machine."""
        return ""

    def close(self) -> None:
        """See `Process`."""


class WorkerActor:
    """A worker's process on its machine."""

    def run(self, host: str, port: int, key: bytes, local: bool) -> None:
        """Connect, take the files, serve until the driver is gone; ends the process."""
        import ray

        address = LOOPBACK if local else str(ray.util.get_node_ip_address())
        folder = ScratchFolder()  # of an actor that is killed, the next one removes it
        serve(call_back(host, port, key, folder.path, address), folder.close)


def node_id() -> str:
    """This machine's name in the cluster."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def connect(cluster: ClusterConfig, replicas: int, ranks: int = 1) -> Any:
    """The `ray` module, connected. Raises UserError.

    Args:
        replicas, ranks: for which a private Ray has room; a single rank is no actor.
    """
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        raise UserError(
            f"cluster.address={cluster.address} needs Ray, which is not installed: pip install --editable '.[ray]'"
        ) from None
    if ray.is_initialized():
        return ray
    settings: dict[str, Any] = {"address": cluster.address}
    if cluster.address == "local":
        placed_ranks = ranks if ranks > 1 else 0
        cpus = replicas * cluster.cpus_per_replica + placed_ranks * cluster.cpus_per_rank
        gpus = replicas * cluster.gpus_per_replica + placed_ranks * cluster.gpus_per_rank
        settings["num_cpus"] = -int(-cpus // 1)
        settings["num_gpus"] = -int(-gpus // 1)
        settings["include_dashboard"] = False
        settings["object_store_memory"] = STORE_BYTES
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves this machine
    try:
        check_that_it_listens(cluster.address)
        ray.init(**settings, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cluster.address={cluster.address}: no Ray cluster answers there ({reason})") from None
    return ray


def check_gpus_of_replicas(each: float, there: float) -> None:
    """Raises UserError when a cluster has GPUs and replicas get none: Ray hides GPUs from them."""
    if there and not each:
        raise UserError(
            f"The cluster has {there:g} GPUs and cluster.gpus_per_replica=0 gives the replicas none: they would decode "
            "on CPUs. Set cluster.gpus_per_replica=1"
        )


def check_that_it_listens(address: str) -> None:
    """Ray itself would try for many minutes. Raises OSError; what is not host:port is left to Ray."""
    if found := re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address):
        socket.create_connection((found[1], int(found[2])), timeout=REACH_S).close()
