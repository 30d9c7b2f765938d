"""A long run whose replicas crash, hang and return invalid output: no sample lost or twice, no memory that grows.

    python -m benchmarks.soak --steps 1000 --replicas 4 --lag 2 [--failures 0.001] [--out soak.json]

What is real: the replicas' processes and their protocol, the watch over them, generation ahead of learning by `--lag`
versions, the publication of every version with its checksums. What is not: the replicas' engine makes samples up (each
from its seed and place, so that a wrong one is known), and the learner adds noise to a policy of some thousand weights.
A model would cost hours on a CPU, and what is looked for here is around it.

A replica fails with probability `--failures` before each sample: a third of the times it ends its process, a third
it sleeps for ever (the silence limit finds it), a third it sends tokens that are not in the vocabulary. Memory, threads
and open files are those of the learner's process; memory's growth is a least-squares slope after the first fifth.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from forerun.config import SpeculationConfig
from forerun.engine.base import Counters, Requests, Sampling, Weights, nothing, requested
from forerun.engine.replicated import ReplicatedEngine
from forerun.models import Policy
from forerun.tracking.environment import describe_environment
from forerun.training.prefetch import RolloutThread
from forerun.training.prompts import Request
from forerun.training.rollout import RolloutBatch
from forerun.training.weights import pack_weights
from forerun.types import Rollout
from forerun.workers.handle import Timeouts

VOCABULARY = 32
PROMPTS, SAMPLES, LONGEST = 8, 4, 12
SILENCE_S = 3.0
GROWTH_MIB = 16.0  # per 1,000 steps: what this process may grow by
LEAST_STEPS = 80  # measured ones: the slope of fewer is noise
WAYS = ("dies", "hangs", "lies")
FAILURES = "FORERUN_SOAK_FAILURES"  # how the replicas hear of the probability


def made_up(seed: int, prompt: int, sample: int) -> list[int]:
    """The tokens of a sample."""
    draw = random.Random(f"{seed}/{prompt}/{sample}")
    return [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, LONGEST))]


class Unreliable:
    """The `RolloutEngine` of a replica: no model, and a probability to fail."""

    def __init__(self) -> None:
        self.counters, self.warnings = Counters(), list[str]()
        self._version, self._draw = 0, random.Random()
        self._failures = float(os.environ[FAILURES])

    def metrics(self) -> dict[str, Any]:
        """Nothing of interest."""
        return {}

    def load(self, weights: Weights) -> Weights:
        """Hold a version; the replica's server has compared its checksums."""
        self._version = weights.version
        return Weights(weights.version, dict(weights.checksums))

    def extend(self, requests: Requests) -> bool:
        """Every request is a stream of its own."""
        return False

    def resume(self) -> None:
        """Nothing waits."""

    def stream(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        n: int = 1,
        only: Requests | None = None,
        between: Callable[[], None] = nothing,
    ) -> Iterator[Rollout]:
        """Made-up samples, one by one."""
        for prompt, sample in requested(len(prompts), n, only):
            between()
            tokens = made_up(sampling.seed, prompt, sample)
            if self._draw.random() < self._failures:
                self._fail(tokens)
            logprobs, versions = [-1.0] * len(tokens), [self._version] * len(tokens)
            self.counters.tokens += len(tokens)
            yield Rollout(prompts[prompt], tokens, logprobs, versions, "length", prompt, sample)

    def _fail(self, tokens: list[int]) -> None:
        way = self._draw.choice(WAYS)
        if way == "dies":
            os._exit(1)
        if way == "hangs":
            time.sleep(1e6)
        tokens[0] = VOCABULARY + 1


def unreliable(engine: str, *, policy: str, dtype: str, speculation: dict[str, Any], slots: int) -> Any:
    """The replicas' maker."""
    return Unreliable()


@dataclass
class Watch:
    """What is counted and measured from step to step."""

    lag: int
    wrong: list[str] = field(default_factory=list)
    measured: list[tuple[int, float, int, int]] = field(default_factory=list)  # step, MiB, threads, open files

    def look(self, step: int, generated: RolloutBatch) -> None:
        """Every sample of the step once, with its own tokens, of a version that the lag allows."""
        found = sorted((r.prompt_index, r.sample_index) for r in generated.rollouts)
        if found != [(p, s) for p in range(PROMPTS) for s in range(SAMPLES)]:
            self.wrong.append(f"step {step} has the samples {found}")
        for r in generated.rollouts:
            if r.tokens != made_up(step, r.prompt_index, r.sample_index):
                self.wrong.append(f"step {step}: sample {r.prompt_index}/{r.sample_index} is of another seed")
            if not step - self.lag <= min(r.versions) <= max(r.versions) <= step:
                self.wrong.append(f"step {step} has versions {sorted(set(r.versions))}")

    def measure(self, step: int) -> None:
        """Of this process, now."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        self.measured.append((step, mib, threading.active_count(), len(os.listdir("/proc/self/fd"))))

    def result(self) -> dict[str, Any]:
        """Growth after the first fifth, and what is wrong with it."""
        kept = np.array(self.measured[len(self.measured) // 5 :])  # [M, 4]
        slope = float(np.polyfit(kept[:, 0], kept[:, 1], 1)[0] * 1000)
        quarter = max(1, len(kept) // 4)
        threads, files = (int(np.median(kept[-quarter:, c]) - np.median(kept[:quarter, c])) for c in (2, 3))
        wrong = list(self.wrong)
        if slope > GROWTH_MIB and len(kept) >= LEAST_STEPS:
            wrong.append(f"memory grows by {slope:.1f} MiB per 1,000 steps")
        wrong += [f"threads grew by {threads}"] if threads > 0 else []
        wrong += [f"open files grew by {files}"] if files > 0 else []
        return {
            "wrong": wrong, "memory_mib": float(kept[-1, 1]), "memory_mib_per_1000_steps": slope,
            "threads_grown": threads, "files_grown": files,
        }  # fmt: skip


def small_policy() -> Policy:
    """Some thousand weights, with a tokenizer because a policy is saved with one."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    return Policy(LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=words), "soak")


def soak(steps: int, replicas: int, lag: int, failures: float) -> dict[str, Any]:
    """Run it; `wrong` in the result is empty when all is well."""
    root = str(Path(__file__).parent.parent)
    os.environ |= {FAILURES: str(failures), "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    torch.manual_seed(0)
    policy, watch, began = small_policy(), Watch(lag), time.perf_counter()
    engine = ReplicatedEngine(
        "local", policy, None, SpeculationConfig(method="none"), slots=SAMPLES, replicas=replicas,
        timeouts=Timeouts(heartbeat_s=SILENCE_S), losses=10, make="benchmarks.soak:unreliable",
    )  # fmt: skip
    prompts = [[1 + p, 2, 3] for p in range(PROMPTS)]

    def make(step: int, stop: Callable[[], bool], between: Callable[[], None]) -> RolloutBatch:
        request = Request([], prompts, Sampling(LONGEST, 1.0, step))
        rollouts = list(engine.stream(prompts, request.sampling, SAMPLES, between=between))
        return RolloutBatch(rollouts, [], torch.zeros(PROMPTS, SAMPLES), 0.0, 0.0, Counters(), [], request)

    ahead, warnings = RolloutThread(engine, make, range(steps), lag, in_flight=True), 0
    try:
        ahead.offer(pack_weights(0, policy, None, shared=False, frozen=True))
        for step in range(steps):
            watch.look(step, ahead.take(step, lambda: False))
            for parameter in policy.model.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=1e-3)
            ahead.offer(pack_weights(step + 1, policy, None, shared=False, frozen=True))
            warnings += len(engine.warnings)
            engine.warnings.clear()
            watch.measure(step)
        counted = engine.metrics()["replicas"]
    finally:
        ahead.close()
        engine.close()
    seconds = time.perf_counter() - began
    return {
        "steps": steps, "replicas": replicas, "lag": lag, "samples": steps * PROMPTS * SAMPLES, "lost": counted["lost"],
        "samples_rerun": counted["samples_rerun"], "warnings": warnings, "seconds": seconds, **watch.result(),
    }  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--lag", type=int, default=2)
    parser.add_argument("--failures", type=float, default=0.001, help="probability, before each sample")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    result = soak(options.steps, options.replicas, options.lag, options.failures)
    print(json.dumps(result, indent=2))
    if options.out is not None:
        head = {"benchmark": "soak", "failures": options.failures}
        whole = {**head, **result, "environment": describe_environment()}
        options.out.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    raise SystemExit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
