"""A new version to 1, 2 and 4 replicas of this machine: seconds per load, and the memory that a load takes.

    python -m benchmarks.broadcast [--megabytes 600] [--replicas 1,2,4] [--loads 3] [--out FILE]

Two ways, in turns: out of memory that the replicas share (what a run does), and streamed to each through a connection
of its own (what replicas on other machines get, and all where there is no room). What is real: the replicas' processes,
their protocol, checksums and copies. What is not: they hold weights and no engine, and the weights are random. A
replica's rollouts spell the checksum of what it holds, and all have to be those of the version that was sent. Seconds
are those of `load`, without the checksum of the sender. Memory is the proportional set size of learner and replicas
together, sampled during the loads, minus what they hold between them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forerun.config import SpeculationConfig
from forerun.engine.base import Counters, Requests, Sampling, Weights, nothing, requested
from forerun.engine.replicated import ReplicatedEngine
from forerun.models import Policy
from forerun.models.checksum import checksum
from forerun.tracking.environment import describe_environment, machine_line
from forerun.training.weights import pack_weights
from forerun.types import Rollout
from forerun.workers.local import LocalLauncher

VOCABULARY = 32
WAYS = {"shared memory": True, "streams": False}
SAMPLE_S = 0.02  # between two looks at the memory


class Holder:
    """The `RolloutEngine` of a replica: only weights."""

    def __init__(self) -> None:
        self.counters, self.warnings = Counters(), list[str]()
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._version = 0

    def metrics(self) -> dict[str, Any]:
        """Nothing of interest."""
        return {}

    def load(self, weights: Weights) -> Weights:
        """Copy a version into its own tensors."""
        self._tensors = {group: own for group, own in self._tensors.items() if group in weights.checksums}
        for group, state in weights.groups.items():
            own = self._tensors.setdefault(group, {})
            for name, tensor in state.items():
                own.setdefault(name, torch.empty_like(tensor)).copy_(tensor)
        self._version = weights.version
        return Weights(weights.version, {group: checksum(own) for group, own in self._tensors.items()})

    def resume(self) -> None:
        """Nothing waits."""

    def extend(self, requests: Requests) -> bool:
        """Every request is a stream of its own."""
        return False

    def stream(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        n: int = 1,
        only: Requests | None = None,
        between: Callable[[], None] = nothing,
    ) -> Iterator[Rollout]:
        """Samples that spell the checksums of what it holds, a token per hexadecimal digit, group by group."""
        for prompt, sample in requested(len(prompts), n, only):
            between()
            tokens = spelled(self._tensors)
            versions = [self._version] * len(tokens)
            yield Rollout(prompts[prompt], tokens, [-1.0] * len(tokens), versions, "length", prompt, sample)


def holder(engine: str, *, policy: str, dtype: str, speculation: dict[str, Any], slots: int) -> Any:
    """The replicas' maker."""
    return Holder()


def spelled(groups: dict[str, Any]) -> list[int]:
    """The checksums of groups as tokens."""
    return [int(digit, 16) for group in sorted(groups) for digit in checksum(groups[group])]


def random_policy(megabytes: float) -> Policy:
    """About that many megabytes of float32 weights, with a tokenizer because a policy is saved with one."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    width = 1024 if megabytes >= 100 else 64
    layers = max(1, round(megabytes * 2**20 / 4 / (16 * width**2)))
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    return Policy(LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=words), "random")


def holders(policy: Policy, replicas: int, shared_memory: bool) -> ReplicatedEngine:
    """An engine over replicas that only hold weights."""
    root = str(Path(__file__).parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return ReplicatedEngine(
        "local", policy, None, SpeculationConfig(method="none"), slots=1, replicas=replicas,
        make="benchmarks.broadcast:holder", launcher=LocalLauncher(shared_memory),
    )  # fmt: skip


def check(engine: ReplicatedEngine, weights: Weights, replicas: int) -> None:
    """Raises SystemExit: a replica holds other bytes than were sent."""
    wanted = spelled(weights.groups)
    for rollout in engine.stream([[1]] * replicas, Sampling(64, 0.0, 0)):
        if rollout.tokens != wanted:
            sys.exit(f"replica {rollout.prompt_index} holds {rollout.tokens}; {wanted} was sent")


class Memory:
    """What processes hold together while it is entered, in MiB; pages that k of them map count 1/k for each."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids, self._done = pids, threading.Event()
        self.rest = self.peak = self.now()

    def now(self) -> float:
        """At this moment."""
        return sum(proportional_mib(pid) for pid in self._pids)

    def __enter__(self) -> Memory:
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.peak = max(self.peak, self.now())


def proportional_mib(pid: int) -> float:
    """Proportional set size of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024


def measure(policy: Policy, replicas: int, way: str, loads: int) -> dict[str, Any]:
    """Seconds, memory and bytes of `loads` versions, after one that makes room for them."""
    seconds = []
    with closing(holders(policy, replicas, WAYS[way])) as engine:
        engine.load(pack_weights(1, policy, None, shared=False))
        written = engine.written_bytes
        with Memory([os.getpid(), *engine.pids]) as memory:
            for number in range(2, 2 + loads):
                next(policy.model.parameters()).data.add_(1.0)
                weights = pack_weights(number, policy, None, shared=False)
                started = time.perf_counter()
                engine.load(weights)
                seconds.append(time.perf_counter() - started)
        check(engine, weights, replicas)
        if engine.warnings:
            sys.exit(f"{way}: {engine.warnings}")
        return {
            "way": way, "replicas": replicas, "loads": loads, "seconds_median": statistics.median(seconds),
            "seconds_range": [min(seconds), max(seconds)], "memory_rest_mib": memory.rest,
            "memory_load_mib": memory.peak - memory.rest, "written_bytes": (engine.written_bytes - written) // loads,
        }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """The row as it is shown."""
    least, most = row["seconds_range"]
    return (
        f"{row['replicas']} replicas, {row['way']}: {row['seconds_median']:.2f} s a load ({least:.2f} to {most:.2f}), "
        f"{row['memory_load_mib']:.0f} MiB beyond the {row['memory_rest_mib']:.0f} MiB between loads, "
        f"{row['written_bytes'] / 2**20:.0f} MiB written"
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=600.0, help="of a version")
    parser.add_argument("--replicas", default="1,2,4")
    parser.add_argument("--loads", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.manual_seed(0)
    policy = random_policy(options.megabytes)
    size = sum(tensor.numel() * tensor.element_size() for tensor in policy.model.state_dict().values())
    environment = describe_environment()
    print(f"{size / 2**20:.0f} MiB a version; {machine_line(environment)}", flush=True)
    rows = []
    for replicas in (int(r) for r in options.replicas.split(",")):
        for way in WAYS:
            rows.append(measure(policy, replicas, way, options.loads))
            print(line(rows[-1]), flush=True)
    if options.out is not None:
        result = {"benchmark": "broadcast", "bytes": size, "rows": rows, "environment": environment}
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
