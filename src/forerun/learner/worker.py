"""A rank of a sharded learner: the requests that it answers in its worker process.

All ranks carry out the same request at the same time, each on its own rows; they meet in FSDP2's collectives. A rank
sends "progress" after every request, micro-batch and parameter, so that a hung one falls silent. `distributed.py` is
the driver's side, `cotrain_worker.py` a drafter that trains with the policy.

    requests    check_folder, build; score, update, stop, send_policy, save, restore;
                add_drafter, train_drafter, send_drafter, get_draft_optimizer, set_draft_optimizer
    replies     answer (of any request), interrupted (of an update); progress; pieces (and their frames)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from forerun.config import DraftConfig, TrainConfig
from forerun.errors import Interrupted, UserError
from forerun.events import CountStream, T
from forerun.learner.fsdp import Blueprint, build_sharded, load_shards, load_whole, save_shards, whole_parameters
from forerun.learner.learner import SHARDS, WEIGHTS, Learner
from forerun.learner.objective import Scored, Update
from forerun.learner.parallel import all_reduce_max
from forerun.learner.shared_folder import folder_fault
from forerun.models import Policy
from forerun.models.logprobs import completion_logits
from forerun.types import Rollout
from forerun.workers.handle import LOOPBACK
from forerun.workers.server import Requests, Server
from forerun.workers.weights import chunks_of, send_pieces
from forerun.workers.wire import pack, unpack

if TYPE_CHECKING:
    from forerun.learner.cotrain_worker import RankCoTrainer


@dataclass(frozen=True, slots=True)
class RankSpec:
    """How a rank makes its part of the learner."""

    plan: Blueprint
    config: TrainConfig
    temperature: float
    rank: int
    count: int
    device: str
    address: str  # of its machine, as the other ranks reach it
    store: tuple[str, int]  # where the ranks meet: address, port
    timeout_s: float  # of waiting for another rank


def serve_rank(server: Server) -> Requests:
    """The factory of a rank."""
    return Rank(server).requests


class Rank:
    """Answers requests for one part of a learner."""

    spec: RankSpec
    learner: Learner
    drafter: RankCoTrainer | None = None

    def __init__(self, server: Server) -> None:
        self.server = server
        self._stop = False
        work: list[Callable[..., None]] = [
            self.check_folder, self.build,
            self.score, self.update, self.send_policy, self.save, self.restore,
            self.add_drafter, self.train_drafter, self.send_drafter,
            self.get_draft_optimizer, self.set_draft_optimizer,
        ]  # fmt: skip
        self.requests: Requests = {method.__name__: self._announced(method) for method in work} | {"stop": self.stop}

    def _announced(self, method: Callable[..., None]) -> Callable[..., None]:
        """The method after a sign that it begins: a rank that waits in it for another one is not the one that hangs."""

        def carry_out(*content: Any) -> None:
            self._progress(0)
            method(*content)

        return carry_out

    def _answer(self, result: Any = None) -> None:
        self.server.send("answer", result)

    def _progress(self, sequences: int) -> None:
        self.server.send("progress", sequences)

    # ---- start ----

    def check_folder(self, file: str, content: str) -> None:
        """See `folder_fault`."""
        self._answer(folder_fault(Path(file), content))

    def build(self, spec: RankSpec) -> None:
        """Meet the other ranks, and build this rank's part of the learner."""
        self.spec = spec
        device = torch.device(spec.device)
        self._meet(device)
        sizes = (spec.config.data_parallel, spec.config.tensor_parallel)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("dp", "tp"))
        file = Path(self.server.files[WEIGHTS])
        policy = Policy(build_sharded(spec.plan, file, mesh, device, learns=True), None, spec.plan.name)
        reference = build_sharded(spec.plan, file, mesh, device, learns=False) if spec.config.kl > 0 else None
        self.learner = Learner(policy, spec.config, spec.temperature, reference, all_reduce_max)
        self.server.remove_files()
        self._answer()

    def _meet(self, device: torch.device) -> None:
        """Join the process group."""
        spec = self.spec
        timeout = timedelta(seconds=spec.timeout_s)
        if name := interface_of(spec.address):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)  # gloo asks for the host's name else, often a loopback
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store = dist.TCPStore(*spec.store, is_master=False, timeout=timeout)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=spec.rank, world_size=spec.count, timeout=timeout)

    # ---- the learner's methods ----

    def score(self, rollouts: list[Rollout], batches: list[list[int]]) -> None:
        """This rank's rows of a batch; for `batches` see `RankCoTrainer.caching_forward`."""
        forward = completion_logits if self.drafter is None else self.drafter.caching_forward(rollouts, batches)
        scored = self._report(self.learner.score(rollouts, forward))
        own = [x.cpu().clone() for x in scored.logprobs]  # not the storage that they are views of
        reference = None if scored.reference is None else [x.cpu().clone() for x in scored.reference]
        self._answer(Scored(own, reference, scored.entropy, scored.entropies))

    def update(self, update: Update, learning_rate: float) -> None:
        """This rank's part of an update."""
        self._stop = False
        try:
            result = self._report(self.learner.apply(update, learning_rate, self._stop_requested))
        except Interrupted:
            self.server.send("interrupted")
        else:
            self._answer(result)

    def stop(self) -> None:
        """Leave the update under way; after its end this does nothing."""
        self._stop = True

    def _stop_requested(self) -> bool:
        """Whether the driver wants the update under way to be left."""
        while self.server.pending():
            self.server.answer()
        return self._stop

    def _report(self, work: CountStream[T]) -> T:
        """Run work to its end; its result. Every yield is passed on."""
        while True:
            try:
                done = next(work)
            except StopIteration as end:
                result: T = end.value
                return result
            self._progress(done)

    def send_policy(self) -> None:
        """Send the weights in the dtype that generates: all ranks gather them, rank 0 sends."""
        self._send("send_policy", whole_parameters(self.learner.policy.model, self.spec.plan.dtype))

    def _send(self, group: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Answers when all of the group has been sent."""

        def gathered() -> Iterable[tuple[str, str, torch.Tensor]]:
            for name, whole in tensors:
                self._progress(0)
                yield group, name, whole

        for pieces in chunks_of(gathered()):
            if self.spec.rank == 0:
                send_pieces(self.server.connection, pieces)
        self._answer()

    def save(self, folder: str) -> None:
        """Write this rank's part into the folder of a checkpoint."""
        learner = self.learner
        save_shards(Path(folder) / SHARDS, learner.policy.model, learner.optimizer, learner.reference)
        self._answer()

    def restore(self, folder: str) -> None:
        """Go on from a checkpoint of any number of ranks, or of one process."""
        state = (self.learner.policy.model, self.learner.optimizer, self.learner.reference)
        if (Path(folder) / SHARDS).is_dir():
            load_shards(Path(folder) / SHARDS, *state)
        else:
            load_whole(Path(folder), *state)
        self._answer()

    # ---- a drafter that trains with the policy ----

    def add_drafter(self, head: bytes, config: DraftConfig) -> None:
        """Hold a drafter, in place of an earlier one."""
        from forerun.learner.cotrain_worker import RankCoTrainer  # drafters load slowly

        learner, dtype = self.learner, self.spec.plan.dtype
        drafter = unpack(head, learner.policy.device)
        self.drafter = RankCoTrainer(drafter, learner.policy, dtype, config, learner.config, learner.temperature)
        self._answer()

    def train_drafter(self) -> None:
        """Train it on what the last scoring kept."""
        assert self.drafter is not None
        self._answer(self.drafter.train(lambda: self._progress(0)))

    def send_drafter(self) -> None:
        """Send its weights."""
        assert self.drafter is not None
        self._send("send_drafter", ((name, p.detach().cpu()) for name, p in self.drafter.head.named_parameters()))

    def get_draft_optimizer(self) -> None:
        """The state of its optimizer, which is the same on every rank: rank 0 sends it."""
        assert self.drafter is not None
        self._answer(pack(self.drafter.optimizer.state_dict()) if self.spec.rank == 0 else None)

    def set_draft_optimizer(self, state: bytes) -> None:
        """Inverse; the drafter follows. Raises UserError when the state is of another drafter."""
        assert self.drafter is not None
        try:
            self.drafter.optimizer.load_state_dict(unpack(state))
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"The state of the drafter's optimizer does not fit the drafter: {error}") from None
        self._answer()


def interface_of(address: str) -> str | None:
    """The network interface that has an address; None where none has, or it is unknown."""
    if address == LOOPBACK:
        return "lo" if sys.platform == "linux" else None
    import psutil  # Ray brings it

    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if address in (a.address for a in addresses)), None)
