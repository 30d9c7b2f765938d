"""Rules with one fault each, as published systems have had them: what a test of losslessness must catch.

Each can replace a rule of chain.py (`BROKEN`) or tree.py (`BROKEN_TREE`). The faults of chains show with sampled drafts
of two or more tokens at temperature above 0, those in `SHOW_WITH_ONE_HOT` also with deterministic drafts. Most accept
more than the exact rule does. More faults of trees: tests/proofs/broken_tree.py.

Not included: faults that keep the distribution of the text, such as reporting the draft's log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import log

import torch
from torch import Tensor

from forerun.acceptance.chain import (
    Acceptance,
    RuleFunction,
    Target,
    accept_longest,
    block_acceptance,
    clipped_products,
    drafted,
    log_q_of_tokens,
    longest_prefix,
    next_token,
    token_acceptance,
    verify,
)
from forerun.acceptance.tree import (
    Endpoint,
    Tree,
    TreeRuleFunction,
    Visit,
    descend,
    draw,
    run_tree,
    verify_rrs,
    walk_child,
)
from forerun.types import Draft, VerifyInput, VerifyResult

_LENIENCE = 2.0
_OTHER_TEMPERATURE = 1.5
TYPICAL_FLOOR, TYPICAL_SHARE = 0.3, 0.5  # Medusa's epsilon and delta (2401.10774, section 3.3), made for few tokens


# --- the next token ---------------------------------------------------------------------------------------------------


def _from_target(target: Target, draft: Draft, acceptance: Acceptance, needed: Tensor, uniforms: Tensor) -> Tensor:
    """The next token from p, as if nothing had been rejected."""
    return next_token(target, replace(draft, lengths=acceptance.accepted), acceptance, needed, uniforms)


def _without_token(target: Target, draft: Draft, acceptance: Acceptance, needed: Tensor, uniforms: Tensor) -> Tensor:
    """The next token from p without the rejected token: the residual of a one-hot draft."""
    return next_token(target, replace(draft, log_q=None, vocabulary=None), acceptance, needed, uniforms)


def _unweighted(target: Target, draft: Draft, acceptance: Acceptance, needed: Tensor, uniforms: Tensor) -> Tensor:
    """The next token from norm((p - q)+) instead of norm((p_tau p - q)+)."""
    unweighted = replace(acceptance, weight=torch.ones_like(acceptance.weight))
    return next_token(target, draft, unweighted, needed, uniforms)


# --- acceptance -------------------------------------------------------------------------------------------------------


def _by_prefix(target: Target, draft: Draft, log_ratio: Tensor, uniforms: Tensor) -> Acceptance:
    """Block acceptance with h_i = p_i at every slot."""
    if draft.log_q is None or uniforms.shape[1] < 2:
        return token_acceptance(target, draft, log_ratio, uniforms)
    prefix = clipped_products(log_ratio).exp()
    return longest_prefix((uniforms <= prefix) & drafted(draft), prefix)


def _unclipped(target: Target, draft: Draft, log_ratio: Tensor, uniforms: Tensor) -> Acceptance:
    """Block acceptance with p_i = product of p/q, not clipped at 1."""
    if draft.log_q is None or uniforms.shape[1] < 2:
        return token_acceptance(target, draft, log_ratio, uniforms)
    return accept_longest(target, draft, log_ratio.cumsum(1).exp(), uniforms)


def _lenient(target: Target, draft: Draft, log_ratio: Tensor, uniforms: Tensor) -> Acceptance:
    """Token acceptance by u <= 2 p/q."""
    return token_acceptance(target, draft, log_ratio + log(_LENIENCE), uniforms)


def _typical(target: Target, draft: Draft, log_ratio: Tensor, uniforms: Tensor) -> Acceptance:
    """Accept where p(x) is above the smaller of a floor and a share of exp(-entropy), whatever u. Dense and slow."""
    rows = target.logits[:, : uniforms.shape[1]].to(torch.float64) * target.scale[:, None, None]
    log_p = rows.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)  # [B, k], 0 log 0 = 0
    floor = (TYPICAL_SHARE * torch.exp(-entropy)).clamp(max=TYPICAL_FLOOR)
    likely = target.log_p(draft.tokens) >= floor.log()
    certain = torch.where(likely, 0.0, -torch.inf).to(torch.float64)
    return token_acceptance(target, draft, certain, uniforms)


# --- what the rule reads ----------------------------------------------------------------------------------------------


def _row_before(inputs: VerifyInput) -> VerifyInput:
    """Every row but the first is read one slot too early."""
    rows = inputs.target_logits
    return replace(inputs, target_logits=torch.cat([rows[:, :1], rows[:, :-1]], 1))


def _without_unlikely(inputs: VerifyInput) -> VerifyInput:
    """The draft cut before its first token that q finds less than half as likely as its best: anticipation."""
    draft = inputs.draft
    if draft.log_q is None:
        return inputs
    keeps = (log_q_of_tokens(draft) >= draft.log_q.amax(2).double() - log(2)) & drafted(draft)
    return replace(inputs, draft=replace(draft, lengths=keeps.cumprod(1).sum(1)))


def _other_q(inputs: VerifyInput) -> VerifyInput:
    """q at another temperature than the one the draft was sampled at."""
    draft = inputs.draft
    if draft.log_q is None:
        return inputs
    return replace(inputs, draft=replace(draft, log_q=(draft.log_q / _OTHER_TEMPERATURE).log_softmax(-1)))


def _one_uniform(inputs: VerifyInput) -> VerifyInput:
    """One uniform for all slots of a round."""
    uniforms = inputs.accept_uniforms
    return replace(inputs, accept_uniforms=uniforms[:, :1].expand_as(uniforms))


def _token_rule_on(change: Callable[[VerifyInput], VerifyInput], inputs: VerifyInput) -> VerifyResult:
    return verify("token", change(inputs))


BROKEN: dict[str, RuleFunction] = {
    "no_residual": partial(verify, token_acceptance, choose=_from_target),
    "block_no_residual": partial(verify, block_acceptance, choose=_from_target),
    "residual_masks_token": partial(verify, token_acceptance, choose=_without_token),
    "block_residual_unweighted": partial(verify, block_acceptance, choose=_unweighted),
    "block_threshold_is_prefix": partial(verify, _by_prefix),
    "block_without_clip": partial(verify, _unclipped),
    "lenient_ratio": partial(verify, _lenient),  # 2509.23232
    "typical_acceptance": partial(verify, _typical, choose=_from_target),  # 2401.10774, section 3.3
    "misaligned_row": partial(_token_rule_on, _row_before),
    "peeking_admission": partial(_token_rule_on, _without_unlikely),
    "q_at_other_temperature": partial(_token_rule_on, _other_q),
    "shared_uniform": partial(_token_rule_on, _one_uniform),
}
SHOW_WITH_ONE_HOT = frozenset(
    {"no_residual", "block_no_residual", "lenient_ratio", "typical_acceptance", "misaligned_row", "shared_uniform"}
)


# --- trees ------------------------------------------------------------------------------------------------------------


def _walk_child_from_target(tree: Tree, visit: Visit, inputs: VerifyInput) -> Endpoint:
    """The walk, where p keeps the children that were not sampled."""
    child, _ = walk_child(tree, visit, inputs)
    return child, draw(visit.p, visit.p, inputs.residual_uniforms[visit.sequences])


BROKEN_TREE: dict[str, TreeRuleFunction] = {
    "no_residual": partial(run_tree, partial(descend, _walk_child_from_target)),
    "misaligned_row": lambda inputs: verify_rrs(_row_before(inputs)),  # without q: the walk
}
