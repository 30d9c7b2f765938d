"""Workers of this machine, with a dummy served in them: how they are started, answer, are lost, and end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import pytest

import dummy_worker
from forerun.errors import UserError
from forerun.workers.handle import Spec, Timeouts, Worker, WorkerLost, kill_all, poll
from forerun.workers.local import LocalLauncher
from forerun.workers.wire import CHUNK_BYTES

HELPERS = Path(dummy_worker.__file__).parent
SHORT = Timeouts(heartbeat_s=2.0, start_s=60.0)
linux = pytest.mark.skipif(sys.platform != "linux", reason="a stopped worker dies with its driver on Linux alone")


def spec(greeting: str = "hello", **changes: object) -> Spec:
    settings: dict[str, object] = {"threads": 2, "timeouts": SHORT}
    return Spec("dummy_worker:serve_dummy", (greeting,), **(settings | changes))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HELPERS), prepend=os.pathsep)


@pytest.fixture
def start() -> Iterator[Callable[..., list[Worker]]]:
    """start(count, spec) -> workers that are ready; all are killed at the end."""
    launcher, started = LocalLauncher(), []

    def of(count: int = 1, what: Spec | None = None) -> list[Worker]:
        workers = launcher.start(count, what or spec())
        started.extend(workers)
        for worker in workers:
            worker.await_reply("ready", ("make",), SHORT.start_s)
        return workers

    yield of
    kill_all(started)
    launcher.close()
    assert all(gone(worker.process.pid) for worker in started)


def gone(pid: int) -> bool:
    """Whether a process ends within some seconds; one that nobody has waited for counts as ended."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_workers_are_made_and_answer(start: Callable[..., list[Worker]], tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").write_text("content")
    workers = start(2, spec("good day", files={"all": tmp_path, "one": tmp_path / "file"}))
    pids = [worker.process.pid for worker in workers]
    for worker, pid in zip(workers, pids, strict=True):
        worker.send("greet")
        assert worker.await_reply("greeting", ("greet",), 20) == ("greeting", "good day", pid, "2")
    assert os.getpid() not in pids and len(set(pids)) == 2
    workers[0].send("read", "one")
    workers[0].send("read", "all")
    assert workers[0].receive(20) == ("found", "content")
    assert workers[0].receive(20) == ("found", ["file", "folder", "folder/inner"])


def test_large_messages_arrive_whole(start: Callable[..., list[Worker]]) -> None:
    (worker,) = start()
    data = os.urandom(CHUNK_BYTES + 12345)
    worker.send("echo", data)
    assert worker.await_reply("echoed", ("echo",), 20)[1] == data


def test_a_refusal_is_the_users_error_and_the_worker_goes_on(start: Callable[..., list[Worker]]) -> None:
    (worker,) = start()
    worker.send("refuse")
    worker.send("greet")
    with pytest.raises(UserError, match="no such thing here"):
        worker.await_reply("greeting", ("refuse", "greet"), 20)
    assert worker.await_reply("greeting", ("greet",), 20)[1] == "hello"
    worker.send("refuse")
    worker.send("greet")
    assert worker.await_reply("greeting", ("greet",), 20)[1] == "hello"
    assert list(worker.inbox) == [("refused", "refuse", "no such thing here")]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ("fail", r"ended with code 1: RuntimeError: it was asked to fail \(.*dummy_worker.py:\d+\)"),
        ("exit", "ended with code 3: the last line"),
        ("kill", "was killed by signal 9"),
        ("nothing of this name", r"ended with code 1: KeyError: .nothing of this name. \(.*server.py:\d+\)"),
    ],
)
def test_how_a_worker_ended_is_known(start: Callable[..., list[Worker]], request_: str, words: str) -> None:
    (worker,) = start()
    worker.send(request_)
    with pytest.raises(WorkerLost) as lost:
        worker.receive(20)
    assert re.fullmatch(words, str(lost.value)) and worker.gone
    before = time.time()
    assert worker.failure is None or abs(worker.failure[0] - before) < 20
    for _ in range(3):  # the first may still fit into the buffer of the socket
        with pytest.raises(WorkerLost, match=words.split(":")[0]):
            worker.send("greet")
            worker.receive(5)


def test_invalid_output_is_a_loss(start: Callable[..., list[Worker]]) -> None:
    (worker,) = start()
    worker.send("garbage")
    with pytest.raises(WorkerLost, match="returned invalid output: "):
        worker.receive(20)


def test_a_factory_that_refuses_or_fails(start: Callable[..., list[Worker]]) -> None:
    with pytest.raises(UserError, match="it refuses to start"):
        start(1, spec("refuse"))
    with pytest.raises(
        WorkerLost, match=r"^ended with code 1: ValueError: it fails to start \(.*dummy_worker.py:\d+\)$"
    ):
        start(1, spec("fail"))
    with pytest.raises(WorkerLost, match="has been silent for 3 s"):
        (worker,) = launched = LocalLauncher().start(1, spec("hang"))
        try:
            worker.await_reply("ready", ("make",), 3.0)
        finally:
            kill_all(launched)


def test_a_program_that_does_not_begin_says_why() -> None:
    launcher = LocalLauncher(program="import nowhere")
    (worker,) = launcher.start(1, spec())
    with pytest.raises(WorkerLost, match="ended with code 1: ModuleNotFoundError: No module named 'nowhere'"):
        worker.await_reply("ready", ("make",), 20)
    worker.kill()
    launcher.close()


def test_silence_is_counted_until_it_is_too_long(start: Callable[..., list[Worker]]) -> None:
    """Of two workers one hangs; the other one's heartbeats count for itself alone."""
    workers = start(2)
    workers[0].send("hang")
    workers[1].send("beat", 8, 0.3)
    with pytest.raises(WorkerLost, match=r"has been silent for \d s"):
        while True:
            for worker in poll(workers, 0.1):
                assert worker is workers[1] and worker.receive(0.0)[0] in ("heartbeat", "done")
            workers[1].check_heartbeat(1.2)
            workers[0].check_heartbeat(SHORT.heartbeat_s)
    assert workers[0].silent_s > SHORT.heartbeat_s


@pytest.mark.slow
def test_a_worker_that_stops_in_mid_message_does_not_stop_the_driver(start: Callable[..., list[Worker]]) -> None:
    """Neither while it sends, nor while it should read."""
    workers = start(2)
    started = time.monotonic()
    workers[0].send("half")
    with pytest.raises(WorkerLost, match="cannot be reached"):
        workers[0].receive(20)
    os.kill(workers[1].process.pid, signal.SIGSTOP)
    with pytest.raises(WorkerLost, match="cannot be reached"):
        workers[1].send("echo", bytes(2**23))
    assert time.monotonic() - started < 30


def test_a_worker_ends_when_its_connection_does(start: Callable[..., list[Worker]]) -> None:
    (worker,) = start()
    worker.connection.close()
    assert worker.process.end(20) == "ended with code 0"


@linux
def test_workers_survive_the_thread_that_asked_for_them() -> None:
    """The parent-death signal follows a thread: it has to be one that lives as long as the launcher."""
    launcher, workers = LocalLauncher(), []
    thread = Thread(target=lambda: workers.extend(launcher.start(1, spec())))
    thread.start()
    thread.join()
    (worker,) = workers
    worker.await_reply("ready", ("make",), SHORT.start_s)
    worker.send("greet")
    assert worker.await_reply("greeting", ("greet",), 20)[1] == "hello"
    launcher.close()  # its thread ends, and the worker with it
    assert worker.process.end(20) == "was killed by signal 9"
    worker.kill()


DRIVER = """
import os, signal, sys, time
from forerun.workers.handle import Spec
from forerun.workers.local import LocalLauncher
workers = LocalLauncher().start(3, Spec("dummy_worker:serve_dummy"))
for worker in workers[:2]:
    worker.await_reply("ready", ("make",), 60)
print(*(worker.process.pid for worker in workers), flush=True)
time.sleep(1e6)
"""


@linux
def test_no_worker_outlives_a_killed_driver() -> None:
    """One idle, one stopped, one that may still be starting."""
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    pids = [int(pid) for pid in driver.stdout.readline().split()]
    os.kill(pids[0], signal.SIGSTOP)
    driver.kill()
    driver.wait()
    assert len(pids) == 3 and all(gone(pid) for pid in pids)
