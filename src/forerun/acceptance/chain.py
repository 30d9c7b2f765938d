"""Exact acceptance rules for a chain of draft tokens: token rejection sampling, block verification, greedy.

A rule is a deterministic function of a `VerifyInput`, batched, on any device. Whatever the draft, the tokens a round
emits, continued by the target, are distributed as the target's own; tests/proofs/oracle.py proves it by enumeration.

Conventions
- B sequences, k draft slots, V vocabulary, D draft vocabulary. Slot i (0-based) is verified by target row i, which also
  gives the next token after i accepted ones. `draft.lengths` may differ between sequences as long as the decision to
  draft slot i used nothing sampled at slot i or later.
- temperature 0 marks a greedy sequence: a slot is accepted iff it is the argmax; uniforms and q are not read.
- Nothing of size [B, k+1, V] is built: full rows are read in chunks of a few MB, beyond the log-sum-exp only where the
  result depends on them. Scalars per slot are float64.
- For top-k and top-p mask the target logits with -inf and give the draft the q it was sampled from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from forerun.acceptance.random import inverse_cdf
from forerun.errors import UserError
from forerun.types import Draft, VerifyInput, VerifyResult

_CHUNK_ELEMENTS = {"cpu": 1 << 21}  # float32 logits in flight: 8 MB is near the caches, and worth waking threads for
_CHUNK_ELEMENTS_DEVICE = 1 << 24  # 64 MB hides the launch time on an accelerator

RuleFunction = Callable[[VerifyInput], VerifyResult]  # a rule by itself: `partial(verify, name)`


@dataclass(frozen=True, slots=True)
class Target:
    """The target's rows read where they lie: log p = logits * scale - lse."""

    logits: Tensor  # [B, k+1, V]
    scale: Tensor  # [B] float32, 1/temperature; 1 for a greedy sequence
    lse: Tensor  # [B, k+1] float64, 0 in rows beyond the draft's length

    def log_p(self, tokens: Tensor) -> Tensor:
        """Log-probability of token j of each sequence under row j: [B, n] int64 -> [B, n] float64."""
        rows = self.logits[:, : tokens.shape[1]]
        values = rows.gather(2, tokens[..., None])[..., 0].to(torch.float32) * self.scale[:, None]
        return values.to(torch.float64) - self.lse[:, : tokens.shape[1]]


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Accepted count, and the weight of p in the residual at the first rejection."""

    accepted: Tensor  # [B] int64
    weight: Tensor  # [B] float64


AcceptanceRule = Callable[[Target, Draft, Tensor, Tensor], Acceptance]  # the tensors: log p/q and uniforms, [B, k] each
NextToken = Callable[[Target, Draft, Acceptance, Tensor, Tensor], Tensor]


def token_acceptance(target: Target, draft: Draft, log_ratio: Tensor, uniforms: Tensor) -> Acceptance:
    """Accept slots from the left while u <= p(x)/q(x) (2211.17192, algorithm 1); the residual is norm((p - q)+)."""
    accepted = ((uniforms <= log_ratio.exp()) & drafted(draft)).cumprod(1).sum(1)
    return Acceptance(accepted, torch.ones(len(uniforms), dtype=torch.float64, device=uniforms.device))


def block_acceptance(target: Target, draft: Draft, log_ratio: Tensor, uniforms: Tensor) -> Acceptance:
    """Accept the longest prefix i with u_i <= h_i (2403.10444, algorithm 2); the residual is norm((p_i p - q)+).

    p_i = min(p_{i-1} p(x_i)/q(x_i), 1); h_gamma = p_gamma; for i < gamma, h_i = S_i/(S_i + 1 - p_i) with
    S_i = sum_x (p_i p(x|x_<=i) - q(x|x_<=i))+. One-hot drafts go by the token rule: same distribution, less work.
    """
    if draft.log_q is None or uniforms.shape[1] < 2:
        return token_acceptance(target, draft, log_ratio, uniforms)
    return accept_longest(target, draft, clipped_products(log_ratio).exp(), uniforms)


def accept_longest(target: Target, draft: Draft, prefix: Tensor, uniforms: Tensor) -> Acceptance:
    """Block verification given p_1 .. p_k as `prefix` [B, k]."""
    # S_i needs two full rows, so it is computed only where it matters: h_i <= p_i since S_i <= p_i, hence u_i > p_i
    # rejects without S_i; and where slot gamma is accepted, no shorter prefix is needed.
    count = torch.arange(1, uniforms.shape[1] + 1, device=uniforms.device)
    hits = (uniforms <= prefix) & drafted(draft)
    final = hits & (count == draft.lengths[:, None])
    open_slots = hits & (count < draft.lengths[:, None]) & ~final.any(1, keepdim=True)
    sequences, slots = open_slots.nonzero(as_tuple=True)
    p = prefix[sequences, slots]
    mass = residual_mass(target, draft, p, sequences, slots + 1)
    hits = final.index_put((sequences, slots), uniforms[sequences, slots] <= block_threshold(mass, p))
    return longest_prefix(hits, prefix)


def longest_prefix(hits: Tensor, prefix: Tensor) -> Acceptance:
    """The longest accepted prefix i of `hits` [B, k], 0 without any, and its weight p_i of `prefix` [B, k], p_0 = 1."""
    accepted = (hits * torch.arange(1, hits.shape[1] + 1, device=hits.device)).amax(1)
    with_empty = torch.nn.functional.pad(prefix, (1, 0), value=1.0)  # [B, k+1]
    return Acceptance(accepted, with_empty.gather(1, accepted[:, None])[:, 0])


def clipped_products(log_ratio: Tensor) -> Tensor:
    """Running product of p/q clipped at 1 after every slot, log p_i: [B, k] -> [B, k]."""
    columns, running = [], torch.zeros_like(log_ratio[:, 0])
    for column in log_ratio.unbind(1):
        running = (running + column).clamp(max=0.0)
        columns.append(running)
    return torch.stack(columns, 1)


def block_threshold(mass: Tensor, prefix: Tensor) -> Tensor:
    """h = S/(S + 1 - p), and 1 where both S and 1 - p vanish (the prefix is certain and the next rows agree)."""
    denominator = mass + 1.0 - prefix
    return torch.where(denominator > 0, mass / denominator.clamp(min=torch.finfo(mass.dtype).tiny), 1.0)


def residual_mass(target: Target, draft: Draft, weight: Tensor, sequences: Tensor, rows: Tensor) -> Tensor:
    """S = sum_x (weight p(x) - q(x))+ at the given (sequence, row) pairs: [n] each -> [n] float64.

    Where the draft vocabulary is smaller than V, columns outside it have q = 0 and add what they hold of p.
    """
    assert draft.log_q is not None
    mass = torch.empty_like(weight)
    for part, logits in stream_rows(target, sequences, rows):
        chosen = logits if draft.vocabulary is None else logits.gather(1, draft.vocabulary.expand(len(logits), -1))
        shift = weight[part].log() - target.lse[sequences[part], rows[part]]
        inside = (chosen + shift.to(torch.float32)[:, None]).exp_()  # [m, D] weight * p
        outside = 0.0 if draft.vocabulary is None else (weight[part] - inside.sum(1)).clamp(min=0.0)
        inside -= select_rows(draft.log_q, sequences[part], rows[part]).exp_()
        mass[part] = inside.relu_().sum(1) + outside
    return mass


def next_token(target: Target, draft: Draft, acceptance: Acceptance, needed: Tensor, uniforms: Tensor) -> Tensor:
    """The token after the accepted ones: from p if all drafts were accepted, else from norm((weight p - q)+).

    `needed` [B] bool skips (greedy) sequences; the result is [B] int64, 0 for those.
    """
    following = torch.zeros_like(acceptance.accepted)
    sequences = needed.nonzero()[:, 0]
    for part, logits in stream_rows(target, sequences, acceptance.accepted[sequences]):
        members = sequences[part]
        weights = _row_probabilities(target, members, acceptance.accepted[members], logits)  # [m, V]
        rejected = (acceptance.accepted[members] < draft.lengths[members]).nonzero()[:, 0]
        weights[rejected] = _residual(weights[rejected], draft, acceptance, members[rejected])
        following[members] = inverse_cdf(weights, uniforms[members])
    return following


def _residual(p: Tensor, draft: Draft, acceptance: Acceptance, members: Tensor) -> Tensor:
    """(weight p - q)+ [m, V], not normalised, at the first rejected slot of the given sequences."""
    slot = acceptance.accepted[members]
    if draft.log_q is None:  # q is one at the draft token and the weight is one, so the residual is p elsewhere
        residual = p.scatter(1, draft.tokens[members, slot][:, None], 0.0)
    else:
        q = select_rows(draft.log_q, members, slot).exp()
        residual = p * acceptance.weight[members].to(p.dtype)[:, None]
        residual = (
            residual - q if draft.vocabulary is None else residual.scatter_add_(1, draft.vocabulary.expand_as(q), -q)
        )
        residual = residual.relu_()
    # The mass is at least the chance of a rejection here, so a mass that rounds to zero means p = q to rounding, an
    # event of chance ~1e-7: any distribution is right to that accuracy, and p emits no token that p forbids.
    empty = (residual.sum(1) == 0).nonzero()[:, 0]
    return residual.index_copy_(0, empty, p[empty])


RULES: dict[str, AcceptanceRule] = {"token": token_acceptance, "block": block_acceptance}


@torch.no_grad()
def verify(rule: str | AcceptanceRule, inputs: VerifyInput, choose: NextToken = next_token) -> VerifyResult:
    """Verify one round of drafts. k = 0 is plain sampling.

    Args:
        rule: a name in `RULES`, or a function that decides what is accepted.
        choose: draws the token after the accepted ones; another one for a broken rule of `broken.py`.

    Raises:
        ValueError: shapes disagree, a row that is read has no finite log-sum-exp, or a draft token has probability zero
            under the q it claims to be sampled from.

    Sources: Leviathan et al. 2211.17192 (token); Sun et al. 2403.10444, algorithm 2 (block).
    """
    if isinstance(rule, str) and rule not in RULES:
        raise ValueError(f"there is no verification rule {rule!r}; the rules are {', '.join(RULES)}")
    accept = RULES[rule] if isinstance(rule, str) else rule
    check_shapes(inputs)
    check_draft(inputs)
    draft = inputs.draft
    draft = replace(draft, tokens=draft.tokens.where(drafted(draft), 0))  # padding may hold anything
    greedy = inputs.temperature == 0
    scale = inverse_temperature(inputs.temperature)
    target = Target(inputs.target_logits, scale, _log_sum_exp(inputs.target_logits, scale, draft.lengths))
    log_q = log_q_of_tokens(draft)
    check_probabilities(target, log_q, greedy)
    acceptance = accept(target, draft, target.log_p(draft.tokens) - log_q, inputs.accept_uniforms)
    following = choose(target, draft, acceptance, ~greedy, inputs.residual_uniforms)
    accepted = acceptance.accepted
    if bool(greedy.any()):
        accepted, following = _decide_greedily(target, draft, greedy, accepted, following)
    return _result(target, draft, accepted, following)


def _decide_greedily(
    target: Target, draft: Draft, greedy: Tensor, accepted: Tensor, following: Tensor
) -> tuple[Tensor, Tensor]:
    """Overwrite the greedy sequences: accept slots while they equal the argmax; the argmax of the next row follows."""
    rows = target.logits.shape[1]
    best = torch.zeros_like(target.lse, dtype=torch.int64)  # [B, k+1]
    counted = greedy[:, None] & (torch.arange(rows, device=greedy.device) <= draft.lengths[:, None])
    sequences, index = counted.nonzero(as_tuple=True)
    for part, logits in stream_rows(target, sequences, index):
        best[sequences[part], index[part]] = logits.argmax(1)
    matches = ((draft.tokens == best[:, :-1]) & drafted(draft)).cumprod(1).sum(1)
    accepted = torch.where(greedy, matches, accepted)
    return accepted, torch.where(greedy, best.gather(1, accepted[:, None])[:, 0], following)


def _result(target: Target, draft: Draft, accepted: Tensor, following: Tensor) -> VerifyResult:
    """Lay out the emitted tokens and their log-probabilities under the rows that verified them; zeros beyond."""
    place = torch.arange(target.logits.shape[1], device=accepted.device)  # [k+1]
    padded = torch.nn.functional.pad(draft.tokens, (0, 1))  # [B, k+1]
    tokens = torch.where(place < accepted[:, None], padded, 0)
    tokens = torch.where(place == accepted[:, None], following[:, None], tokens)
    logprobs = torch.where(place <= accepted[:, None], target.log_p(tokens), 0.0)
    return VerifyResult(accepted, tokens, logprobs.to(torch.float32))


def log_q_of_tokens(draft: Draft) -> Tensor:
    """Log-probability of each draft token under its own q: [B, k] float64; 0 for a one-hot draft and beyond lengths."""
    if draft.log_q is None or draft.tokens.shape[1] == 0:
        return torch.zeros_like(draft.tokens, dtype=torch.float64)
    columns, known = draft.tokens, torch.ones_like(draft.tokens, dtype=torch.bool)
    if draft.vocabulary is not None:
        columns = torch.searchsorted(draft.vocabulary, draft.tokens).clamp(max=len(draft.vocabulary) - 1)
        known = draft.vocabulary[columns] == draft.tokens
    log_q = draft.log_q.gather(2, columns[..., None])[..., 0].to(torch.float64)
    return torch.where(drafted(draft), torch.where(known, log_q, -torch.inf), 0.0)


def _log_sum_exp(logits: Tensor, scale: Tensor, lengths: Tensor) -> Tensor:
    """Log-sum-exp of the scaled rows 0..lengths: [B, k+1] float64, 0 in the rows beyond."""
    counted = torch.arange(logits.shape[1], device=logits.device) <= lengths[:, None]
    sequences, rows = counted.nonzero(as_tuple=True)
    target = Target(logits, scale, torch.zeros(logits.shape[:2], dtype=torch.float64, device=logits.device))
    for part, values in stream_rows(target, sequences, rows):
        top = values.amax(1, keepdim=True)
        total = values.sub_(top).exp_().sum(1)
        target.lse[sequences[part], rows[part]] = total.to(torch.float64).log() + top[:, 0]
    return target.lse


def _row_probabilities(target: Target, sequences: Tensor, rows: Tensor, logits: Tensor) -> Tensor:
    """p of streamed logits [m, V], in place."""
    return logits.sub_(target.lse[sequences, rows].to(logits.dtype)[:, None]).exp_()


def stream_rows(target: Target, sequences: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Scaled float32 logits of the given (sequence, row) pairs, [m, V] at a time, as fresh memory."""
    elements = _CHUNK_ELEMENTS.get(target.logits.device.type, _CHUNK_ELEMENTS_DEVICE)
    step = max(1, elements // target.logits.shape[2])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        values = select_rows(target.logits, sequences[part], rows[part]).to(torch.float32)
        yield part, values.mul_(target.scale[sequences[part], None])


def select_rows(table: Tensor, sequences: Tensor, rows: Tensor) -> Tensor:
    """Rows [m, V] of a table [B, n, V]; reading them by one flat index is four times faster than by two."""
    if not table.is_contiguous():
        return table[sequences, rows]
    return table.view(-1, table.shape[2]).index_select(0, sequences * table.shape[1] + rows)


def drafted(draft: Draft) -> Tensor:
    """Which slots hold a proposal: [B, k] bool."""
    return torch.arange(draft.tokens.shape[1], device=draft.tokens.device) < draft.lengths[:, None]


def inverse_temperature(temperature: Tensor) -> Tensor:
    """What logits are multiplied by: [B] float32, 1 for a greedy sequence."""
    return torch.where(temperature == 0, 1.0, 1.0 / temperature).to(torch.float32)


def check_shapes(inputs: VerifyInput) -> None:
    """Refuse trees and tensors whose shapes disagree with the draft's [B, k]."""
    draft, logits = inputs.draft, inputs.target_logits
    if draft.parents is not None:
        raise ValueError("a chain rule cannot verify a tree; give a draft without parents")
    batch, k = draft.tokens.shape
    columns = logits.shape[-1] if draft.vocabulary is None else len(draft.vocabulary)
    expected = {
        "target_logits": (logits, (batch, k + 1, logits.shape[-1])),
        "draft.lengths": (draft.lengths, (batch,)),
        "temperature": (inputs.temperature, (batch,)),
        "accept_uniforms": (inputs.accept_uniforms, (batch, k)),
        "residual_uniforms": (inputs.residual_uniforms, (batch,)),
    }
    if draft.log_q is not None:
        expected["draft.log_q"] = (draft.log_q, (batch, k, columns))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but the draft's tokens ask for {shape}")


def check_draft(inputs: VerifyInput) -> None:
    """Refuse lengths, tokens and temperatures outside their range."""
    draft, temperature = inputs.draft, inputs.temperature
    k, size = draft.tokens.shape[1], inputs.target_logits.shape[2]
    unknown = ((draft.tokens < 0) | (draft.tokens >= size)) & drafted(draft)
    refuse(
        {
            f"its draft length is not in 0..{k}": (draft.lengths > k) | (draft.lengths < 0),
            f"a draft token is not in the target's vocabulary 0..{size - 1}": unknown.any(1),
            "its temperature is not a finite number >= 0": ~(temperature >= 0) | temperature.isinf(),
        }
    )


def check_probabilities(target: Target, log_q: Tensor, greedy: Tensor) -> None:
    """Refuse what would bias the result unnoticed: broken rows, draft tokens that q cannot have produced."""
    impossible = (log_q.isnan() | log_q.isinf()).any(1) & ~greedy
    refuse(
        {
            "its target logits hold NaN, +inf or a row of only -inf. The policy has diverged, or its file is damaged; "
            "lower train.learning_rate and go on from an earlier checkpoint": ~target.lse.isfinite().all(1),
            "a draft token has probability zero under its own q, so q is not what it was sampled from": impossible,
        }
    )


class NotVerifiable(UserError, ValueError):
    """A round whose inputs no rule can verify, in one sentence."""


def refuse(problems: dict[str, Tensor]) -> None:
    """Raise NotVerifiable for the first sequence flagged by any problem, each [B] bool; one transfer when fine."""
    if not bool(torch.stack(list(problems.values())).any()):
        return
    for problem, flags in problems.items():
        if bool(flags.any()):
            raise NotVerifiable(f"sequence {int(flags.nonzero()[0, 0])} cannot be verified: {problem}")
