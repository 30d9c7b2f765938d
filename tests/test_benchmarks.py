"""What the benchmarks share, on a tiny model: the right figures, and drafters that go along without a trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import online, trees, trie
from benchmarks.acceptance import Expected
from benchmarks.common import Movement, Setting, Trajectory, difference, load_setting, mean_of, tokens_per_round
from forerun.acceptance.chain import verify
from forerun.config import TrieConfig
from forerun.drafters.trie import TrieDrafter
from forerun.engine import Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.types import Draft, Rollout, VerifyInput
from tiny_models import random_drafter


def long_or_short(problem: Any, completion: str) -> float:
    """A reward that an untrained policy sometimes earns."""
    return float(sum(map(ord, completion)) % 2)


@pytest.fixture
def setting(tiny: Callable[..., Path], tmp_path: Path) -> Setting:
    """A tiny policy on sums, two prompts with four samples a step."""
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    data = {
        "policy": {"model": str(tiny("llama")), "dtype": "float32", "device": "cpu"},
        "task": {"name": "jsonl", "path": str(tmp_path / "sums.jsonl"), "reward": f"{__name__}:long_or_short"},
        "draft": {"online_learning_rate": 1e-2},
        "rollout": {"slots": 8, "max_new_tokens": 10},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    rates = {"train.prompts_per_step": 2, "train.samples_per_prompt": 4, "train.learning_rate": 1e-3, "seed": None}
    return load_setting(str(tmp_path / "tiny.yaml"), rates)


def test_means_and_differences() -> None:
    assert mean_of([2.0]).stderr == 0
    assert (mean_of([1.0, 3.0]).mean, mean_of([1.0, 3.0]).stderr) == (2.0, 1.0)
    assert (difference([1.0, 5.0], [0.0, 2.0]).mean, difference([1.0, 5.0], [0.0, 2.0]).stderr) == (2.0, 1.0)


def test_tokens_per_round_pools_the_samples_of_a_prompt() -> None:
    def rollout(prompt: int, tokens: int, rounds: int) -> Rollout:
        return Rollout([1], [2] * tokens, [0.0] * tokens, [0] * tokens, "eos", prompt_index=prompt, rounds=rounds)

    assert tokens_per_round([rollout(1, 6, 2), rollout(0, 4, 4), rollout(1, 2, 2)]) == [1.0, 2.0]


def test_a_step_moves_the_policy(setting: Setting) -> None:
    trajectory, movement = Trajectory(setting), Movement(setting.policy)
    generated = trajectory.generate(LocalEngine(setting.policy, slots=8), trajectory.problems(0), 0)
    assert len({*generated.rewards.view(-1).tolist()}) == 2, "a step without contrast would teach nothing"
    assert movement.relative() == 0
    trajectory.update(generated)
    assert 0 < movement.relative() < 1


def test_only_the_online_shadow_learns(setting: Setting) -> None:
    shadows = online.shadows_of(setting, "in-domain", random_drafter(setting.policy))
    frozen, learner = shadows
    before = {k: v.clone() for k, v in frozen.drafter.state_dict().items()}
    trajectory = Trajectory(setting)
    generated = trajectory.generate(LocalEngine(setting.policy, slots=8), trajectory.problems(0), 0)
    assert online.coverage(frozen.drafter, generated.rollouts) == 1  # its vocabulary is the policy's
    first = online.judged(setting, [shadows], generated.rollouts, 3, 4)
    assert first[frozen.name] == first[learner.name]
    assert learner.trainer is not None
    online.learn(trajectory, [learner.trainer], generated, 0)
    assert all(torch.equal(v, before[k]) for k, v in frozen.drafter.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in learner.drafter.state_dict().items())
    second = online.judged(setting, [shadows], generated.rollouts, 3, 4)
    lengths = [[v.length for v in second[name]] for name in (learner.name, frozen.name)]
    assert difference(*lengths).mean > 0, "it has just been taught these rollouts"


def test_windows_pair_the_drafters_prompt_by_prompt() -> None:
    names = ["in, frozen", "in, online", "out, frozen", "out, online"]
    rows = [
        {"reward": float(s), "acceptance": {n: {"by_prompt": [i + s, i + s + 2.0]} for i, n in enumerate(names)}}
        for s in range(4)
    ]
    table = online.windows(rows, 2)
    assert table["first"]["in, frozen"]["mean"] == 1.5 and table["last"]["in, frozen"]["mean"] == 3.5
    assert table["last"]["out, online - out, frozen"] == {"mean": 1.0, "stderr": 0.0}
    assert table["last"]["in, frozen - out, frozen"] == {"mean": -2.0, "stderr": 0.0}


def test_a_trie_remembers_the_epoch_before(setting: Setting) -> None:
    run = trie.Run(setting, 3, TrieConfig(), frozen=True)
    (first, _), (second, rows) = run.epoch(0, 2), run.epoch(1, 2)
    assert set(first) == {"prompt", "global"} and set(second) == {"prompt", "global", "prompt, fresh"}
    assert [len(e.by_prompt) for e in (*first.values(), *second.values())] == [4] * 5
    assert rows[-1]["weights_moved"] == 0 and rows[-1]["step"] == 4
    held = {name: drafter.metrics()["texts"] for name, drafter in run.tries.items()}
    assert held == {"prompt": 4 + 32, "global": 4 + 32}  # prompts once, samples of both epochs
    assert "prompt: epoch 2 - epoch 1" in trie.contrasts([first, second])


def test_a_replay_repeats_the_run_round_by_round(setting: Setting) -> None:
    """Three streams of one trie, cool enough for siblings to agree; a trie that drafts otherwise is told apart."""
    settings, prompts = TrieConfig(match_min=1, floor=0.1), [[5, 6, 7], [9, 8], [5, 5]]
    engine = LocalEngine(setting.policy, TrieDrafter(settings), k=3, slots=12)
    drafter, other = TrieDrafter(settings), TrieDrafter(settings.model_copy(update={"match_min": 2}))
    rounds: list[list[int]] = [[], [], []]
    tokens = 0
    for seed in range(3):
        rollouts = list(engine.stream(prompts, Sampling(24, 0.1, seed), 4))
        tokens += sum(len(r.tokens) for r in rollouts)
        rollouts.sort(key=lambda r: (r.prompt_index, r.sample_index))
        rounds[0] += [r.rounds for r in rollouts]
        rounds[1] += [t.rounds for t in trie.replay(drafter, rollouts, 3, 24)]
        rounds[2] += [t.rounds for t in trie.replay(other, rollouts, 3, 24)]
    assert rounds[0] == rounds[1] != rounds[2] and sum(rounds[0]) < 0.8 * tokens
    assert drafter.metrics() == engine.metrics()["drafter"]


def test_tree_budgets_keep_the_shares_of_their_preset() -> None:
    assert trees.graft_config(12, "graft").keep == (3, 6) and trees.graft_config(24, "graft").keep == (6, 12)
    large = trees.graft_config(60, "eagle")
    assert (large.keep, large.depth, large.variant) == ((8, 24, 40), 8, "eagle")


def test_trees_are_measured_against_the_full_tree(setting: Setting, tmp_path: Path) -> None:
    random_drafter(setting.policy).save(tmp_path / "head", {})
    blocks = trees.methods(str(tmp_path / "head"), "block", 6, [2], ["eagle", "graft"])
    rows = trees.measure(setting, blocks, setting.held_out(2), 0.0, 1, 1)
    assert [r["method"] for r in rows] == ["plain", "chain k=2", "eagle 6", "graft 6"]
    assert rows[0]["tokens_per_round"]["mean"] == 1 and rows[2]["minus_eagle"] == {"mean": 0.0, "stderr": 0.0}
    assert all(r["nodes_mean"] <= limit for r, limit in zip(rows, (0, 2, 6, 6), strict=True))


def test_a_run_judges_before_it_learns(setting: Setting) -> None:
    shadows = online.shadows_of(setting, "in-domain", random_drafter(setting.policy))
    rows = online.run(setting, [shadows], steps=2, k=3, most=2)
    frozen, learner = (s.name for s in shadows)
    assert rows[0]["acceptance"][frozen] == rows[0]["acceptance"][learner]
    assert rows[1]["acceptance"][frozen] != rows[1]["acceptance"][learner]
    assert rows[1]["coverage"] == {frozen: 1.0} and rows[1]["weights_moved"] > 0
    assert online.windows(rows, 1)["first"][f"{learner} - {frozen}"] == {"mean": 0.0, "stderr": 0.0}


def test_expected_acceptance_is_the_mean_over_uniforms() -> None:
    """Both rules on one batch of drafts, against 4,000 draws each; an unclipped product would be off by percents."""
    source = torch.Generator().manual_seed(5)
    batch, k, size, draws = 6, 3, 9, 4000
    logits = 2 * torch.randn(batch, k + 1, size, generator=source)
    log_q = (logits[:, :k] + torch.randn(batch, k, size, generator=source)).log_softmax(-1)
    tokens = torch.multinomial(log_q.exp().flatten(0, 1), 1, generator=source).view(batch, k)
    draft = Draft(tokens, torch.tensor([3, 3, 2, 1, 3, 2]), log_q)
    judge = Expected()
    some = torch.rand(batch, k).clamp(0.1, 0.9)
    judge("token", VerifyInput(logits, draft, torch.ones(batch), some, torch.full((batch,), 0.5)))
    many = torch.arange(batch).repeat_interleave(draws)
    repeated = Draft(tokens[many], draft.lengths[many], log_q[many])
    accept = torch.rand(len(many), k, generator=source, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    for rule, expected in (("token", judge.token), ("block", judge.block)):
        residual = torch.full((len(many),), 0.5)
        verdict = verify(rule, VerifyInput(logits[many], repeated, torch.ones(len(many)), accept, residual))
        seen = verdict.accepted.double().view(batch, draws).mean(1)
        torch.testing.assert_close(seen, torch.tensor(expected, dtype=torch.float64), atol=0.08, rtol=0)  # 4 sigma
