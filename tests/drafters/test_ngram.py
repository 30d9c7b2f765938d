"""Prompt lookup: the definition, and the drafter at work."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import drafter_contract as contract
import forerun
from forerun.config import NgramConfig, SpeculationConfig
from forerun.drafters import load_drafter
from forerun.drafters.base import Rows
from forerun.drafters.ngram import LookupText, NgramDrafter
from forerun.engine.local.engine import LocalEngine
from forerun.errors import UserError
from forerun.models import Policy
from proofs.lookups import reference_lookup

SHORT = NgramConfig(prompt_lookup_min=1, prompt_lookup_max=3)
make = partial(NgramDrafter, SHORT)


def text_of(tokens: list[int], shortest: int, longest: int) -> LookupText:
    text = LookupText(shortest, longest)
    text.extend(tokens)
    return text


@pytest.mark.parametrize(
    ("tokens", "shortest", "longest", "expected"),
    [
        ([1, 2, 3, 4, 2, 3], 2, 3, [4, 2, 3]),  # the example in vLLM's docstring: fewer than k tokens are left
        ([1, 2, 9, 1, 2, 8, 1, 2], 2, 2, [9, 1, 2, 8]),  # two matches of one length: the earliest
        ([7, 1, 2, 9, 5, 1, 2, 8, 5, 1, 2], 1, 3, [8, 5, 1, 2]),  # a longer match goes before an earlier one
        ([4, 4, 4], 1, 2, [4]),  # the match may overlap the suffix
        ([1, 2, 3], 1, 3, []),
        ([1], 1, 3, []),
        ([1, 2, 1, 2], 3, 5, []),  # shorter than the minimum does not count
    ],
)
def test_definition(tokens: list[int], shortest: int, longest: int, expected: list[int]) -> None:
    assert reference_lookup(tokens, 4, shortest, longest) == expected
    assert text_of(tokens, shortest, longest).continuation(4) == expected


def test_tables_equal_the_definition_on_random_texts() -> None:
    rng, drafted = random.Random(0), 0
    for _ in range(300):
        shortest = rng.randint(1, 3)
        longest, alphabet, cut = rng.randint(shortest, 5), rng.randint(2, 6), rng.randint(1, 12)
        tokens = [rng.randrange(alphabet) for _ in range(rng.randint(cut, 40))]
        prompt = text_of(tokens[:cut], shortest, longest)
        sample, sibling = prompt.sample(), prompt.sample()
        sibling.extend([rng.randrange(alphabet) for _ in range(9)])  # must leave no trace in `sample`
        for token in tokens[cut:]:
            sample.extend([token])
            expected = reference_lookup(sample.tokens, 4, shortest, longest)
            assert sample.continuation(4) == expected
            drafted += bool(expected)
        assert sample.tokens == tokens and prompt.tokens == tokens[:cut]
    assert drafted > 1000


def test_budgets_bound_each_row() -> None:
    drafter = NgramDrafter(SHORT)
    drafter.open(4, 32, 4)
    drafter.prefill(2, torch.tensor([[1, 2, 3, 1, 2], [5, 6, 0, 0, 0]]), torch.tensor([5, 2]), None)
    for source, target in ((2, 0), (3, 1)):
        drafter.copy(source, target)
    rows = Rows(torch.tensor([2, 6]), torch.tensor([4, 1]), torch.tensor([1, 2]), torch.ones(2))
    for budget, expected in ((4, [3, 1, 2]), (1, [3]), (0, [])):
        draft = drafter.propose(rows, torch.tensor([budget, 4]))
        assert draft.lengths.tolist() == [len(expected), 0] and draft.tokens.shape == (2, len(expected))
        assert draft.tokens[0].tolist() == expected and draft.log_q is None


@pytest.mark.parametrize("k", [1, 4])
def test_greedy_identity(policy: Policy, k: int) -> None:
    rollouts = contract.check_greedy_identity(policy, make, k)
    assert any(any(r.drafted) for r in rollouts), "no draft was ever accepted"


def test_every_end(policy: Policy) -> None:
    contract.check_every_end(policy, make)


def test_a_drafted_end_token_ends_the_sample(policy: Policy) -> None:
    """After [a, end, a] the draft is [end, a]; `a` is the token after which this policy ends most readily."""
    with torch.no_grad():
        prompts = torch.tensor([[a, 0, a] for a in range(1, 55)])
        best = prompts[policy.model(prompts).logits[:, -1].softmax(-1)[:, 0].argmax()].tolist()
    rollouts = LocalEngine(policy, make(), k=4, slots=64).generate([best], max_new_tokens=8, n=256, seed=3)
    ended = [r for r in rollouts if r.tokens[0] == 0]
    assert ended and all(r.drafted == [True] and r.finish_reason == "eos" for r in ended)
    assert all(0 not in r.tokens[:-1] for r in rollouts)


def test_stop_strings(policy: Policy) -> None:
    contract.check_stop_strings(policy, make)


def test_logprobs(policy: Policy) -> None:
    contract.check_logprobs(policy, make)


def test_results_do_not_depend_on_batching(policy: Policy) -> None:
    runs = [
        LocalEngine(policy, make(), k=3, slots=slots).generate(contract.PROMPTS, max_new_tokens=20, n=3, seed=11)
        for slots in (1, 4, 15)
    ]
    assert [r.tokens for r in runs[0]] == [r.tokens for r in runs[1]] == [r.tokens for r in runs[2]]
    assert [r.rounds for r in runs[0]] == [r.rounds for r in runs[1]] == [r.rounds for r in runs[2]]


def test_a_recipe_names_it(policy: Policy, tmp_path: Path) -> None:
    settings = SpeculationConfig.model_validate({"method": "ngram", "k": 3, "ngram": {"prompt_lookup_max": 7}})
    drafter = load_drafter(policy, settings)
    assert isinstance(drafter, NgramDrafter) and drafter.settings.prompt_lookup_max == 7
    assert drafter.state_dict() == {}
    drafter.load_state_dict({})
    with pytest.raises(UserError, match=r"no weights, but the state holds \['fc.weight'\]"):
        drafter.load_state_dict({"fc.weight": torch.zeros(1)})
    drafter.save(tmp_path, {"run": "x"})
    assert '"prompt_lookup_max": 7' in (tmp_path / "config.json").read_text()
    with pytest.raises(ValidationError, match="prompt_lookup_min 5 is above prompt_lookup_max 3"):
        NgramConfig(prompt_lookup_max=3)
    with pytest.raises(UserError, match="looks its drafts up"):
        load_drafter(policy, settings.model_copy(update={"draft_temperature": 0.5}))


@pytest.mark.parametrize("method", ["ngram", "trie", "model"])
def test_outsiders_load_it_by_name(tiny: Callable[..., Path], method: str) -> None:
    folder = str(tiny("llama"))
    speculation = {"method": method, "k": 3, "ngram": {"prompt_lookup_min": 1}}
    speculation |= {"draft": folder} if method == "model" else {}
    engine = forerun.load_engine("local", policy=folder, dtype="float32", speculation=speculation, slots=4)
    rollouts = engine.generate([[1, 2, 3, 1, 2], [4]], max_new_tokens=8, temperature=0.0, n=2)
    plain = forerun.load_engine("local", policy=folder, dtype="float32")
    assert [r.tokens for r in rollouts] == [
        r.tokens for r in plain.generate([[1, 2, 3, 1, 2], [4]], max_new_tokens=8, temperature=0.0, n=2)
    ]
    assert engine.metrics()["drafted"] > 0
    assert (engine.metrics()["drafter"] != {}) == (method == "trie")
