"""Runs vLLM in this process: its settings, and restoring the global state that it changes."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # one process
DEFAULTS = {  # unless the user set them
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it pins a core, also away from the learner
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def device() -> torch.device:
    """Where vLLM runs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def random_state(state: Tensor) -> Iterator[None]:
    """Use another torch random state, and restore the caller's."""
    mine = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield
    finally:
        torch.set_rng_state(mine)


@contextmanager
def own_process() -> Iterator[None]:
    """Start vLLM within; then undo its seed of torch, its `set_num_threads` and its freeze of the garbage collector."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    threads, state = torch.set_num_threads, torch.get_rng_state()
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads = threads
        torch.set_rng_state(state)
        for name, old in before.items():
            if old is None:
                del os.environ[name]
            else:
                os.environ[name] = old
