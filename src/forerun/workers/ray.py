"""Rollout replicas as Ray actors, on whatever machines Ray finds for them, and what all actors have in common.

Only who starts a process is different here, and how it is reached: the actor connects back to this process by
TCP, gets the files that it works on (first policy, drafter) in pieces, and then runs the server of
`engine/worker.py`. Ray's part is to place it, again after a machine was lost, and to end it. The key of a connection
is drawn for it and travels through Ray; what follows is pickled and not encrypted: the network must be trusted.
Left out: the learner's ranks, which are actors by the same means (`ray_ranks.py`).
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from forerun.config import ClusterConfig, Recipe
from forerun.engine.worker import CHUNK_BYTES, Lost, Order, Patience, Replica, Starter, impatient, serve
from forerun.errors import UserError
from forerun.workers.scratch import ScratchFolder

LOOPBACK = "127.0.0.1"  # nobody beyond this machine has to do with a private Ray
STORE_BYTES = 100 * 2**20  # for Ray's objects, of which there are next to none
REACH_S = 10.0  # until a cluster's address takes a connection
ALIVE_S = 60  # of silence after which the system asks whether the other machine is still there


def starter(recipe: Recipe) -> Starter | None:
    """Where the recipe's replicas begin; None: on this machine, without Ray.

    Raises:
        UserError: Ray is not installed, or its cluster cannot be reached.
    """
    if recipe.cluster.address == "none" or not recipe.rollout.replicas:
        return None
    return OnCluster(recipe.cluster, recipe.rollout.replicas, recipe.train.ranks)


class OnCluster:
    """The `Starter` of Ray actors. The resources of all replicas are reserved together."""

    def __init__(self, cluster: ClusterConfig, replicas: int, ranks: int = 1) -> None:
        """`ranks`: of the learner, for which a private Ray keeps room."""
        ray = connect(cluster, replicas, ranks)
        self._room = Room(ray, cluster, replicas, cluster.cpus_per_replica, cluster.gpus_per_replica)

    def begin(self, order: Order, patience: Patience) -> Callable[[], Replica]:
        """See `Starter`."""
        call = self._room.call(Actor, patience)
        order = replace(order, threads=self._room.threads)

        def connected() -> Replica:
            connection = call.answered(dict(files_in(folders_of(order))))
            replica = Replica(call.process, connection)
            replica.send("make", order)
            return replica

        return connected

    def close(self) -> None:
        """Give the resources back; actors in them end."""
        self._room.close()


# ---- actors of any kind ----


class NotPlaced(Lost):
    """The cluster had no room for an actor."""


class Room:
    """The resources of some actors that are alike, reserved together."""

    def __init__(self, ray: Any, cluster: ClusterConfig, actors: int, cpus: float, gpus: float) -> None:
        self.ray, self.cluster, self.cpus, self.gpus = ray, cluster, cpus, gpus
        need = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        self._group = ray.util.placement_group([need] * actors, strategy=cluster.placement)

    @property
    def threads(self) -> int:
        """Of an actor."""
        return max(1, int(self.cpus))

    def call(self, kind: type, patience: Patience, *words: Any) -> Call:
        """Ask for an actor; its method `run` gets a host, a port and a key to call back with, and the words."""
        ray, key = self.ray, secrets.token_bytes(32)
        host = LOOPBACK if self.cluster.address == "local" else ray.util.get_node_ip_address()
        server = socket.create_server((host, 0))
        place = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self._group)
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "scheduling_strategy": place, "max_restarts": 0}
        actor = ray.remote(kind).options(**options).remote()
        running = actor.run.remote(host, server.getsockname()[1], key, *words)
        return Call(RayProcess(ray, actor, running), server, key, patience, self)

    def close(self) -> None:
        """Give the resources back; actors in them end."""
        if self.ray.is_initialized():
            self.ray.util.remove_placement_group(self._group)


@dataclass(slots=True)
class Call:
    """An actor that was asked for, and has not called back yet."""

    process: RayProcess
    server: socket.socket
    key: bytes
    patience: Patience
    room: Room

    def answered(self, files: Mapping[str, Path]) -> Connection:
        """Wait for the actor, and send it files, by their paths in its folder. Raises Lost."""
        try:
            with self.server:
                mine = self._accept()
            impatient(mine, self.patience)
            keep_alive(mine)
            connection = Connection(mine.detach())
            return self._greet(connection, files)
        except Lost:
            self.process.kill()
            raise

    def _greet(self, connection: Connection, files: Mapping[str, Path]) -> Connection:
        process = self.process
        try:
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
            process.pid, process.node, process.said = connection.recv()
            connection.send([(name, path.stat().st_size) for name, path in files.items()])
            for path in files.values():
                send_file(connection, path)
        except (OSError, EOFError, AuthenticationError) as error:
            connection.close()
            raise Lost(f"did not get its files: {type(error).__name__} {error}. {process.end()}".rstrip(" .")) from None
        return connection

    def _accept(self) -> socket.socket:
        """The actor's connection, unless the actor ends before it makes one. Raises Lost."""
        waited, limit_s = 0.0, self.patience.start_s
        while waited < limit_s:
            self.server.settimeout(1.0)
            try:
                return self.server.accept()[0]
            except TimeoutError:
                waited += 1.0
            if end := self.process.end(0.0):
                raise Lost(end)
        free, room = self.room.ray.available_resources(), self.room
        raise NotPlaced(
            f"was not placed in {limit_s:.0f} s: it needs {room.cpus:g} CPUs and {room.gpus:g} GPUs, and the cluster "
            f"has {free.get('CPU', 0):g} and {free.get('GPU', 0):g} free"
        )


def call_back(host: str, port: int, key: bytes, folder: Path, said: Any = None) -> Connection:
    """The actor's end of `Call.answered`: connect, tell who it is (and `said`), take the files."""
    mine = socket.create_connection((host, port))
    keep_alive(mine)
    connection = Connection(mine.detach())
    answer_challenge(connection, key)
    deliver_challenge(connection, key)
    connection.send((os.getpid(), node_id(), said))
    for name, size in connection.recv():
        receive_file(connection, folder / name, size)
    return connection


def keep_alive(end: socket.socket) -> None:
    """Send small messages at once, and find out when the other machine has gone without a word."""
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # Linux; elsewhere the system's own patience holds
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, ALIVE_S)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, ALIVE_S // 4)


@dataclass(slots=True)
class RayProcess:
    """An actor, as `engine.replica.Process` has it."""

    ray: Any
    actor: Any
    running: Any  # what `Actor.run` will have returned
    pid: int = 0  # on its own machine
    node: str = ""  # that machine's name in the cluster
    said: Any = None  # as it called back

    def kill(self) -> None:
        """See `Process`."""
        if self.ray.is_initialized():  # else everything of Ray's has ended already
            with suppress(self.ray.exceptions.ActorHandleNotFoundError):  # so has it, with an earlier session of Ray
                self.ray.kill(self.actor, no_restart=True)

    def end(self, timeout_s: float = 5.0) -> str:
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

    def close(self) -> None:
        """See `Process`."""


class Actor:
    """The replica's process on its machine."""

    def run(self, host: str, port: int, key: bytes) -> None:
        """Connect, take the folders, serve until the driver is gone."""
        with ScratchFolder() as folder:  # of an actor that is killed, the next one removes it
            connection = call_back(host, port, key, folder)
            serve(connection, lambda order: placed(order, folder))


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
            f"cluster.address={cluster.address} needs Ray, which is not installed: pip install 'forerun[ray]'"
        ) from None
    if ray.is_initialized():
        return ray
    settings: dict[str, Any] = {"address": cluster.address}
    if cluster.address == "local":
        placed_ranks = ranks if ranks > 1 else 0
        cpus = replicas * cluster.cpus_per_replica + placed_ranks * cluster.cpus_per_rank
        gpus = replicas * cluster.gpus_per_replica + placed_ranks * cluster.gpus_per_rank
        settings |= {
            "num_cpus": -int(-cpus // 1), "num_gpus": -int(-gpus // 1), "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
        }  # fmt: skip
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves this machine
    try:
        check_that_it_listens(cluster.address)
        ray.init(**settings, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        words = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cluster.address={cluster.address}: no Ray cluster answers there ({words})") from None
    return ray


def check_that_it_listens(address: str) -> None:
    """Ray itself would try for many minutes, without a word. Raises OSError; what is not host:port is left to Ray."""
    if found := re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address):
        socket.create_connection((found[1], int(found[2])), timeout=REACH_S).close()


# ---- folders ----


def folders_of(order: Order) -> dict[str, Path]:
    """What an engine is made of, as far as it is folders of this machine: "policy", and "draft" where there is one."""
    named = {"policy": order.policy, "draft": order.speculation.get("draft")}
    return {name: Path(path) for name, path in named.items() if path and Path(path).is_dir()}


def placed(order: Order, folder: Path) -> Order:
    """The order with the folders that were sent in place of those of the driver's machine."""
    draft = {"draft": str(folder / "draft")} if (folder / "draft").is_dir() else {}
    policy = str(folder / "policy") if (folder / "policy").is_dir() else order.policy
    return replace(order, policy=policy, speculation=order.speculation | draft)


def files_in(folders: dict[str, Path]) -> Iterator[tuple[str, Path]]:
    """Every file, by its path in the actor's folder."""
    for name, folder in folders.items():
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            yield f"{name}/{path.relative_to(folder)}", path


def send_file(connection: Connection, path: Path) -> None:
    """In pieces of `CHUNK_BYTES`."""
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            connection.send_bytes(piece)


def receive_file(connection: Connection, path: Path, size: int) -> None:
    """The inverse."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(connection.recv_bytes())
