"""Tree rules with one fault each: what a test of losslessness must be able to catch.

Every rule takes the arguments of `tree.verify_tree` without the rule's name and returns a TreeVerdict, so a fault can
stand wherever a tree rule stands. `BROKEN_TREE` names them all, with the drafts that they show with at temperature
above 0; the trees need siblings and depth. Where q is None, the faults made for sampled drafts are the exact walk, but
for `parent_row_off_by_one`, which then shows too.

Left out: the faults of chains (`broken.py`) that look the same on trees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import log

import torch
from torch import Tensor

from forerun.acceptance.chain import log_q_of_tokens
from forerun.acceptance.oracle import Text
from forerun.acceptance.tree import (
    Settle,
    Settlement,
    Spend,
    Spent,
    Tree,
    TreeResult,
    TreeRuleFunction,
    Visit,
    descend,
    draft_columns,
    draw,
    log_q_of_family,
    reject_recursively,
    run_tree,
    spend_children,
    toss_among_children,
    traverse,
    verify_rrs,
    where_sampled,
    widen,
)
from forerun.acceptance.tree_oracle import DraftTree, Number
from forerun.types import Draft

_TYPICAL_FLOOR, _TYPICAL_SHARE = 0.3, 0.5  # as in `broken.py`: Medusa's epsilon and delta, made for few tokens


@dataclass(frozen=True, slots=True)
class TreeFault:
    """A wrong rule and the drafts it is wrong for: siblings "sampled", "best" or "top" (see `drawn_trees`)."""

    what: str
    rule: TreeRuleFunction
    siblings: str = "sampled"
    told: bool = True  # whether the draft comes with q


def pruned(trees: list[DraftTree], keeps: Callable[[Number, Text], bool]) -> list[DraftTree]:
    """Drop the nodes whose own q and text `keeps` refuses, and all below them: peeking, in rational numbers."""
    return [_pruned(tree, keeps) for tree in trees]


def _pruned(tree: DraftTree, keeps: Callable[[Number, Text], bool]) -> DraftTree:
    """One tree of `pruned`."""
    rows = [0]
    for row in range(1, len(tree.p)):
        parent = tree.parents[row - 1] + 1
        if parent in rows and keeps(tree.q[parent][tree.token(row)], tree.text(row)):
            rows.append(row)
    parents = tuple(rows.index(tree.parents[row - 1] + 1) - 1 for row in rows[1:])
    tokens = tuple(tree.token(row) for row in rows[1:])
    p, q = tuple(tree.p[row] for row in rows), tuple(tree.q[row] for row in rows)
    return replace(tree, parents=parents, tokens=tokens, p=p, q=q)


# --- faults of one node and its children ------------------------------------------------------------------------------


def _left_is_target(tree: Tree, visit: Visit, weight: Tensor) -> Spent:
    """Nothing is taken from p when children fall."""
    return replace(spend_children(tree, visit, weight), left=visit.p)


def _judged_by_target(tree: Tree, visit: Visit, weight: Tensor) -> Spent:
    """Elders that fell take nothing from what their siblings are judged by; only the end is drawn from the residual."""
    stale = spend_children(tree, visit, weight, remove=lambda measure, q, before: (measure, before))
    return replace(spend_children(tree, visit, weight), chances=stale.chances)


def _left_forgets_weight(tree: Tree, visit: Visit, weight: Tensor) -> Spent:
    """The end is drawn from (p - q)+ instead of (w p - q)+."""
    unweighted = spend_children(tree, visit, torch.ones_like(weight))
    return replace(spend_children(tree, visit, weight), left=unweighted.left)


def _typical(tree: Tree, visit: Visit, weight: Tensor) -> Spent:
    """A child stands if p finds it likely enough, whatever the coin. Source: 2401.10774, section 3.3."""
    p = visit.p.to(torch.float64)
    floor = (_TYPICAL_SHARE * (p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(1).exp()).clamp(max=_TYPICAL_FLOOR)
    children = tree.children[visit.sequences, visit.rows]
    likely = p.gather(1, tree.tokens[visit.sequences[:, None], children]) >= floor[:, None]
    return Spent(likely.to(torch.float64), visit.p, weight)


def _row_not_renormalised(tree: Tree, sequences: Tensor, family: Tensor) -> Tensor:
    """q without its elders, and without their mass."""
    q = log_q_of_family(tree, sequences, family).exp_()
    return widen(tree, q.scatter_(1, draft_columns(tree, sequences, family[:, :-1]), 0.0))


# --- faults of a whole round ------------------------------------------------------------------------------------------


def _with_shared_coin(tree: Tree, members: Tensor, coins: Tensor, picks: Tensor) -> Settlement:
    """All siblings are judged by the coin of the eldest."""
    eldest = tree.children[:, :, 0].gather(1, tree.parents)[:, 1:]  # [B, k]
    return reject_recursively(tree, members, coins.gather(1, (eldest - 1).clamp(min=0)), picks)


def _peeking(settle: Settle, tree: Tree, members: Tensor, coins: Tensor, picks: Tensor) -> Settlement:
    """Siblings that q finds less likely than one over D are dropped once they have been drawn."""
    assert tree.draft.log_q is not None
    unlikely = log_q_of_tokens(tree.draft) < -log(tree.draft.log_q.shape[2])  # [B, k]
    gone = torch.nn.functional.pad(unlikely, (1, 0)).gather(1, tree.children.flatten(1)).view_as(tree.children)
    order = (gone | (tree.children == 0)).int().argsort(dim=2, stable=True)
    kept = tree.children.masked_fill(gone, 0).gather(2, order)
    return settle(replace(tree, children=kept), members, coins, picks)


def _walk_from_target(tree: Tree, members: Tensor, coins: Tensor, picks: Tensor) -> Settlement:
    """The walk, where p keeps the children that the coin refused."""

    def toss(tree: Tree, visit: Visit, coins: Tensor, picks: Tensor) -> Settlement:
        child, _ = toss_among_children(tree, visit, coins, picks)
        return child, draw(visit.p, visit.p, picks[visit.sequences])

    return descend(toss, tree, members, coins, picks)


def _row_before(target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor) -> TreeResult:
    """Every row but the root's is read one slot too early."""
    shifted = torch.cat([target_logits[:, :1], target_logits[:, :-1]], 1)
    return verify_rrs(shifted, draft, temperature, coins, picks)


def _rrs(spend: Spend) -> TreeRuleFunction:
    """Recursive rejection with another treatment of children."""
    return partial(run_tree, where_sampled(partial(reject_recursively, spend=spend)))


def _traversal(spend: Spend = spend_children, rise: bool = True) -> TreeRuleFunction:
    """Traversal with another treatment of children, or of a node's own threshold."""
    return partial(run_tree, where_sampled(partial(traverse, spend=spend, rise=rise)))


BROKEN_TREE: dict[str, TreeFault] = {
    "top_k_as_sampled": TreeFault("the likeliest tokens are judged as if drawn from q", verify_rrs, "top"),
    "best_as_sampled": TreeFault("an eldest that is the argmax is judged as if drawn from q", verify_rrs, "best"),
    "no_residual": TreeFault("after the last child fell, the token is drawn from p", _rrs(_left_is_target)),
    "siblings_judged_by_target": TreeFault("elders leave p as it was", _rrs(_judged_by_target)),
    "sibling_q_not_renormalised": TreeFault(
        "q loses elders without being renormalised", _rrs(partial(spend_children, sibling_row=_row_not_renormalised))
    ),
    "typical_acceptance": TreeFault("a child stands if p finds it likely", _rrs(_typical)),
    "shared_sibling_coin": TreeFault("one coin for all siblings", partial(run_tree, where_sampled(_with_shared_coin))),
    "parent_row_off_by_one": TreeFault("children are judged by the row before their parent's", _row_before),
    "peeking_pruning": TreeFault(
        "unlikely siblings are dropped after they were drawn",
        partial(run_tree, where_sampled(partial(_peeking, reject_recursively))),
    ),
    "traversal_peeking_pruning": TreeFault(
        "the same under traversal", partial(run_tree, where_sampled(partial(_peeking, traverse)))
    ),
    "traversal_threshold_is_weight": TreeFault("h = w: children that fall raise nothing", _traversal(rise=False)),
    "traversal_siblings_unmoved": TreeFault("elders leave m and w as they were", _traversal(_judged_by_target)),
    "traversal_residual_unweighted": TreeFault("the end is drawn from (p - q)+", _traversal(_left_forgets_weight)),
    "walk_no_residual": TreeFault(
        "where no child is taken, the token is drawn from p", partial(run_tree, _walk_from_target), "top", told=False
    ),
}
