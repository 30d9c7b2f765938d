"""A learner in processes of its own, its model sharded over them: the parent's end. Has the methods of `Learner`.

Rows are given out by tokens (`parallel.split_rows`); every rank answers for its own. With tensor parallelism
consecutive ranks run the same rows, and the first of them answers. After an update the ranks stream the new weights
into the parent's policy, which generates, is evaluated and is saved. All ranks live and die together: one that ends, or
falls silent, ends the group (`RanksLost`); the parent's policy may then hold parts of two versions.
Rounding differs from one process: bfloat16 weights are the nearest to their masters, not rounded at random.
Where the processes come from is a `Launcher`'s (`local.py`). A drafter may train beside the policy in the same ranks
(`cotrain_distributed.py`). Left out: another group in place of a lost one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from forerun.config import DraftConfig, RolloutConfig, TrainConfig
from forerun.errors import Interrupted, UserError
from forerun.events import Counting, finish
from forerun.learner.learner import Learner
from forerun.learner.lora import LoraAdapter
from forerun.learner.objective import Objective, Scored, Update, UpdateResult
from forerun.learner.parallel import split_rows
from forerun.models import Policy
from forerun.tracking.files import disk_errors
from forerun.types import Rollout
from forerun.workers.local import Job, Launcher, Nursery, RanksLost
from forerun.workers.scratch import ScratchFolder
from forerun.workers.wire import Message, pack, receive, send, unpack

if TYPE_CHECKING:
    from forerun.learner.cotrain_worker import Taught

START_S = 600.0  # until the ranks have their model; to write or read a checkpoint
TICK_S = 0.1  # the longest wait between two looks at all ranks
LAST_WORDS_S = 5.0  # until it is known how a rank ended, when one is gone


class _Gone(Exception):
    """A rank cannot be talked to."""


@dataclass(slots=True)
class RankHandle:
    """The parent's end of one rank."""

    connection: Connection
    done: int = 0  # rows of the order under way
    silent_s: float = 0.0  # listened to in vain
    gone: bool = False  # nothing more will be heard
    failed: tuple[float, str] | None = None  # when, and what it said of it

    def hear(self) -> Message:
        """Its next message. Raises _Gone."""
        try:
            message = receive(self.connection)
        except (EOFError, OSError):
            self.gone = True
            raise _Gone from None
        self.silent_s = 0.0
        if message[0] == "failed":
            self.failed, self.gone = (message[1], message[2]), True
            raise _Gone
        return message

    def drain(self) -> None:
        """Hear what it has said, for the sake of how it ended."""
        with contextlib.suppress(_Gone):
            while not self.gone and self.connection.poll():
                self.hear()


def make_learner(
    policy: Policy, config: TrainConfig, rollout: RolloutConfig, launcher: Launcher | None = None
) -> Learner | LearnerGroup:
    """The learner that `train.ranks` asks for.

    Args:
        rollout: how the engine samples. launcher: where its ranks come from; None: this machine.

    Raises:
        UserError: the machine has too few GPUs, or the policy cannot be packed.
    """
    if config.ranks == 1:
        return Learner(policy, config, rollout.temperature, max_new_tokens=rollout.max_new_tokens)
    return LearnerGroup(policy, config, rollout.temperature, launcher, rollout.max_new_tokens)


class LearnerGroup:
    """`Learner`, over `config.ranks` processes. Any method but `close` raises RanksLost."""

    adapter: LoraAdapter | None = None  # `train.lora` is for one process

    def __init__(
        self,
        policy: Policy,
        config: TrainConfig,
        temperature: float,
        launcher: Launcher | None = None,
        max_new_tokens: int = 1,
    ) -> None:
        """Start the ranks with the weights of `policy`.

        Args:
            launcher: where they come from; None: this machine. max_new_tokens: see `Learner`.

        Raises:
            UserError: there are too few GPUs, the ranks cannot be placed, or the policy cannot be packed.
        """
        self.policy, self.config = policy, config
        self.objective = Objective(config, max_new_tokens)
        self._ranks: list[RankHandle] = []
        module = type(policy.model).__module__
        job = Job(config.ranks, policy.device, module, config.silence_s, START_S)
        self._processes = (launcher or Nursery()).start(job)
        self._make(temperature)

    # ---- the methods of Learner ----

    def score(
        self,
        rollouts: Sequence[Rollout],
        batches: Sequence[Sequence[int]] = (),
    ) -> Counting[Scored]:
        """See `Learner.score`. `batches`: of rollouts, from which the ranks keep what `study` learns from."""
        parts = self._split(rollouts, range(len(rollouts)))
        orders = [("score", [rollouts[i] for i in part], _within(batches, part)) for part in parts]
        answers = yield from self._run(self._for_all(orders))
        return _merge(rollouts, parts, [answer[1] for answer in answers[:: self.config.tensor_parallel]])

    def update(
        self,
        rollouts: Sequence[Rollout],
        advantages: Tensor,  # [P·n]
        scored: Scored,
        learning_rate: float,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> Counting[dict[str, float]]:
        """See `Learner.update`. A request to stop that comes after the first optimizer step is left to the caller."""
        update, result = self.objective.plan(rollouts, advantages, scored), UpdateResult()
        if update.chunks:
            if stop_requested():
                raise Interrupted
            result = yield from self._update(update, learning_rate, stop_requested)
        return self.objective.metrics(update, result, learning_rate, scored)

    def save(self, folder: Path) -> None:
        """Write masters, moments and reference, each rank its part. Raises UserError, RanksLost."""
        self._all_agree("save", str(folder.absolute()))

    def restore(self, folder: Path) -> None:
        """Go on from what `save`, on any number of ranks, or `Learner.save` wrote; the policy follows.

        Raises:
            UserError: the checkpoint is broken. RanksLost.
        """
        self._all_agree("restore", str(folder.absolute()))
        self._fetch("weights", self.policy.model)

    # ---- a drafter beside the policy, see `cotrain_distributed.py` ----

    def enrol(self, head: nn.Module, config: DraftConfig) -> None:
        """Have every rank hold this drafter from here on. Raises RanksLost."""
        self._all_agree("enrol", pack(head), config)

    def study(self, head: nn.Module) -> list[Taught]:
        """Have the ranks train it on what the last `score` taught; `head` follows. Raises UserError, RanksLost."""
        answers = finish(self._run([("study",)] * self.config.ranks))
        self._fetch("drafter", head)
        self._agree(answers)
        return [answer[1] for answer in answers]

    def compare(self, held: Sequence[str], received: str) -> None:
        """Checksums of the ranks' drafters, and of what they sent. Raises RanksLost when they are not one."""
        if set(held) != {received}:
            self._end(f"The learner's ranks hold drafters {', '.join(held)} and have sent {received}")

    def draft_optimizer(self) -> dict[str, Any]:
        """State of the drafter's optimizer, on the CPU. Raises RanksLost."""
        answers = finish(self._run([("note",)] * self.config.ranks, limit_s=START_S))
        state: dict[str, Any] = unpack(answers[0][1])
        return state

    def set_draft_optimizer(self, state: dict[str, Any], head: nn.Module) -> None:
        """Inverse of `draft_optimizer`; the drafter follows. Raises UserError, RanksLost."""
        self._all_agree("recall", pack(state))
        self._fetch("drafter", head)

    def close(self) -> None:
        """End all ranks at once."""
        self._processes.close()
        self._ranks = []

    @property
    def pids(self) -> list[int]:
        """Of the ranks, each on its own machine."""
        return self._processes.pids

    def _make(self, temperature: float) -> None:
        """Have every rank build its part. Raises UserError, RanksLost."""
        from forerun.learner.fsdp import blueprint, store_weights
        from forerun.learner.worker import Order  # FSDP2 and checkpoints load slowly

        plan, patience_s = blueprint(self.policy), max(START_S, self.config.silence_s)
        try:
            with ScratchFolder() as folder:
                with disk_errors(file := folder / "weights.pt"):
                    store_weights(self.policy, file)
                places = self._processes.settle(file)
                self._ranks = [RankHandle(connection) for connection in self._processes.connections]
                orders = [
                    Order(plan, self.config, temperature, rank, len(places), place, patience_s)
                    for rank, place in enumerate(places)
                ]
                self._agree(finish(self._run([("make", order) for order in orders], limit_s=patience_s)))
        except BaseException:
            self.close()
            raise

    # ---- orders ----

    def _run(
        self,
        orders: Sequence[Message],
        idle: Callable[[], None] = lambda: None,
        limit_s: float | None = None,
    ) -> Counting[list[Message]]:
        """Give each rank its order and await its answer.

        Args:
            idle: called several times a second.
            limit_s: of silence; None: the recipe's.

        Raises:
            RanksLost: a rank ended, or was silent for too long.
        """
        if not self._ranks:
            raise RanksLost("The learner's ranks were ended; make a new learner")
        answers: dict[int, Message] = {}
        done = 0
        for number, (rank, order) in enumerate(zip(self._ranks, orders, strict=True)):
            rank.done, rank.silent_s = 0, 0.0
            self._send(number, order)
        while len(answers) < len(self._ranks):
            open_ranks = {rank.connection: i for i, rank in enumerate(self._ranks) if i not in answers}
            started = time.perf_counter()
            ready = wait(list(open_ranks), TICK_S)
            waited = min(time.perf_counter() - started, 2 * TICK_S)  # not what this process slept itself
            for connection, number in open_ranks.items():
                if connection in ready:
                    done += self._take(number, answers)
                    yield done
                else:
                    self._ranks[number].silent_s += waited
            self._check_silence([i for i in open_ranks.values() if i not in answers], limit_s or self.config.silence_s)
            idle()
        return [answers[i] for i in range(len(self._ranks))]

    def _send(self, number: int, order: Message) -> None:
        try:
            send(self._ranks[number].connection, order)
        except OSError:
            self._lose(number)

    def _take(self, number: int, answers: dict[int, Message]) -> int:
        """Act on a rank's next message; how many more sequences are done. Raises RanksLost."""
        rank = self._ranks[number]
        try:
            message = rank.hear()
            if message[0] == "piece":
                self._place(message[1], message[2], rank.connection.recv_bytes())
            elif message[0] == "tick":
                more, rank.done = message[1] - rank.done, max(rank.done, message[1])
                return max(0, more) if number % self.config.tensor_parallel == 0 else 0
            else:
                answers[number] = message
        except (_Gone, EOFError, OSError):
            self._lose(number)
        return 0

    def _check_silence(self, waiting: list[int], limit_s: float) -> None:
        """A rank that hangs makes the others hang that wait for it: the one that fell silent first is named."""
        silent = max(waiting, key=lambda i: self._ranks[i].silent_s, default=None)
        if silent is not None and self._ranks[silent].silent_s > limit_s:
            self._end(f"Rank {silent} of the learner has been silent for {self._ranks[silent].silent_s:.0f} s")

    def _all_agree(self, *order: Any) -> None:
        self._agree(finish(self._run([order] * self.config.ranks, limit_s=START_S)))

    def _agree(self, answers: list[Message]) -> None:
        """Raises UserError when the ranks have refused."""
        for kind, *content in answers:
            if kind == "refused":
                raise UserError(content[0])

    def _lose(self, number: int) -> NoReturn:
        """A rank cannot be talked to: find out which was lost first, and end all.

        One that went without a word was killed; those that failed by its loss have said so, and when.
        """
        until = time.perf_counter() + LAST_WORDS_S
        while True:
            ended = self._processes.ended()
            for rank in self._ranks:
                rank.drain()
            mute = [i for i, rank in enumerate(self._ranks) if rank.gone and rank.failed is None]
            told = all(i in ended for i in mute) if mute else all(rank.gone for rank in self._ranks)
            if told or time.perf_counter() > until:
                break
            time.sleep(0.02)
        failed = sorted((r.failed[0], i) for i, r in enumerate(self._ranks) if r.failed is not None)
        first = mute[0] if mute else failed[0][1] if failed else number
        words = self._ranks[first].failed
        last = words[1] if words is not None else self._processes.last_line(first)
        how = ended.get(first, "cannot be talked to")
        self._end(f"Rank {first} of the learner {how}{f': {last}' if last else ''}")

    def _end(self, sentence: str) -> NoReturn:
        self.close()
        raise RanksLost(f"{sentence}; all {self.config.ranks} were ended")

    # ---- updates ----

    def _split(self, rollouts: Sequence[Rollout], chosen: Sequence[int]) -> list[list[int]]:
        """Of the chosen rollouts those of each group of ranks."""
        lengths = [len(rollouts[i].prompt_ids) + len(rollouts[i].tokens) for i in chosen]
        return [[chosen[j] for j in part] for part in split_rows(lengths, self.config.data_parallel)]

    def _for_all(self, orders: Sequence[Message]) -> list[Message]:
        """Each order for all ranks of its group."""
        return [order for order in orders for _ in range(self.config.tensor_parallel)]

    def _update(
        self, update: Update, learning_rate: float, stop_requested: Callable[[], bool]
    ) -> Counting[UpdateResult]:
        """Have the ranks carry out an update, and take their weights over."""
        told = False

        def idle() -> None:
            nonlocal told
            if not told and stop_requested():
                told = True
                for number in range(len(self._ranks)):
                    self._send(number, ("stop",))

        chunks = [self._split(update.rollouts, chunk) for chunk in update.chunks]
        shares = [_share(update, [parts[group] for parts in chunks]) for group in range(self.config.data_parallel)]
        orders = self._for_all([("train", share, learning_rate) for share in shares])
        answers = yield from self._run(orders, idle)
        if answers[0][0] == "interrupted":
            raise Interrupted
        self._fetch("weights", self.policy.model)
        self._agree(answers)
        parts: list[UpdateResult] = [answer[1] for answer in answers[:: self.config.tensor_parallel]]
        result = UpdateResult(norms=parts[0].norms)
        for part in parts:
            result.add(part.sums, part.tokens)
        return result

    def _fetch(self, order: str, module: nn.Module) -> None:
        """Take the ranks' weights over, in place. Raises RanksLost."""
        self._targets = {name: p.detach() for name, p in module.named_parameters()}
        self._missing = {name: p.numel() for name, p in self._targets.items()}
        finish(self._run([(order,)] * self.config.ranks))
        incomplete = [name for name, count in self._missing.items() if count]
        self._targets = {}
        if incomplete:
            self._end(f"Rank 0 of the learner sent {len(incomplete)} parameters only in part: {', '.join(incomplete)}")

    def _place(self, name: str, start: int, data: bytes) -> None:
        """Put a piece of a parameter in its place."""
        target = self._targets[name].view(-1)
        values = torch.frombuffer(bytearray(data), dtype=target.dtype)
        target[start : start + len(values)] = values.to(target.device)
        self._missing[name] -= len(values)


def _within(batches: Sequence[Sequence[int]], part: list[int]) -> list[list[int]]:
    """Which of a rank's rollouts are in each batch."""
    place = {i: number for number, i in enumerate(part)}
    return [[place[i] for i in batch if i in place] for batch in batches]


def _share(update: Update, chunks: list[list[int]]) -> Update:
    """What a rank needs of an update: the rollouts of its chunks, renumbered, with their targets."""
    chosen = [i for chunk in chunks for i in chunk]
    place = {i: number for number, i in enumerate(chosen)}
    return replace(
        update,
        rollouts=[update.rollouts[i] for i in chosen],
        targets=[update.targets[i].clone() for i in chosen],
        chunks=[[place[i] for i in chunk] for chunk in chunks],
    )


def _merge(rollouts: Sequence[Rollout], parts: list[list[int]], scored: list[Scored]) -> Scored:
    """What the ranks found, in the order of the batch."""
    own, entropies = [torch.empty(0)] * len(rollouts), [0.0] * len(rollouts)
    reference = None if scored[0].reference is None else list(own)
    for part, found in zip(parts, scored, strict=True):
        for place, i in enumerate(part):
            own[i], entropies[i] = found.logprobs[place], found.entropies[place]
            if reference is not None and found.reference is not None:
                reference[i] = found.reference[place]
    lengths = [len(r.tokens) for r in rollouts]
    mean = sum(e * n for e, n in zip(entropies, lengths, strict=True)) / max(1, sum(lengths))
    return Scored(own, reference, mean, entropies)
