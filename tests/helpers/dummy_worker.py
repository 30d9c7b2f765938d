"""A served object for tests of the worker runtime: it knows neither engine nor learner, and fails as it is asked to."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from forerun.errors import UserError
from forerun.workers.server import Requests, Server
from forerun.workers.weights import chunks_of, send_pieces


def serve_dummy(server: Server, greeting: str = "hello") -> Requests:
    """The factory. It refuses, dies or fails at start when the greeting says so."""
    if greeting == "refuse":
        raise UserError("it refuses to start")
    if greeting == "fail":
        raise ValueError("it fails to start\nand says more")
    if greeting == "hang":
        time.sleep(1e6)
    return Dummy(server, greeting).requests


class Dummy:
    """Answers with what it was made with, or in a way that it should not."""

    def __init__(self, server: Server, greeting: str) -> None:
        self.server, self.greeting = server, greeting
        self.requests: Requests = {
            "greet": self.greet,
            "read": self.read,
            "echo": self.echo,
            "refuse": self.refuse,
            "fail": self.fail,
            "exit": self.exit,
            "kill": self.kill,
            "hang": self.hang,
            "garbage": self.garbage,
            "half": self.half,
            "beat": self.beat,
            "only": self.only,
            "tensors": self.tensors,
        }

    def greet(self) -> None:
        self.server.send("greeting", self.greeting, os.getpid(), os.environ["OMP_NUM_THREADS"])

    def read(self, name: str) -> None:
        path = Path(self.server.files[name])
        found = sorted(str(p.relative_to(path)) for p in path.rglob("*")) if path.is_dir() else path.read_text()
        self.server.send("found", found)

    def echo(self, data: bytes) -> None:
        self.server.send("echoed", data)

    def refuse(self) -> None:
        raise UserError("no such thing here")

    def fail(self) -> None:
        raise RuntimeError("it was asked to fail")

    def exit(self) -> None:
        print("the last line", file=sys.stderr, flush=True)
        os._exit(3)

    def kill(self) -> None:
        print("a line that explains nothing", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(self) -> None:
        time.sleep(1e6)

    def garbage(self) -> None:
        self.server.connection.send_bytes(b"this is no pickle")

    def half(self) -> None:
        """The header of a message of 1,000 bytes, and nothing more."""
        os.write(self.server.connection.fileno(), (1000).to_bytes(4, "big") + b"some")
        time.sleep(1e6)

    def beat(self, times: int, seconds: float) -> None:
        for _ in range(times):
            time.sleep(seconds)
            self.server.send("heartbeat")
        self.server.send("done")

    def only(self, number: int, request: str) -> None:
        """One of several fails, some time later the others, which wait for it."""
        if int(self.greeting) != number:
            time.sleep(1.0)
            raise RuntimeError("its peer is gone")
        self.requests[request]()

    def tensors(self) -> None:
        """A hundred numbers, which rank 0 sends."""
        for pieces in chunks_of([("tensors", "w", torch.arange(100.0))], 64):
            self.server.send("progress", pieces[0].start)
            if self.greeting == "0":
                send_pieces(self.server.connection, pieces)
        self.server.send("answer", None)
