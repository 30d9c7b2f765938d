"""Rollout replicas as Ray actors, on whatever machines Ray finds for them.

Only who starts a replica's process is different here, and how it is reached: the actor connects back to this process by
TCP, gets the folders that its engine is made of (the first policy, the drafter) in pieces, and then runs the server of
`engine/replica.py`. Ray's part is to place it, again after a machine was lost, and to end it. The key of a connection
is drawn for it and travels through Ray; what follows is pickled and not encrypted: the network must be trusted.
Left out: the learner, which stays where the run was started.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from forerun.config import ClusterConfig, Recipe
from forerun.engine.replica import CHUNK_BYTES, Lost, Order, Patience, Replica, Starter, impatient, serve
from forerun.errors import UserError

LOOPBACK = "127.0.0.1"  # nobody beyond this machine has to do with a private Ray


def starter(recipe: Recipe) -> Starter | None:
    """Where the recipe's replicas begin; None: on this machine, without Ray.

    Raises:
        UserError: Ray is not installed, or its cluster cannot be reached.
    """
    if recipe.cluster.address == "none":
        return None
    return OnCluster(recipe.cluster, recipe.rollout.replicas)


class OnCluster:
    """The `Starter` of Ray actors. The resources of all replicas are reserved together."""

    def __init__(self, cluster: ClusterConfig, replicas: int) -> None:
        self.cluster, self._ray = cluster, connect(cluster, replicas)
        need = {"CPU": cluster.cpus_per_replica} | (
            {"GPU": cluster.gpus_per_replica} if cluster.gpus_per_replica else {}
        )
        self._group = self._ray.util.placement_group([need] * replicas, strategy=cluster.placement)

    def begin(self, order: Order, patience: Patience) -> Callable[[], Replica]:
        """See `Starter`."""
        ray, cluster, key = self._ray, self.cluster, secrets.token_bytes(32)
        host = LOOPBACK if cluster.address == "local" else ray.util.get_node_ip_address()
        server = socket.create_server((host, 0))
        server.settimeout(patience.start_s)
        place = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self._group)
        order = replace(order, threads=max(1, int(cluster.cpus_per_replica)))
        actor = (
            ray.remote(Actor)
            .options(
                num_cpus=cluster.cpus_per_replica, num_gpus=cluster.gpus_per_replica, scheduling_strategy=place,
                max_restarts=0,
            )
            .remote()
        )  # fmt: skip
        running = actor.run.remote(host, server.getsockname()[1], key)
        process = RayProcess(ray, actor, running)

        def connected() -> Replica:
            try:
                return self._meet(server, process, key, order, patience)
            except Lost:
                process.kill()
                raise

        return connected

    def close(self) -> None:
        """Give the resources back; actors in them end."""
        if self._ray.is_initialized():
            self._ray.util.remove_placement_group(self._group)

    def _meet(
        self, server: socket.socket, process: RayProcess, key: bytes, order: Order, patience: Patience
    ) -> Replica:
        """Wait for the actor, send it its folders and its order. Raises Lost."""
        with server:
            mine = self._accept(server, process, patience)
        impatient(mine, patience)
        mine.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(mine.detach())
        try:
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
            process.pid, process.node = connection.recv()
            folders = folders_of(order)
            connection.send([(name, path.stat().st_size) for name, path in files_in(folders)])
            for _, path in files_in(folders):
                send_file(connection, path)
        except (OSError, EOFError, AuthenticationError) as error:
            connection.close()
            raise Lost(f"did not get its files: {type(error).__name__} {error}. {process.end()}".rstrip(" .")) from None
        replica = Replica(process, connection)
        replica.send("make", order)
        return replica

    def _accept(self, server: socket.socket, process: RayProcess, patience: Patience) -> socket.socket:
        """The actor's connection, unless the actor ends before it makes one. Raises Lost."""
        waited = 0.0
        while waited < patience.start_s:
            server.settimeout(1.0)
            try:
                return server.accept()[0]
            except TimeoutError:
                waited += 1.0
            if end := process.end(0.0):
                raise Lost(end)
        free, cluster = self._ray.available_resources(), self.cluster
        raise Lost(
            f"was not placed in {patience.start_s:.0f} s: it needs {cluster.cpus_per_replica:g} CPUs and "
            f"{cluster.gpus_per_replica:g} GPUs, and the cluster has {free.get('CPU', 0):g} and "
            f"{free.get('GPU', 0):g} free"
        )


@dataclass(slots=True)
class RayProcess:
    """An actor, as `engine.replica.Process` has it."""

    ray: Any
    actor: Any
    running: Any  # what `Actor.run` will have returned
    pid: int = 0  # on its own machine
    node: str = ""  # that machine's name in the cluster

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
            return f"was lost by the cluster: {lines[-1]}"
        return "ended"

    def close(self) -> None:
        """See `Process`."""


class Actor:
    """The replica's process on its machine."""

    def run(self, host: str, port: int, key: bytes) -> None:
        """Connect, take the folders, serve until the driver is gone."""
        with socket.create_connection((host, port)) as mine:
            mine.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(mine.detach())
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
        connection.send((os.getpid(), node_id()))
        with tempfile.TemporaryDirectory() as folder:
            for name, size in connection.recv():
                receive_file(connection, Path(folder) / name, size)
            serve(connection, lambda order: placed(order, Path(folder)))


def node_id() -> str:
    """This machine's name in the cluster."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def connect(cluster: ClusterConfig, replicas: int) -> Any:
    """The `ray` module, connected. Raises UserError."""
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
        cpus, gpus = replicas * cluster.cpus_per_replica, replicas * cluster.gpus_per_replica
        settings |= {"num_cpus": -int(-cpus // 1), "num_gpus": -int(-gpus // 1), "include_dashboard": False}
    try:
        ray.init(**settings, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        words = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cluster.address={cluster.address}: no Ray cluster answers there ({words})") from None
    return ray


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
