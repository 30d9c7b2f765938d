"""A version on its way to many replicas: written once where memory is shared, to all at the same time, nothing left."""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

import pytest
import torch

import faulty_engines
from benchmarks.broadcast import WAYS, random_policy, spelled
from forerun.config import SpeculationConfig
from forerun.engine import Sampling, Weights
from forerun.engine.replicated import ReplicatedEngine
from forerun.errors import UserError
from forerun.models import Policy
from forerun.models.checksum import checksum
from forerun.training.weights import pack_weights
from forerun.workers.handle import Timeouts
from forerun.workers.local import LocalLauncher
from forerun.workers.shared_memory import ALIGNMENT_BYTES, Segment, received

pytestmark = pytest.mark.usefixtures("forked_workers")
ROOT = Path(__file__).parent.parent.parent
N = 4
TIMEOUTS = Timeouts(heartbeat_s=20.0, start_s=120.0)
WAIT_S = 30.0  # for what happens in milliseconds


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Half a megabyte."""
    torch.manual_seed(0)
    return random_policy(0.5)


@pytest.fixture(scope="module", autouse=True)
def makers() -> Iterator[None]:
    """The replicas find `benchmarks` and `faulty_engines.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(faulty_engines.__file__).parent}", prepend=os.pathsep)
        yield


def start(
    policy: Policy, replicas: int, shared_memory: bool, make: str = "benchmarks.broadcast:holder"
) -> ReplicatedEngine:
    return ReplicatedEngine(
        "local", policy, None, SpeculationConfig(method="none"), slots=1, replicas=replicas, make=make,
        timeouts=TIMEOUTS, launcher=LocalLauncher(shared_memory),
    )  # fmt: skip


@pytest.fixture(scope="module")
def started(policy: Policy) -> Iterator[dict[str, ReplicatedEngine]]:
    """Four replicas that share memory, and four that do not; segments of tests before are gone."""
    gc.collect()
    assert not with_segments_of(os.getpid())
    engines = {way: start(policy, N, shared) for way, shared in WAYS.items()}
    yield engines
    for engine in engines.values():
        engine.close()


@pytest.fixture(params=WAYS)
def engine(request: pytest.FixtureRequest, started: dict[str, ReplicatedEngine], policy: Policy) -> ReplicatedEngine:
    """Each of them, with the first weights and no history."""
    return as_new(started[request.param], policy)


@pytest.fixture
def shared(started: dict[str, ReplicatedEngine], policy: Policy) -> ReplicatedEngine:
    """Those that share memory."""
    return as_new(started["shared memory"], policy)


def as_new(engine: ReplicatedEngine, policy: Policy) -> ReplicatedEngine:
    engine.load(pack_weights(0, policy, None, shared=False))
    engine.warnings.clear()
    engine.lost = 0
    return engine


def version(number: int, policy: Policy) -> Weights:
    """A version of a policy and a drafter, other bytes for another number."""
    state = {name: tensor + number for name, tensor in policy.model.state_dict().items()}
    draft = {"fc.weight": torch.full((300, 7), number, dtype=torch.bfloat16), "d2t": torch.arange(5) + number}
    return Weights(number, {"policy": checksum(state), "draft": checksum(draft)}, state, draft)


def held(engine: ReplicatedEngine) -> list[list[int]]:
    """What each replica spells."""
    found = engine.stream([[1]] * N, Sampling(64, 0.0, 0))
    return [r.tokens for r in sorted(found, key=lambda r: r.prompt_index)]


def size_of(weights: Weights) -> int:
    return sum(t.numel() * t.element_size() for state in weights.groups.values() for t in state.values())


def written_by_system_calls() -> int:
    """Bytes that this process has given to write(), to whatever."""
    return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])


def with_segments_of(pid: int) -> set[int]:
    """The processes that have memory of a process's segments in their address space or among their open files."""
    name, found = f"memfd:forerun-{pid} ", set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is somebody else's
            if name in (process / "maps").read_text() or any(name in link for link in links(process / "fd")):
                found.add(int(process.name))
    return found


def links(folder: Path) -> Iterator[str]:
    """What the files in it point to."""
    for link in folder.iterdir():
        with suppress(OSError):  # it was closed
            yield os.readlink(link)


def until(condition: Callable[[], bool]) -> bool:
    """Whether it comes true."""
    end = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@contextmanager
def loading(engine: ReplicatedEngine, weights: Weights, stopped: int) -> Iterator[list[tuple[int, str]]]:
    """A load while one replica is stopped, entered when all others have taken it; the states so far."""
    states: list[tuple[int, str]] = []
    engine.on_state = lambda who, state, _: states.append((int(who.removeprefix("replica ")), state))
    os.kill(engine.pids[stopped], signal.SIGSTOP)
    thread = Thread(target=engine.load, args=(weights,))
    thread.start()
    try:
        assert until(lambda: sorted(states) == so_far(stopped)), states
        yield states
        thread.join(WAIT_S)
        assert not thread.is_alive()
    finally:
        engine.on_state = lambda *_: None


def so_far(stopped: int) -> list[tuple[int, str]]:
    """The states when all but one have taken a version."""
    return sorted([(i, "load") for i in range(N)] + [(i, "idle") for i in range(N) if i != stopped])


def test_all_hold_the_version_and_shared_memory_is_written_once(engine: ReplicatedEngine, policy: Policy) -> None:
    """The engine's own count, and the system's: bytes that are not laid down in shared memory are written."""
    weights = version(3, policy)
    size, tensors = size_of(weights), sum(map(len, weights.groups.values()))
    counted, called = engine.written_bytes, written_by_system_calls()
    assert engine.load(weights).version == 3
    counted, called = engine.written_bytes - counted, written_by_system_calls() - called
    if all(replica.worker.shares_memory for replica in engine._replicas):
        assert size <= counted < size + tensors * ALIGNMENT_BYTES and called < size / 4
    else:
        assert counted == N * size and N * size <= called < (N + 1) * size
    assert held(engine) == [spelled(weights.groups)] * N and not engine.warnings


def test_what_is_published_in_shared_memory_is_not_written_again(shared: ReplicatedEngine, policy: Policy) -> None:
    """And it is a copy: the learner goes on."""
    counted = shared.written_bytes
    weights = pack_weights(4, policy, None, shared=False, frozen=True)
    wanted = spelled(weights.groups)
    with torch.no_grad():
        next(policy.model.parameters()).add_(1.0)
    shared.load(weights)
    assert held(shared) == [wanted] * N and shared.written_bytes == counted
    assert spelled({"policy": policy.model.state_dict()}) != wanted


def test_a_byte_that_changed_is_refused_by_all(engine: ReplicatedEngine, policy: Policy) -> None:
    """They go on with the version before."""
    before = version(5, policy)
    engine.load(before)
    damaged = pack_weights(6, policy, None, shared=False, frozen=True)
    assert damaged.segment is not None
    damaged.segment.tensors["policy"]["model.norm.weight"].view(torch.uint8)[1] ^= 1
    with pytest.raises(UserError, match="checksum"):
        engine.load(damaged)
    assert held(engine) == [spelled(before.groups)] * N
    assert engine.metrics()["version"] == 5 and engine.lost == 0
    engine.load(version(7, policy))
    assert held(engine) == [spelled(version(7, policy).groups)] * N


def test_without_room_it_is_streamed_with_one_warning(shared: ReplicatedEngine, policy: Policy) -> None:
    """No file of this process, in memory or not, may grow beyond 64 KB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    counted = shared.written_bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        for number in (8, 9):
            shared.load(version(number, policy))
        frozen = pack_weights(10, policy, None, shared=False, frozen=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert held(shared) == [spelled(version(9, policy).groups)] * N
    assert shared.written_bytes - counted == 2 * N * size_of(version(9, policy))
    assert len(shared.warnings) == 1 and "Version 8 does not fit into shared memory" in shared.warnings[0]
    assert frozen.segment is None and frozen.policy is not None
    live = policy.model.state_dict()
    assert all(torch.equal(t, live[n]) and t.data_ptr() != live[n].data_ptr() for n, t in frozen.policy.items())


def test_a_slow_replica_holds_up_no_other(engine: ReplicatedEngine, policy: Policy) -> None:
    """The first of them is stopped until all others are done."""
    weights = version(11, policy)
    with loading(engine, weights, stopped=0) as states:
        assert (0, "idle") not in states
        os.kill(engine.pids[0], signal.SIGCONT)
    assert states[-1] == (0, "idle") and engine.lost == 0
    assert held(engine) == [spelled(weights.groups)] * N


def test_one_that_is_killed_in_a_load_is_replaced_and_leaves_nothing(shared: ReplicatedEngine, policy: Policy) -> None:
    weights, victim = version(12, policy), shared.pids[2]
    with loading(shared, weights, stopped=2):
        assert os.getpid() in with_segments_of(os.getpid())
        os.kill(victim, signal.SIGKILL)
    assert shared.lost == 1 and len(shared.warnings) == 1 and "killed by signal 9" in shared.warnings[0]
    assert victim not in shared.pids and held(shared) == [spelled(weights.groups)] * N
    assert until(lambda: not with_segments_of(os.getpid()))


DRIVER = """
import os, signal, sys
from benchmarks.broadcast import holders, random_policy
from forerun.training.weights import pack_weights
policy = random_policy(0.5)
engine = holders(policy, 2, True)
os.kill(engine.pids[0], signal.SIGSTOP)
print(*engine.pids, flush=True)
engine.load(pack_weights(1, policy, None, shared=False, frozen=True))
"""


def test_a_driver_that_is_killed_in_a_load_leaves_nothing() -> None:
    """Its first replica is stopped, so that the load lasts."""
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert driver.stdout is not None
    with driver.stdout as out:
        pids = {int(pid) for pid in out.readline().split()}
    try:
        assert len(pids) == 2 and until(lambda: driver.pid in with_segments_of(driver.pid))
    finally:
        driver.kill()
        driver.wait()
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert not with_segments_of(driver.pid)


def test_one_that_alone_refuses_is_replaced(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORERUN_TEST_REFUSED", str(tmp_path / "refused"))
    with closing(start(policy, 2, True, "faulty_engines:refusing_weights")) as engine:
        engine.load(version(1, policy))
        assert (tmp_path / "refused").exists() and engine.lost == 1 and engine.metrics()["version"] == 1
        assert "refuses version 1, which others hold: it refuses them" in engine.warnings[0]
        assert held(engine) == [spelled(version(1, policy).groups)] * N


def test_a_version_changes_in_mid_stream(engine: ReplicatedEngine, policy: Policy) -> None:
    """What is spelled before and after are the two versions, and every sample says which."""
    old, new = version(13, policy), version(14, policy)
    engine.load(old)
    found, done = [], False

    def between() -> None:
        nonlocal done
        if found and not done:
            done = engine.load(new).version == 14

    for rollout in engine.stream([[1]] * N, Sampling(64, 0.0, 0), 400, between=between):
        found.append((rollout.versions[0], rollout.tokens))
    spelling = {13: spelled(old.groups), 14: spelled(new.groups)}
    assert len(found) == 400 * N and all(tokens == spelling[number] for number, tokens in found)
    assert {number for number, _ in found} == {13, 14} and engine.lost == 0


def test_any_tensor_arrives_and_writes_stay_with_the_receiver() -> None:
    groups = {
        "policy": {
            "float8": torch.randn(3, 5).to(torch.float8_e4m3fn), "half": torch.randn(2, 3, dtype=torch.bfloat16),
            "bits": torch.tensor([True, False, True]), "one": torch.tensor(2.5, dtype=torch.float64),
            "none": torch.empty(0, 4), "turned": torch.arange(12).view(3, 4).T,
            "learnt": torch.nn.Parameter(torch.ones(7)),
        },
        "draft": {},
    }  # fmt: skip
    mine, theirs = (Connection(end.detach()) for end in socket.socketpair())
    with mine, theirs:
        segment = Segment.of(groups)
        segment.send(mine)
        arrived = received(theirs, segment.places, segment.size_bytes)
    assert {g: list(s) for g, s in arrived.items()} == {g: list(s) for g, s in groups.items()}
    for name, tensor in arrived["policy"].items():
        sent = groups["policy"][name]
        assert tensor.dtype == sent.dtype and tensor.shape == sent.shape
        assert torch.equal(tensor.view(torch.uint8) if tensor.dim() else tensor, as_bytes(sent)), name
    arrived["policy"]["learnt"].zero_()
    assert segment.tensors["policy"]["learnt"].sum() == 7
    del segment
    assert arrived["policy"]["one"] == 2.5  # mapped as long as somebody looks at it


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8) if tensor.dim() else tensor


def test_empty_groups_have_a_segment_too() -> None:
    assert Segment.of({"draft": {}}).tensors == {"draft": {}}
