"""Engines in worker processes: one that crashes, hangs or returns invalid output is replaced, its samples run again.

A `RolloutEngine` over N replicas, which get samples as their slots become free (`stream.py`). Every sample keeps the
seed that it has in one process, and is taken once: what a lost replica had delivered stays, the rest is handed out
again; its successor first gets the current version of policy and drafter. What replicas hold are copies; what they
return is checked against what was asked. Not supported: moving a sample that a replica was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from forerun.config import SpeculationConfig
from forerun.drafters import Drafter
from forerun.engine.base import (
    Counters,
    Requests,
    RolloutEngine,
    Sampling,
    Weights,
    check_request,
    engine_metrics,
    nothing,
)
from forerun.engine.stragglers import Stragglers
from forerun.engine.stream import Stream
from forerun.engine.worker import FACTORY, EngineSpec, Status, save_models
from forerun.errors import UserError, WorkersLost
from forerun.models import Policy
from forerun.models.checksum import checksum
from forerun.types import Rollout
from forerun.workers.devices import VISIBLE, check_replicas_on_ray, replica_environments
from forerun.workers.handle import Launcher, Spec, Timeouts, Worker, WorkerLost, kill_all, poll
from forerun.workers.local import LocalLauncher
from forerun.workers.scratch import ScratchFolder
from forerun.workers.weights import WeightSync
from forerun.workers.wire import Message

MAKE = "forerun.engine:load"
TICK_S = 0.2  # the longest wait between two looks at all replicas
LOSSES = 3  # see `ReplicatedEngine`


class ReplicasLost(WorkersLost):
    """One replica after another was lost in one place."""


@dataclass(slots=True, eq=False)
class Replica:
    """One worker in its place, and its successors."""

    index: int
    worker: Worker
    busy: bool = False  # in a stream
    losses: int = 0  # in a row: since its last sample, in this stream or load
    failure: str = ""  # the exception that ended the worker before, where no sample has come since
    counted: Counters | None = None  # in the worker's last status
    metrics: dict[str, Any] = field(default_factory=dict)


class ReplicatedEngine(RolloutEngine):
    """An engine over worker processes."""

    def __init__(
        self,
        engine: str,
        policy: Policy,
        drafter: Drafter | None,
        speculation: SpeculationConfig,
        *,
        slots: int,
        replicas: int,
        timeouts: Timeouts | None = None,
        make: str = MAKE,
        launcher: Launcher | None = None,
        losses: int | None = None,
        ranks: int = 1,
    ) -> None:
        """Start replicas with the weights of a live policy and drafter, through a folder that is kept for successors.

        Args:
            engine: what runs in each, "local" or "vllm". slots: of each.
            make: makes it there, "module:function", see `EngineSpec`.
            launcher: starts the processes; None: on this machine.
            losses: in a row in one place that are replaced, in one stream or load; one more and the run stops.
                None: `LOSSES`.
            ranks: of the learner; on this machine replicas get GPUs of their own after them.

        Raises:
            UserError: a replica cannot make its engine, or there are too few GPUs.
        """
        super().__init__(policy, speculation.tokens if drafter is not None else 0)
        self.lost = 0  # replicas replaced
        self.rerun = 0  # samples asked for again
        self._launcher = launcher or LocalLauncher()
        self._environments = self._placed(engine, policy.device, ranks, replicas)
        self._slots = slots
        self._idle = 0  # replicas that the latest stream had no sample for
        self._warned_of_idle = False
        self._max_losses = LOSSES if losses is None else losses
        self._stragglers = Stragglers()
        self._vocabulary = policy.model.config.get_text_config().vocab_size
        self._held = Weights(0, _checksums(policy, drafter))
        self._weights: Weights | None = None  # None: as in the folder
        self._sync = WeightSync(lambda text: self.warnings.append(text))
        self._stream: Stream | None = None
        self._paused = False
        self._folder = ScratchFolder()
        block, files = save_models(policy, drafter, speculation, self._folder.path)
        spec = EngineSpec(make, engine, str(policy.dtype)[6:], block, slots)
        threads = max(1, torch.get_num_threads() // replicas)
        self._spec = Spec(FACTORY, (spec,), files, threads, timeouts or Timeouts(), self._environments)
        self._replicas: list[Replica] = []
        try:
            workers = self._launcher.start(replicas, self._spec)
            self._replicas = [Replica(index, worker) for index, worker in enumerate(workers)]
            for replica in self._replicas:
                self._await_ready(replica)
        except WorkerLost as lost:
            self.close()
            raise UserError(f"A replica of the rollout engine {lost}") from None
        except BaseException:
            self.close()
            raise

    # ---- the contract ----

    @property
    def rule(self) -> str:
        """See `RolloutEngine.rule`: the replicas'."""
        return next((r.metrics["rule"] for r in self._replicas if "rule" in r.metrics), "plain")

    def stream(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        n: int = 1,
        only: Requests | None = None,
        between: Callable[[], None] = nothing,
    ) -> Iterator[Rollout]:
        """See `RolloutEngine.stream`; `between` is called several times a second, replicas go on meanwhile."""
        if self._stream is not None:
            raise UserError("This engine is already generating; finish or close its stream first")
        check_request(prompts, sampling, n, self._vocabulary, self.policy.context)
        self._stream = stream = Stream.opened(prompts, sampling, n, only, len(self._replicas), self._held.version)
        self._forget_losses()
        self.timeline = []
        started = time.perf_counter()
        try:
            self._hand_out(stream)
            self._find_idle(stream)
            while stream.waiting or any(replica.busy for replica in self._replicas):
                between()
                if self._paused:
                    raise UserError("The engine is paused; call resume() before the next round")
                self._hand_out(stream)
                rollouts = self._receive(stream)
                self._hand_out(stream)  # before the caller takes its time over them
                self.timeline.append((time.perf_counter() - started, stream.unfinished))
                yield from rollouts
            self.warnings += self._stragglers.report()
        finally:
            self._abort()
            self._stream = None
            self.counters.seconds += time.perf_counter() - started

    def load(self, weights: Weights) -> Weights:
        """Give every replica a version, all at the same time; in a stream it takes effect between two rounds.

        Raises:
            UserError: no replica takes it; they go on with the one before.
        """
        before, self._weights = self._weights, weights
        if self._stream is None:
            self._forget_losses()
        else:
            self._stream.versions.add(weights.version)
        try:
            self._load_all(weights)
        except UserError:
            self._weights = before
            raise
        self._held = Weights(weights.version, dict(weights.checksums))
        return self._held

    def pause(self) -> None:
        """Refuse to go on until `resume`; replicas wait before their next round."""
        self._paused = True
        self._send_busy("pause")

    def resume(self) -> None:
        """Go on."""
        self._paused = False
        self._send_busy("resume")

    def metrics(self) -> dict[str, Any]:
        """See `RolloutEngine.metrics`; and the replicas that were lost and the samples that were run again for it."""
        drafter: dict[str, float] = {}
        for replica in self._replicas:
            for name, value in replica.metrics.get("drafter", {}).items():
                drafter[name] = drafter.get(name, 0.0) + value
        replicas = {
            "count": len(self._replicas),
            "lost": self.lost,
            "samples_rerun": self.rerun,
            "idle": self._idle,
            "slowest_ratio": self._stragglers.slowest_ratio,
        }
        own = {"rule": self.rule, "replicas": replicas}
        return engine_metrics(self._held, self.counters, self.warnings, drafter) | own

    @property
    def pids(self) -> list[int]:
        """Of the workers, each on its own machine."""
        return [replica.worker.process.pid for replica in self._replicas]

    @property
    def written_bytes(self) -> int:
        """Of weights, in all loads, see `WeightSync`."""
        return self._sync.written_bytes

    def close(self) -> None:
        """End the processes."""
        kill_all([replica.worker for replica in self._replicas])
        self._replicas = []
        self._weights = None  # shared memory stays mapped as long as somebody holds its tensors
        self._launcher.close()
        self._folder.close()

    def _placed(self, engine: str, policy: torch.device, ranks: int, replicas: int) -> list[dict[str, str]]:
        """Which GPUs each replica is to see; none where Ray decides."""
        check_replicas_on_ray(policy, self._launcher)
        if self._launcher.remote:
            return []
        environments, sharing = replica_environments(engine, policy, ranks, replicas)
        for number in sharing:
            gpu = environments[number][VISIBLE]
            self.warnings.append(f"Replica {number} shares GPU {gpu} with the learner: no other is free")
        return environments

    # ---- weights ----

    def _await_ready(self, replica: Replica) -> None:
        """Wait until it has its engine, and bring it to the current version. Raises WorkerLost, UserError."""
        replica.worker.await_reply("ready", ("make",), self._spec.timeouts.start_s)
        if self._weights is not None:
            for _, error in self._give(self._weights, [replica]):
                raise error

    def _load_all(self, weights: Weights) -> None:
        """Bring all replicas to a version; those that do not take it are replaced.

        Raises:
            UserError: none takes it, so that it is the version's fault.
        """
        failed = self._give(weights, self._replicas)
        refusals = [error for _, error in failed if isinstance(error, UserError)]
        if refusals and len(failed) == len(self._replicas):
            for replica in (replica for replica, error in failed if isinstance(error, WorkerLost)):
                replica.worker.process.kill()  # another one is started when it is needed
            raise UserError(str(refusals[0]))  # not one of `failed`: that would hold itself, and with it the version
        for replica, error in failed:
            if isinstance(error, UserError):
                error = WorkerLost(f"refuses version {weights.version}, which others hold: {error}")
            self._replace(replica, error)

    def _give(self, weights: Weights, replicas: Sequence[Replica]) -> list[tuple[Replica, WorkerLost | UserError]]:
        """Send a version to replicas at the same time; those that do not hold it then, and why."""
        failed: list[tuple[Replica, WorkerLost | UserError]] = []
        by_worker = {id(replica.worker): replica for replica in replicas}
        for replica in replicas:
            self._report(replica, "load")
        for worker, answer in self._sync.send(weights, [replica.worker for replica in replicas]):
            replica = by_worker[id(worker)]
            if isinstance(answer, tuple):
                self._warn(replica, answer[-1])
                self._report(replica, "generate" if replica.busy else "idle")
            else:
                failed.append((replica, answer))
        return failed

    # ---- streams ----

    def _hand_out(self, stream: Stream) -> None:
        """Ask replicas for what nobody was asked for, as far as they have room."""
        for index, requests in stream.hand_out(self._slots).items():
            replica = self._replicas[index]
            try:
                self._ask(replica, stream, requests)
            except WorkerLost as reason:
                self._replace(replica, reason)

    def _ask(self, replica: Replica, stream: Stream, requests: Requests) -> None:
        """Ask it for these samples. Raises WorkerLost."""
        if stream.asked[replica.index] == len(requests):  # the first ones
            replica.worker.send("stream", list(stream.prompts), stream.sampling, stream.n, sorted(requests))
        else:
            replica.worker.send("more", requests)
        if not replica.busy:
            replica.busy = True
            self._report(replica, "generate")
        self._note_load(replica, stream)

    def _note_load(self, replica: Replica, stream: Stream) -> None:
        """How many samples it decodes from now on."""
        samples = min(self._slots, len(stream.pending[replica.index]))
        self._stragglers.decodes(replica.index, samples, time.perf_counter())

    def _find_idle(self, stream: Stream) -> None:
        """Count the replicas without a sample; of a training step they are reported, once."""
        count, samples = len(self._replicas), stream.unfinished
        self._idle = max(0, count - samples)
        if self._idle and stream.n > 1 and not self._warned_of_idle:
            self._warned_of_idle = True
            self.warnings.append(
                f"{self._idle} of {count} replicas have nothing to do: {samples} samples were asked for. Set "
                f"rollout.replicas={samples}, or raise train.prompts_per_step or train.samples_per_prompt"
            )

    def _receive(self, stream: Stream) -> list[Rollout]:
        """What has come from busy replicas, waiting a moment for it; replaces those that are lost."""
        busy = [replica for replica in self._replicas if replica.busy]
        unread = any(replica.worker.inbox for replica in busy)
        ready = poll([replica.worker for replica in busy], 0.0 if unread else TICK_S)
        rollouts: list[Rollout] = []
        for replica in busy:
            worker = replica.worker
            try:
                if worker in ready:
                    worker.inbox.append(worker.receive(0.0))
                worker.check_heartbeat(self._spec.timeouts.heartbeat_s)
                while worker.inbox:
                    rollouts += self._handle(replica, worker.inbox.popleft(), stream)
            except WorkerLost as reason:
                self._replace(replica, reason)
        return rollouts

    def _handle(self, replica: Replica, message: Message, stream: Stream) -> list[Rollout]:
        """Act on a message of the stream; the rollout that it brought, if any. Raises WorkerLost, UserError."""
        kind = message[0]
        if kind == "refused":
            replica.busy = False
            raise UserError(message[2])
        self._count(replica, message[-1])
        pending = stream.pending[replica.index]
        if kind == "rollout":
            rollout = message[1]
            if fault := stream.fault_of(rollout, replica.index, self._vocabulary):
                raise WorkerLost(f"returned invalid output: {fault}")
            pending.discard((rollout.prompt_index, rollout.sample_index))
            replica.losses, replica.failure = 0, ""
            self._note_load(replica, stream)
            self._stragglers.delivered(replica.index, len(rollout.tokens))
            return [rollout]
        if kind == "done" and message[1] == stream.asked[replica.index]:
            replica.busy = False
            self._report(replica, "idle")
            if pending:
                raise WorkerLost(f"says that it is done, with {len(pending)} samples missing")
        return []

    def _abort(self) -> None:
        """Nobody wants the rest of the stream. A replica that does not stop is killed; one is started when needed."""
        for replica in [replica for replica in self._replicas if replica.busy]:
            replica.busy = False
            self._report(replica, "idle")
            worker = replica.worker
            try:
                worker.send("abort")
                seen = any(self._ended(replica, message) for message in worker.inbox)
                while not seen and not self._ended(replica, worker.receive(self._spec.timeouts.heartbeat_s)):
                    pass
            except WorkerLost:
                worker.process.kill()
            worker.inbox.clear()

    def _ended(self, replica: Replica, message: Message) -> bool:
        """Whether it is the last one of the stream."""
        assert self._stream is not None
        return message[0] == "refused" or message[:2] == ("done", self._stream.asked[replica.index])

    def _send_busy(self, request: str) -> None:
        for replica in self._replicas:
            if replica.busy:
                self._try(replica, lambda r: r.worker.send(request))

    # ---- losses ----

    def _try(self, replica: Replica, action: Callable[[Replica], None]) -> None:
        """Do something with a replica; where it turns out to be lost, its successor is brought to the same state."""
        try:
            action(replica)
        except WorkerLost as reason:
            self._replace(replica, reason)

    def _replace(self, replica: Replica, reason: WorkerLost) -> None:
        """Another worker in its place, with the current version; its samples are to be handed out again.

        Raises:
            ReplicasLost: too many in a row, or two by the same exception. UserError: the successor refuses to start.
        """
        name, stream = f"Replica {replica.index}", self._stream
        wanted = stream.take_back(replica.index) if stream is not None else 0
        self.rerun += wanted
        self._stragglers.forget(replica.index)
        while True:
            self.lost += 1
            replica.losses += 1
            replica.busy = False
            replica.worker.kill()
            self._report(replica, "lost")
            if reason.failure and reason.failure == replica.failure:
                text = f"{name} of the rollout engine {reason}; so did the one before it"
                raise ReplicasLost(text, reason.failure, repeated=True)
            replica.failure = reason.failure
            if replica.losses > self._max_losses:
                raise ReplicasLost(f"{name} of the rollout engine {reason}; {replica.losses} were lost in a row")
            self.warnings.append(f"{name} {reason}. Another one takes its place; {wanted} samples run again")
            try:
                place = self._environments[replica.index : replica.index + 1]
                (replica.worker,) = self._launcher.start(1, replace(self._spec, environments=place))
                replica.counted = None
                replica.metrics = {}
                self._await_ready(replica)
                self._report(replica, "idle")
                return
            except WorkerLost as again:
                reason = again

    def _forget_losses(self) -> None:
        for replica in self._replicas:
            replica.losses = 0

    def _report(self, replica: Replica, state: str) -> None:
        """Call `on_state`."""
        version = self._held.version if self._weights is None else self._weights.version
        self.on_state(f"replica {replica.index}", state, version)

    def _count(self, replica: Replica, status: Status) -> None:
        """Add what a replica has counted since its last message."""
        added = status.counters.minus(replica.counted or Counters())
        added.seconds = 0.0  # replicas work side by side: the stream's own time counts
        self.counters = self.counters.plus(added)
        replica.counted = status.counters
        replica.metrics = status.metrics
        self._warn(replica, status)

    def _warn(self, replica: Replica, status: Status) -> None:
        self.warnings += [f"Replica {replica.index}: {warning}" for warning in status.warnings]


def _checksums(policy: Policy, drafter: Drafter | None) -> dict[str, str]:
    sums = {"policy": checksum(policy.model.state_dict())}
    return sums if drafter is None else sums | {"draft": checksum(drafter.state_dict())}
