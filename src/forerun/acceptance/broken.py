"""Rules with one fault each, as published systems have had them: what a test of losslessness must be able to catch.

Every function takes the arguments of `chain.verify` without the rule's name and returns a Verdict, so a fault can stand
wherever a rule stands. `BROKEN` names them all. Faults show with sampled drafts of two or more tokens at temperature
above 0; those marked (one-hot too) also show with deterministic drafts. Accepting more is typical: bugs look like wins.

Left out: faults that keep the law of the text, such as reporting the draft's log-probabilities.
"""

from __future__ import annotations

from dataclasses import replace
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
    run,
    token_acceptance,
    verify_token,
)
from forerun.types import Draft, VerifyResult

_LENIENCE = 2.0
_TYPICAL_FLOOR, _TYPICAL_SHARE = 0.3, 0.5  # Medusa's epsilon and delta (2401.10774, section 3.3), made for few tokens
_OTHER_TEMPERATURE = 1.5


def no_residual(target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor) -> VerifyResult:
    """Token rule without a residual: a rejected token is replaced from p (one-hot too)."""
    return run(token_acceptance, _from_target, target_logits, draft, temperature, coins, picks)


def block_no_residual(
    target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor
) -> VerifyResult:
    """Block rule without a residual (one-hot too)."""
    return run(block_acceptance, _from_target, target_logits, draft, temperature, coins, picks)


def residual_masks_token(
    target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor
) -> VerifyResult:
    """Token rule whose residual is p without the rejected token, which is right only for a one-hot draft."""
    return run(token_acceptance, _without_token, target_logits, draft, temperature, coins, picks)


def block_residual_unweighted(
    target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor
) -> VerifyResult:
    """Block rule whose residual is norm((p - q)+) instead of norm((p_tau p - q)+)."""
    return run(block_acceptance, _unweighted, target_logits, draft, temperature, coins, picks)


def block_threshold_is_prefix(
    target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor
) -> VerifyResult:
    """Block rule that accepts by h_i = p_i at every slot."""
    return run(_by_prefix, next_token, target_logits, draft, temperature, coins, picks)


def block_without_clip(
    target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor
) -> VerifyResult:
    """Block rule whose running products p_i are not clipped at 1."""
    return run(_unclipped, next_token, target_logits, draft, temperature, coins, picks)


def lenient_ratio(
    target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor
) -> VerifyResult:
    """Token rule that accepts by u <= 2 p/q (one-hot too). Source of the fault: 2509.23232."""
    return run(_lenient, next_token, target_logits, draft, temperature, coins, picks)


def typical_acceptance(
    target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor
) -> VerifyResult:
    """Accept what is likely enough under p, whatever the coin (one-hot too). Source: 2401.10774, section 3.3."""
    return run(_typical, _from_target, target_logits, draft, temperature, coins, picks)


def misaligned_row(
    target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor
) -> VerifyResult:
    """Token rule that judges every slot but the first by the row before its own (one-hot too)."""
    shifted = torch.cat([target_logits[:, :1], target_logits[:, :-1]], 1)
    return verify_token(shifted, draft, temperature, coins, picks)


def peeking_admission(
    target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor
) -> VerifyResult:
    """Token rule on the draft cut before its first token that q finds half as likely as its best: anticipation."""
    if draft.log_q is None:
        return verify_token(target_logits, draft, temperature, coins, picks)
    keeps = (log_q_of_tokens(draft) >= draft.log_q.amax(2).double() - log(2)) & drafted(draft)
    shorter = replace(draft, lengths=keeps.cumprod(1).sum(1))
    return verify_token(target_logits, shorter, temperature, coins, picks)


def q_at_other_temperature(
    target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor
) -> VerifyResult:
    """Token rule whose q has another temperature than the one the draft was sampled at."""
    if draft.log_q is not None:
        draft = replace(draft, log_q=(draft.log_q / _OTHER_TEMPERATURE).log_softmax(-1))
    return verify_token(target_logits, draft, temperature, coins, picks)


def shared_coin(target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor) -> VerifyResult:
    """Token rule that uses one coin for all slots of a round (one-hot too)."""
    return verify_token(target_logits, draft, temperature, coins[:, :1].expand_as(coins), picks)


BROKEN: dict[str, RuleFunction] = {
    rule.__name__: rule
    for rule in (
        no_residual,
        block_no_residual,
        residual_masks_token,
        block_residual_unweighted,
        block_threshold_is_prefix,
        block_without_clip,
        lenient_ratio,
        typical_acceptance,
        misaligned_row,
        peeking_admission,
        q_at_other_temperature,
        shared_coin,
    )
}


def _from_target(target: Target, draft: Draft, acceptance: Acceptance, needed: Tensor, picks: Tensor) -> Tensor:
    """The next token from p, as if nothing had been rejected."""
    return next_token(target, replace(draft, lengths=acceptance.accepted), acceptance, needed, picks)


def _without_token(target: Target, draft: Draft, acceptance: Acceptance, needed: Tensor, picks: Tensor) -> Tensor:
    """The next token from p without the rejected token."""
    return next_token(target, replace(draft, log_q=None, vocabulary=None), acceptance, needed, picks)


def _unweighted(target: Target, draft: Draft, acceptance: Acceptance, needed: Tensor, picks: Tensor) -> Tensor:
    """The next token from a residual that forgets the weight of the accepted prefix."""
    forgotten = replace(acceptance, weight=torch.ones_like(acceptance.weight))
    return next_token(target, draft, forgotten, needed, picks)


def _by_prefix(target: Target, draft: Draft, log_ratio: Tensor, coins: Tensor) -> Acceptance:
    """h_i = p_i."""
    if draft.log_q is None or coins.shape[1] < 2:
        return token_acceptance(target, draft, log_ratio, coins)
    prefix = clipped_products(log_ratio).exp()
    return longest_prefix((coins <= prefix) & drafted(draft), prefix)


def _unclipped(target: Target, draft: Draft, log_ratio: Tensor, coins: Tensor) -> Acceptance:
    """p_i = product of p/q, above 1 too."""
    if draft.log_q is None or coins.shape[1] < 2:
        return token_acceptance(target, draft, log_ratio, coins)
    return accept_longest(target, draft, log_ratio.cumsum(1).exp(), coins)


def _lenient(target: Target, draft: Draft, log_ratio: Tensor, coins: Tensor) -> Acceptance:
    """A ratio that flatters the draft."""
    return token_acceptance(target, draft, log_ratio + log(_LENIENCE), coins)


def _typical(target: Target, draft: Draft, log_ratio: Tensor, coins: Tensor) -> Acceptance:
    """p(x) above the smaller of a floor and a share of exp(-entropy); dense, for it is a control and not a product."""
    rows = target.logits[:, : coins.shape[1]].to(torch.float64) * target.scale[:, None, None]
    log_p = rows.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)  # [B, k], 0 log 0 = 0
    floor = (_TYPICAL_SHARE * torch.exp(-entropy)).clamp(max=_TYPICAL_FLOOR)
    likely = target.log_p(draft.tokens) >= floor.log()
    certain = torch.where(likely, 0.0, -torch.inf).to(torch.float64)
    return token_acceptance(target, draft, certain, coins)
