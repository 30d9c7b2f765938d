"""Tree rules with one fault each: what a test of losslessness must catch.

Each can replace a rule of tree.py. `BROKEN_TREE` names them with the drafts that they show with at temperature above 0;
the trees need siblings and depth. Where q is None, the faults made for sampled drafts are the exact walk, except for
`parent_row_off_by_one`, which then shows too. Faults that look the same on chains are in forerun.acceptance.broken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import log

import torch
from torch import Tensor

from forerun.acceptance import broken
from forerun.acceptance.broken import TYPICAL_FLOOR, TYPICAL_SHARE
from forerun.acceptance.chain import log_q_of_tokens
from forerun.acceptance.tree import (
    ChildrenRejected,
    Endpoint,
    FindEndpoint,
    RejectChildren,
    Tree,
    TreeRuleFunction,
    Visit,
    draft_columns,
    log_q_of_siblings,
    reject_children,
    reject_recursively,
    run_tree,
    traverse,
    verify_rrs,
    where_sampled,
    widen,
)
from forerun.types import VerifyInput
from proofs.oracle import Text
from proofs.tree_oracle import DraftTree, Number


@dataclass(frozen=True, slots=True)
class TreeFault:
    """A wrong rule and the drafts it is wrong for: siblings "sampled", "best" or "top" (see `drawn_trees`)."""

    what: str
    rule: TreeRuleFunction
    siblings: str = "sampled"
    with_q: bool = True  # whether the draft comes with q


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


def _residual_is_target(tree: Tree, visit: Visit, weight: Tensor) -> ChildrenRejected:
    """Rejections take nothing from p."""
    return replace(reject_children(tree, visit, weight), residual=visit.p)


def _verified_by_target(tree: Tree, visit: Visit, weight: Tensor) -> ChildrenRejected:
    """Rejections take nothing from what later siblings are verified by; only the end is drawn from the residual."""
    stale = reject_children(tree, visit, weight, remove=lambda measure, q, before: (measure, before))
    return replace(reject_children(tree, visit, weight), chances=stale.chances)


def _residual_unweighted(tree: Tree, visit: Visit, weight: Tensor) -> ChildrenRejected:
    """The end is drawn from (p - q)+ instead of (w p - q)+."""
    unweighted = reject_children(tree, visit, torch.ones_like(weight))
    return replace(reject_children(tree, visit, weight), residual=unweighted.residual)


def _typical(tree: Tree, visit: Visit, weight: Tensor) -> ChildrenRejected:
    """A child is accepted if p finds it likely enough, whatever the uniform. Source: 2401.10774, section 3.3."""
    p = visit.p.to(torch.float64)
    floor = (TYPICAL_SHARE * (p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(1).exp()).clamp(max=TYPICAL_FLOOR)
    children = tree.children[visit.sequences, visit.rows]
    likely = p.gather(1, tree.tokens[visit.sequences[:, None], children]) >= floor[:, None]
    return ChildrenRejected(likely.to(torch.float64), visit.p, weight)


def _row_not_renormalised(tree: Tree, sequences: Tensor, siblings: Tensor) -> Tensor:
    """q without the earlier siblings and without their mass."""
    q = log_q_of_siblings(tree, sequences, siblings).exp_()
    return widen(tree, q.scatter_(1, draft_columns(tree, sequences, siblings[:, :-1]), 0.0))


# --- faults of a whole round ------------------------------------------------------------------------------------------


def _with_shared_uniform(tree: Tree, members: Tensor, inputs: VerifyInput) -> Endpoint:
    """All siblings are verified with the uniform of the first."""
    first = tree.children[:, :, 0].gather(1, tree.parents)[:, 1:]  # [B, k]
    shared = inputs.accept_uniforms.gather(1, (first - 1).clamp(min=0))
    return reject_recursively(tree, members, replace(inputs, accept_uniforms=shared))


def _peeking(find: FindEndpoint, tree: Tree, members: Tensor, inputs: VerifyInput) -> Endpoint:
    """Siblings that q finds less likely than one over D are dropped once they have been drawn."""
    assert tree.draft.log_q is not None
    unlikely = log_q_of_tokens(tree.draft) < -log(tree.draft.log_q.shape[2])  # [B, k]
    gone = torch.nn.functional.pad(unlikely, (1, 0)).gather(1, tree.children.flatten(1)).view_as(tree.children)
    order = (gone | (tree.children == 0)).int().argsort(dim=2, stable=True)
    kept = tree.children.masked_fill(gone, 0).gather(2, order)
    return find(replace(tree, children=kept), members, inputs)


def _rule(find: FindEndpoint) -> TreeRuleFunction:
    return partial(run_tree, where_sampled(find))


def _rrs(reject: RejectChildren) -> TreeRuleFunction:
    """Recursive rejection with another treatment of children."""
    return _rule(partial(reject_recursively, reject=reject))


def _traversal(reject: RejectChildren = reject_children, raise_threshold: bool = True) -> TreeRuleFunction:
    """Traversal with another treatment of children, or of a node's own threshold."""
    return _rule(partial(traverse, reject=reject, raise_threshold=raise_threshold))


BROKEN_TREE: dict[str, TreeFault] = {
    "top_k_as_sampled": TreeFault("the likeliest tokens are verified as if drawn from q", verify_rrs, "top"),
    "best_as_sampled": TreeFault("a first sibling that is the argmax counts as drawn from q", verify_rrs, "best"),
    "no_residual": TreeFault("after the last rejection, the token is drawn from p", _rrs(_residual_is_target)),
    "siblings_verified_by_target": TreeFault("rejections leave p as it was", _rrs(_verified_by_target)),
    "sibling_q_not_renormalised": TreeFault(
        "q loses earlier siblings without being renormalised",
        _rrs(partial(reject_children, sibling_row=_row_not_renormalised)),
    ),
    "typical_acceptance": TreeFault("a child is accepted if p finds it likely", _rrs(_typical)),
    "shared_sibling_uniform": TreeFault("one uniform for all siblings", _rule(_with_shared_uniform)),
    "parent_row_off_by_one": TreeFault(
        "children are verified by the row before their parent's", broken.BROKEN_TREE["misaligned_row"]
    ),
    "peeking_pruning": TreeFault(
        "unlikely siblings are dropped after they were drawn", _rule(partial(_peeking, reject_recursively))
    ),
    "traversal_peeking_pruning": TreeFault("the same under traversal", _rule(partial(_peeking, traverse))),
    "traversal_threshold_is_weight": TreeFault(
        "h = w: rejected children raise nothing", _traversal(raise_threshold=False)
    ),
    "traversal_siblings_unmoved": TreeFault("rejections leave m and w as they were", _traversal(_verified_by_target)),
    "traversal_residual_unweighted": TreeFault("the end is drawn from (p - q)+", _traversal(_residual_unweighted)),
    "walk_no_residual": TreeFault(
        "where no child is taken, the token is drawn from p", broken.BROKEN_TREE["no_residual"], "top", with_q=False
    ),
}
