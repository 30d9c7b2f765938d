"""The draft temperature, tuned online: exact overlaps, convergence, and losslessness."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import drafter_contract as contract
from chi_square import p_value_of_texts
from forerun.acceptance.chain import verify
from forerun.acceptance.random import Purpose, inverse_cdf_log, uniforms
from forerun.config import SpeculationConfig
from forerun.drafters import load_drafter
from forerun.drafters.base import Rows
from forerun.drafters.draft_model import ModelDrafter
from forerun.drafters.eagle3 import Eagle3Drafter
from forerun.drafters.mtp import MtpDrafter, MtpHead
from forerun.drafters.temperature import GRID, FixedTemperature, OnlineTemperature, draft_temperature_of, overlaps
from forerun.engine.local.engine import LocalEngine
from forerun.errors import UserError
from forerun.models import Policy, load_policy
from forerun.types import Draft, VerifyInput, VerifyResult
from tiny_models import random_drafter, random_head


def rows_of(count: int, temperature: float) -> Rows:
    zeros = torch.zeros(count, dtype=torch.int64)
    return Rows(zeros, zeros + 5, torch.arange(count), torch.full((count,), temperature))


def verified(accepted: list[int]) -> VerifyResult:
    count = torch.tensor(accepted)
    return VerifyResult(count, torch.zeros(len(accepted), int(count.max()) + 1, dtype=torch.int64), torch.zeros(1))


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [None, [0, 2, 3, 7, 8]])
def test_overlaps_are_those_of_the_reached_slots(columns: list[int] | None) -> None:
    """Against plain Python, by temperature, position and token; rejected and greedy rows and padding do not count."""
    torch.manual_seed(0)
    vocabulary = list(range(11)) if columns is None else columns
    scores, logits = 2 * torch.randn(4, 3, len(vocabulary)), 2 * torch.randn(4, 4, 11)
    rows, tuned = rows_of(4, 0.7), OnlineTemperature(start=1.1, positions=100, memory=3)
    rows.temperature[3] = 0.0
    log_q = (scores / (0.7 * 1.1)).log_softmax(-1)
    lengths, accepted = [3, 2, 0, 3], [1, 2, 0, 3]  # row 0: slots 0 and 1, row 1: both that it has
    draft = Draft(
        torch.zeros(4, 3, dtype=torch.int64), torch.tensor(lengths), log_q,
        None if columns is None else torch.tensor(columns),
    )  # fmt: skip
    tuned.learn(rows, draft, logits, verified(accepted))
    expected = []
    for h in GRID:
        found = []
        for row, slot in ((0, 0), (0, 1), (1, 0), (1, 1)):
            p_weights = [exp(x / 0.7) for x in logits[row, slot].tolist()]
            q_weights = [exp(x / (0.7 * h)) for x in scores[row, slot].tolist()]
            pairs = zip((p_weights[v] for v in vocabulary), q_weights, strict=True)
            found.append(sum(min(p / sum(p_weights), q / sum(q_weights)) for p, q in pairs))
        expected.append(sum(found) / 4)
    assert tuned.means == pytest.approx(expected, abs=1e-5)
    assert tuned.value == GRID[expected.index(max(expected))]
    assert tuned.metrics() == {"draft_temperature": tuned.value, "draft_temperature_slots": 4}


def test_overlap_is_what_the_token_rule_accepts() -> None:
    """The share of drafts that stand is the overlap (2211.17192, corollary 3.6): 20000 draws, within 4 deviations."""
    torch.manual_seed(1)
    count, temperature = 20_000, 0.6
    z, logits = 2 * torch.randn(9), 2 * torch.randn(9)
    rows = rows_of(count, 1.0)
    log_q = (z / temperature).log_softmax(-1).expand(count, 1, 9)
    tokens = inverse_cdf_log(log_q[:, 0], uniforms(rows.seeds, rows.lengths[:, None], Purpose.DRAFT)[:, 0])
    draft = Draft(tokens[:, None], torch.ones(count, dtype=torch.int64), log_q)
    accept = uniforms(rows.seeds, rows.lengths[:, None], Purpose.ACCEPT)
    verdict = verify("token", VerifyInput(logits.expand(count, 2, 9), draft, rows.temperature, accept, accept[:, 0]))
    expected = float(overlaps(logits.log_softmax(-1)[None], z.log_softmax(-1)[None], 1.0, [temperature])[0, 0])
    deviation = (expected * (1 - expected) / count) ** 0.5
    assert abs(float(verdict.accepted.float().mean()) - expected) < 4 * deviation
    assert abs(expected - float(overlaps(logits.log_softmax(-1)[None], z.log_softmax(-1)[None], 1.0, [1.0]))) > 0.05


def test_a_round_is_looked_at_in_part() -> None:
    """No more slots than asked for, others every round, all of them in the end; nothing of size [B, k, V] is made."""
    tuned, asked = OnlineTemperature(positions=6), []
    every = torch.arange(40)
    for _ in range(20):
        row, slot = tuned._some(every, every % 3, 6)
        assert len(row) == 6 and torch.equal(slot, row % 3) and len(set(row.tolist())) == 6
        asked.append(tuple(row.tolist()))
    assert len(set(asked)) > 10 and len({r for rows in asked for r in rows}) == 40

    class Wide(Tensor):
        """Logits that may be read by rows only."""

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = super().__torch_function__(function, types, args, kwargs or {})
            if isinstance(out, Tensor) and function is not Tensor.__getitem__:
                assert out.numel() <= 6 * 50, function
            return out

    logits = torch.randn(30, 4, 50).as_subclass(Wide)
    draft = Draft(torch.zeros(30, 3, dtype=torch.int64), torch.full((30,), 3), torch.randn(30, 3, 50).log_softmax(-1))
    tuned.learn(rows_of(30, 1.0), draft, logits, verified([3] * 30))
    assert tuned.metrics()["draft_temperature_slots"] == 6


def test_what_teaches_nothing() -> None:
    tuned, rows, logits = OnlineTemperature(start=0.9), rows_of(2, 1.0), torch.randn(2, 3, 5)
    tokens, lengths, log_q = torch.zeros(2, 2, dtype=torch.int64), torch.tensor([2, 2]), torch.zeros(2, 2, 5)
    tuned.learn(rows, Draft(tokens, lengths), logits, verified([2, 1]))
    tuned.learn(rows, Draft(tokens, lengths, log_q, parents=tokens - 1), logits, verified([2, 1]))
    tuned.learn(rows_of(2, 0.0), Draft(tokens, lengths, log_q), logits, verified([2, 1]))
    tuned.learn(rows, Draft(tokens[:, :0], lengths * 0, log_q[:, :0]), logits[:, :1], verified([0, 0]))
    assert tuned.value == 0.9 and tuned.metrics()["draft_temperature_slots"] == 0


# --- where it settles -------------------------------------------------------------------------------------------------


def rounds(tuned: OnlineTemperature, best: float, count: int, noise: float, seed: int = 0) -> None:
    """Rounds of a drafter whose logits are the policy's times `best`: q is p at that temperature, but for noise."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        scores = 2.5 * torch.randn(8, 2, 40, generator=generator)
        logits = torch.randn(8, 3, 40, generator=generator)
        logits[:, :2] = scores / best + noise * torch.randn(8, 2, 40, generator=generator)
        log_q = (scores / (0.8 * tuned.value)).log_softmax(-1)
        draft = Draft(torch.zeros(8, 2, dtype=torch.int64), torch.full((8,), 2), log_q)
        tuned.learn(rows_of(8, 0.8), draft, logits, verified([2] * 8))


@pytest.mark.parametrize("best", GRID)
def test_it_settles_where_q_is_p(best: float) -> None:
    tuned = OnlineTemperature()
    rounds(tuned, best, 3, noise=0.0)
    assert tuned.value == best and tuned.means[GRID.index(best)] == pytest.approx(1, abs=1e-5)


def test_it_stays_there_under_noise_and_follows_a_change() -> None:
    tuned = OnlineTemperature(memory=16)
    rounds(tuned, 0.6, 60, noise=0.4)
    assert tuned.value in (0.5, 0.6, 0.7)
    rounds(tuned, 1.25, 80, noise=0.4, seed=1)
    assert tuned.value in (1.1, 1.25, 1.5)


def unsure(policy: Policy, share: float) -> Policy:
    """The policy itself with its logits times `share`: at that temperature it drafts what the policy would say."""
    model = copy.deepcopy(policy.model)
    model.get_output_embeddings().weight.data.mul_(share)
    return Policy(model, policy.tokenizer, "unsure")


def test_an_unsure_drafter_is_mended_at_work(policy: Policy) -> None:
    """It finds the temperature, keeps it from one call to the next, and acceptance is that of a perfect drafter."""
    drafter = ModelDrafter(unsure(policy, 0.5), policy).draw("sampled", "auto")
    engine = LocalEngine(policy, drafter, k=3, rule="token", slots=16)
    engine.generate(contract.PROMPTS, max_new_tokens=16, n=8, seed=1)
    shown = engine.metrics()["drafter"]
    assert shown["draft_temperature"] == 0.5 and shown["draft_temperature_slots"] > 100
    before = copy.deepcopy(engine.counters)
    engine.generate(contract.PROMPTS, max_new_tokens=16, n=8, seed=2)
    after = engine.counters
    assert engine.metrics()["drafter"]["draft_temperature_slots"] > shown["draft_temperature_slots"]
    online = (after.round_tokens - before.round_tokens) / (after.rounds - before.rounds)
    fixed = LocalEngine(policy, ModelDrafter(unsure(policy, 0.5), policy), k=3, rule="token", slots=16)
    fixed.generate(contract.PROMPTS, max_new_tokens=16, n=8, seed=2)
    assert fixed.metrics()["drafter"] == {}
    assert online > fixed.metrics()["acceptance_length"] + 0.5


def test_greedy_rollouts_and_fixed_temperatures_learn_nothing(policy: Policy) -> None:
    drafters = [
        random_drafter(policy),
        MtpDrafter(MtpHead(policy), policy),
        Eagle3Drafter(random_head(policy), policy).draw("sampled", "auto"),
        MtpDrafter(MtpHead(policy), policy).draw("sampled", "auto"),
    ]
    for drafter, learns in zip(drafters, (False, False, True, True), strict=True):
        engine = LocalEngine(policy, drafter, k=2, slots=4)
        engine.generate(contract.PROMPTS, max_new_tokens=8, temperature=0.0)
        assert engine.metrics()["drafter"] == (
            {"draft_temperature": 1.0, "draft_temperature_slots": 0} if learns else {}
        )
        engine.generate(contract.PROMPTS, max_new_tokens=8, temperature=1.0)
        assert (engine.metrics()["drafter"] != {}) == learns
        assert drafter.metrics().get("draft_temperature_slots", 0) >= 5 * learns


# --- the law ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tiny: Callable[..., Path]) -> Policy:
    return load_policy(str(tiny("llama", vocab_size=12, initializer_range=0.25)), "float32", "cpu")


@pytest.mark.parametrize(("restless", "faulty"), [(False, False), (True, False), (True, True)])
def test_samples_follow_the_policys_law(small: Policy, tiny: Callable[..., Path], restless: bool, faulty: bool) -> None:
    """Chi-square at 20000 samples under block verification.

    Once a draft model, twice a head of fewer tokens whose temperature jumps with what the round before drafted.
    A correct engine fails this less than once in a million seeds; the verifier without residual lies far beyond.
    """
    changes = {"vocab_size": 12, "initializer_range": 0.2, "num_hidden_layers": 1}
    model = load_policy(str(tiny("qwen3", **changes)), "float32", "cpu")
    used: list[float] = []

    class Restless(OnlineTemperature):
        def learn(self, rows: Rows, draft: Draft, logits: Tensor, verdict: VerifyResult) -> None:
            used.append(self.value)
            super().learn(rows, draft, logits, verdict)
            if restless:
                self.value = GRID[(int(1e6 * sum(self.means)) + int(verdict.accepted.sum())) % len(GRID)]

    def make() -> ModelDrafter | Eagle3Drafter:
        head = random_head(small, vocabulary=[0, 1, 2, 4, 5, 6, 8, 9, 11])
        drafter: Any = Eagle3Drafter(head, small) if restless else ModelDrafter(model, small)
        drafter.draft_temperature = Restless()
        return drafter

    p = contract.law_p_value(small, make, faulty)
    assert len(set(used)) >= (6 if restless else 2)
    assert p < 1e-6 if faulty else p > 1e-6


@pytest.mark.parametrize("peeking", [False, True])
def test_a_temperature_that_reads_its_own_drafts_breaks_the_law(peeking: bool) -> None:
    """Per row, one of two temperatures is drawn, or chosen by which draft looks better: 40000 rounds of one draft."""
    torch.manual_seed(3)
    count, size, temperatures = 40_000, 6, (0.4, 1.5)
    z, logits = 1.5 * torch.randn(size), 1.5 * torch.randn(size)
    rows = rows_of(count, 1.0)
    drawn, log_q = [], []
    for temperature in temperatures:
        log_q.append((z / temperature).log_softmax(-1))
        draws = uniforms(rows.seeds, rows.lengths[:, None], Purpose.DRAFT)[:, 0]
        drawn.append(inverse_cdf_log(log_q[-1].expand(count, size), draws))
    best = int(logits.argmax())
    second = drawn[1] == best if peeking else uniforms(rows.seeds, rows.lengths[:, None], Purpose.PLAIN)[:, 0] < 0.5
    chosen = torch.stack(log_q)[second.long()]
    tokens = torch.where(second, drawn[1], drawn[0])
    draft = Draft(tokens[:, None], torch.ones(count, dtype=torch.int64), chosen[:, None])
    accept = uniforms(rows.seeds, rows.lengths[:, None], Purpose.ACCEPT)
    residual = uniforms(rows.seeds, rows.lengths[:, None], Purpose.RESIDUAL)[:, 0]
    inputs = VerifyInput(logits.expand(count, 2, size), draft, rows.temperature, accept, residual)
    verdict = verify("block", inputs)
    counts = Counter((token,) for token in verdict.tokens[:, 0].tolist())
    law = {(token,): p for token, p in enumerate(logits.double().softmax(-1).tolist())}
    p = p_value_of_texts(counts, law)
    assert p < 1e-6 if peeking else p > 1e-6


# --- settings ---------------------------------------------------------------------------------------------------------


def test_recipes_ask_for_it(policy: Policy, tiny: Callable[..., Path], tmp_path: Path) -> None:
    random_drafter(policy).save(tmp_path / "eagle3", {})
    MtpDrafter(MtpHead(policy), policy).save(tmp_path / "mtp", {})
    drafts = {"eagle3": str(tmp_path / "eagle3"), "mtp": str(tmp_path / "mtp"), "model": str(tiny("llama"))}
    for method, draft in drafts.items():
        block = {"method": method, "draft": draft, "draft_temperature": "auto"}
        drafter: Any = load_drafter(policy, SpeculationConfig.model_validate(block))
        assert isinstance(drafter.draft_temperature, OnlineTemperature) and drafter.name == method
        fixed: Any = load_drafter(policy, SpeculationConfig.model_validate({**block, "draft_temperature": 0.7}))
        assert isinstance(fixed.draft_temperature, FixedTemperature) and fixed.draft_temperature.value == 0.7
    for method in ("ngram", "trie", "graft"):
        with pytest.raises(ValidationError, match=f"method: {method} samples none"):
            SpeculationConfig.model_validate({"method": method, "draft_temperature": "auto"})
    with pytest.raises(ValidationError, match="proposal: argmax samples none"):
        SpeculationConfig.model_validate({"method": "mtp", "proposal": "argmax", "draft_temperature": "auto"})
    for value in (0, -1, "warm"):
        with pytest.raises(ValidationError):
            SpeculationConfig.model_validate({"method": "mtp", "draft_temperature": value})
    with pytest.raises(UserError, match="proposal=argmax samples none"):
        draft_temperature_of("auto", "argmax")
    for method in ("ngram", "trie"):
        block = SpeculationConfig.model_validate({"method": method}).model_copy(update={"draft_temperature": "auto"})
        with pytest.raises(UserError, match="draft_temperature=auto asks for sampled drafts"):
            load_drafter(policy, block)
