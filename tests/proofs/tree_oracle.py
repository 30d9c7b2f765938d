"""Exact proof by enumeration that a tree rule emits text distributed as the target's, and the slow reference.

Three parts. The first states every rule once, in plain Python, for one tree and any kind of number. The second runs it
on rational numbers over all trees a drafter may draw: the law must equal the target's exactly. On floats with given
uniforms the same statement is `verify_tree_reference`, which the batched code must agree with. The third runs the
batched code: it recovers by bisection every threshold at which a uniform changes the result, and so integrates the code
over its uniforms without sampling.

Conventions: as in `oracle.py` (texts, models, laws) and `tree.py` (rows: 0 the root, j+1 the node of slot j).
- A rule is a generator. It yields questions, (slot, chances): which of the successive intervals of these widths is the
  acceptance uniform of that slot in, or none (the number of chances)? It returns the last accepted row and the weights
  of the token after it.
- A Shape decides, from the parents and tokens of the slots drawn so far, on the parent of the next slot (-1 the root),
  or stops (None). It sees nothing of the slot it decides on: that is non-anticipation.

V <= 3 and k <= 5 take seconds.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial

import torch
from torch import Tensor

from forerun.acceptance.tree import TreeResult, TreeRuleFunction
from forerun.types import Draft, VerifyInput
from proofs.oracle import HIGH, LOW, Law, Model, Round, Text, completed, largest, merge

Number = Fraction | float
Numbers = tuple[Number, ...]
Question = tuple[int, Numbers]
Settled = tuple[int, Numbers]
Shape = Callable[[Text, Text], int | None]

_BISECTIONS = 28  # float32 rows know a threshold no better
_STEP = 2.0**-27  # past a threshold that bisection has found


@dataclass(frozen=True, slots=True)
class DraftTree:
    """One tree a drafter may draw, its probability, and the rows that verify it."""

    parents: Text  # slots, -1 the root
    tokens: Text
    p: tuple[Numbers, ...]  # k+1 target rows
    q: tuple[Numbers, ...]  # k+1 rows that the children of every row are drawn from
    sampled: bool = True  # False: q is not given to the rule
    probability: Fraction = Fraction(1)

    def children(self, row: int) -> list[int]:
        """Rows of the children in slot order."""
        return [slot + 1 for slot, parent in enumerate(self.parents) if parent + 1 == row]

    def token(self, row: int) -> int:
        """Token of a row other than the root."""
        return self.tokens[row - 1]

    def path(self, row: int) -> list[int]:
        """Rows from below the root down to the given one."""
        return [] if row == 0 else [*self.path(self.parents[row - 1] + 1), row]

    def text(self, row: int) -> Text:
        """Tokens from below the root down to the given row."""
        return tuple(self.token(above) for above in self.path(row))


TreeRule = Callable[[DraftTree], Generator[Question, int, Settled]]


# --- the rules --------------------------------------------------------------------------------------------------------


def walk_rule(tree: DraftTree) -> Generator[Question, int, Settled]:
    """Target-only walk: uniform d decides between the children of the node at depth d."""
    row, depth = 0, 0
    while children := tree.children(row):
        tokens = [tree.token(child) for child in children]
        chosen = yield depth, tuple(tree.p[row][token] for token in tokens)
        if chosen == len(children):
            return row, without(tree.p[row], tokens)
        row, depth = children[chosen], depth + 1
    return row, tree.p[row]


def rrs_rule(tree: DraftTree, first_fixed: bool = False) -> Generator[Question, int, Settled]:
    """Recursive rejection without replacement: uniform j accepts or rejects node j."""
    row = 0
    while True:
        chances, residual, _ = rejected(tree, row, 1, first_fixed)
        for child, chance in zip(tree.children(row), chances, strict=True):
            if (yield child - 1, (chance,)) == 0:
                row = child
                break
        else:
            return row, residual


def traversal_rule(tree: DraftTree) -> Generator[Question, int, Settled]:
    """Traversal verification: uniform j accepts or rejects node j once everything below it has been rejected."""
    settled = yield from _traverse(tree, 0, 1)
    assert settled is not None
    return settled


def _traverse(tree: DraftTree, row: int, weight: Number) -> Generator[Question, int, Settled | None]:
    """Verify the nodes from this one down; one is accepted with probability `weight`. None if all are rejected."""
    chances, residual, threshold = rejected(tree, row, weight, False)
    for child, chance in zip(tree.children(row), chances, strict=True):
        settled = yield from _traverse(tree, child, chance)
        if settled is not None:
            return settled
    if row == 0 or (yield row - 1, (threshold,)) == 0:
        return row, residual
    return None


TREE_EXACT: dict[str, TreeRule] = {
    "walk": walk_rule,
    "rrs": rrs_rule,
    "best_sampled": partial(rrs_rule, first_fixed=True),
    "traversal": traversal_rule,
}


def rejected(tree: DraftTree, row: int, weight: Number, first_fixed: bool) -> tuple[Numbers, Numbers, Number]:
    """What `reject_children` computes: chances of the children, what they leave of weight * p, and its mass."""
    tokens = tuple(tree.token(child) for child in tree.children(row))
    # The same rationals come back in thousands of trees; floats stay out of the cache, which holds 1.0 and 1 for equal.
    compute = _rejected if isinstance(tree.p[row][0], float) else _rejected_cached
    return compute(tree.p[row], tree.q[row], tokens, weight, first_fixed)


def _rejected(
    p: Numbers, q: Numbers, tokens: Text, weight: Number, first_fixed: bool
) -> tuple[Numbers, Numbers, Number]:
    """`rejected` by content."""
    measure: Numbers = tuple(weight * a for a in p)
    chances: list[Number] = []
    for rank, token in enumerate(tokens):
        proposal = normalised(without(q, tokens[:rank]))
        if first_fixed and rank == 0:
            proposal = tuple(int(other == token) for other in range(len(q)))
        chances.append(min(1, measure[token] / proposal[token]))
        left: Numbers = tuple(max(a - b, 0) for a, b in zip(measure, proposal, strict=True))
        rejection = sum(left) + 1 - weight
        if rejection > 0:
            measure, weight = tuple(a / rejection for a in left), sum(left) / rejection
    return tuple(chances), measure, weight


_rejected_cached = lru_cache(maxsize=1 << 16)(_rejected)


def without(row: Numbers, tokens: Sequence[int]) -> Numbers:
    """The row with the given entries set to 0."""
    return tuple(0 if token in tokens else mass for token, mass in enumerate(row))


def normalised(row: Numbers) -> Numbers:
    """The row over its sum."""
    total = sum(row)
    return tuple(mass / total for mass in row)


# --- drafting ---------------------------------------------------------------------------------------------------------


def fixed_shape(parents: Text) -> Shape:
    """Draw the same tree always."""
    return lambda _, tokens: parents[len(tokens)] if len(tokens) < len(parents) else None


def growing_shape(parents: Text, goes_on: Callable[[Text, Text], bool]) -> Shape:
    """Draw the slots of a tree as long as `goes_on` says yes to the parents and tokens before; legal."""
    return lambda above, tokens: parents[len(tokens)] if len(tokens) < len(parents) and goes_on(above, tokens) else None


def drawn_trees(target: Model, draft: Model, shape: Shape, siblings: str = "sampled") -> list[DraftTree]:
    """Every tree the drafter may draw.

    `siblings` says how: "sampled" without replacement; "best", the first the argmax and the others sampled; "top", the
    likeliest in order, deterministic. A tree ends early where a parent has no token left to draw.
    """
    finished, growing = [], [DraftTree((), (), (target(()),), (draft(()),))]
    while growing:
        tree = growing.pop()
        parent = shape(tree.parents, tree.tokens)
        row = None if parent is None else without(tree.q[parent + 1], _taken(tree, parent))
        if parent is None or row is None or not any(row):
            finished.append(tree)
            continue
        chances = normalised(row)
        if siblings == "top" or (siblings == "best" and not _taken(tree, parent)):
            chances = tuple(int(token == row.index(max(row))) for token in range(len(row)))
        growing.extend(_grown(tree, parent, token, c, target, draft) for token, c in enumerate(chances) if c)
    return finished


def _taken(tree: DraftTree, parent: int) -> Text:
    """Tokens of the children that a slot has already."""
    return tuple(tree.token(child) for child in tree.children(parent + 1))


def _grown(tree: DraftTree, parent: int, token: int, chance: Number, target: Model, draft: Model) -> DraftTree:
    """The tree with one more node."""
    text = (*tree.text(parent + 1), token)
    return DraftTree(
        (*tree.parents, parent),
        (*tree.tokens, token),
        (*tree.p, target(text)),
        (*tree.q, draft(text)),
        tree.sampled,
        tree.probability * Fraction(chance),
    )


def without_q(trees: list[DraftTree]) -> list[DraftTree]:
    """The same trees without q for the rule."""
    return [replace(tree, sampled=False) for tree in trees]


# --- laws -------------------------------------------------------------------------------------------------------------


def outcomes(rule: TreeRule, tree: DraftTree) -> Iterator[tuple[Fraction, int, Numbers]]:
    """Every way a rule may settle a tree: its chance, the last row, the weights of the next token."""
    waiting: list[tuple[Fraction, tuple[int, ...]]] = [(Fraction(1), ())]
    while waiting:
        chance, answers = waiting.pop()
        steps = rule(tree)
        try:
            _, chances = next(steps)
            for answer in answers:
                _, chances = steps.send(answer)
        except StopIteration as end:
            yield chance, *end.value
            continue
        widths = [Fraction(width) for width in chances]
        for answer, width in enumerate([*widths, 1 - sum(widths)]):
            if width > 0:
                waiting.append((chance * width, (*answers, answer)))


def tree_texts(rule: TreeRule, trees: list[DraftTree]) -> Iterator[tuple[Fraction, Text]]:
    """What one round emits: every text with its probability, a text possibly more than once."""
    for tree in trees:
        for chance, row, weights in outcomes(rule, tree):
            text = tree.text(row)
            for token, mass in enumerate(normalised(weights)):
                yield tree.probability * chance * Fraction(mass), (*text, token)


def tree_law(rule: TreeRule, trees: list[DraftTree], target: Model, length: int) -> Law:
    """Exact law of the first `length` tokens when one round of a tree rule is followed by the target."""
    return completed(_added(tree_texts(rule, trees)), target, length)


def tree_expected_accepted(rule: TreeRule, trees: list[DraftTree]) -> Fraction:
    """Expected number of accepted draft tokens in one round."""
    ends = ((tree, end) for tree in trees for end in outcomes(rule, tree))
    return sum((tree.probability * chance * len(tree.path(row)) for tree, (chance, row, _) in ends), Fraction(0))


def _added(texts: Iterable[tuple[Fraction, Text]]) -> list[tuple[Fraction, Text]]:
    """Equal texts added up: completing each once saves most of the work."""
    sums: dict[Text, Fraction] = defaultdict(Fraction)
    for probability, text in texts:
        sums[text] += probability
    return [(probability, text) for text, probability in sums.items() if probability]


# --- on floats --------------------------------------------------------------------------------------------------------


def verify_tree_reference(rule: str, inputs: VerifyInput) -> TreeResult:
    """The tree rules, slow and obvious: one sequence at a time, Python floats."""
    temperature = inputs.temperature.tolist()
    trees = [_float_tree(inputs.target_logits[b], inputs.draft, b, t) for b, t in enumerate(temperature)]
    deepest = max((len(tree.path(row)) for tree in trees for row in range(len(tree.p))), default=0)
    accepted = torch.zeros(len(trees), dtype=torch.int64)
    tokens, logprobs = torch.zeros(len(trees), deepest + 1, dtype=torch.int64), torch.zeros(len(trees), deepest + 1)
    path = torch.full((len(trees), deepest), -1)
    for b, tree in enumerate(trees):
        statement = TREE_EXACT[rule] if tree.sampled else walk_rule
        uniforms = inputs.accept_uniforms[b].tolist()
        row, weights = _greedy(tree) if temperature[b] == 0 else _driven(statement, tree, uniforms)
        emitted = (*tree.text(row), _inverse(weights, float(inputs.residual_uniforms[b])))
        accepted[b] = n = len(emitted) - 1
        path[b, :n] = torch.tensor(tree.path(row), dtype=torch.int64) - 1
        tokens[b, : n + 1] = torch.tensor(emitted)
        rows = [0, *tree.path(row)]
        logprobs[b, : n + 1] = torch.tensor([math.log(tree.p[r][t]) for r, t in zip(rows, emitted, strict=True)])
    return TreeResult(accepted, tokens, logprobs, path)


def _float_tree(logits: Tensor, draft: Draft, b: int, temperature: float) -> DraftTree:
    """One sequence's tree with dense rows of floats."""
    assert draft.parents is not None
    n, size = int(draft.lengths[b]), logits.shape[1]
    parents, tokens = tuple(draft.parents[b, :n].tolist()), tuple(draft.tokens[b, :n].tolist())
    p = (logits[: n + 1].to(torch.float64) / (temperature or 1.0)).softmax(-1).tolist()
    q: list[Numbers] = [()] * (n + 1)
    if draft.log_q is not None:
        columns = list(range(size)) if draft.vocabulary is None else draft.vocabulary.tolist()
        for slot in reversed(range(n)):
            known = dict(zip(columns, draft.log_q[b, slot].double().exp().tolist(), strict=True))
            q[parents[slot] + 1] = tuple(known.get(token, 0.0) for token in range(size))
    return DraftTree(parents, tokens, tuple(map(tuple, p)), tuple(q), draft.log_q is not None)


def _driven(rule: TreeRule, tree: DraftTree, uniforms: list[float]) -> Settled:
    """Where a rule ends with these acceptance uniforms."""
    steps = rule(tree)
    try:
        slot, chances = next(steps)
        while True:
            sums = itertools.accumulate(chances)
            slot, chances = steps.send(next((i for i, end in enumerate(sums) if uniforms[slot] < end), len(chances)))
    except StopIteration as end:
        row, weights = end.value
        return row, weights


def _greedy(tree: DraftTree) -> Settled:
    """Where the argmax leads, the first of equals."""
    row, children = 0, [0]
    while children:
        row = children[0]
        best = tree.p[row].index(max(tree.p[row]))
        children = [child for child in tree.children(row) if tree.token(child) == best]
    return row, tuple(int(token == best) for token in range(len(tree.p[row])))


def _inverse(weights: Numbers, uniform: float) -> int:
    """The first token whose running sum exceeds that share of the total."""
    sums = list(itertools.accumulate(weights))
    return next(token for token, total in enumerate(sums) if total > uniform * sums[-1])


# --- under the torch code ---------------------------------------------------------------------------------------------


def tree_round(trees: list[DraftTree], temperature: float = 1.0, vocabulary: Text | None = None) -> Round:
    """Tensors of all trees, one row each, padded; arguments as `torch_round`."""
    count, k, size = len(trees), max(len(tree.tokens) for tree in trees), len(trees[0].p[0])
    logits, log_q = torch.zeros(count, k + 1, size, dtype=torch.float64), torch.zeros(count, k, size)
    tokens, parents = torch.zeros(2, count, k, dtype=torch.int64)
    for b, tree in enumerate(trees):
        n = len(tree.tokens)
        logits[b, : n + 1] = torch.tensor([_float_logs(row) for row in tree.p]) * (temperature or 1.0)
        tokens[b, :n] = torch.tensor(tree.tokens, dtype=torch.int64)
        parents[b, :n] = torch.tensor(tree.parents, dtype=torch.int64)
        log_q[b, :n] = torch.tensor([_float_logs(tree.q[parent + 1]) for parent in tree.parents]).reshape(n, size)
    columns = None if vocabulary is None else torch.tensor(vocabulary)
    known = log_q if columns is None else log_q[:, :, columns]
    lengths = torch.tensor([len(tree.tokens) for tree in trees])
    draft = Draft(tokens, lengths, known if trees[0].sampled else None, columns, parents)
    return Round(logits.to(torch.float32), draft, torch.full((count,), temperature))


def _float_logs(row: Numbers) -> list[float]:
    """Logarithms of a row, -inf for 0."""
    return torch.tensor([float(value) for value in row], dtype=torch.float64).log().tolist()


@dataclass(frozen=True, slots=True)
class TreeCells:
    """A rule's result as a table over its uniforms: a product of intervals for acceptance, V for the residual.

    Assumes that an acceptance uniform's thresholds show while those before it take one value in each of their intervals
    and those after it are at one of their ends, and that the emitted token never decreases with the residual uniform.
    `predict` reads the table, so that a test can check the assumption against the code at random uniforms.
    """

    edges: list[Tensor]  # k of [P, m_j + 1], ascending from 0 to 1
    last: Tensor  # [P, C], C the product of all m_j
    thresholds: Tensor  # [P, C, V-1], largest residual uniform that emits a token <= v

    def predict(self, accept: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Last accepted rows and next tokens at uniforms [P, k] and [P]."""
        cell = torch.zeros(len(accept), dtype=torch.int64)
        for slot, edges in enumerate(self.edges):
            cell = cell * (edges.shape[1] - 1) + (accept[:, slot, None] > edges[:, 1:-1]).sum(1)
        row = torch.arange(len(accept))
        return self.last[row, cell], (residual[:, None] > self.thresholds[row, cell]).sum(1)

    def volumes(self) -> Tensor:
        """Probability of every cell: [P, C]."""
        volume = torch.ones(len(self.last), 1, dtype=torch.float64)
        for edges in self.edges:
            volume = (volume[:, :, None] * edges.diff(dim=1)[:, None, :]).flatten(1)
        return volume


def tree_cells(rule: TreeRuleFunction, given: Round) -> TreeCells:
    """Recover the table of a torch rule, one acceptance uniform after the other, by bisection."""
    paths, k = given.draft.tokens.shape
    edges, accept = [], torch.zeros(paths, 1, 0, dtype=torch.float64)
    for slot in range(k):
        edges.append(_accept_edges(rule, given, accept, k - slot - 1))
        middles = (edges[-1][:, 1:] + edges[-1][:, :-1]) / 2  # [P, m]
        accept = _crossed(accept, middles[:, :, None])
    last, _ = results_at(rule, given, accept, torch.full(accept.shape[:2], 0.5, dtype=torch.float64))
    return TreeCells(edges, last, _residual_thresholds(rule, given, accept))


def torch_tree_law(cells: TreeCells, trees: list[DraftTree], target: Model, length: int) -> Law:
    """Law of `length` tokens of a torch rule, integrated over its uniforms, completed by the target."""
    bounds = torch.nn.functional.pad(torch.nn.functional.pad(cells.thresholds, (1, 0)), (0, 1), value=1.0)
    masses = (cells.volumes()[:, :, None] * bounds.diff(dim=2)).tolist()
    texts = (
        (tree.probability * Fraction(mass), (*tree.text(row), token))
        for tree, rows, table in zip(trees, cells.last.tolist(), masses, strict=True)
        for row, shares in zip(rows, table, strict=True)
        for token, mass in enumerate(shares)
        if mass > 0
    )
    return completed(_added(texts), target, length)


def _crossed(some: Tensor, others: Tensor) -> Tensor:
    """Every row of [P, m, i] followed by every row of [P, n, j]: [P, m * n, i + j]."""
    left = some.repeat_interleave(others.shape[1], 1)
    return torch.cat([left, others.repeat(1, some.shape[1], 1)], 2)


def _accept_edges(rule: TreeRuleFunction, given: Round, before: Tensor, after: int) -> Tensor:
    """Interval ends of the uniform that follows `before` [P, C, j], with `after` more behind it: [P, m+1]."""
    paths = len(before)
    ends = torch.tensor(list(itertools.product((LOW, HIGH), repeat=after)), dtype=torch.float64)
    others = _crossed(before, ends.reshape(1, 2**after, after).expand(paths, -1, -1))
    slot = before.shape[2]

    def result(value: Tensor) -> Tensor:
        accept = torch.cat([others[:, :, :slot], value[:, :, None], others[:, :, slot:]], 2)
        last, token = results_at(rule, given, accept, torch.full_like(value, 0.5))
        return last * given.logits.shape[2] + token

    found: list[list[float]] = [[0.0] for _ in range(paths)]
    start, top = (torch.full(others.shape[:2], end, dtype=torch.float64) for end in (LOW, HIGH))
    while bool((result(start) != result(top)).any()):
        edge = largest(partial(_unchanged, result, start, result(start)), tuple(start.shape), _BISECTIONS)
        for values, more in zip(found, edge.tolist(), strict=True):
            values.extend(more)
        start = (edge + _STEP).clamp(max=HIGH)
    merged = [merge(sorted({*values, 1.0})) for values in found]
    widest = max(len(values) for values in merged)
    return torch.tensor([values + [1.0] * (widest - len(values)) for values in merged], dtype=torch.float64)


def _unchanged(result: Callable[[Tensor], Tensor], start: Tensor, there: Tensor, value: Tensor) -> Tensor:
    """Whether the result at a uniform above `start` is still what it was there."""
    return (value <= start) | (result(value) == there)


def _residual_thresholds(rule: TreeRuleFunction, given: Round, accept: Tensor) -> Tensor:
    """Largest residual uniform that emits a token of at most 0, 1, .. V-2, in every cell: [P, C, V-1]."""
    most = torch.arange(given.logits.shape[2] - 1)
    shape = (*accept.shape[:2], len(most))
    repeated = accept.repeat_interleave(len(most), 1)  # [P, C * (V-1), k]

    def holds(residual: Tensor) -> Tensor:
        return results_at(rule, given, repeated, residual.flatten(1))[1].view(shape) <= most

    return largest(holds, shape, _BISECTIONS)


def results_at(rule: TreeRuleFunction, given: Round, accept: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Last rows and next tokens at C settings of the uniforms per tree: [P, C, k], [P, C] -> two [P, C]."""
    result = rule(given.repeated(accept, residual))
    accepted = result.accepted[:, None]
    rows = torch.nn.functional.pad(result.path + 1, (1, 0)).gather(1, accepted)
    return rows.view(residual.shape), result.tokens.gather(1, accepted).view(residual.shape)
