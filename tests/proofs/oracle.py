"""Exact proof by enumeration that a verification rule emits text distributed as the target's.

Two halves. The first treats a rule as mathematics: it enumerates (draft path, acceptance, next token) in rational
numbers, for any rule, proposal and admission policy; the law must equal the target's exactly. The second runs the
rule's own torch code: it recovers by bisection every threshold at which a uniform changes the result, and so integrates
the code over its uniforms without sampling; that law must equal the target's to float accuracy.

Conventions
- Text is a tuple of tokens; a Model maps a text to the next token's distribution, a tuple of V Fractions.
- A round emits between 1 and k+1 tokens. Its law is completed by the target to n tokens, which is what further exact
  rounds would do, and compared with the target's law of n tokens.
- An Admission maps a sampled path of k tokens to the number of slots verified. `stopping_time` may read only what was
  sampled before the slot it decides on; `peeking` reads the slot itself and must fail.
- A rule turns what a round proposes into weighted texts (`chain_texts`); a rule on trees is one more such function.

V <= 3 and k <= 3 take milliseconds to seconds.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from forerun.acceptance.chain import RULES, RuleFunction, verify
from forerun.types import Draft, VerifyInput

CHAIN_RULES: dict[str, RuleFunction] = {name: partial(verify, name) for name in RULES}

Text = tuple[int, ...]
Row = tuple[Fraction, ...]
Model = Callable[[Text], Row]
Admission = Callable[[Text], int]
Law = dict[Text, Fraction]
Outcome = tuple[Fraction, int, Fraction]  # probability, accepted tokens, weight of p in the residual

LOW, HIGH = 2.0**-54, 1.0 - 2.0**-53  # the ends of the open unit interval of uniforms
_BISECTIONS = 42
_SAME = 1e-11  # thresholds closer than this are one


@dataclass(frozen=True, slots=True)
class Proposal:
    """One way a drafter may propose k tokens: its probability, its tokens, and the rows they came from."""

    probability: Fraction
    path: Text
    q: tuple[Row, ...]
    sampled: bool  # False: deterministic, q is one-hot and not given to the rule


ChainRule = Callable[[list[Row], tuple[Row, ...], Text], Iterator[Outcome]]


def random_model(seed: int, size: int, zeros: bool = False) -> Model:
    """A context-dependent distribution over `size` tokens with small denominators; `zeros` forbids some tokens."""

    def row(text: Text) -> Row:
        source = random.Random(f"{seed}:{text}")
        weights = [source.randint(0 if zeros else 1, 6) for _ in range(size)]
        weights[source.randrange(size)] += 1
        return tuple(Fraction(weight, sum(weights)) for weight in weights)

    return row


def greedy_model(model: Model) -> Model:
    """The law of the same model at temperature 0: all mass on the first largest entry."""
    return lambda text: _one_hot(model(text).index(max(model(text))), len(model(text)))


def sampled_proposals(draft: Model, k: int) -> list[Proposal]:
    """Every path of k tokens that the draft model can sample."""
    size = len(draft(()))
    proposals = []
    for path in itertools.product(range(size), repeat=k):
        q = tuple(draft(path[:i]) for i in range(k))
        probability = _product(q[i][token] for i, token in enumerate(path))
        if probability > 0:
            proposals.append(Proposal(probability, path, q, True))
    return proposals


def one_hot_proposals(draft: Model, k: int) -> list[Proposal]:
    """The single path of the draft model's favourites, as a deterministic drafter proposes it."""
    path: Text = ()
    for _ in range(k):
        path += (draft(path).index(max(draft(path))),)
    return [Proposal(Fraction(1), path, tuple(_one_hot(token, len(draft(()))) for token in path), False)]


def fixed_length(k: int) -> Admission:
    """Verify k slots, always."""
    return lambda path: min(k, len(path))


def stopping_time(goes_on: Callable[[Text], bool]) -> Admission:
    """Verify slot j as long as `goes_on` says yes to the tokens before it; legal, and a fixed length is one."""
    return lambda path: next((j for j in range(len(path)) if not goes_on(path[:j])), len(path))


def peeking(keeps: Callable[[Text], bool]) -> Admission:
    """Verify slot j as long as `keeps` says yes to the tokens up to and including it; a control that must fail."""
    return lambda path: next((j for j in range(len(path)) if not keeps(path[: j + 1])), len(path))


def token_rule(p: list[Row], q: tuple[Row, ...], path: Text) -> Iterator[Outcome]:
    """Token rejection sampling over gamma = len(path) slots; p has gamma+1 rows. Source: 2211.17192, algorithm 1."""
    reached = Fraction(1)
    for i, token in enumerate(path):
        chance = min(Fraction(1), p[i][token] / q[i][token])
        yield reached * (1 - chance), i, Fraction(1)
        reached *= chance
    yield reached, len(path), Fraction(1)


def block_rule(p: list[Row], q: tuple[Row, ...], path: Text) -> Iterator[Outcome]:
    """Block verification; arguments as `token_rule`. Source: 2403.10444, algorithm 2."""
    prefix = [Fraction(1)]
    for i, token in enumerate(path):
        prefix.append(min(prefix[-1] * p[i][token] / q[i][token], Fraction(1)))
    longer_fail = Fraction(1)
    for i in range(len(path), 0, -1):
        chance = prefix[i] if i == len(path) else block_threshold(p[i], q[i], prefix[i])
        yield longer_fail * chance, i, prefix[i]
        longer_fail *= 1 - chance
    yield longer_fail, 0, Fraction(1)


def block_threshold(p: Row, q: Row, prefix: Fraction) -> Fraction:
    """h = S/(S + 1 - prefix) with S = sum (prefix p - q)+, and 1 where the denominator is 0."""
    mass = sum(residual(p, q, prefix), Fraction(0))
    denominator = mass + 1 - prefix
    return mass / denominator if denominator else Fraction(1)


def residual(p: Row, q: Row, weight: Fraction) -> Row:
    """(weight p - q)+, not normalised."""
    return tuple(max(weight * a - b, Fraction(0)) for a, b in zip(p, q, strict=True))


def chain_texts(
    rule: ChainRule, target: Model, proposals: list[Proposal], admit: Admission
) -> Iterator[tuple[Fraction, Text]]:
    """What one round of a chain rule emits: every text with its probability, a text possibly more than once."""
    for proposal in proposals:
        gamma = admit(proposal.path)
        path = proposal.path[:gamma]
        p = [target(path[:i]) for i in range(gamma + 1)]
        for chance, accepted, weight in rule(p, proposal.q[:gamma], path):
            if chance == 0:
                continue
            left = p[gamma] if accepted == gamma else residual(p[accepted], proposal.q[accepted], weight)
            for token, mass in enumerate(left):
                yield proposal.probability * chance * mass / sum(left), (*path[:accepted], token)


def rule_law(rule: ChainRule, target: Model, proposals: list[Proposal], admit: Admission, length: int) -> Law:
    """Exact law of the first `length` tokens when one round of a chain rule is followed by the target."""
    return completed(chain_texts(rule, target, proposals, admit), target, length)


def expected_accepted(rule: ChainRule, target: Model, proposals: list[Proposal], admit: Admission) -> Fraction:
    """Expected number of accepted draft tokens in one round."""
    texts = chain_texts(rule, target, proposals, admit)
    return sum((probability * (len(text) - 1) for probability, text in texts), Fraction(0))


def completed(texts: Iterable[tuple[Fraction, Text]], target: Model, length: int) -> Law:
    """Add up weighted texts after the target has continued each to `length` tokens; longer ones are cut there."""
    law: Law = defaultdict(Fraction)
    waiting = list(texts)
    while waiting:
        probability, text = waiting.pop()
        if len(text) >= length:
            law[text[:length]] += probability
        else:
            waiting.extend((probability * mass, (*text, token)) for token, mass in enumerate(target(text)) if mass)
    return {text: probability for text, probability in law.items() if probability}


def target_law(target: Model, length: int) -> Law:
    """The target's own law of `length` tokens."""
    return completed([(Fraction(1), ())], target, length)


def total_variation(one: Law, other: Law) -> float:
    """Half the L1 distance between two laws; 0 means equal."""
    zero = Fraction(0)
    return float(sum((abs(one.get(text, zero) - other.get(text, zero)) for text in {*one, *other}), zero) / 2)


@dataclass(frozen=True, slots=True)
class Round:
    """A `VerifyInput` without uniforms for every proposal at once: one row per path."""

    logits: Tensor  # [P, k+1, V] float32
    draft: Draft
    temperature: Tensor  # [P]

    def inputs(self, accept: Tensor, residual: Tensor) -> VerifyInput:
        """With uniforms [P, k] and [P]."""
        return VerifyInput(self.logits, self.draft, self.temperature, accept, residual)

    def repeated(self, accept: Tensor, residual: Tensor) -> VerifyInput:
        """With C settings of the uniforms per path, [P, C, k] and [P, C], flattened to P * C rows."""
        index = torch.arange(accept.shape[0]).repeat_interleave(accept.shape[1])
        some = {name: getattr(self.draft, name) for name in ("tokens", "lengths", "log_q", "parents")}
        rows = {name: None if value is None else value[index] for name, value in some.items()}
        draft = replace(self.draft, **rows)
        return VerifyInput(self.logits[index], draft, self.temperature[index], accept.flatten(0, 1), residual.flatten())


def torch_round(
    target: Model, proposals: list[Proposal], admit: Admission, temperature: float = 1.0, vocabulary: Text | None = None
) -> Round:
    """Tensors whose target at this temperature is the model; `vocabulary` gives the q of those columns only.

    At temperature 0 the logits are the model's log-probabilities, and the law to expect is `greedy_model`'s.
    """
    k = len(proposals[0].path)
    rows = [[_logs(target(one.path[:i])) for i in range(k + 1)] for one in proposals]
    logits = torch.tensor(rows, dtype=torch.float64) * (temperature or 1.0)
    log_q, columns = None, None
    if proposals[0].sampled:
        log_q = torch.tensor([[_logs(row) for row in one.q] for one in proposals], dtype=torch.float32)
        log_q = log_q.reshape(len(proposals), k, logits.shape[2])
    if vocabulary is not None and log_q is not None:
        columns = torch.tensor(vocabulary)
        log_q = log_q[:, :, columns]
    tokens = torch.tensor([one.path for one in proposals], dtype=torch.int64).reshape(len(proposals), k)
    lengths = torch.tensor([admit(one.path) for one in proposals])
    draft = Draft(tokens, lengths, log_q, columns)
    return Round(logits.to(torch.float32), draft, torch.full((len(proposals),), temperature))


@dataclass(frozen=True, slots=True)
class Cells:
    """A rule's result as a table over its uniforms: a product of intervals for acceptance, V for the residual.

    Assumes that the accepted count never grows with an acceptance uniform, that the emitted token never decreases with
    the residual uniform, and that an acceptance uniform's thresholds show while all others are at one of their ends.
    `predict` reads the table, so that a test can check the assumption against the code at random uniforms.
    """

    edges: Tensor  # [P, k, m+1] ascending from 0 to 1
    accepted: Tensor  # [P, m**k]
    thresholds: Tensor  # [P, m**k, V-1] largest residual uniform that emits a token <= v

    def predict(self, accept: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Accepted counts and next tokens at uniforms [P, k] and [P]."""
        _, k, ends = self.edges.shape
        cell = torch.zeros(len(accept), dtype=torch.int64)
        for slot in range(k):
            inner = self.edges[:, slot, 1:-1]
            cell = cell * (ends - 1) + (accept[:, slot, None] > inner).sum(1)
        row = torch.arange(len(accept))
        return self.accepted[row, cell], (residual[:, None] > self.thresholds[row, cell]).sum(1)

    def volumes(self) -> Tensor:
        """Probability of every cell: [P, m**k]."""
        volume = torch.ones(len(self.edges), 1, dtype=torch.float64)
        for widths in self.edges.diff(dim=2).unbind(1):
            volume = (volume[:, :, None] * widths[:, None, :]).flatten(1)
        return volume


def cells_of(rule: RuleFunction, given: Round) -> Cells:
    """Recover the table of a torch rule by bisection: 2^(k-1) settings of the others for each uniform and count."""
    edges = _edges(rule, given)
    middles = (edges[:, :, 1:] + edges[:, :, :-1]) / 2  # [P, k, m]
    paths, k, m = middles.shape
    chosen = torch.tensor(list(itertools.product(range(m), repeat=k)), dtype=torch.int64).reshape(m**k, k)
    accept = middles.gather(2, chosen.T.expand(paths, k, m**k)).transpose(1, 2)  # [P, C, k]
    accepted, _ = _results(rule, given, accept, torch.full(accept.shape[:2], 0.5, dtype=torch.float64))
    return Cells(edges, accepted, _residual_thresholds(rule, given, accept))


def torch_law(rule: RuleFunction, given: Round, proposals: list[Proposal], target: Model, length: int) -> Law:
    """Law of `length` tokens of the torch rule, integrated over its uniforms, completed by the target.

    Every probability is a Fraction made of a float: the law is exact up to the rule's own float arithmetic.
    """
    cells = cells_of(rule, given)
    edges = torch.nn.functional.pad(cells.thresholds, (1, 0), value=0.0)
    shares = torch.nn.functional.pad(edges, (0, 1), value=1.0).diff(dim=2)  # [P, C, V]
    masses = (cells.volumes()[:, :, None] * shares).tolist()
    texts = [
        (proposal.probability * Fraction(mass), (*proposal.path[:count], token))
        for proposal, counts, row in zip(proposals, cells.accepted.tolist(), masses, strict=True)
        for count, shares_of_cell in zip(counts, row, strict=True)
        for token, mass in enumerate(shares_of_cell)
        if mass > 0
    ]
    return completed(texts, target, length)


def _results(rule: RuleFunction, given: Round, accept: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Accepted counts and next tokens at C settings of the uniforms per path: [P, C, k], [P, C] -> two [P, C]."""
    result = rule(given.repeated(accept, residual))
    following = result.tokens.gather(1, result.accepted[:, None])[:, 0]
    return result.accepted.view(residual.shape), following.view(residual.shape)


def _edges(rule: RuleFunction, given: Round) -> Tensor:
    """Interval ends of every acceptance uniform, thresholds that coincide merged: [P, k, m+1]."""
    paths, k = given.draft.tokens.shape
    thresholds = _accept_thresholds(rule, given).view(paths, k, -1).tolist() if k else [[] for _ in range(paths)]
    inner = [[[value for value in values if _SAME < value < 1 - _SAME] for values in row] for row in thresholds]
    merged = [[merge([0.0, *sorted(values), 1.0]) for values in row] for row in inner]
    most = max((len(values) for row in merged for values in row), default=2)
    padded = [[values + [1.0] * (most - len(values)) for values in row] for row in merged]
    return torch.tensor(padded, dtype=torch.float64).reshape(paths, k, most)


def merge(values: list[float]) -> list[float]:
    """Drop every value that repeats its predecessor up to rounding."""
    return [value for i, value in enumerate(values) if i == 0 or value - values[i - 1] > _SAME]


def _accept_thresholds(rule: RuleFunction, given: Round) -> Tensor:
    """Largest uniform of each slot that still accepts each count, whichever ends the others are at: [P, k * C]."""
    paths, k = given.draft.tokens.shape
    ends = list(itertools.product((LOW, HIGH), repeat=k))
    settings = [
        (slot, count, accept)
        for slot in range(k)
        for count in range(1, k + 1)
        for accept in ends
        if accept[slot] == LOW  # overwritten below; one of the two is enough
    ]
    slots = torch.tensor([slot for slot, _, _ in settings]).expand(paths, -1)[..., None]
    counts = torch.tensor([count for _, count, _ in settings])
    others = torch.tensor([accept for _, _, accept in settings], dtype=torch.float64).expand(paths, -1, -1)

    def holds(value: Tensor) -> Tensor:
        accept = others.scatter(2, slots, value[..., None])
        return _results(rule, given, accept, torch.full_like(value, 0.5))[0] >= counts

    return largest(holds, (paths, len(settings)))


def _residual_thresholds(rule: RuleFunction, given: Round, accept: Tensor) -> Tensor:
    """Largest residual uniform that emits a token of at most 0, 1, .. V-2, in every cell: [P, C, V-1]."""
    most = torch.arange(given.logits.shape[2] - 1)
    shape = (*accept.shape[:2], len(most))
    repeated = accept.repeat_interleave(len(most), 1)  # [P, C * (V-1), k]

    def holds(residual: Tensor) -> Tensor:
        return _results(rule, given, repeated, residual.flatten(1))[1].view(shape) <= most

    return largest(holds, shape)


def largest(holds: Callable[[Tensor], Tensor], shape: tuple[int, ...], bisections: int = _BISECTIONS) -> Tensor:
    """Bisect, elementwise, for the largest value in (0, 1) that a condition holds at; above it the condition fails."""
    low = torch.full(shape, LOW, dtype=torch.float64)
    high = torch.full(shape, HIGH, dtype=torch.float64)
    never, always = ~holds(low), holds(high)
    for _ in range(bisections):
        middle = (low + high) / 2
        holding = holds(middle)
        low, high = torch.where(holding, middle, low), torch.where(holding, high, middle)
    return torch.where(always, 1.0, torch.where(never, 0.0, low))


def _one_hot(token: int, size: int) -> Row:
    """A row with all mass on one token."""
    return tuple(Fraction(int(i == token)) for i in range(size))


def _logs(row: Row) -> list[float]:
    """Logarithms of a row as floats, -inf for 0."""
    return torch.tensor([float(value) for value in row], dtype=torch.float64).log().tolist()


def _product(values: Iterable[Fraction]) -> Fraction:
    """Product of Fractions, 1 for none."""
    result = Fraction(1)
    for value in values:
        result *= value
    return result
