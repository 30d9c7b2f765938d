"""Exact acceptance rules for trees of draft tokens: target-only walk, recursive rejection, traversal, greedy.

Every rule is a deterministic function of logits, draft and uniforms, batched over ragged trees, on any device. The
tokens a round emits, continued by the target, are distributed as the target's own; `tree_oracle.py` proves it by
enumeration, and holds the slow reference of every rule.

Conventions
- B sequences, k draft slots, V vocabulary, D draft vocabulary, S siblings at most. `draft.parents[b, j]` is the slot of
  node j's parent, -1 for a child of the root, and smaller than j; slots from `draft.lengths[b]` on are padding.
- Inside, nodes go by target rows: row 0 is the root, the newest committed token, and row j+1 follows slot j. A node is
  judged by its parent's row, and the row of the last accepted node gives the next token.
- `log_q` None marks trees whose tokens were not sampled; the walk judges them, whatever the rule's name. Otherwise
  siblings were drawn in slot order without replacement from one row q, which `log_q` repeats at each of them (only the
  eldest's copy is read): the first from q, or for "best_sampled" the argmax of q, and every later one from q without
  its elders. "walk" does not read q: it is exact for any tree, however it was made, and accepts less of sampled ones.
- Non-anticipation: what the sampled rules ask is that whether slot j is drafted, and under which parent, was decided by
  the tokens of slots before j at most, elder siblings and cousins included. A slot that was drawn stays in the tree.
  Reason: averaged over the token drawn last, the law of a verdict is that of the tree without it.
- Coins [B, k]: the walk reads coins[:, d] at the node of depth d (root 0), the sampled rules coins[:, j] when node j is
  judged. Picks [B]: the token that ends the round. All belong to this round alone; keyed by `round_keys` of `random.py`
  that holds for up to 128 slots.
- temperature 0 marks a greedy sequence: it follows the argmax, and neither coins, picks nor q are read.
- Nothing of size [B, k+1, V] is built. The walk and recursive rejection read the rows on the accepted path alone;
  traversal reads those of every node with children, level by level. Scalars are float64, rows float32.

Left out: siblings drawn with replacement; sampled and fixed nodes mixed under one parent but for "best_sampled".
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
    log_q_of_tokens,
    refuse,
    select_rows,
    stream_rows,
)
from forerun.acceptance.random import inverse_cdf
from forerun.types import Draft, VerifyResult


@dataclass(frozen=True, slots=True)
class TreeResult:
    """A `VerifyResult` over tree paths: `path[b, : accepted[b]]` are the accepted slots from the root down, -1 beyond.

    A = the depth of the batch's deepest node; `verdict.tokens` and `.logprobs` are [B, A+1]. An engine keeps the root's
    cache entry and those of the path.
    """

    verdict: VerifyResult
    path: Tensor  # [B, A] int64


@dataclass(frozen=True, slots=True)
class Tree:
    """Draft trees by target rows, and the rows that judge them; `target.lse` is filled in as rows are read."""

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
class Spent:
    """A node after all its children have fallen, and how each of them stood before."""

    chances: Tensor  # [m, S] float64, of accepting a child or below it once its elders have fallen
    left: Tensor  # [m, V] float32, what is left of weight * p; sums to `weight`
    weight: Tensor  # [m] float64


TreeRuleFunction = Callable[[Tensor, Draft, Tensor, Tensor, Tensor], TreeResult]
Settlement = tuple[Tensor, Tensor]  # last accepted row and next token, [B] int64 each, 0 for sequences not asked for
Settle = Callable[[Tree, Tensor, Tensor, Tensor], Settlement]  # tree, sequences [n], coins [B, k], picks [B]
Choose = Callable[[Tree, Visit, Tensor, Tensor], Settlement]  # the child to go to or 0, and the token if it is 0: [m]
Spend = Callable[[Tree, Visit, Tensor], Spent]  # tree, rows, weights [m]


def verify_tree(
    rule: str, target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor
) -> TreeResult:
    """Judge one round of draft trees.

    `rule` is "walk", "rrs", "best_sampled" or "traversal"; `target_logits` [B, k+1, V] of any float type, -inf allowed;
    `draft` with parents; `temperature` [B], 0 for greedy sequences; `coins` [B, k] and `picks` [B] uniforms in (0, 1)
    independent of the draft's. Raises ValueError when shapes or parents disagree, when siblings share a token, when a
    row that was read has no finite log-sum-exp, and when a draft token has probability zero under the q it claims to be
    sampled from. Sources: SpecInfer 2305.09781 (rrs; without replacement: RSD 2402.14160, Sequoia 2402.12374),
    RheoSampling 2609.21827 (best_sampled), 2505.12398 (traversal).
    """
    if rule not in TREE_RULES:
        raise ValueError(f"there is no tree rule {rule!r}; the rules are {', '.join(TREE_RULES)}")
    return TREE_RULES[rule](target_logits, draft, temperature, coins, picks)


def verify_walk(target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor) -> TreeResult:
    """Sample from the target and follow it while it stays in the tree; arguments as `verify_tree`."""
    return run_tree(walk, target_logits, replace(draft, log_q=None, vocabulary=None), temperature, coins, picks)


def verify_rrs(target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor) -> TreeResult:
    """Recursive rejection of siblings sampled without replacement; arguments as `verify_tree`."""
    return run_tree(where_sampled(reject_recursively), target_logits, draft, temperature, coins, picks)


def verify_best_sampled(
    target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor
) -> TreeResult:
    """Recursive rejection where the eldest of siblings was not sampled; arguments as `verify_tree`.

    Exact for whatever eldest: one that was sampled after all is judged as if it were fixed, which costs acceptance.
    """
    settle = partial(reject_recursively, spend=partial(spend_children, eldest_fixed=True))
    return run_tree(where_sampled(settle), target_logits, draft, temperature, coins, picks)


def verify_traversal(
    target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor
) -> TreeResult:
    """Judge nodes from the leaves up, a node after all below it; arguments as `verify_tree`. A chain: block rule."""
    return run_tree(where_sampled(traverse), target_logits, draft, temperature, coins, picks)


TREE_RULES: dict[str, TreeRuleFunction] = {
    "walk": verify_walk,
    "rrs": verify_rrs,
    "best_sampled": verify_best_sampled,
    "traversal": verify_traversal,
}


@torch.no_grad()
def run_tree(
    settle: Settle, target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor
) -> TreeResult:
    """Run a rule, given as what settles the sampled sequences, over a batch. Arguments and errors as `verify_tree`."""
    _check_tree(target_logits, draft, temperature, coins, picks)
    greedy = temperature == 0
    scale = torch.where(greedy, 1.0, 1.0 / temperature).to(torch.float32)
    lse = torch.zeros(target_logits.shape[:2], dtype=torch.float64, device=target_logits.device)
    tree = _grow(Target(target_logits, scale, lse), draft)
    last, following = settle(tree, (~greedy).nonzero()[:, 0], coins, picks)
    if bool(greedy.any()):
        last_greedy, best = descend(_follow_argmax, tree, greedy.nonzero()[:, 0], coins, picks)
        last, following = last + last_greedy, following + best
    check_probabilities(tree.target, log_q_of_tokens(tree.draft), greedy)
    return _tree_verdict(tree, last, following)


# --- one node and its children ----------------------------------------------------------------------------------------

SiblingRow = Callable[[Tree, Tensor, Tensor], Tensor]  # tree, sequences [n], sibling after elders [n, s] -> [n, V]
Remove = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # measure [n, V], q, weight -> measure, weight


def remove_proposal(measure: Tensor, q: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(m - q)+/R and its mass S/R. Where R = 0 no child can fall, and m stays as it was."""
    left = (measure - q).relu_()
    mass = left.sum(1).to(torch.float64)
    fallen = mass + (1.0 - weight)
    certain = (fallen <= 0).nonzero()[:, 0]
    left = left.index_copy_(0, certain, measure[certain])
    mass, fallen = mass.index_copy(0, certain, weight[certain]), fallen.index_fill(0, certain, 1.0)
    return left.mul_(fallen.reciprocal().to(torch.float32)[:, None]), mass / fallen


def row_without_elders(tree: Tree, sequences: Tensor, family: Tensor) -> Tensor:
    """The row that the last of `family` was drawn from: q of the eldest without the tokens of all but the last."""
    log_q = log_q_of_family(tree, sequences, family)
    elders = draft_columns(tree, sequences, family[:, :-1])
    # A softmax over what remains: one minus the elders' share would lose all digits where they hold nearly everything.
    return widen(tree, log_q.scatter_(1, elders, -torch.inf).softmax(1))


def log_q_of_family(tree: Tree, sequences: Tensor, family: Tensor) -> Tensor:
    """log q of the first of the given siblings [n, s], over the draft vocabulary: [n, D] float32, as fresh memory."""
    assert tree.draft.log_q is not None
    return select_rows(tree.draft.log_q, sequences, family[:, 0] - 1).to(torch.float32, copy=True)


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


def spend_children(
    tree: Tree,
    visit: Visit,
    weight: Tensor,
    eldest_fixed: bool = False,
    sibling_row: SiblingRow = row_without_elders,
    remove: Remove = remove_proposal,
) -> Spent:
    """Let the children of every visited node fall one after the other; see `traverse` for the symbols.

    `weight` [m] is w before the first child; with w = 1 this is recursive rejection. The callables are for controls.
    """
    children = tree.children[visit.sequences, visit.rows]  # [m, S]
    chances = torch.zeros(children.shape, dtype=torch.float64, device=weight.device)
    left, weight = visit.p * weight.to(torch.float32)[:, None], weight.clone()
    for rank in range(children.shape[1]):
        held = (children[:, rank] > 0).nonzero()[:, 0]
        if len(held) == 0:
            break
        sequences, family = visit.sequences[held], children[held, : rank + 1]
        token = tree.tokens[sequences, family[:, -1]][:, None]
        if eldest_fixed and rank == 0:
            q = torch.zeros_like(left[held]).scatter_(1, token, 1.0)
        else:
            q = sibling_row(tree, sequences, family)
        measure = left[held]
        ratio = measure.gather(1, token).to(torch.float64) / q.gather(1, token).to(torch.float64)
        chances[held, rank] = ratio[:, 0].clamp(max=1.0)
        left[held], weight[held] = remove(measure, q, weight[held])
    return Spent(chances, left, weight)


def read_rows(tree: Tree, sequences: Tensor, rows: Tensor) -> Iterator[tuple[slice, Visit]]:
    """p of the given (sequence, row) pairs, a few MB at a time; their log-sum-exp stays in `tree.target.lse`."""
    for part, values in stream_rows(tree.target, sequences, rows):
        top = values.amax(1, keepdim=True)
        total = values.sub_(top).exp_().sum(1, keepdim=True)
        tree.target.lse[sequences[part], rows[part]] = (total.to(torch.float64).log() + top)[:, 0]
        yield part, Visit(sequences[part], rows[part], values.div_(total))


# --- settling ---------------------------------------------------------------------------------------------------------


def where_sampled(settle: Settle) -> Settle:
    """The rule where q is known, and the walk, which is the law of all rules for a one-hot q, where it is None."""
    return lambda tree, members, coins, picks: (walk if tree.draft.log_q is None else settle)(
        tree, members, coins, picks
    )


def walk(tree: Tree, members: Tensor, coins: Tensor, picks: Tensor) -> Settlement:
    """One coin per visited node decides between its children, each with mass p, and what p holds beside them."""
    return descend(toss_among_children, tree, members, coins, picks)


def reject_recursively(
    tree: Tree, members: Tensor, coins: Tensor, picks: Tensor, spend: Spend = spend_children
) -> Settlement:
    """Accept the first sibling with u <= r(x)/q(x), where r = norm((r - q)+) and q loses x whenever one falls."""
    return descend(partial(_try_children, spend), tree, members, coins, picks)


def descend(choose: Choose, tree: Tree, members: Tensor, coins: Tensor, picks: Tensor) -> Settlement:
    """Go from the root to the child that `choose` names until it names none."""
    last = torch.zeros(len(picks), dtype=torch.int64, device=picks.device)
    following = torch.zeros_like(last)
    while len(members):
        child = torch.zeros_like(members)
        for part, visit in read_rows(tree, members, last[members]):
            child[part], following[members[part]] = choose(tree, visit, coins, picks)
        members, child = members[child > 0], child[child > 0]
        last[members] = child
    return last, following


def traverse(
    tree: Tree, members: Tensor, coins: Tensor, picks: Tensor, spend: Spend = spend_children, rise: bool = True
) -> Settlement:
    """Accept the first node in post-order with u <= h, the root if there is none (2505.12398, algorithm 2).

    A node that is reached has a weight w, the chance that it or something below it will be accepted, and a measure
    m = w p of the tokens after it; the root has w = 1. Child x weighs min(1, m(x)/q(x)). When it falls, which has the
    chance R = S + 1 - w with S = sum (m - q)+, then m becomes (m - q)+/R, w becomes S/R, and q loses x. What w has
    become when no child is left is h, and the next token is drawn from m.

    w and h depend on no coin, for a node is only reached when its elders have fallen; so they are computed for whole
    levels, from the root down. `rise` False keeps h at w, and is for controls.
    """
    weight, threshold = _weigh(tree, members, spend)
    reached = torch.nn.functional.pad(coins, (1, 0)) <= (threshold if rise else weight)
    last = _first_in_post_order(tree, reached)
    following = torch.zeros_like(last)
    for part, visit in read_rows(tree, members, last[members]):
        spent = spend(tree, visit, weight[visit.sequences, visit.rows])
        following[members[part]] = draw(spent.left, visit.p, picks[visit.sequences])
    return torch.zeros_like(last).index_copy_(0, members, last[members]), following


def _weigh(tree: Tree, members: Tensor, spend: Spend) -> tuple[Tensor, Tensor]:
    """Weight w and threshold h of every node of the given sequences, 0 for others: two [B, k+1] float64."""
    weight = torch.zeros_like(tree.target.lse)
    weight[members, 0] = 1.0
    threshold = torch.zeros_like(weight)
    for depth in range(int(tree.depth.max())):
        inner = (tree.depth == depth) & (tree.children[:, :, 0] > 0) & (weight > 0)
        sequences, rows = inner.nonzero(as_tuple=True)
        for part, visit in read_rows(tree, sequences, rows):
            spent = spend(tree, visit, weight[sequences[part], rows[part]])
            threshold[sequences[part], rows[part]] = spent.weight
            children = tree.children[sequences[part], rows[part]]  # [m, S]
            index, rank = (children > 0).nonzero(as_tuple=True)
            weight[sequences[part][index], children[index, rank]] = spent.chances[index, rank]
    return weight, torch.where(tree.children[:, :, 0] > 0, threshold, weight)


def _first_in_post_order(tree: Tree, stands: Tensor) -> Tensor:
    """Row of the first node in post-order that stands [B, k+1], 0 if none: [B]."""
    below, deepest = stands, int(tree.depth.max())
    for _ in range(deepest):
        below = below | _of_children(tree, below).any(2)
    some = _of_children(tree, below)  # [B, k+1, S]
    eldest = tree.children.gather(2, some.int().argmax(2, keepdim=True))[:, :, 0].where(some.any(2), 0)
    last = torch.zeros_like(tree.parents[:, 0])
    for _ in range(deepest):
        child = eldest.gather(1, last[:, None])[:, 0]
        last = torch.where(child > 0, child, last)
    return last


def _of_children(tree: Tree, flags: Tensor) -> Tensor:
    """Flags [B, k+1] of every row's children: [B, k+1, S]."""
    return flags.gather(1, tree.children.flatten(1)).view_as(tree.children) & (tree.children > 0)


def toss_among_children(tree: Tree, visit: Visit, coins: Tensor, picks: Tensor) -> Settlement:
    """The walk's choice; where it stays, the token comes from p without the children."""
    children = tree.children[visit.sequences, visit.rows]  # [m, S]
    tokens = tree.tokens[visit.sequences[:, None], children]
    mass = visit.p.gather(1, tokens).where(children > 0, 0.0)
    coin = torch.nn.functional.pad(coins, (0, 1))[visit.sequences, tree.depth[visit.sequences, visit.rows]]
    child = _first(children, mass.to(torch.float64).cumsum(1) > coin[:, None])
    stays = (child == 0).nonzero()[:, 0]
    left = visit.p[stays].scatter_add_(1, tokens[stays], -mass[stays])
    return child, _draw_where_it_stays(stays, left, visit, picks)


def _try_children(spend: Spend, tree: Tree, visit: Visit, coins: Tensor, picks: Tensor) -> Settlement:
    """The choice of recursive rejection; where it stays, the token comes from what the children have left."""
    children = tree.children[visit.sequences, visit.rows]  # [m, S]
    spent = spend(tree, visit, torch.ones_like(visit.rows, dtype=torch.float64))
    coin = torch.nn.functional.pad(coins, (1, 0))[visit.sequences[:, None], children]
    child = _first(children, (coin <= spent.chances) & (children > 0))
    stays = (child == 0).nonzero()[:, 0]
    return child, _draw_where_it_stays(stays, spent.left[stays], visit, picks)


def _follow_argmax(tree: Tree, visit: Visit, coins: Tensor, picks: Tensor) -> Settlement:
    """The greedy choice. Logits decide it: probabilities may round to a tie."""
    best = select_rows(tree.target.logits, visit.sequences, visit.rows).to(torch.float32).argmax(1)
    children = tree.children[visit.sequences, visit.rows]
    tokens = tree.tokens[visit.sequences[:, None], children]
    return _first(children, (tokens == best[:, None]) & (children > 0)), best


def _first(children: Tensor, holds: Tensor) -> Tensor:
    """The first of [m, S] children for which it holds, 0 if none: [m]."""
    return children.gather(1, holds.int().argmax(1, keepdim=True))[:, 0].where(holds.any(1), 0)


def _draw_where_it_stays(stays: Tensor, left: Tensor, visit: Visit, picks: Tensor) -> Tensor:
    """A token for the visits at places `stays` [n] from their `left` [n, V], 0 for the others: [m]."""
    tokens = draw(left, visit.p[stays], picks[visit.sequences[stays]])
    return torch.zeros_like(visit.rows).index_copy_(0, stays, tokens)


def draw(left: Tensor, p: Tensor, picks: Tensor) -> Tensor:
    """A token from what is left [m, V], or from p where rounding left nothing, as the chain rules do."""
    empty = (left.sum(1) == 0).nonzero()[:, 0]
    return inverse_cdf(left.index_copy(0, empty, p[empty]), picks)


# --- trees ------------------------------------------------------------------------------------------------------------


def _grow(target: Target, draft: Draft) -> Tree:
    """Turn slots and their parents into rows and their children."""
    assert draft.parents is not None
    real = drafted(draft)
    pad = partial(torch.nn.functional.pad, pad=(1, 0))
    draft = replace(draft, tokens=draft.tokens.where(real, 0), parents=draft.parents.where(real, -1))
    assert draft.parents is not None
    parents = pad(draft.parents + 1)
    rows = torch.arange(parents.shape[1], device=parents.device).expand_as(parents)
    node = rows.where(pad(real), 0)  # [B, k+1]
    rank = _elders(draft).sum(2)  # [B, k]
    most = int(rank.max()) + 1 if rank.numel() else 1
    children = parents.new_zeros(*parents.shape, most)
    sequences, slots = real.nonzero(as_tuple=True)
    children[sequences, parents[sequences, slots + 1], rank[sequences, slots]] = slots + 1
    depth, above = torch.zeros_like(parents), node
    while bool(above.any()):
        depth, above = depth + (above > 0), parents.gather(1, above)
    return Tree(target, draft, pad(draft.tokens), parents, children, depth)


def _elders(draft: Draft) -> Tensor:
    """Whether slot i (last axis) is an elder sibling of slot j: [B, k, k]."""
    assert draft.parents is not None
    slots = torch.arange(draft.tokens.shape[1], device=draft.tokens.device)
    related = (draft.parents[:, :, None] == draft.parents[:, None, :]) & drafted(draft)[:, :, None]
    return related & (slots < slots[:, None])


def _tree_verdict(tree: Tree, last: Tensor, following: Tensor) -> TreeResult:
    """Lay out the path to the last accepted rows, the emitted tokens and their log-probabilities; zeros beyond."""
    accepted = tree.depth.gather(1, last[:, None])  # [B, 1]
    deepest, at = int(tree.depth.max()), last[:, None]
    rows = last.new_zeros(len(last), deepest + 1)  # the row that judged every emitted token
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
    return TreeResult(VerifyResult(accepted[:, 0], tokens, logprobs), path)


def _check_tree(target_logits: Tensor, draft: Draft, temperature: Tensor, coins: Tensor, picks: Tensor) -> None:
    """Refuse chains, shapes that disagree, and trees that are none or repeat a token among siblings."""
    if draft.parents is None:
        raise ValueError("a tree rule needs draft.parents; judge a chain by chain.verify, or give it parents slot - 1")
    if draft.parents.shape != draft.tokens.shape:
        shapes = f"{tuple(draft.parents.shape)}, but the draft's tokens have {tuple(draft.tokens.shape)}"
        raise ValueError(f"draft.parents has shape {shapes}")
    check_shapes(target_logits, replace(draft, parents=None), temperature, coins, picks)
    check_draft(draft, temperature, target_logits.shape[2])
    slots = torch.arange(draft.tokens.shape[1], device=draft.tokens.device)
    misplaced = ((draft.parents < -1) | (draft.parents >= slots)) & drafted(draft)
    twins = _elders(draft) & (draft.tokens[:, :, None] == draft.tokens[:, None, :])
    refuse(
        {
            "the parent of slot j is not in -1..j-1": misplaced.any(1),
            "two siblings hold the same token": twins.flatten(1).any(1),
        }
    )
