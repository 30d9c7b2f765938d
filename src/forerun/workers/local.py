"""Where the processes of a sharded learner come from: what their group asks for (`Launcher`), and this machine's.

A launcher starts one process per rank, with a connection to each; orders and answers are the group's
(`distributed.py`). On this machine a nursery imports once and forks the ranks (`worker.main`); here is the parent's end
of it. When the parent dies, so do they, also one that is stopped. Left out: other machines (`ray_ranks.py`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import torch

from forerun.errors import PartLost, UserError
from forerun.workers.scratch import ScratchFolder

PROGRAM = "from forerun.learner.worker import main; main()"


class RanksLost(PartLost):
    """The ranks of the learner are gone, all of them: which one was lost first, and how it ended."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a group needs of its launcher."""

    ranks: int
    device: torch.device  # of the policy that the driver holds
    module: str  # that defines the model
    silence_s: float  # without a word after which a rank is given up
    start_s: float  # until it can be talked to


@dataclass(frozen=True, slots=True)
class Place:
    """What a rank has to know of where it runs."""

    device: str
    threads: int
    weights: str  # file of its machine
    meeting: str  # of all ranks: file:///path, or tcp://host:port of rank 0


class Ranks(Protocol):
    """The processes of one learner. `connections` and `pids` are in the order of the ranks."""

    connections: list[Connection]

    @property
    def pids(self) -> list[int]:
        """Each on its own machine."""

    def settle(self, weights: Path) -> list[Place]:
        """Wait until all can be talked to, and give them a file. Raises UserError, RanksLost."""

    def ended(self) -> dict[int, str]:
        """How each rank ended that has, as far as is known."""

    def last_line(self, rank: int) -> str:
        """The last that it wrote, "" for nothing."""

    def close(self) -> None:
        """End all that are left, at once; a second time does nothing."""


class Launcher(Protocol):
    """Where ranks come from."""

    def start(self, job: Job) -> Ranks:
        """Let them begin. Raises UserError."""


class Nursery:
    """The `Launcher` of this machine."""

    def __init__(self, program: str = PROGRAM) -> None:
        """`program`: Python that runs in the nursery, see `rank.main`."""
        self.program = program

    def start(self, job: Job) -> Ranks:
        """See `Launcher`."""
        return RanksHere(job, _devices(job.device, job.ranks), self.program)


class RanksHere:
    """`Ranks` that a nursery of this machine has forked. In a session of their own: Ctrl-C is the parent's."""

    def __init__(self, job: Job, devices: list[str], program: str) -> None:
        """Start the nursery, with one end of a socket pair for each rank."""
        self.connections: list[Connection] = []
        self._pids: list[int] = []
        self._ended: dict[int, str] = {}
        self._said = ""  # the line under way
        self._devices, self._threads = devices, max(1, torch.get_num_threads() // job.ranks)
        self._folder = ScratchFolder()
        theirs: list[socket.socket] = []
        for _ in devices:
            mine, other = socket.socketpair()
            _impatient(mine, job.silence_s)
            self.connections.append(Connection(mine.detach()))
            theirs.append(other)
        read, write = os.pipe()
        self._lifeline = os.fdopen(write, "wb")  # only this process holds it: when it dies, the ranks are ended
        passed = [read, *(other.fileno() for other in theirs)]
        self._process = self._spawn(program, passed, job.module)
        assert self._process.stdout is not None
        self._output = self._process.stdout
        os.set_blocking(self._output.fileno(), False)
        os.close(read)
        for other in theirs:
            other.close()

    def _spawn(self, program: str, passed: list[int], module: str) -> subprocess.Popen[bytes]:
        words = [str(passed[0]), module, str(self._folder.path), *map(str, passed[1:])]
        local = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
        with open(self._folder.path / "nursery.log", "wb") as errors:
            return subprocess.Popen(
                [sys.executable, "-c", program, *words], pass_fds=passed, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
                env=local | os.environ | {"OMP_NUM_THREADS": str(self._threads)},
            )  # fmt: skip

    @property
    def pids(self) -> list[int]:
        """See `Ranks`; that of the nursery is not among them."""
        self._hear()
        return self._pids

    def settle(self, weights: Path) -> list[Place]:
        """See `Ranks`. The file is of this machine already, and whoever cannot be talked to is found out later."""
        meeting = f"file://{self._folder.path}/meeting"
        return [Place(device, self._threads, str(weights), meeting) for device in self._devices]

    def ended(self) -> dict[int, str]:
        """See `Ranks`. When the nursery is gone no more will be told of the others."""
        gone = self._process.poll() is not None
        self._hear()
        untold = dict.fromkeys(range(len(self._devices)), "cannot be talked to") if gone else {}
        return untold | self._ended

    def last_line(self, rank: int) -> str:
        """See `Ranks`; of the nursery where no rank was forked."""
        folder = self._folder.path
        log = folder / f"rank-{rank}.log"
        text = (log if log.exists() else folder / "nursery.log").read_text(errors="replace")
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")

    def close(self) -> None:
        """See `Ranks`; the nursery sees to it, and reaps them."""
        self._lifeline.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # it is not as far as that
            self._process.kill()
            self._process.wait()
        if self._process.returncode != 0:
            with contextlib.suppress(ProcessLookupError):  # there may be no ranks
                os.killpg(self._process.pid, signal.SIGKILL)
        for connection in self.connections:
            connection.close()
        self._output.close()
        self._folder.close()

    def _hear(self) -> None:
        """Take in what the nursery says: `pids ...`, and `ended rank code`."""
        if not self._output.closed and select.select([self._output], [], [], 0)[0]:
            self._said += (self._output.read() or b"").decode()
        *lines, self._said = self._said.split("\n")
        for words in (line.split() for line in lines):
            if words[:1] == ["pids"]:
                self._pids = [int(word) for word in words[1:]]
            elif words[:1] == ["ended"]:
                code = int(words[2])
                self._ended[int(words[1])] = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"


def _devices(device: torch.device, ranks: int) -> list[str]:
    """Where each rank computes: the policy's device on a CPU, one GPU each otherwise."""
    if device.type != "cuda":
        return [str(device)] * ranks
    if torch.cuda.device_count() < ranks:
        raise UserError(
            f"train.ranks={ranks} needs a GPU for each rank, and this machine has {torch.cuda.device_count()}; set "
            "train.ranks to at most that"
        )
    return [f"cuda:{rank}" for rank in range(ranks)]


def _impatient(end: socket.socket, silence_s: float) -> None:
    """A rank that stops in mid-message must not stop its parent, whose end of the socket this is."""
    limit = struct.pack("ll", int(silence_s) + 1, 0)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        end.setsockopt(socket.SOL_SOCKET, option, limit)
