"""What every drafter must keep in the local engine, whatever it proposes. Each check takes a maker of drafters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from chi_square import p_value_of_texts
from forerun.acceptance.chain import verify
from forerun.acceptance.random import inverse_cdf
from forerun.drafters.base import Drafter, Rows
from forerun.engine.local.engine import LocalEngine
from forerun.models import Policy
from forerun.types import Rollout, VerifyInput, VerifyResult

Make = Callable[[], Drafter]

# ragged, of one token, repetitive, and one with the end token (0) inside, which lookups then draft
PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [20, 21, 20, 0, 21, 20], [30] * 40]
# rows of another batch shape sum in another order, which depends on the processor too: in float32 log-probabilities of
# the tiny policies were seen to differ by 2.7e-5
PARITY: dict[str, float] = {"atol": 2e-4, "rtol": 0.0}
LAW_PROMPT, LAW_SAMPLES = [3, 7, 5, 3, 7], 20_000


@dataclass
class Forced:
    """In the place of `sample_draft`: drafts a known text, and keeps the distributions that it would have drafted from.

    `errs(root, slot)` says where it drafts a wrong token, as a head does now and then.
    """

    truth: dict[int, list[int]]  # by request seed
    errs: Callable[[int, int], bool] = lambda root, slot: False
    seen: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)  # by seed, root and slot

    def __call__(
        self, logits: torch.Tensor, rows: Rows, slot: int, draft_temperature: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = []
        for seed, root, row in zip(rows.seeds.tolist(), rows.lengths.tolist(), logits, strict=True):
            self.seen[seed, root, slot] = torch.log_softmax(row.float(), -1)
            text, at = self.truth[seed], root + 1 + slot
            tokens.append(text[at] if at < len(text) and not self.errs(root, slot) else 0)
        return torch.tensor(tokens), logits


def check_greedy_identity(policy: Policy, make: Make, k: int) -> list[Rollout]:
    """Token for token as without drafts, with more samples than slots; returns the speculative rollouts."""
    plain = LocalEngine(policy, slots=5).generate(PROMPTS, max_new_tokens=24, temperature=0.0, n=2)
    engine = LocalEngine(policy, make(), k=k, slots=3)
    rollouts = engine.generate(PROMPTS, max_new_tokens=24, temperature=0.0, n=2)
    assert [r.tokens for r in rollouts] == [r.tokens for r in plain]
    assert engine.metrics()["drafted"] > 0, "nothing was drafted: the test would be idle"
    for a, b in zip(plain, rollouts, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), **PARITY)
    return rollouts


def check_every_end(policy: Policy, make: Make, temperature: float = 1.0) -> list[Rollout]:
    """The end token ends a sample wherever it is in a draft, and none exceeds the model's context."""
    engine = LocalEngine(policy, make(), k=4, slots=8)
    rollouts = engine.generate(PROMPTS, max_new_tokens=200, temperature=temperature, n=6, seed=5)
    assert {r.finish_reason for r in rollouts} == {"eos", "context"}
    for r in rollouts:
        total = len(r.prompt_ids) + len(r.tokens)
        assert (r.tokens[-1] == 0) == (r.finish_reason == "eos") and 0 not in r.tokens[:-1]
        assert total == policy.context if r.finish_reason == "context" else total <= policy.context
        assert len(r.tokens) == len(r.logprobs) == len(r.versions) == len(r.drafted)
    return rollouts


def check_stop_strings(policy: Policy, make: Make) -> None:
    """A stop string ends a sample at the token that completes it, also inside an accepted run."""
    stop = ("7", "ab")
    rollouts = LocalEngine(policy, make(), k=6, slots=4).generate(PROMPTS, max_new_tokens=60, n=6, seed=2, stop=stop)
    assert any(r.finish_reason == "stop" for r in rollouts)
    for r in rollouts:
        found = any(s in policy.tokenizer.decode(r.tokens) for s in stop)
        assert found == (r.finish_reason == "stop")
        assert not any(s in policy.tokenizer.decode(r.tokens[:-1]) for s in stop)


def check_logprobs(policy: Policy, make: Make) -> None:
    """Log-probabilities are those of teacher forcing, whoever proposed the token."""
    for r in LocalEngine(policy, make(), k=3, slots=4).generate(PROMPTS, max_new_tokens=16, temperature=0.8, n=3):
        ids = torch.tensor([r.prompt_ids + r.tokens])
        with torch.no_grad():
            rows = torch.log_softmax(policy.model(ids).logits[0] / 0.8, -1)
        at = torch.arange(len(r.prompt_ids) - 1, ids.shape[1] - 1)
        expected = rows[at, torch.tensor(r.tokens)]
        torch.testing.assert_close(torch.tensor(r.logprobs), expected, **PARITY)


def check_the_same(policy: Policy, drafter: Drafter, again: Drafter) -> None:
    """A drafter that was saved and loaded has the same weights, and drafts the same."""
    assert drafter.state_dict().keys() == again.state_dict().keys()
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    runs = [
        LocalEngine(policy, d, k=3, slots=4).generate([[5, 6, 7]], max_new_tokens=20, n=4) for d in (drafter, again)
    ]
    assert [(r.tokens, r.rounds, r.drafted) for r in runs[0]] == [(r.tokens, r.rounds, r.drafted) for r in runs[1]]


def law_p_value(policy: Policy, make: Make, faulty: bool) -> float:
    """Chi-square p-value of `LAW_SAMPLES` samples of up to three tokens against the policy's exact law.

    `faulty` replaces the residual of a rejected draft by the policy's row: drafted tokens become too frequent.
    """
    verifier = no_residual if faulty else verify
    engine = LocalEngine(policy, make(), k=2, slots=1000, verifier=verifier)
    rollouts = engine.generate([LAW_PROMPT], max_new_tokens=3, n=LAW_SAMPLES, seed=1)
    assert engine.metrics()["acceptance_per_position"][1] > 0.05, "too little was speculated: the test would be idle"
    return p_value_of_texts(Counter(tuple(r.tokens) for r in rollouts), exact_law(policy))


def no_residual(rule: str, inputs: VerifyInput) -> VerifyResult:
    """A broken verifier: whatever follows the accepted tokens is drawn from the policy's row, not from the residual."""
    result = verify(rule, inputs)
    batch = torch.arange(len(result.accepted))
    row = inputs.target_logits[batch, result.accepted].float() / inputs.temperature[:, None]
    tokens = result.tokens.clone()
    tokens[batch, result.accepted] = inverse_cdf(row.softmax(-1), inputs.residual_uniforms)
    return replace(result, tokens=tokens)


def exact_law(policy: Policy) -> dict[tuple[int, ...], float]:
    """Probability of every text of up to three tokens after `LAW_PROMPT`; the end token (0) ends it."""
    law: dict[tuple[int, ...], float] = {}
    frontier: dict[tuple[int, ...], float] = {(): 1.0}
    for step in range(3):
        with torch.no_grad():
            rows = policy.model(torch.tensor([LAW_PROMPT + list(t) for t in frontier])).logits[:, -1]
        following: dict[tuple[int, ...], float] = {}
        for text, row in zip(frontier, rows.double().softmax(-1).tolist(), strict=True):
            for token, p in enumerate(row):
                (law if token == 0 or step == 2 else following)[(*text, token)] = frontier[text] * p
        frontier = following
    return law
