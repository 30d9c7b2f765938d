"""What runs in the processes of a sharded learner: a nursery that imports once and forks the ranks, and a rank.

All ranks carry out the same order at the same time, each on its own rows; they meet in FSDP2's collectives. A rank says
so after every micro-batch, parameter and order, which is why a hung one falls silent. The nursery tells how each rank
ended, and ends all of them when the parent is gone, also one that is stopped (its parent's end: `local.py`); a rank
may have been started otherwise, too (`run_rank`). Left out: who listens (`distributed.py`).

    to a rank    make, score, train, stop, weights, save, restore; enrol, study, drafter, note, recall
    from it      ready, tick, scored, trained, interrupted, studied, noted, piece (+ bytes), sent, done, refused, failed

The second five are for a drafter that trains beside the policy (`cotrain_worker.py`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from forerun.config import DraftConfig, TrainConfig
from forerun.errors import Interrupted, UserError
from forerun.events import Counting, T
from forerun.learner.fsdp import Blueprint, build_sharded, load_shards, load_whole, save_shards, whole_parameters
from forerun.learner.learner import SHARDS, Learner
from forerun.learner.objective import Scored, Update
from forerun.learner.parallel import most_over_ranks
from forerun.models import Policy
from forerun.models.logprobs import completion_logits
from forerun.types import Rollout
from forerun.workers.local import Place
from forerun.workers.wire import pack, receive, send, unpack

if TYPE_CHECKING:
    from forerun.learner.cotrain_worker import Pupil

CHUNK_BYTES = 16 * 2**20  # of weights per message


@dataclass(frozen=True, slots=True)
class Order:
    """How a rank makes its part of the learner."""

    plan: Blueprint
    config: TrainConfig
    temperature: float
    rank: int
    count: int
    place: Place
    patience_s: float  # for another rank


class Server:
    """Carries out orders until the parent is gone."""

    def __init__(self, connection: Connection, order: Order) -> None:
        self.connection, self.order = connection, order
        self._stop = False
        device, plan, file = torch.device(order.place.device), order.plan, Path(order.place.weights)
        sizes = (order.config.data_parallel, order.config.tensor_parallel)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("dp", "tp"))
        policy = Policy(build_sharded(plan, file, mesh, device, learns=True), None, plan.name)
        reference = build_sharded(plan, file, mesh, device, learns=False) if order.config.kl > 0 else None
        self.learner = Learner(policy, order.config, order.temperature, reference, most_over_ranks)
        self.model = policy.model
        self.pupil: Pupil | None = None

    def run(self) -> None:
        """Raises EOFError or ConnectionError when the parent is gone."""
        self.tell("ready")
        orders: dict[str, Callable[..., None]] = {
            "score": self.score, "train": self.train, "stop": self.stop, "weights": self.weights,
            "save": self.save, "restore": self.restore, "enrol": self.enrol, "study": self.study,
            "drafter": self.drafter, "note": self.note, "recall": self.recall,
        }  # fmt: skip
        while True:
            kind, *content = receive(self.connection)
            if kind != "stop":
                self.tell("tick", 0)  # who waits for another rank from here on is not the one that hangs
            try:
                orders[kind](*content)
            except UserError as error:
                self.tell("refused", str(error))

    def tell(self, *message: Any) -> None:
        """The kind first."""
        send(self.connection, message)

    def score(self, rollouts: list[Rollout], batches: list[list[int]]) -> None:
        """This rank's rows of a batch; `batches` of them are kept for the drafter, see `Pupil.listen`."""
        forward = completion_logits if self.pupil is None else self.pupil.listen(rollouts, batches)
        scored = self._report(self.learner.score(rollouts, forward))
        own = [x.cpu().clone() for x in scored.logprobs]  # not the storage that they are views of
        reference = None if scored.reference is None else [x.cpu().clone() for x in scored.reference]
        self.tell("scored", Scored(own, reference, scored.entropy, scored.entropies))

    def train(self, update: Update, learning_rate: float) -> None:
        """This rank's part of an update."""
        self._stop = False
        try:
            result = self._report(self.learner.apply(update, learning_rate, self.stop_requested))
        except Interrupted:
            self.tell("interrupted")
        else:
            self.tell("trained", result)

    def _report(self, work: Counting[T]) -> T:
        """Run work to its end; its result. Every yield is passed on."""
        while True:
            try:
                done = next(work)
            except StopIteration as end:
                result: T = end.value
                return result
            self.tell("tick", done)

    def stop_requested(self) -> bool:
        """Whether the parent wants the update under way to be left."""
        while self.connection.poll():
            kind, *_ = receive(self.connection)
            assert kind == "stop", kind
            self.stop()
        return self._stop

    def stop(self) -> None:
        """Leave the update under way; one that has ended is left alone."""
        self._stop = True

    def weights(self) -> None:
        """Give out the policy, in the dtype that generates: rank 0 sends what all of them gather."""
        self._give_out(whole_parameters(self.model, self.order.plan.dtype))

    def _give_out(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, whole in tensors:
            self.tell("tick", 0)
            if self.order.rank == 0:
                for start, part in _pieces(whole):
                    self.tell("piece", name, start)
                    self.connection.send_bytes(part.view(torch.uint8).numpy().data)
        self.tell("sent")

    def save(self, folder: str) -> None:
        """Write this rank's part into the folder of a checkpoint."""
        save_shards(Path(folder) / SHARDS, self.model, self.learner.optimizer, self.learner.reference)
        self.tell("done")

    def restore(self, folder: str) -> None:
        """Go on from a checkpoint of any number of ranks, or of one process."""
        state = (self.model, self.learner.optimizer, self.learner.reference)
        if (Path(folder) / SHARDS).is_dir():
            load_shards(Path(folder) / SHARDS, *state)
        else:
            load_whole(Path(folder), *state)
        self.tell("done")

    # ---- a drafter beside the policy ----

    def enrol(self, head: bytes, config: DraftConfig) -> None:
        """Hold a drafter, in place of an earlier one."""
        from forerun.learner.cotrain_worker import Pupil  # drafters load slowly

        learner, dtype = self.learner, self.order.plan.dtype
        drafter = unpack(head, learner.policy.device)
        self.pupil = Pupil(drafter, learner.policy, dtype, config, learner.config, learner.temperature)
        self.tell("done")

    def study(self) -> None:
        """Train the drafter on what the last scoring taught."""
        assert self.pupil is not None
        self.tell("studied", self.pupil.study(lambda: self.tell("tick", 0)))

    def drafter(self) -> None:
        """Give out the drafter's weights."""
        assert self.pupil is not None
        self._give_out((name, p.detach().cpu()) for name, p in self.pupil.head.named_parameters())

    def note(self) -> None:
        """Give out the drafter's optimizer, which is the same on every rank: rank 0 does."""
        assert self.pupil is not None
        self.tell("noted", pack(self.pupil.optimizer.state_dict()) if self.order.rank == 0 else None)

    def recall(self, state: bytes) -> None:
        """Inverse of `note`; the drafter follows. Raises UserError when the state is of another drafter."""
        assert self.pupil is not None
        try:
            self.pupil.optimizer.load_state_dict(unpack(state))
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"The state of the drafter's optimizer does not fit the drafter: {error}") from None
        self.tell("done")


def _pieces(tensor: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """(first element, flat slice) of at most `CHUNK_BYTES` each."""
    flat = tensor.contiguous().view(-1)
    size = max(1, CHUNK_BYTES // flat.element_size())
    return [(start, flat[start : start + size]) for start in range(0, len(flat), size)]


def _be_rank(connection: Connection, store: dist.Store | None, built: Callable[[], None]) -> None:
    """A rank's life."""
    _, order = receive(connection)
    place, patience = order.place, timedelta(seconds=order.patience_s)
    torch.set_num_threads(place.threads)
    device = torch.device(place.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = store or _met(place.meeting, order)
    store.set_timeout(patience)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=order.rank, world_size=order.count, timeout=patience)
    try:
        server = Server(connection, order)
    except UserError as error:
        send(connection, ("refused", str(error)))
        return
    built()
    server.run()


def _met(meeting: str, order: Order) -> dist.Store:
    """The store at which the ranks meet; the same kind of access for all, or they would not find each other's keys."""
    kind, where = meeting.split("://")
    if kind == "file":
        return dist.FileStore(where, order.count)
    host, _, port = where.rpartition(":")
    return dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=order.patience_s))


def run_rank(connection: Connection, store: dist.Store | None, built: Callable[[], None]) -> NoReturn:
    """A rank from start to end. It leaves without tidying up: its peers may be gone, and wait for nobody.

    Args:
        store: where all ranks meet, when this process holds it.
        built: called, perhaps twice, when the file of weights is not needed any more.
    """
    code = 1
    try:
        _be_rank(connection, store, built)
        code = 0
    except (EOFError, ConnectionError):
        code = 0  # the parent is gone
    except BaseException as error:
        failed_at = time.time()  # about the same in all ranks: the first to fail is the one to name
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        with contextlib.suppress(OSError):  # the parent is gone as well
            send(connection, ("failed", failed_at, f"{type(error).__name__}: {lines[0]}"))
    finally:
        built()
        sys.stderr.flush()
        os._exit(code)


def _end_with(lifeline: int, ranks: dict[int, int]) -> None:
    """Wait until the parent's end of a pipe is closed, then end the ranks."""
    os.read(lifeline, 1)
    for pid in list(ranks):
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    """The nursery: `lifeline, module of the model, folder for logs, sockets of the ranks`.

    Prints `pids ...` and `ended rank code`.
    """
    lifeline, module, folder, *sockets = sys.argv[1:]
    importlib.import_module(module)
    connections = [Connection(int(number)) for number in sockets]
    ranks: dict[int, int] = {}  # by process id
    for rank, connection in enumerate(connections):
        pid = os.fork()  # nothing has been computed yet: no threads, no CUDA
        if pid == 0:
            for other in connections:
                if other is not connection:
                    other.close()
            log = os.open(Path(folder) / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            run_rank(connection, None, lambda: None)
        ranks[pid] = rank
    print("pids", *ranks, flush=True)  # in the order of the ranks
    for connection in connections:
        connection.close()
    threading.Thread(target=_end_with, args=(int(lifeline), ranks), daemon=True).start()
    while ranks:
        pid, status = os.wait()
        print("ended", ranks.pop(pid), os.waitstatus_to_exitcode(status), flush=True)
