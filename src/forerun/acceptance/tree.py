"""Exact acceptance rules for trees of draft tokens: target-only walk, recursive rejection, traversal, greedy.

A rule is a deterministic function of a `VerifyInput`, batched over ragged trees, on any device. The tokens a round
emits, continued by the target, are distributed as the target's own; tests/proofs/tree_oracle.py proves it by
enumeration.

Conventions
- B sequences, k draft slots, V vocabulary, D draft vocabulary, S siblings at most. `draft.parents[b, j]` is the slot of
  node j's parent, -1 for a child of the root, and smaller than j; slots from `draft.lengths[b]` on are padding.
- Inside, nodes are indexed by target row: row 0 is the root (the newest committed token), row j+1 the node of slot j. A
  node is verified by its parent's row, and the row of the last accepted node gives the next token.
- `log_q` None marks trees whose tokens were not sampled; every rule then is the walk. Otherwise siblings were drawn in
  slot order without replacement from one row q, which `log_q` repeats at each of them (only the first sibling's copy is
  read): the first from q (for "best_sampled": the argmax of q), later ones from q without the earlier siblings. "walk"
  does not read q: it is exact for any tree, and accepts less of sampled ones.
- Non-anticipation: the sampled rules require that whether slot j is drafted, and under which parent, depends only on
  the tokens of earlier slots. A slot that was drawn stays in the tree. Reason: averaged over the token drawn last, the
  output distribution is that of the tree without it.
- `accept_uniforms`: the walk reads [:, d] at the node of depth d (root 0), the sampled rules [:, j] for node j. All
  belong to this round alone; `round_keys` of random.py guarantees that for up to 128 slots.
- temperature 0 marks a greedy sequence: it follows the argmax; uniforms and q are not read.
- Nothing of size [B, k+1, V] is built. The walk and recursive rejection read the rows on the accepted path alone;
  traversal those of every node with children, level by level. Scalars are float64, rows float32.

Not supported: siblings drawn with replacement; sampled and fixed siblings mixed in other ways than "best_sampled".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from forerun.acceptance.chain import (
    Target,
    check_draft,
    check_probabilities,
    check_shapes,
    drafted,
    inverse_temperature,
    log_q_of_tokens,
    refuse,
    select_rows,
    stream_rows,
)
from forerun.acceptance.random import inverse_cdf
from forerun.types import Draft, VerifyInput, VerifyResult


@dataclass(frozen=True, slots=True)
class TreeResult(VerifyResult):
    """A `VerifyResult` over tree paths: `path[b, : accepted[b]]` are the accepted slots from the root down, -1 beyond.

    A = depth of the batch's deepest node; `tokens` and `logprobs` are [B, A+1]. An engine keeps the cache entries of
    the root and the path.
    """

    path: Tensor  # [B, A] int64


@dataclass(frozen=True, slots=True)
class Tree:
    """Draft trees by target row; `target.lse` is filled in as rows are read."""

    target: Target
    draft: Draft
    tokens: Tensor  # [B, k+1] int64, token of every row's node, 0 for the root
    parents: Tensor  # [B, k+1] int64, row of the parent; 0 for the root and padding
    children: Tensor  # [B, k+1, S] int64, rows of the children in slot order, then 0
    depth: Tensor  # [B, k+1] int64, 0 for the root and padding


@dataclass(frozen=True, slots=True)
class Visit:
    """Some rows of p, one for each (sequence, row) pair."""

    sequences: Tensor  # [m] int64
    rows: Tensor  # [m] int64
    p: Tensor  # [m, V] float32


@dataclass(frozen=True, slots=True)
class ChildrenRejected:
    """A node after all its children were rejected, and the chance of each when it was tried."""

    chances: Tensor  # [m, S] float64, of accepting a child or below it once the earlier siblings are rejected
    residual: Tensor  # [m, V] float32, what is left of weight * p; sums to `weight`
    weight: Tensor  # [m] float64


TreeRuleFunction = Callable[[VerifyInput], TreeResult]
Endpoint = tuple[Tensor, Tensor]  # last accepted row and next token, [B] int64 each, 0 for sequences not asked for
FindEndpoint = Callable[[Tree, Tensor, VerifyInput], Endpoint]  # the tensor: sequences [n]
ChooseChild = Callable[[Tree, Visit, VerifyInput], Endpoint]  # the child to go to or 0, and the token if it is 0: [m]
RejectChildren = Callable[[Tree, Visit, Tensor], ChildrenRejected]  # the tensor: weights [m]


def verify_tree(rule: str, inputs: VerifyInput) -> TreeResult:
    """Verify one round of draft trees by the rule "walk", "rrs", "best_sampled" or "traversal".

    Raises:
        ValueError: shapes or parents disagree, siblings share a token, a row that is read has no finite log-sum-exp, or
            a draft token has probability zero under the q it claims to be sampled from.

    Sources: SpecInfer 2305.09781 (rrs; without replacement: RSD 2402.14160, Sequoia 2402.12374), 2609.21827
    (best_sampled: RheoSampling), 2505.12398 (traversal).
    """
    if rule not in TREE_RULES:
        raise ValueError(f"there is no tree rule {rule!r}; the rules are {', '.join(TREE_RULES)}")
    return TREE_RULES[rule](inputs)


def verify_walk(inputs: VerifyInput) -> TreeResult:
    """Sample from the target and follow the sample while it is in the tree."""
    return run_tree(walk, replace(inputs, draft=replace(inputs.draft, log_q=None, vocabulary=None)))


def verify_rrs(inputs: VerifyInput) -> TreeResult:
    """Recursive rejection of siblings sampled without replacement."""
    return run_tree(where_sampled(reject_recursively), inputs)


def verify_best_sampled(inputs: VerifyInput) -> TreeResult:
    """Recursive rejection where the first sibling was not sampled.

    Exact for any first sibling; one that was sampled after all is verified as if it were fixed and accepted less often.
    """
    find = partial(reject_recursively, reject=partial(reject_children, first_fixed=True))
    return run_tree(where_sampled(find), inputs)


def verify_traversal(inputs: VerifyInput) -> TreeResult:
    """Verify nodes from the leaves up, a node after all below it. On a chain this is block verification."""
    return run_tree(where_sampled(traverse), inputs)


TREE_RULES: dict[str, TreeRuleFunction] = {
    "walk": verify_walk,
    "rrs": verify_rrs,
    "best_sampled": verify_best_sampled,
    "traversal": verify_traversal,
}


@torch.no_grad()
def run_tree(find: FindEndpoint, inputs: VerifyInput) -> TreeResult:
    """Run the rule that finds the endpoints of sampled sequences by `find`. Errors as `verify_tree`."""
    _check_tree(inputs)
    logits, greedy = inputs.target_logits, inputs.temperature == 0
    lse = torch.zeros(logits.shape[:2], dtype=torch.float64, device=logits.device)
    tree = _build(Target(logits, inverse_temperature(inputs.temperature), lse), inputs.draft)
    last, following = find(tree, (~greedy).nonzero()[:, 0], inputs)
    if bool(greedy.any()):
        last_greedy, best = descend(_follow_argmax, tree, greedy.nonzero()[:, 0], inputs)
        last, following = last + last_greedy, following + best
    check_probabilities(tree.target, log_q_of_tokens(tree.draft), greedy)
    return _tree_result(tree, last, following)


# --- one node and its children ----------------------------------------------------------------------------------------

SiblingRow = Callable[[Tree, Tensor, Tensor], Tensor]  # tree, sequences [n], siblings up to it [n, s] -> [n, V]
Remove = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # measure [n, V], q, weight -> measure, weight


def remove_proposal(measure: Tensor, q: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(m - q)+/R and its mass S/R. Where R = 0 no child can be rejected, and m is unchanged."""
    residual = (measure - q).relu_()
    mass = residual.sum(1).to(torch.float64)
    rejection = mass + (1.0 - weight)
    certain = (rejection <= 0).nonzero()[:, 0]
    residual = residual.index_copy_(0, certain, measure[certain])
    mass, rejection = mass.index_copy(0, certain, weight[certain]), rejection.index_fill(0, certain, 1.0)
    return residual.mul_(rejection.reciprocal().to(torch.float32)[:, None]), mass / rejection


def row_without_earlier_siblings(tree: Tree, sequences: Tensor, siblings: Tensor) -> Tensor:
    """The row that the last of `siblings` was drawn from: q of the first without the tokens of all but the last."""
    log_q = log_q_of_siblings(tree, sequences, siblings)
    earlier = draft_columns(tree, sequences, siblings[:, :-1])
    # A softmax over the rest: one minus the share of the earlier ones would lose all digits where it is nearly one.
    return widen(tree, log_q.scatter_(1, earlier, -torch.inf).softmax(1))


def log_q_of_siblings(tree: Tree, sequences: Tensor, siblings: Tensor) -> Tensor:
    """log q of the first of the given siblings [n, s], over the draft vocabulary: [n, D] float32, as fresh memory."""
    assert tree.draft.log_q is not None
    return select_rows(tree.draft.log_q, sequences, siblings[:, 0] - 1).to(torch.float32, copy=True)


def draft_columns(tree: Tree, sequences: Tensor, rows: Tensor) -> Tensor:
    """Columns of the draft vocabulary that the nodes [n, s] hold: [n, s]."""
    tokens = tree.tokens[sequences[:, None], rows]
    vocabulary = tree.draft.vocabulary
    return tokens if vocabulary is None else torch.searchsorted(vocabulary, tokens).clamp(max=len(vocabulary) - 1)


def widen(tree: Tree, q: Tensor) -> Tensor:
    """Probabilities over the draft vocabulary [n, D] as ones over the target's [n, V]."""
    if tree.draft.vocabulary is None:
        return q
    wide = q.new_zeros(len(q), tree.target.logits.shape[2])
    return wide.index_copy_(1, tree.draft.vocabulary, q)


def reject_children(
    tree: Tree,
    visit: Visit,
    weight: Tensor,
    first_fixed: bool = False,
    sibling_row: SiblingRow = row_without_earlier_siblings,
    remove: Remove = remove_proposal,
) -> ChildrenRejected:
    """Reject the children of every visited node one after the other; see `traverse` for the symbols.

    `weight` [m] is w before the first child; with w = 1 this is recursive rejection. Tests replace the callables.
    """
    children = tree.children[visit.sequences, visit.rows]  # [m, S]
    chances = torch.zeros(children.shape, dtype=torch.float64, device=weight.device)
    residual = visit.p * weight.to(torch.float32)[:, None]
    weight = weight.clone()
    for rank in range(children.shape[1]):
        present = (children[:, rank] > 0).nonzero()[:, 0]
        if len(present) == 0:
            break
        sequences, siblings = visit.sequences[present], children[present, : rank + 1]
        token = tree.tokens[sequences, siblings[:, -1]][:, None]
        if first_fixed and rank == 0:
            q = torch.zeros_like(residual[present]).scatter_(1, token, 1.0)
        else:
            q = sibling_row(tree, sequences, siblings)
        measure = residual[present]
        ratio = measure.gather(1, token).to(torch.float64) / q.gather(1, token).to(torch.float64)
        chances[present, rank] = ratio[:, 0].clamp(max=1.0)
        residual[present], weight[present] = remove(measure, q, weight[present])
    return ChildrenRejected(chances, residual, weight)


def read_rows(tree: Tree, sequences: Tensor, rows: Tensor) -> Iterator[tuple[slice, Visit]]:
    """p of the given (sequence, row) pairs, a few MB at a time; fills in their `tree.target.lse`."""
    for part, values in stream_rows(tree.target, sequences, rows):
        top = values.amax(1, keepdim=True)
        total = values.sub_(top).exp_().sum(1, keepdim=True)
        tree.target.lse[sequences[part], rows[part]] = (total.to(torch.float64).log() + top)[:, 0]
        yield part, Visit(sequences[part], rows[part], values.div_(total))


# --- endpoints --------------------------------------------------------------------------------------------------------


def where_sampled(find: FindEndpoint) -> FindEndpoint:
    """`find` where q is known, else the walk, which all rules are equivalent to for a one-hot q."""
    return lambda tree, members, inputs: (walk if tree.draft.log_q is None else find)(tree, members, inputs)


def walk(tree: Tree, members: Tensor, inputs: VerifyInput) -> Endpoint:
    """One uniform per visited node samples p: one of its children, or none of them."""
    return descend(walk_child, tree, members, inputs)


def reject_recursively(
    tree: Tree, members: Tensor, inputs: VerifyInput, reject: RejectChildren = reject_children
) -> Endpoint:
    """Accept the first sibling with u <= r(x)/q(x), where r = norm((r - q)+) and q loses x after each rejection."""
    return descend(partial(_accept_child, reject), tree, members, inputs)


def descend(choose: ChooseChild, tree: Tree, members: Tensor, inputs: VerifyInput) -> Endpoint:
    """Go from the root to the child that `choose` returns until it returns none."""
    last = torch.zeros_like(tree.parents[:, 0])
    following = torch.zeros_like(last)
    while len(members):
        child = torch.zeros_like(members)
        for part, visit in read_rows(tree, members, last[members]):
            child[part], following[members[part]] = choose(tree, visit, inputs)
        members, child = members[child > 0], child[child > 0]
        last[members] = child
    return last, following


def traverse(
    tree: Tree,
    members: Tensor,
    inputs: VerifyInput,
    reject: RejectChildren = reject_children,
    raise_threshold: bool = True,
) -> Endpoint:
    """Accept the first node in post-order with u <= h, the root if there is none (2505.12398, algorithm 2).

    A node that is reached has a weight w, the chance that it or something below it will be accepted, and a measure
    m = w p of the tokens after it; the root has w = 1. Child x weighs min(1, m(x)/q(x)). It is rejected with
    probability R = S + 1 - w, S = sum (m - q)+; then m becomes (m - q)+/R, w becomes S/R, and q loses x. h is w after
    the last child; the next token is drawn from m.

    w and h depend on no uniform, since a node is reached only when its earlier siblings are rejected; they are computed
    for whole levels, from the root down. Tests set `raise_threshold` to False, which keeps h at w.
    """
    weight, threshold = _weigh(tree, members, reject)
    uniforms = torch.nn.functional.pad(inputs.accept_uniforms, (1, 0))
    last = _first_in_post_order(tree, uniforms <= (threshold if raise_threshold else weight))
    following = torch.zeros_like(last)
    for part, visit in read_rows(tree, members, last[members]):
        rejected = reject(tree, visit, weight[visit.sequences, visit.rows])
        following[members[part]] = draw(rejected.residual, visit.p, inputs.residual_uniforms[visit.sequences])
    return torch.zeros_like(last).index_copy_(0, members, last[members]), following


def _weigh(tree: Tree, members: Tensor, reject: RejectChildren) -> tuple[Tensor, Tensor]:
    """Weight w and threshold h of every node of the given sequences, 0 for others: two [B, k+1] float64."""
    weight = torch.zeros_like(tree.target.lse)
    weight[members, 0] = 1.0
    threshold = torch.zeros_like(weight)
    for depth in range(int(tree.depth.max())):
        inner = (tree.depth == depth) & (tree.children[:, :, 0] > 0) & (weight > 0)
        sequences, rows = inner.nonzero(as_tuple=True)
        for part, visit in read_rows(tree, sequences, rows):
            rejected = reject(tree, visit, weight[sequences[part], rows[part]])
            threshold[sequences[part], rows[part]] = rejected.weight
            children = tree.children[sequences[part], rows[part]]  # [m, S]
            index, rank = (children > 0).nonzero(as_tuple=True)
            weight[sequences[part][index], children[index, rank]] = rejected.chances[index, rank]
    return weight, torch.where(tree.children[:, :, 0] > 0, threshold, weight)


def _first_in_post_order(tree: Tree, accepted: Tensor) -> Tensor:
    """Row of the first node in post-order that is accepted [B, k+1], 0 if none: [B]."""
    below, deepest = accepted, int(tree.depth.max())
    for _ in range(deepest):
        below = below | _of_children(tree, below).any(2)
    some = _of_children(tree, below)  # [B, k+1, S]
    first = tree.children.gather(2, some.int().argmax(2, keepdim=True))[:, :, 0].where(some.any(2), 0)
    last = torch.zeros_like(tree.parents[:, 0])
    for _ in range(deepest):
        child = first.gather(1, last[:, None])[:, 0]
        last = torch.where(child > 0, child, last)
    return last


def _of_children(tree: Tree, flags: Tensor) -> Tensor:
    """Flags [B, k+1] of every row's children: [B, k+1, S]."""
    return flags.gather(1, tree.children.flatten(1)).view_as(tree.children) & (tree.children > 0)


def walk_child(tree: Tree, visit: Visit, inputs: VerifyInput) -> Endpoint:
    """The choice of the walk; where it stops, the token comes from p without the children."""
    children = tree.children[visit.sequences, visit.rows]  # [m, S]
    tokens = tree.tokens[visit.sequences[:, None], children]
    mass = visit.p.gather(1, tokens).where(children > 0, 0.0)
    depth = tree.depth[visit.sequences, visit.rows]
    uniforms = torch.nn.functional.pad(inputs.accept_uniforms, (0, 1))[visit.sequences, depth]
    child = _first(children, mass.to(torch.float64).cumsum(1) > uniforms[:, None])
    stopped = (child == 0).nonzero()[:, 0]
    residual = visit.p[stopped].scatter_add_(1, tokens[stopped], -mass[stopped])
    return child, _draw_where_stopped(stopped, residual, visit, inputs)


def _accept_child(reject: RejectChildren, tree: Tree, visit: Visit, inputs: VerifyInput) -> Endpoint:
    """The choice of recursive rejection; where it stops, the token comes from the residual."""
    children = tree.children[visit.sequences, visit.rows]  # [m, S]
    rejected = reject(tree, visit, torch.ones_like(visit.rows, dtype=torch.float64))
    uniforms = torch.nn.functional.pad(inputs.accept_uniforms, (1, 0))[visit.sequences[:, None], children]
    child = _first(children, (uniforms <= rejected.chances) & (children > 0))
    stopped = (child == 0).nonzero()[:, 0]
    return child, _draw_where_stopped(stopped, rejected.residual[stopped], visit, inputs)


def _follow_argmax(tree: Tree, visit: Visit, inputs: VerifyInput) -> Endpoint:
    """The greedy choice. Logits decide it: probabilities may round to a tie."""
    best = select_rows(tree.target.logits, visit.sequences, visit.rows).to(torch.float32).argmax(1)
    children = tree.children[visit.sequences, visit.rows]
    tokens = tree.tokens[visit.sequences[:, None], children]
    return _first(children, (tokens == best[:, None]) & (children > 0)), best


def _first(children: Tensor, holds: Tensor) -> Tensor:
    """The first of [m, S] children for which it holds, 0 if none: [m]."""
    return children.gather(1, holds.int().argmax(1, keepdim=True))[:, 0].where(holds.any(1), 0)


def _draw_where_stopped(stopped: Tensor, residual: Tensor, visit: Visit, inputs: VerifyInput) -> Tensor:
    """A token for the visits at places `stopped` [n] from their `residual` [n, V], 0 for the others: [m]."""
    tokens = draw(residual, visit.p[stopped], inputs.residual_uniforms[visit.sequences[stopped]])
    return torch.zeros_like(visit.rows).index_copy_(0, stopped, tokens)


def draw(residual: Tensor, p: Tensor, uniforms: Tensor) -> Tensor:
    """A token from the residual [m, V], or from p where it rounds to nothing, as the chain rules do."""
    empty = (residual.sum(1) == 0).nonzero()[:, 0]
    return inverse_cdf(residual.index_copy(0, empty, p[empty]), uniforms)


# --- trees ------------------------------------------------------------------------------------------------------------


def _build(target: Target, draft: Draft) -> Tree:
    """Turn slots and their parents into rows and their children."""
    assert draft.parents is not None
    real = drafted(draft)
    pad = partial(torch.nn.functional.pad, pad=(1, 0))
    draft = replace(draft, tokens=draft.tokens.where(real, 0), parents=draft.parents.where(real, -1))
    assert draft.parents is not None
    parents = pad(draft.parents + 1)
    rows = torch.arange(parents.shape[1], device=parents.device).expand_as(parents)
    node = rows.where(pad(real), 0)  # [B, k+1]
    rank = _earlier_siblings(draft).sum(2)  # [B, k]
    most = int(rank.max()) + 1 if rank.numel() else 1
    children = parents.new_zeros(*parents.shape, most)
    sequences, slots = real.nonzero(as_tuple=True)
    children[sequences, parents[sequences, slots + 1], rank[sequences, slots]] = slots + 1
    depth, above = torch.zeros_like(parents), node
    while bool(above.any()):
        depth, above = depth + (above > 0), parents.gather(1, above)
    return Tree(target, draft, pad(draft.tokens), parents, children, depth)


def _earlier_siblings(draft: Draft) -> Tensor:
    """Whether slot i (last axis) is an earlier sibling of slot j: [B, k, k]."""
    assert draft.parents is not None
    slots = torch.arange(draft.tokens.shape[1], device=draft.tokens.device)
    related = (draft.parents[:, :, None] == draft.parents[:, None, :]) & drafted(draft)[:, :, None]
    return related & (slots < slots[:, None])


def _tree_result(tree: Tree, last: Tensor, following: Tensor) -> TreeResult:
    """Lay out the path to the last accepted rows, the emitted tokens and their log-probabilities; zeros beyond."""
    accepted = tree.depth.gather(1, last[:, None])  # [B, 1]
    deepest, at = int(tree.depth.max()), last[:, None]
    rows = last.new_zeros(len(last), deepest + 1)  # the row that verified every emitted token
    for _ in range(deepest):
        rows = rows.scatter(1, tree.depth.gather(1, at), at)
        at = tree.parents.gather(1, at)
    place = torch.arange(deepest + 1, device=last.device)
    tokens = torch.nn.functional.pad(tree.tokens.gather(1, rows)[:, 1:], (0, 1))
    tokens = torch.where(place < accepted, tokens, 0).where(place != accepted, following[:, None])
    sequences = torch.arange(len(last), device=last.device)[:, None]
    values = tree.target.logits[sequences, rows, tokens].to(torch.float32) * tree.target.scale[:, None]
    logprobs = torch.where(place <= accepted, values - tree.target.lse.gather(1, rows), 0.0).to(torch.float32)
    path = torch.where(place[1:] <= accepted, rows[:, 1:] - 1, -1)
    return TreeResult(accepted[:, 0], tokens, logprobs, path)


def _check_tree(inputs: VerifyInput) -> None:
    """Refuse chains, shapes that disagree, and trees that are none or repeat a token among siblings."""
    draft = inputs.draft
    if draft.parents is None:
        raise ValueError("a tree rule needs draft.parents; verify a chain by chain.verify, or give it parents slot - 1")
    if draft.parents.shape != draft.tokens.shape:
        shapes = f"{tuple(draft.parents.shape)}, but the draft's tokens have {tuple(draft.tokens.shape)}"
        raise ValueError(f"draft.parents has shape {shapes}")
    check_shapes(replace(inputs, draft=replace(draft, parents=None)))
    check_draft(inputs)
    slots = torch.arange(draft.tokens.shape[1], device=draft.tokens.device)
    misplaced = ((draft.parents < -1) | (draft.parents >= slots)) & drafted(draft)
    twins = _earlier_siblings(draft) & (draft.tokens[:, :, None] == draft.tokens[:, None, :])
    refuse(
        {
            "the parent of slot j is not in -1..j-1": misplaced.any(1),
            "two siblings hold the same token": twins.flatten(1).any(1),
        }
    )
