"""Log-probability parity in a reduced number format: rounding passes on any machine, faults do not.

On some machines the kernels of all batch sizes of plain decoding agree to the bit while k+1 rows round otherwise. That
is imitated here, so that the tolerance cannot depend on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forerun.engine.local.engine import LocalEngine
from forerun.lossless import parity
from forerun.lossless.exact import replay
from forerun.lossless.faults import draft_logprobs, neighbour_logprobs
from forerun.lossless.parity import gap, greedy_check, parity_checks
from forerun.models import Policy, load_policy
from forerun.models.forward import PolicyForward
from forerun.types import Rollout
from tiny_models import random_drafter

K, SLOTS, TOKENS = 3, 8, 48
PROMPTS = [[3, 7, 5], [1, 2], [9, 4, 4, 8], [6]]
Replay = Callable[[Policy, Sequence[Rollout], int, int, float], list[np.ndarray]]


@pytest.fixture(scope="module")
def policy(tiny: Callable[..., Path]) -> Policy:
    return load_policy(str(tiny("llama", initializer_range=0.25)), "bfloat16", "cpu")


def rollouts_of(policy: Policy, **engine: object) -> list[Rollout]:
    made = LocalEngine(policy, random_drafter(policy), k=K, slots=SLOTS, **engine)  # type: ignore[arg-type]
    return made.generate(PROMPTS, max_new_tokens=TOKENS, n=2, seed=1)


def failed(policy: Policy, rollouts: list[Rollout]) -> list[str]:
    return [check.name for check in parity_checks(policy, rollouts, K, SLOTS, 1.0) if not check.passed]


def same_for_all_batches(
    policy: Policy, rollouts: Sequence[Rollout], rows: int, slots: int, t: float
) -> list[np.ndarray]:
    return replay(policy, rollouts, rows, SLOTS, t)


def test_rounding_passes_even_where_batch_sizes_agree_to_the_bit(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = rollouts_of(policy)
    monkeypatch.setattr(parity, "replay", same_for_all_batches)
    checks = parity_checks(policy, rollouts, K, SLOTS, 1.0)
    assert all(check.passed for check in checks), checks
    learner = next(check for check in checks if check.name == "learner against plain rows")
    assert learner.numbers["kl"] > parity.FLOOR[torch.bfloat16], "nothing rounds: the test would be idle"
    exact = next(check for check in checks if "float32" in check.name)
    assert exact.numbers["bound_kl"] < 1e-3 * learner.numbers["bound_kl"]


@pytest.mark.parametrize("fault", [draft_logprobs, neighbour_logprobs])
def test_wrong_reports_are_caught(policy: Policy, fault: Callable[..., object]) -> None:
    assert failed(policy, rollouts_of(policy, verifier=fault)) == ["reported against verified rows"]


def test_a_report_at_another_temperature_is_caught(policy: Policy) -> None:
    rollouts = [replace(r, logprobs=[0.9 * x for x in r.logprobs]) for r in rollouts_of(policy)]
    assert "reported against verified rows" in failed(policy, rollouts)


def off_by(amount: float, faulty: Callable[[int], bool]) -> Replay:
    """`replay` with every second token off by `amount` nats where `faulty` says so of the rows per pass."""

    def replayed(policy: Policy, rollouts: Sequence[Rollout], rows: int, slots: int, t: float) -> list[np.ndarray]:
        values = replay(policy, rollouts, rows, slots, t)
        return [v + amount * (np.arange(len(v)) % 2) * faulty(rows) for v in values]

    return replayed


@pytest.mark.parametrize(("rows", "caught"), [(1, "learner against plain rows"), (K + 1, "verified rows against")])
def test_a_faulty_pass_does_not_raise_its_own_tolerance(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, rows: int, caught: str
) -> None:
    """A KL of 0.01 a token, in plain or in verified rows."""
    rollouts = rollouts_of(policy)
    monkeypatch.setattr(parity, "replay", off_by(0.2, lambda n: n == rows))
    found = failed(policy, rollouts)
    assert "verified rows against plain rows" in found and any(name.startswith(caught) for name in found)


def test_a_fault_of_verified_rows_below_the_rounding_is_caught_in_float32(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A KL of 2.5e-7 a token."""
    rollouts = rollouts_of(policy)
    assert failed(policy, rollouts) == []
    monkeypatch.setattr(parity, "replay", off_by(1e-3, lambda n: n > 1))
    assert failed(policy, rollouts) == ["verified rows against the learner, float32"]


def noisy_rows(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    """Passes of several rows a sequence add noise to their logits, as a wrong mask or position would."""
    forward = PolicyForward.__call__
    source = torch.Generator().manual_seed(0)

    def faulty(self: PolicyForward, tokens: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        logits, features = forward(self, tokens, *arguments, **settings)
        if logits is not None and tokens.shape[1] == K + 1:
            logits = logits + size * torch.randn(logits.shape, generator=source).to(logits.dtype)
        return logits, features

    monkeypatch.setattr(PolicyForward, "__call__", faulty)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_fault_of_verified_rows_does_not_excuse_greedy_texts(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    policy = load_policy(str(tiny("llama", initializer_range=0.25)), dtype, "cpu")
    plain, drafted = LocalEngine(policy, slots=SLOTS), LocalEngine(policy, random_drafter(policy), k=K, slots=SLOTS)
    sound = greedy_check(plain, drafted, policy, PROMPTS, TOKENS)
    assert sound.passed, sound
    noisy_rows(monkeypatch, 0.5)
    broken = greedy_check(plain, drafted, policy, PROMPTS, TOKENS)
    assert not broken.passed and broken.numbers["identical"] < len(PROMPTS)
    texts = plain.generate(PROMPTS, max_new_tokens=TOKENS, temperature=0.0)
    own = gap(replay(policy, texts, 1, SLOTS, 1.0), replay(policy, texts, K + 1, SLOTS, 1.0)).max
    assert broken.numbers["worst_margin"] < 2 * own, "measured on the judged rows, the allowance would let it pass"
