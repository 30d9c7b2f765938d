"""Training drafters: losses against slow references, and the loop, which can be broken off."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draft_training import distributions, watched
from forerun.config import DraftConfig
from forerun.drafters import unroll
from forerun.drafters.eagle3 import new_head
from forerun.drafters.mtp import MtpHead
from forerun.drafters.training.distill import chain_losses, distill, pruned_copy
from forerun.drafters.training.heads import run_teacher, split_pairs, train_head, unrolled_losses, weighted_loss
from forerun.drafters.training.losses import acceptance, cross_entropy, position_loss, total_variation
from forerun.drafters.training.trainer import StateFile, Trainer, TrainingSetup, Validation, fit
from forerun.engine.local.engine import LocalEngine
from forerun.errors import UserError
from forerun.models import Policy
from tiny_models import random_head

KINDS = ["eagle3", "mtp", "model"]


def logs(seed: int, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """log p, the logits of q (a leaf with gradient) and log q, in float64."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (2 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    q.requires_grad_(True)
    return torch.log_softmax(p, -1), q, torch.log_softmax(q, -1)


def close(a: Any, b: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=atol, rtol=1e-4, check_dtype=False)


# ---- losses ----


def test_cross_entropy_is_that_of_the_sampled_token() -> None:
    _, logits, log_q = logs(0, 5, 4)
    tokens = torch.tensor([3, 0, -1, 2, 2])
    loss = cross_entropy(log_q, tokens)
    loss.sum().backward()
    q = log_q.detach().exp()
    for row, token in enumerate(tokens.tolist()):  # d(-log q_x)/dz = q - 1[x], nothing where x cannot be drafted
        wanted = torch.zeros(4, dtype=torch.float64) if token < 0 else q[row] - torch.eye(4, dtype=torch.float64)[token]
        close(logits.grad[row], wanted, 1e-12)
        close(loss[row].detach(), 0.0 if token < 0 else -torch.log(q[row, token]), 1e-12)


def test_cross_entropy_is_forward_kls_gradient_in_the_mean() -> None:
    log_p, logits, log_q = logs(1, 1, 6)
    mean = sum(log_p[0, x].exp() * cross_entropy(log_q, torch.tensor([x]))[0] for x in range(6))
    close(torch.autograd.grad(mean, logits, retain_graph=True)[0], log_q.exp() - log_p.exp(), 1e-12)


@pytest.mark.parametrize("name", ["lk", "kl", "tv", "ce", "e2e"])
def test_losses_leave_out_what_a_logit_of_minus_infinity_excludes(name: str) -> None:
    """Of the policy alone, as with a draft vocabulary that holds such a token, and of both."""
    torch.manual_seed(0)
    p, tokens, reached = torch.randn(5, 6), torch.randint(0, 6, (5,)), torch.rand(5)
    masked = torch.cat([p, torch.full((5, 3), -torch.inf)], dim=1)

    def of(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = q.clone().requires_grad_()
        loss, _ = position_loss(name, p.log_softmax(-1), q.log_softmax(-1), tokens, reached)
        (gradient,) = torch.autograd.grad(loss.sum(), q)
        return loss.detach(), gradient

    q = torch.randn(5, 9)
    q[:, 6:] = -torch.inf
    loss, gradient = of(masked, q)
    expected, expected_gradient = of(p, q[:, :6])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[:, :6], expected_gradient)
    assert not gradient[:, 6:].any()
    alone, gradient = of(masked, torch.randn(5, 9))
    assert bool(alone.isfinite().all() and gradient.isfinite().all())


def test_the_gradient_of_total_variation_is_the_papers() -> None:
    """2606.12370: -q_j ([q_j <= p_j] - S), S = Σ q_i [q_i <= p_i]."""
    log_p, logits, log_q = logs(2, 7, 9)
    total_variation(log_p, log_q).sum().backward()
    p, q = log_p.exp(), log_q.detach().exp()
    below = (q <= p).double()
    close(logits.grad, -q * (below - (q * below).sum(-1, keepdim=True)), 1e-12)


def expected_accepted(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Expected number of accepted drafts of one chain [J, V], over all drafts and uniforms: every path, one by one."""
    depth, size = log_p.shape
    total = torch.zeros((), dtype=log_p.dtype)
    for path in itertools.product(range(size), repeat=depth):
        drawn, accepted = torch.ones((), dtype=log_p.dtype), torch.ones((), dtype=log_p.dtype)
        for j, x in enumerate(path):
            drawn = drawn * log_q[j, x].exp()
        for j, x in enumerate(path):
            accepted = accepted * torch.clamp((log_p[j, x] - log_q[j, x]).exp(), max=1)
            total = total + drawn * accepted
    return total


def test_the_end_to_end_loss_is_the_expected_number_of_accepted_drafts() -> None:
    log_p, logits, log_q = logs(3, 3, 4)
    alive, losses = torch.ones(1, dtype=torch.float64), []
    for j in range(3):
        loss, overlap = position_loss("e2e", log_p[j : j + 1], log_q[j : j + 1], torch.tensor([0]), alive)
        alive = alive * overlap
        losses.append(loss.sum())
    reference = expected_accepted(log_p, log_q)
    assert 0.3 < float(reference.detach()) < 2.9
    close((3 - sum(losses)).detach(), reference.detach(), 1e-12)
    ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (-sum(losses), reference))
    close(ours, theirs, 1e-12)
    separate = torch.autograd.grad(acceptance(log_p, log_q).sum(), logits)[0]
    assert float((separate - theirs).abs().max()) > 1e-2, "total variation by position would pass as well"


def test_the_end_to_end_loss_of_a_distilled_model_runs_over_all_chains() -> None:
    """Completions of 4, 1 and 3 tokens at depth 3."""
    lengths, depth = [4, 1, 3], 3
    log_p, logits, log_q = logs(4, sum(lengths), 5)
    left = torch.cat([torch.arange(n, 0, -1) for n in lengths])
    sums = chain_losses(acceptance(log_p, log_q), left, depth)
    for j in range(depth):
        slow, start = torch.zeros((), dtype=torch.float64), 0
        for n in lengths:
            for first in range(start, start + n - j):
                slow = (
                    slow + 1 - torch.stack([acceptance(log_p[i], log_q[i]) for i in range(first, first + j + 1)]).prod()
                )
            start += n
        close(sums[j].detach(), slow.detach(), 1e-12)
        ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (sums[j], slow))
        close(ours, theirs, 1e-12)


UNEVEN = [([5, 6, 7], [8, 9, 10, 11, 3, 4]), ([4, 5], [6, 7]), ([9, 8, 7, 6], [5]), ([1, 2], [12, 13, 50, 4, 5])]


def head_of(method: str, policy: Policy) -> Any:
    """A head that knows some of the tokens (EAGLE-3), or all (MTP, of one layer or two)."""
    torch.manual_seed(0)
    return (
        MtpHead(policy, int(method[-1]))
        if method.startswith("mtp")
        else random_head(policy, [0, 3, 4, 5, 6, 7, 9, 10, 13])
    )


def rows_of(head: Any, policy: Policy, pair: tuple[list[int], list[int]], depth: int) -> list[tuple[Tensor, Tensor]]:
    """log p, log q by draft position of one text alone; row b of each is base b."""
    return distributions(head, policy, run_teacher(head, policy, [pair], 0.8), depth, 0.8)


def slow_loss(name: str, head: Any, policy: Policy, depth: int) -> Tensor:
    """One text, one base, one position at a time; mean over a position's rows, then over positions."""
    found: list[list[Tensor]] = [[] for _ in range(depth)]
    vocabulary = list(range(55)) if isinstance(head, MtpHead) else head.vocabulary.tolist()
    for pair in UNEVEN:
        rows = rows_of(head, policy, pair, depth)
        for base in range(len(pair[1])):
            alive = torch.ones(())
            for j in range(min(depth, len(pair[1]) - base)):
                log_p, log_q = rows[j][0][base].detach(), rows[j][1][base]
                alive = alive * acceptance(log_p, log_q)
                token = pair[1][base + j]
                if name == "e2e":
                    found[j].append(1 - alive)
                else:
                    found[j].append(-log_q[vocabulary.index(token)] if token in vocabulary else 0 * log_q[0])
    assert [len(x) for x in found] == [14, 10, 7, 5][:depth]
    return torch.stack([torch.stack(x).mean() for x in found]).mean()


@pytest.mark.parametrize("method", ["eagle3", "mtp1"])
def test_what_long_texts_compute_again_changes_nothing(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    head, config = head_of(method, policy), DraftConfig(depth=3)

    def result() -> tuple[Tensor, list[Tensor]]:
        head.zero_grad(set_to_none=True)
        loss = weighted_loss(unrolled_losses(head, policy, run_teacher(head, policy, UNEVEN, 0.8), config, 0.8), 1.0)
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in head.parameters() if p.grad is not None]

    loss, gradients = result()
    monkeypatch.setattr("forerun.drafters.training.heads.ROWS", 3)
    monkeypatch.setattr("forerun.drafters.training.heads.KEPT_BYTES", 0)
    monkeypatch.setattr("forerun.drafters.unroll.LAYER_BYTES", 0)
    monkeypatch.setitem(unroll.SCORE_BYTES, "cpu", 1)
    again, gradients_again = result()
    torch.testing.assert_close(again, loss, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(gradients_again, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["eagle3", "mtp1", "mtp2"])
@pytest.mark.parametrize("loss", ["ce", "e2e"])
def test_a_heads_loss_is_that_of_base_after_base(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, method: str, loss: str
) -> None:
    """Texts of uneven length in one batch, rows three at a time; value and gradient."""
    monkeypatch.setattr("forerun.drafters.training.heads.ROWS", 3)
    monkeypatch.setattr("forerun.drafters.training.heads.KEPT_BYTES", 0)
    head, config = head_of(method, policy), DraftConfig(depth=3, loss=loss)
    slow = slow_loss(loss, head, policy, 3)
    slow.backward()
    wanted = {n: p.grad.clone() for n, p in head.named_parameters() if p.grad is not None}
    head.zero_grad(set_to_none=True)
    fast = weighted_loss(unrolled_losses(head, policy, run_teacher(head, policy, UNEVEN, 0.8), config, 0.8), 1.0)
    fast.backward()
    close(fast.detach(), slow.detach())
    size = torch.stack([g.norm() for g in wanted.values()]).norm()
    off = torch.stack([(p.grad - wanted[n]).norm() for n, p in head.named_parameters() if n in wanted]).norm()
    assert len(wanted) > 5 and size > 0.01 and off < 1e-3 * size
    by_position = [
        p.accepted / p.rows for p in unrolled_losses(head, policy, run_teacher(head, policy, UNEVEN, 0.8), config, 0.8)
    ]
    other = unrolled_losses(head, policy, run_teacher(head, policy, UNEVEN, 0.8), DraftConfig(depth=3, loss="kl"), 0.8)
    assert by_position == pytest.approx([p.accepted / p.rows for p in other], abs=1e-6)  # whatever the loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["ce", "e2e"])
def test_the_new_losses_raise_acceptance(policy: Policy, samples: list[Any], kind: str, loss: str) -> None:
    config = DraftConfig(epochs=5, learning_rate=3e-3, batch_tokens=1024, depth=3, vocab=40, loss=loss)
    results: list[Validation] = []
    best = training_of(kind, policy, samples, config)(lambda *_: None, lambda e, r: results.append(r))
    assert best.length == max(r.length for r in results) > results[0].length + 0.05, [r.length for r in results]


# ---- the loop, broken off ----


@pytest.fixture(scope="module")
def samples(policy: Policy) -> list[tuple[list[int], list[int]]]:
    engine = LocalEngine(policy, slots=64)
    rollouts = engine.generate([[i, i + 1, i + 2] for i in range(1, 41)], max_new_tokens=24, n=4, seed=9)
    return [(r.prompt_ids, r.tokens) for r in rollouts]


class Training:
    """One drafter's training; every call begins with the same new drafter."""

    def __init__(self, kind: str, policy: Policy, pairs: list[Any], config: DraftConfig) -> None:
        self.kind, self.policy, self.pairs, self.config = kind, policy, pairs, config
        self.module: Any = None

    def __call__(
        self, report: Callable[..., None], validated: Callable[..., None], file: StateFile | None = None
    ) -> Validation:
        """For `report` and `validated` see `watched`."""
        torch.manual_seed(0)
        setup = TrainingSetup(self.pairs, self.config, 1.0, 7, file)
        if self.kind == "model":
            self.module = pruned_copy(self.policy, [0, 3])
            return watched(distill(self.module, self.policy, setup), report, validated)
        eagle = self.kind == "eagle3"
        self.module = new_head(self.policy, self.pairs, self.config) if eagle else MtpHead(self.policy, 1)
        return watched(train_head(self.module, self.policy, setup), report, validated)

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.module.state_dict().items()}


training_of = Training


def stop_at(step: int, now: int, *_: Any) -> None:
    if now == step:
        raise InterruptedError


def broken_off(training: Training, file: StateFile, spoil: Callable[[dict[str, Any]], None] | None = None) -> Any:
    """Break the training off in the middle of its third epoch, then go on: weights, best and what was validated."""
    steps: list[int] = []
    training(lambda s, n, loss: steps.append(n), lambda *_: None)
    per_epoch = steps[0] // training.config.epochs
    assert per_epoch >= 3
    with pytest.raises(InterruptedError):
        training(partial(stop_at, 2 * per_epoch + 2), lambda *_: None, file)
    if spoil is not None:
        state = torch.load(file.path, weights_only=True)
        spoil(state)
        torch.save(state, file.path)
    results: list[tuple[int, Validation]] = []
    best = training(lambda *_: None, lambda e, r: results.append((e, r)), file)
    return training.weights(), best, results


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def other_order(state: dict[str, Any]) -> None:
    state["order"] = random.Random(5).getstate()


def no_momentum(state: dict[str, Any]) -> None:
    for entry in state["optimizer"]["state"].values():
        entry["exp_avg"].zero_()


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_was_broken_off_ends_as_if_it_had_not_been(
    policy: Policy, samples: list[Any], tmp_path: Path, kind: str
) -> None:
    """Bit-equal weights and validations; not so when the order of batches or the optimizer's momentum is forgotten."""
    training = Training(kind, policy, samples[:96], DraftConfig(epochs=4, batch_tokens=512, depth=2, vocab=40))
    results: list[tuple[int, Validation]] = []
    best = training(lambda *_: None, lambda e, r: results.append((e, r)))
    weights = training.weights()
    again = broken_off(training, StateFile(tmp_path / "state.pt"))
    assert [e for e, _ in again[2]] == [3, 4] and again[2] == results[3:]
    assert again[1] == best and same(again[0], weights)
    if kind == "eagle3":
        for spoil in (other_order, no_momentum):
            (tmp_path / "state.pt").unlink()
            spoiled = broken_off(training, StateFile(tmp_path / "state.pt"), spoil)
            assert not same(spoiled[0], weights), f"{spoil.__name__}: the comparison would be idle"


def test_a_finished_training_is_not_trained_again(policy: Policy, samples: list[Any], tmp_path: Path) -> None:
    """Killed between its last epoch and the saving of the drafter."""
    training = Training("eagle3", policy, samples[:96], DraftConfig(epochs=2, batch_tokens=512, depth=2, vocab=40))
    file, calls = StateFile(tmp_path / "state.pt"), []
    best = training(lambda *_: None, lambda *_: None, file)
    weights = training.weights()
    assert training(lambda *a: calls.append(a), lambda *a: calls.append(a), file) == best
    assert not calls and same(training.weights(), weights) and [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_states_that_do_not_fit_are_refused(policy: Policy, samples: list[Any], tmp_path: Path) -> None:
    file, silent = StateFile(tmp_path / "state.pt"), lambda *_: None
    config = DraftConfig(epochs=1, batch_tokens=512, depth=2, vocab=40)
    Training("eagle3", policy, samples[:64], config)(silent, silent, file)
    with pytest.raises(UserError, match=r"state\.pt is broken or of another drafter .*delete it to train anew"):
        Training("model", policy, samples[:64], config)(silent, silent, file)
    file.path.write_bytes(file.path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"state\.pt is broken or of another drafter"):
        Training("eagle3", policy, samples[:64], config)(silent, silent, file)
    with pytest.raises(UserError, match="Cannot write"):
        StateFile(tmp_path / "missing" / "state.pt").save({})


def small_fit(lengths: list[float], patience: int, loss: float = 1.0) -> tuple[list[int], Tensor, Validation]:
    """One weight that every step raises; `lengths` are the validations. Epochs, the weight in the end, the best."""
    module, epochs, due = torch.nn.Linear(1, 1, bias=False), [], iter(lengths)
    torch.nn.init.zeros_(module.weight)

    def backward(rows: list[int]) -> float:
        (-module.weight.sum()).backward()
        return loss

    config = DraftConfig(epochs=8, patience=patience, learning_rate=0.1)
    setup = TrainingSetup([], config, 1.0, 0)
    work = fit(module, [[0]], setup, random.Random(0), backward, lambda: Validation([], next(due)))
    best = watched(work, lambda *_: None, lambda e, r: epochs.append(e))
    return epochs, module.weight.detach()[0, 0], best


def test_training_stops_when_it_no_longer_helps_and_keeps_the_best() -> None:
    lengths = [1.0, 1.5, 1.4, 1.6, 1.5, 1.6, 1.2, 1.1, 1.9]
    epochs, weight, best = small_fit(lengths, patience=2)
    assert epochs == [0, 1, 2, 3, 4, 5] and best.length == 1.6
    of_epoch_3 = small_fit([1.0, 1.1, 1.2, 1.3, *[0.0] * 5], patience=1)[1]
    assert torch.equal(weight, of_epoch_3) and float(weight) > 0.2
    epochs, _, best = small_fit(lengths, patience=8)
    assert epochs == list(range(9)) and best.length == 1.9
    assert float(small_fit([2.0, *[1.0] * 8], patience=8)[1]) == 0.0  # training did harm: the start is kept


def test_four_epochs_are_trained_in_full_by_default() -> None:
    assert DraftConfig().epochs == DraftConfig().patience == 4
    run = Trainer(torch.nn.Linear(1, 1), DraftConfig(), random.Random(0))
    for run.epoch in range(4):
        assert not run.finished


def test_a_loss_that_is_not_finite_ends_with_a_sentence() -> None:
    with pytest.raises(UserError, match=r"loss is nan at step 1; lower draft\.learning_rate=0\.1"):
        small_fit([1.0], patience=2, loss=float("nan"))


def test_texts_without_a_prompt_are_held_out_one_by_one() -> None:
    """All begin with the same token, which is no prompt that they share."""
    pairs = [([0], [i, i + 1, i + 2]) for i in range(20)] + [([5, 6], [i]) for i in range(4)]
    held, training = split_pairs(pairs, 0.25, random.Random(0))
    assert len(held) + len(training) == 24 and not any(p in training for p in held)
    assert {len(p) for p, _ in held} == {1} and 4 <= len(held) <= 6
    shared = [pair for pair in training if pair[0] == [5, 6]]
    assert len(shared) == 4
