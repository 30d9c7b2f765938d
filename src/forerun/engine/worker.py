"""A rollout engine in a worker process: the requests that it answers.

Between two rounds it sends a heartbeat with what it has counted, and answers waiting requests: so a hung engine falls
silent, and weights can change in flight. `replicated.py` is the driver's side.

    requests    stream, more, pause, resume, abort, load (see `WeightSync`)
    replies     heartbeat, rollout, done, held: the last element of each is a `Status`

"more" adds samples to the latest stream, also when it has ended here: "done" says how many it was asked for in all, so
that the driver knows whether it has seen the end.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forerun.engine.base import Counters, Requests, RolloutEngine, Sampling, Weights
from forerun.models import Policy
from forerun.models.load import save_policy
from forerun.tracking.files import disk_errors
from forerun.workers.server import Requests as RequestTable
from forerun.workers.server import Server
from forerun.workers.weights import Layout, receive_groups

if TYPE_CHECKING:
    from forerun.config import SpeculationConfig
    from forerun.drafters import Drafter

FACTORY = "forerun.engine.worker:serve_engine"
HEARTBEAT_S = 0.2  # between two heartbeats
REPORTED = ("drafter", "rule")  # what of an engine's metrics is sent along


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """How a worker makes its engine: `make`, "module:function", is called as make(engine, policy=, dtype=, ...).

    Its folders are "policy" and, where there is one, "draft" among the worker's files.
    """

    make: str
    engine: str
    dtype: str
    speculation: dict[str, Any]
    slots: int


@dataclass(frozen=True, slots=True)
class Status:
    """What an engine has counted since it was made, and its warnings since the last message."""

    counters: Counters
    warnings: list[str]
    metrics: dict[str, Any]


class Aborted(Exception):
    """The driver does not want the rest of the stream."""


def save_models(
    policy: Policy, drafter: Drafter | None, speculation: SpeculationConfig, folder: Path
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Write the policy, and the drafter if it has weights; the workers' speculation block and files.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    save_policy(policy, folder / "policy")
    files = {"policy": folder / "policy"}
    if drafter is None:
        return {"method": "none"}, files
    block = speculation.model_dump(mode="json")
    if drafter.state_dict():
        with disk_errors(folder):
            drafter.save(folder / "draft", {})
        block["draft"] = str(folder / "draft")
    if block.get("draft") and Path(block["draft"]).is_dir():
        files["draft"] = Path(block["draft"])
    return block, files


def serve_engine(server: Server, spec: EngineSpec) -> RequestTable:
    """The factory of a replica. Raises UserError when the engine cannot be made."""
    module, _, name = spec.make.partition(":")
    make = getattr(importlib.import_module(module), name)
    draft = {"draft": server.files["draft"]} if "draft" in server.files else {}
    speculation = spec.speculation | draft
    policy = server.files["policy"]
    engine = make(spec.engine, policy=policy, dtype=spec.dtype, speculation=speculation, slots=spec.slots)
    engine.warnings.clear()  # of its start: every replica and every successor has the same
    return EngineWorker(server, engine).requests


class EngineWorker:
    """Answers requests for one engine."""

    def __init__(self, server: Server, engine: RolloutEngine) -> None:
        self.server, self.engine = server, engine
        self._paused = False
        self._streaming = False
        self._request: tuple[list[list[int]], Sampling, int] = ([], Sampling(), 1)  # of the latest stream
        self._asked = 0  # samples of it
        self._waiting: Requests = []  # samples of it that no stream of the engine has yet
        self.requests: RequestTable = {
            "load": self.load,
            "stream": self.stream,
            "more": self.more,
            "pause": self.pause,
            "resume": self.resume,
            "abort": self.abort,
        }

    def load(self, version: int, checksums: Mapping[str, str], layout: Layout) -> None:
        """Put a version in use, and send "held"."""
        groups = receive_groups(self.server, checksums, layout)
        held = self.engine.load(Weights(version, checksums, groups.get("policy"), groups.get("draft"), checked=True))
        self._send("held", held.version, dict(held.checksums))

    def stream(self, prompts: list[list[int]], sampling: Sampling, n: int, only: Requests) -> None:
        """Send rollouts as they finish, then "done", also after an abort."""
        self._request, self._asked = (prompts, sampling, n), 0
        self.more(only)

    def more(self, requests: Requests) -> None:
        """More samples of the latest stream."""
        self._asked += len(requests)
        if self._streaming and self.engine.extend(requests):
            return
        self._waiting = [*self._waiting, *requests]
        if not self._streaming:
            self._generate()

    def _generate(self) -> None:
        self._streaming = True
        try:
            with suppress(Aborted):  # raised between two rounds, by a request of the driver
                while self._waiting:
                    only, self._waiting = self._waiting, []
                    for rollout in self.engine.stream(*self._request, only, self._between):
                        self._send("rollout", rollout)
        finally:
            self._streaming = self._paused = False
            self._waiting = []
        self._send("done", self._asked)

    def pause(self) -> None:
        """Wait before the next round of the stream under way."""
        self._paused = self._streaming

    def resume(self) -> None:
        """Go on."""
        self._paused = False
        self.engine.resume()

    def abort(self) -> None:
        """Leave the stream; without one this does nothing."""
        if self._streaming:
            raise Aborted

    def _between(self) -> None:
        """Between two rounds: a heartbeat, and the requests that wait."""
        if time.perf_counter() - self.server.sent_s >= HEARTBEAT_S:
            self._send("heartbeat")
        while self._paused or self.server.pending():
            self.server.answer()

    def _send(self, kind: str, *content: Any) -> None:
        """A message with the status."""
        warnings = list(self.engine.warnings)
        self.engine.warnings.clear()
        metrics = {name: value for name, value in self.engine.metrics().items() if name in REPORTED}
        self.server.send(kind, *content, Status(self.engine.counters.copy(), warnings, metrics))
