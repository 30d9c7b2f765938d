"""The cold start: an ordinary adapter, the same policy when loaded by name, and one that can go on learning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forerun.config import ColdStartConfig
from forerun.errors import UserError
from forerun.learner.sft import learning_rate_factor, merge, solved_examples, train_adapter
from forerun.models import Policy, load_policy
from forerun.tasks import Problem


def trained(policy: Policy, examples: Any, config: ColdStartConfig) -> tuple[list[float], Any]:
    """The losses and the adapter."""
    work, losses = train_adapter(policy, examples, config, 0), []
    while True:
        try:
            losses.append(next(work))
        except StopIteration as end:
            return losses, end.value


def test_adapter_gives_the_same_policy_again(tiny: Callable[..., Path], tmp_path: Path) -> None:
    policy = load_policy(str(tiny("llama")), "float32", "cpu")
    problems = [Problem(str(i), f"{i}+1=", str(i + 1), f"#### {i + 1}") for i in range(12)]
    examples = solved_examples(policy, problems, lambda p: policy.encode(p.question))
    assert all(completion[-1] == policy.tokenizer.eos_token_id for _, completion in examples)
    config = ColdStartConfig(steps=12, batch=6, learning_rate=5e-3, rank=4, warmup=2)
    losses, adapter = trained(policy, examples, config)
    merge(policy, adapter, tmp_path / "adapter")
    assert losses[-1] < losses[0]
    again = load_policy(str(tiny("llama")), "float32", "cpu", str(tmp_path / "adapter"))
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    for loaded in (policy, again):
        assert all(p.requires_grad for p in loaded.model.parameters())
        assert not any("lora" in name for name, _ in loaded.model.named_modules())


def test_a_share_of_the_solutions_may_be_cut_to_the_answer(tiny: Callable[..., Path]) -> None:
    policy = load_policy(str(tiny("llama")), "float32", "cpu")
    problems = [Problem(str(i), f"{i}+1=", str(i + 1), f"{i} + 1 = {i + 1}\n#### {i + 1}") for i in range(10)]
    texts = [
        policy.tokenizer.decode(c[:-1])
        for _, c in solved_examples(policy, problems, lambda p: policy.encode(p.question), 0.4)
    ]
    assert sum(text.startswith("#### ") for text in texts) == 4
    assert sum(" + 1 = " in text for text in texts) == 6
    assert all(text.endswith(f"#### {i + 1}") for i, text in enumerate(texts))


def test_no_solutions_no_cold_start(tiny: Callable[..., Path]) -> None:
    policy = load_policy(str(tiny("llama")), "float32", "cpu")
    with pytest.raises(UserError, match="needs worked solutions"):
        solved_examples(policy, [Problem("1", "1+1=", "2")], lambda p: policy.encode(p.question))
    with pytest.raises(UserError, match="neither a folder nor a shipped artifact"):
        load_policy(str(tiny("llama")), "float32", "cpu", "no-such-adapter")


def test_the_end_of_a_solution_without_an_end_token_of_the_tokenizer(tiny: Callable[..., Path]) -> None:
    """It is one at which generation ends; where there is none either, nothing can be taught."""
    policy = load_policy(str(tiny("llama")), "float32", "cpu")
    policy.tokenizer.eos_token = None
    policy.model.generation_config.eos_token_id = [7, 4]
    problems = [Problem("1", "1+1=", "2", "#### 2")]
    assert solved_examples(policy, problems, lambda p: [1])[0][1][-1] == 4
    policy.model.generation_config.eos_token_id = None
    with pytest.raises(UserError, match=r"names an end token; add eos_token to tokenizer_config\.json, or leave out"):
        solved_examples(policy, problems, lambda p: [1])


def test_learning_rate_rises_then_falls() -> None:
    factors = [learning_rate_factor(s, 100, 10) for s in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.1, abs=0.01) and factors[10:] == sorted(factors[10:], reverse=True)
