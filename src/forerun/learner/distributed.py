"""A learner over worker processes, its model sharded over them: the driver's side. Has the methods of `Learner`.

Rows are split by tokens (`parallel.split_rows`); every rank answers for its own. With tensor parallelism consecutive
ranks run the same rows, and the first of them answers. After an update rank 0 sends the new weights into the driver's
policy, which generates, is evaluated and is saved. The ranks live and die together: one that ends, or falls silent,
ends the group (`RanksLost`); the driver's policy may then hold parts of two versions. Rounding differs from one
process: bfloat16 weights are the nearest to their masters, not rounded at random.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import Store, TCPStore

from forerun.config import DraftConfig, RolloutConfig, TrainConfig
from forerun.errors import Interrupted, UserError
from forerun.events import CountStream, finish
from forerun.learner.learner import WEIGHTS, Learner
from forerun.learner.lora import LoraAdapter
from forerun.learner.objective import Objective, Scored, Update, UpdateResult
from forerun.learner.parallel import split_rows
from forerun.learner.shared_folder import probe_file
from forerun.models import Policy
from forerun.tracking.files import disk_errors
from forerun.types import Rollout
from forerun.workers.devices import rank_gpus
from forerun.workers.group import RankGroup, check_refusals
from forerun.workers.handle import Launcher, Spec, Timeouts
from forerun.workers.local import LocalLauncher
from forerun.workers.scratch import ScratchFolder
from forerun.workers.wire import Message, pack, unpack

if TYPE_CHECKING:
    from forerun.learner.cotrain_worker import RankUpdate
    from forerun.learner.fsdp import Blueprint

FACTORY = "forerun.learner.worker:serve_rank"
START_S = 600.0  # until the ranks have their model; to write or read a checkpoint


def make_learner(
    policy: Policy,
    config: TrainConfig,
    rollout: RolloutConfig,
    launcher: Launcher | None = None,
    run_folder: Path | None = None,
) -> Learner | LearnerGroup:
    """The learner that `train.ranks` asks for; see `LearnerGroup`.

    Args:
        rollout: how the engine samples.

    Raises:
        UserError: the machine has too few GPUs, or the policy cannot be packed.
    """
    if config.ranks == 1:
        return Learner(policy, config, rollout.temperature, max_new_tokens=rollout.max_new_tokens)
    return LearnerGroup(policy, config, rollout.temperature, launcher, rollout.max_new_tokens, run_folder)


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
        run_folder: Path | None = None,
    ) -> None:
        """Start the ranks with the weights of `policy`.

        Args:
            launcher: starts them; None: on this machine. max_new_tokens: see `Learner`.
            run_folder: where ranks on other machines write checkpoints, which all must see; None: is not checked.

        Raises:
            UserError: there are too few GPUs, the ranks cannot be placed, or the policy cannot be packed.
        """
        from forerun.learner.fsdp import blueprint, store_weights  # FSDP2 and checkpoints load slowly

        self.policy, self.config = policy, config
        self.objective = Objective(config, max_new_tokens)
        self.updates = 0  # that were begun
        self._store: Store | None = None  # at which the ranks meet
        launcher = launcher or LocalLauncher()
        devices = rank_devices(policy.device, config.ranks, launcher)
        threads = max(1, torch.get_num_threads() // config.ranks)
        timeouts = Timeouts(config.silence_s, START_S)
        plan = blueprint(policy)
        with ScratchFolder() as folder:
            with disk_errors(file := folder / WEIGHTS):
                store_weights(policy, file)
            spec = Spec(FACTORY, (), {WEIGHTS: file}, threads, timeouts)
            self._ranks = RankGroup("the learner", launcher, config.ranks, spec, config.tensor_parallel)
            try:
                if launcher.remote and run_folder is not None:
                    self._check_folder(run_folder)
                self._build(plan, temperature, devices, launcher.address)
            except BaseException:
                self.close()
                raise

    # ---- the methods of Learner ----

    def score(
        self,
        rollouts: Sequence[Rollout],
        batches: Sequence[Sequence[int]] = (),
    ) -> CountStream[Scored]:
        """See `Learner.score`. `batches`: of rollouts, from which the ranks keep what `train_drafter` learns from."""
        parts = self._split(rollouts, range(len(rollouts)))
        requests = [("score", [rollouts[i] for i in part], _within(batches, part)) for part in parts]
        answers = yield from self._ranks.run(self._for_all(requests))
        return _merge(rollouts, parts, [answer[1] for answer in answers[:: self.config.tensor_parallel]])

    def update(
        self,
        rollouts: Sequence[Rollout],
        advantages: Tensor,  # [P·n]
        scored: Scored,
        learning_rate: float,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> CountStream[dict[str, float]]:
        """See `Learner.update`. A request to stop that comes after the first optimizer step is left to the caller."""
        update, result = self.objective.plan(rollouts, advantages, scored), UpdateResult()
        if update.chunks:
            if stop_requested():
                raise Interrupted
            self.updates += 1  # before: the ranks may be lost in its midst
            result = yield from self._update(update, learning_rate, stop_requested)
        return self.objective.metrics(update, result, learning_rate, scored)

    def save(self, folder: Path) -> None:
        """Write masters, moments and reference, each rank its part. Raises UserError, RanksLost."""
        self._ranks.ask("save", str(folder.absolute()))

    def restore(self, folder: Path) -> None:
        """Go on from what `save`, on any number of ranks, or `Learner.save` wrote; the policy follows.

        Raises:
            UserError: the checkpoint is broken. RanksLost.
        """
        self._ranks.ask("restore", str(folder.absolute()))
        self._fetch("send_policy", self.policy.model)

    # ---- a drafter that trains with the policy, see `cotrain_distributed.py` ----

    def add_drafter(self, head: nn.Module, config: DraftConfig) -> None:
        """Have every rank hold this drafter from here on. Raises RanksLost."""
        self._ranks.ask("add_drafter", pack(head), config)

    def train_drafter(self, head: nn.Module) -> list[RankUpdate]:
        """Have the ranks train it on what the last `score` cached; `head` follows. Raises UserError, RanksLost."""
        answers = finish(self._ranks.run([("train_drafter",)] * self.config.ranks))
        self._fetch("send_drafter", head)
        check_refusals(answers)
        return [answer[1] for answer in answers]

    def check_drafters(self, held: Sequence[str], received: str) -> None:
        """Checksums of the ranks' drafters, and of what they sent. Raises RanksLost when they are not one."""
        if set(held) != {received}:
            self._ranks.end(f"The learner's ranks hold drafters {', '.join(held)} and have sent {received}")

    def draft_optimizer(self) -> dict[str, Any]:
        """State of the drafter's optimizer, on the CPU. Raises RanksLost."""
        state: dict[str, Any] = unpack(self._ranks.ask("get_draft_optimizer")[0])
        return state

    def set_draft_optimizer(self, state: dict[str, Any], head: nn.Module) -> None:
        """Inverse of `draft_optimizer`; the drafter follows. Raises UserError, RanksLost."""
        self._ranks.ask("set_draft_optimizer", pack(state))
        self._fetch("send_drafter", head)

    def close(self) -> None:
        """End all ranks at once."""
        self._ranks.close()
        self._store = None

    @property
    def pids(self) -> list[int]:
        """Of the ranks, each on its own machine; also after they ended."""
        return self._ranks.pids

    def _build(self, plan: Blueprint, temperature: float, devices: list[str], address: str) -> None:
        """Have every rank build its part. Raises UserError, RanksLost."""
        from forerun.learner.worker import RankSpec

        config, count = self.config, self.config.ranks
        timeout_s = max(START_S, config.silence_s)
        self._store, place = open_store(address)
        specs = [
            RankSpec(
                plan, config, temperature, rank, count, devices[rank], self._ranks.addresses[rank], place, timeout_s
            )
            for rank in range(count)
        ]
        check_refusals(finish(self._ranks.run([("build", spec) for spec in specs], limit_s=timeout_s)))

    def _check_folder(self, run_folder: Path) -> None:
        """Raises UserError when a rank does not see the run folder, or may not write to it."""
        with probe_file(run_folder) as (file, content):
            faults = self._ranks.ask("check_folder", str(file), content)
        for rank, fault in enumerate(faults):
            if fault:
                raise UserError(
                    f"Rank {rank} of the learner {fault} the run folder {file.parent}, where ranks "
                    "keep their checkpoints; set runs to a folder that all machines share under the same path"
                )

    # ---- updates ----

    def _split(self, rollouts: Sequence[Rollout], chosen: Sequence[int]) -> list[list[int]]:
        """Of the chosen rollouts those of each group of ranks."""
        lengths = [len(rollouts[i].prompt_ids) + len(rollouts[i].tokens) for i in chosen]
        return [[chosen[j] for j in part] for part in split_rows(lengths, self.config.data_parallel)]

    def _for_all(self, requests: Sequence[Message]) -> list[Message]:
        """Each request for all ranks of its group."""
        return [request for request in requests for _ in range(self.config.tensor_parallel)]

    def _update(
        self, update: Update, learning_rate: float, stop_requested: Callable[[], bool]
    ) -> CountStream[UpdateResult]:
        """Have the ranks carry out an update, and take their weights over."""
        stopping = False

        def idle() -> None:
            nonlocal stopping
            if not stopping and stop_requested():
                stopping = True
                self._ranks.send_all("stop")

        chunks = [self._split(update.rollouts, chunk) for chunk in update.chunks]
        shares = [_share(update, [parts[group] for parts in chunks]) for group in range(self.config.data_parallel)]
        requests = self._for_all([("update", share, learning_rate) for share in shares])
        answers = yield from self._ranks.run(requests, idle)
        if answers[0][0] == "interrupted":
            self.updates -= 1  # the policy is as it was
            raise Interrupted
        self._fetch("send_policy", self.policy.model)
        check_refusals(answers)
        parts: list[UpdateResult] = [answer[1] for answer in answers[:: self.config.tensor_parallel]]
        result = UpdateResult(norms=parts[0].norms, skipped=parts[0].skipped)
        for part in parts:
            result.add(part.sums, part.tokens)
        return result

    def _fetch(self, request: str, module: nn.Module) -> None:
        """Take the ranks' weights over, in place. Raises RanksLost."""
        self._ranks.fetch(request, {name: parameter.detach() for name, parameter in module.named_parameters()})


def open_store(address: str) -> tuple[Store, tuple[str, int]]:
    """A store at a free port of an address, and where it is."""
    listener = socket.create_server((address, 0))
    place = (address, listener.getsockname()[1])
    return TCPStore(*place, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()), place


def rank_devices(policy: torch.device, ranks: int, launcher: Launcher) -> list[str]:
    """Where each rank computes: on CPUs as the policy does, or on a GPU each. Raises UserError."""
    if launcher.remote:
        if policy.type == "cuda" and not launcher.gpus:
            raise UserError(
                f"The policy is on {policy} and cluster.gpus_per_rank=0 would train it on CPUs; set "
                "cluster.gpus_per_rank=1, or policy.device=cpu"
            )
        return ["cuda:0" if launcher.gpus else "cpu"] * ranks
    if policy.type != "cuda":
        return [str(policy)] * ranks
    return [f"cuda:{gpu}" for gpu in rank_gpus(torch.cuda.device_count(), policy.index or 0, ranks)]


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
    """The ranks' results in the order of the batch."""
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
