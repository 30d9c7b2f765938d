"""Memory and seconds of one step of EAGLE-3 training on a single sequence, by its length.

    python -m benchmarks.draft_memory [--lengths 1024,2048,4096,8192,16384,32768] [--vocab 256] [--out FILE]

A head of small widths (hidden 32, 2 heads) and a made-up forward of the policy, float32, depth 4. Each length has a
process of its own; memory is what it holds at most (resident) beyond what it held before its first pass.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from forerun.config import DraftConfig
from forerun.drafters.eagle3 import Eagle3Config, Eagle3Head
from forerun.drafters.trainable import TeacherBatch
from forerun.drafters.training.heads import unrolled_losses, weighted_loss
from forerun.models import Policy
from forerun.tracking.environment import describe_environment, machine_line

HIDDEN, HEADS, LAYERS, DEPTH, PROMPT = 32, 2, 3, 4, 64


class Embeddings(torch.nn.Module):
    """All that the head reads of a policy."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embeddings = torch.nn.Embedding(vocab, HIDDEN)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embeddings


def resident_mib() -> float:
    """At most, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def step(length: int, vocab: int) -> dict[str, float]:
    """One forward and backward pass on a sequence."""
    torch.manual_seed(0)
    shape = {"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_attention_heads": HEADS}
    head = Eagle3Head(
        Eagle3Config(
            **shape, num_key_value_heads=1, head_dim=HIDDEN // HEADS, vocab_size=vocab, layers=(0, 1, 2),
            draft_vocab_size=vocab, max_position_embeddings=length,
        )
    )  # fmt: skip
    policy = Policy(Embeddings(vocab), None, "made-up")
    tokens = torch.randint(vocab, (1, length))
    features = torch.randn(1, length, LAYERS * HIDDEN)
    log_p = torch.randn(1, length, vocab).log_softmax(-1)
    places = torch.arange(length)[None]
    teacher = TeacherBatch(tokens, features, log_p, (places >= PROMPT) & (places < length - 1))
    config = DraftConfig(depth=DEPTH)
    before, started = resident_mib(), time.perf_counter()
    loss = weighted_loss(unrolled_losses(head, policy, teacher, config, 1.0), 1.0)
    loss.backward()
    return {
        "length": length, "seconds": time.perf_counter() - started, "mib": resident_mib() - before,
        "loss": float(loss.detach()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768")
    parser.add_argument("--vocab", type=int, default=256)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    if arguments.alone:
        print(json.dumps(step(lengths[0], arguments.vocab)))
        return
    environment, rows = describe_environment(), []
    print(machine_line(environment))
    for length in lengths:
        command = [sys.executable, "-m", "benchmarks.draft_memory", "--alone", "--vocab", str(arguments.vocab)]
        done = subprocess.run([*command, "--lengths", str(length)], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
        print(f"{length:6} tokens: {rows[-1]['mib']:8.0f} MiB, {rows[-1]['seconds']:7.2f} s", flush=True)
    if arguments.out:
        result = {"environment": environment, "vocab": arguments.vocab, "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
