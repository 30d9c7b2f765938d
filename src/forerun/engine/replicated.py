"""Engines in processes of their own: one that dies, hangs or talks nonsense is replaced, and its samples run again.

A `RolloutEngine` over N replicas. Prompt i belongs to replica i mod N: its samples share a prefill and a trie.
Every sample keeps the seed that it has in one process, and is taken once: what a lost replica had delivered
stays, the rest is asked of its successor, which first gets the current version of policy and drafter. All replicas get
a version at the same time: those of this machine out of memory that they share, in which it is laid down once, others
in pieces, each through its own connection. What they hold is a copy; what they answer is checked against what was
asked. Where their processes come from is a `Starter`'s. Left out: moving work between replicas, and replicas that pass
a version on to others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from forerun.config import SpeculationConfig
from forerun.drafters import Drafter
from forerun.engine.base import (
    Requests,
    RolloutEngine,
    Sampling,
    Weights,
    check_request,
    engine_metrics,
    nothing,
    requested,
)
from forerun.engine.stragglers import Paces
from forerun.engine.worker import (
    MAKER,
    Lost,
    Message,
    OnThisMachine,
    Order,
    Patience,
    Replica,
    Starter,
    Status,
)
from forerun.errors import UserError
from forerun.models import Policy
from forerun.models.checksum import checksum
from forerun.models.load import save_policy
from forerun.tracking.files import disk_errors
from forerun.types import Rollout
from forerun.workers.broadcast import Broadcast
from forerun.workers.scratch import ScratchFolder

TICK_S = 0.2  # the longest wait between two looks at all replicas
CERTAIN = 1e-3  # a log-probability may exceed 0 by rounding


class ReplicasLost(UserError):
    """One process after another was lost in one place; whoever keeps checkpoints may try again from there."""


@dataclass(slots=True)
class Job:
    """A stream under way."""

    prompts: Sequence[list[int]]
    sampling: Sampling
    n: int
    pending: list[set[tuple[int, int]]]  # per replica: (prompt, sample) not delivered yet
    versions: set[int]  # that may have emitted its tokens


class ReplicatedEngine(RolloutEngine):
    """An engine over processes."""

    def __init__(
        self,
        engine: str,
        policy: Policy,
        drafter: Drafter | None,
        speculation: SpeculationConfig,
        *,
        slots: int,
        replicas: int,
        patience: Patience | None = None,
        maker: str = MAKER,
        starter: Starter | None = None,
    ) -> None:
        """Start replicas with the weights of a live policy and drafter, through a folder that is kept for successors.

        Args:
            engine: what runs in each, "local" or "vllm". slots: of each.
            maker: who makes it there, "module:function", see `Order`.
            starter: where the processes come from; None: this machine.

        Raises:
            UserError: a replica cannot make its engine.
        """
        super().__init__(policy, speculation.tokens if drafter is not None else 0)
        self.patience = patience or Patience()
        self.lost = self.rerun = 0  # replicas replaced, and samples asked for again
        self._losses = [0] * replicas  # of them in this stream or load, per place, since its last sample
        self._paces = Paces()
        self._vocabulary = policy.model.config.get_text_config().vocab_size
        self._held = Weights(0, _checksums(policy, drafter))
        self._weights: Weights | None = None  # None: as in the folder
        self._broadcast = Broadcast(lambda text: self.warnings.append(text))
        self._job: Job | None = None
        self._paused = False
        self._folder = ScratchFolder()
        block = _save(policy, drafter, speculation, self._folder.path)
        threads = max(1, torch.get_num_threads() // replicas)
        source = str(self._folder.path / "policy")
        self._order = Order(engine, source, str(policy.dtype)[6:], block, slots, threads, maker)
        self._starter = starter or OnThisMachine()
        self._replicas: list[Replica] = []
        begun = [self._starter.begin(self._order, self.patience) for _ in range(replicas)]
        try:
            self._replicas += [connected() for connected in begun]
            for replica in self._replicas:
                self._make(replica)
        except Lost as lost:
            self.close()
            raise UserError(f"A replica of the rollout engine {lost}") from None
        except UserError:
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
        if self._job is not None:
            raise UserError("This engine is already generating; finish or close its stream first")
        check_request(prompts, sampling, n, self._vocabulary, self.policy.context)
        pending: list[set[tuple[int, int]]] = [set() for _ in self._replicas]
        for prompt, sample in requested(len(prompts), n, only):
            pending[prompt % len(pending)].add((prompt, sample))
        self._job = job = Job(prompts, sampling, n, pending, {self._held.version})
        self._losses, self.timeline, started = [0] * len(self._replicas), [], time.perf_counter()
        try:
            for index in range(len(self._replicas)):
                self._try(index, self._ask)
            while any(r.busy for r in self._replicas):
                between()
                if self._paused:
                    raise UserError("The engine is paused; call resume() before the next round")
                rollouts = self._listen(job)
                self.timeline.append((time.perf_counter() - started, sum(map(len, job.pending))))
                yield from rollouts
            self.warnings += self._paces.judge()
        finally:
            self._call_off()
            self._job = None
            self.counters.seconds += time.perf_counter() - started

    def load(self, weights: Weights) -> Weights:
        """Give every replica a version, all at the same time; in a stream it takes effect between two rounds.

        Raises:
            UserError: no replica takes it; they go on with the one before.
        """
        before, self._weights = self._weights, weights
        if self._job is None:
            self._losses = [0] * len(self._replicas)
        else:
            self._job.versions.add(weights.version)
        try:
            self._push_all(weights.version)
        except UserError:
            self._weights = before
            raise
        self._held = Weights(weights.version, dict(weights.checksums))
        return self._held

    def pause(self) -> None:
        """Refuse to go on until `resume`; replicas wait before their next round."""
        self._paused = True
        self._tell_busy("pause")

    def resume(self) -> None:
        """Go on."""
        self._paused = False
        self._tell_busy("resume")

    def metrics(self) -> dict[str, Any]:
        """See `RolloutEngine.metrics`; and the replicas that were lost and the samples that were run again for it."""
        drafter: dict[str, float] = {}
        for replica in self._replicas:
            for name, value in replica.metrics.get("drafter", {}).items():
                drafter[name] = drafter.get(name, 0.0) + value
        replicas = {
            "count": len(self._replicas), "lost": self.lost, "samples_rerun": self.rerun,
            "slowest_ratio": self._paces.slowest_ratio,
        }  # fmt: skip
        return engine_metrics(self._held, self.counters, self.warnings, drafter) | {
            "rule": self.rule,
            "replicas": replicas,
        }

    @property
    def pids(self) -> list[int]:
        """Of the processes."""
        return [replica.process.pid for replica in self._replicas]

    @property
    def written_bytes(self) -> int:
        """Of weights, in all loads: into shared memory, unless they were published there, and into connections."""
        return self._broadcast.written_bytes

    def close(self) -> None:
        """End the processes."""
        for replica in self._replicas:
            replica.kill()
        self._replicas = []
        self._starter.close()
        self._folder.close()

    # ---- replicas ----

    def _make(self, replica: Replica) -> None:
        """Wait until it has its engine, and bring it to the current version. Raises Lost, UserError."""
        replica.await_reply("ready", self.patience.start_s)
        if self._weights is not None:
            self._push(replica)

    def _push(self, replica: Replica) -> None:
        """Bring one replica to the current version. Raises Lost, UserError."""
        for _, error in self._give([replica]):
            raise error

    def _push_all(self, version: int) -> None:
        """Bring all replicas to the current version; those that do not take it are replaced.

        Raises:
            UserError: none takes it, so that it is the version's fault.
        """
        failed = self._give(self._replicas)
        refusals = [error for _, error in failed if isinstance(error, UserError)]
        if refusals and len(failed) == len(self._replicas):
            for index in (i for i, error in failed if isinstance(error, Lost)):
                self._replicas[index].process.kill()  # another one is started when it is needed
            raise UserError(str(refusals[0]))  # not one of `failed`: that would hold itself, and with it the version
        for index, error in failed:
            if isinstance(error, UserError):
                error = Lost(f"refuses version {version}, which others hold: {error}")
            self._replace(index, error)

    def _give(self, replicas: Sequence[Replica]) -> list[tuple[int, Lost | UserError]]:
        """Send the current version to replicas at the same time; those that do not hold it then, and why."""
        assert self._weights is not None
        failed: list[tuple[int, Lost | UserError]] = []
        for replica in replicas:
            self._tell_watch(replica, "load")
        for replica, answer in self._broadcast.send(self._weights, replicas, self.patience):
            index = self._replicas.index(replica)
            if isinstance(answer, Status):
                self._warn(index, answer)
                self._tell_watch(replica, "generate" if replica.busy else "idle")
            else:
                failed.append((index, answer))
        return failed

    def _ask(self, replica: Replica) -> None:
        """Give it what it still has to do of the stream under way. Raises Lost."""
        assert self._job is not None
        wanted = self._job.pending[self._replicas.index(replica)]
        if wanted:
            replica.send("stream", list(self._job.prompts), self._job.sampling, self._job.n, sorted(wanted))
            replica.busy = True
            self._tell_watch(replica, "generate")
            self._paces.begin(self._replicas.index(replica), time.perf_counter())

    def _try(self, index: int, action: Callable[[Replica], Any]) -> Any:
        """Do something with a replica; where it turns out to be lost, its successor is brought to the same state."""
        try:
            return action(self._replicas[index])
        except Lost as reason:
            self._replace(index, reason)

    def _replace(self, index: int, reason: Lost) -> None:
        """Another process in its place, with the current version and the samples that it had not delivered.

        Raises:
            ReplicasLost: too many in a row. UserError: the successor refuses to start.
        """
        wanted = len(self._job.pending[index]) if self._job is not None else 0
        while True:
            self.lost += 1
            self.rerun += wanted
            self._losses[index] += 1
            self._replicas[index].kill()
            self._tell_watch(self._replicas[index], "lost")
            if (losses := self._losses[index]) > self.patience.losses:
                raise ReplicasLost(f"Replica {index} of the rollout engine {reason}; {losses} were lost in a row")
            self.warnings.append(f"Replica {index} {reason}. Another one takes its place; {wanted} samples run again")
            try:
                self._replicas[index] = replica = self._starter.begin(self._order, self.patience)()
                self._make(replica)
                self._tell_watch(replica, "idle")
                if self._job is not None:
                    self._ask(replica)
                return
            except Lost as again:
                reason = again

    def _listen(self, job: Job) -> list[Rollout]:
        """What the busy replicas have to say, waiting a moment for it; replaces those that are lost."""
        busy = {r.connection: i for i, r in enumerate(self._replicas) if r.busy}
        started, unread = time.perf_counter(), any(r.inbox for r in self._replicas)
        ready = wait(list(busy), 0.0 if unread else TICK_S)
        waited = time.perf_counter() - started
        rollouts: list[Rollout] = []
        for connection, index in busy.items():
            replica = self._replicas[index]
            try:
                if connection in ready:
                    replica.inbox.append(replica.hear(0.0))
                else:
                    replica.wait(waited, self.patience.silence_s)
                while replica.inbox:
                    rollouts += self._take(index, replica.inbox.popleft(), job)
            except Lost as reason:
                self._replace(index, reason)
        return rollouts

    def _take(self, index: int, message: Message, job: Job) -> list[Rollout]:
        """Act on a message of the stream; the rollout that it brought, if any. Raises Lost, UserError."""
        kind, status, *content = message
        replica, pending = self._replicas[index], job.pending[index]
        self._count(index, status)
        if kind == "refused":
            raise UserError(content[1])
        if kind == "rollout":
            if fault := nonsense(content[0], job, pending, self._vocabulary):
                raise Lost(f"talks nonsense: {fault}")
            pending.discard((content[0].prompt_index, content[0].sample_index))
            self._losses[index] = 0
            self._paces.delivered(index, len(content[0].tokens), time.perf_counter())
            return [content[0]]
        if kind == "done":
            replica.busy = False
            self._tell_watch(replica, "idle")
            if pending:
                raise Lost(f"says that it is done, with {len(pending)} samples missing")
        return []

    def _count(self, index: int, status: Status) -> None:
        """Add what a replica has counted since its last message."""
        replica = self._replicas[index]
        added = status.counters.minus(replica.counted)
        added.seconds = 0.0  # they pass side by side
        self.counters = self.counters.plus(added)
        replica.counted, replica.metrics = status.counters, status.metrics
        self._warn(index, status)

    def _warn(self, index: int, status: Status) -> None:
        self.warnings += [f"Replica {index}: {warning}" for warning in status.warnings]

    def _call_off(self) -> None:
        """Nobody wants the rest of the stream. A replica that does not stop is ended; one is started when needed."""
        for replica in [r for r in self._replicas if r.busy]:
            replica.busy = False
            self._tell_watch(replica, "idle")
            try:
                replica.send("abort")
                while replica.hear(self.patience.silence_s)[0] not in ("done", "refused"):
                    pass
            except Lost:
                replica.process.kill()
            replica.inbox.clear()

    def _tell_watch(self, replica: Replica, state: str) -> None:
        version = self._held.version if self._weights is None else self._weights.version
        self.on_state(f"replica {self._replicas.index(replica)}", state, version)

    def _tell_busy(self, order: str) -> None:
        for index, replica in enumerate(self._replicas):
            if replica.busy:
                self._try(index, lambda r: r.send(order))


def nonsense(rollout: Rollout, job: Job, pending: set[tuple[int, int]], vocabulary: int) -> str:
    """Why a rollout cannot be an answer to what was asked; "" when it can."""
    name = f"sample {rollout.sample_index} of prompt {rollout.prompt_index}"
    count, limit = len(rollout.tokens), job.sampling.max_new_tokens
    if (rollout.prompt_index, rollout.sample_index) not in pending:
        return f"{name} was not asked of it, or came twice"
    if rollout.prompt_ids != job.prompts[rollout.prompt_index]:
        return f"{name} has another prompt"
    if not 1 <= count <= limit or count != len(rollout.logprobs) or count != len(rollout.versions):
        return (
            f"{name} has {count} tokens of at most {limit}, {len(rollout.logprobs)} log-probabilities and "
            f"{len(rollout.versions)} versions"
        )
    if not 0 <= min(rollout.tokens) <= max(rollout.tokens) < vocabulary:
        return f"{name} holds a token id outside 0 .. {vocabulary - 1}"
    if not all(isfinite(x) and x <= CERTAIN for x in rollout.logprobs):
        return f"{name} has a log-probability that is not finite, or above 0"
    if not job.versions.issuperset(rollout.versions):
        return f"{name} is of versions {sorted(set(rollout.versions))}; it should be of {sorted(job.versions)}"
    return ""


def _checksums(policy: Policy, drafter: Drafter | None) -> dict[str, str]:
    sums = {"policy": checksum(policy.model.state_dict())}
    return sums if drafter is None else sums | {"draft": checksum(drafter.state_dict())}


def _save(policy: Policy, drafter: Drafter | None, speculation: SpeculationConfig, folder: Path) -> dict[str, Any]:
    """Write both; the speculation block with the drafter's new place."""
    save_policy(policy, folder / "policy")
    if drafter is None:
        return {"method": "none"}
    block = speculation.model_dump(mode="json")
    if drafter.state_dict():
        with disk_errors(folder):
            drafter.save(folder / "drafter", {})
        block["draft"] = str(folder / "drafter")
    return block
