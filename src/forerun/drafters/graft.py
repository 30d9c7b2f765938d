"""Graft (Shen et al. 2605.20104): a dynamic EAGLE-3 tree, pruned where the head is unsure, filled by retrieval.

The head grows a tree of its likeliest tokens (EAGLE-2, 2406.16858: the best `width` candidates of a depth are expanded,
`width` children each). After some numbers of expansions, the checkpoints, a row whose likeliest path has a probability
below the threshold stops; fewer drafts are kept there, and the slots that this frees are filled from an adjacency table
M[V, s], the s likeliest successors of every token as the policy's last verified row after it had them.

Nodes are one list per row, a parent before its children; the index -1 is the root. "Best first" is by log-probability
of the path under the head for candidates, and by rank path for retrieved nodes.
Non-anticipation: candidates, stops and retrieval are functions of committed text, weights and earlier rounds, so the
tree is known before any token of its round is, and q is one-hot. The table is shared by all rows: a request's text
depends on the other requests, its distribution does not.
The paper publishes neither its calibration of thresholds nor its templates for 36 and 20 nodes.
Axes: B live rows, K width, C candidates, m template nodes, s successors, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from forerun.acceptance.chain import drafted
from forerun.config import GraftConfig, SpeculationConfig
from forerun.drafters.base import Rows
from forerun.drafters.eagle3 import Eagle3Drafter, Eagle3Head
from forerun.drafters.files import reading
from forerun.errors import UserError
from forerun.models import Policy
from forerun.models.cache import SlotPass, TreePlaces
from forerun.models.forward import check_trees
from forerun.types import Draft, VerifyResult

TABLE = "adjacency.safetensors"


@dataclass(frozen=True, slots=True)
class Nodes:
    """Nodes of B trees, a parent before its children."""

    tokens: Tensor  # [B, c] int64
    parents: Tensor  # [B, c] int64, -1: the root
    depth: Tensor  # [B, c] int64, children of the root have 1
    valid: Tensor  # [B, c] bool

    def select(self, order: Tensor, valid: Tensor) -> Nodes:
        """The nodes `order` [B, c] in that order, of which `valid` [B, c] stay; whoever stays keeps its parent."""
        parents = self.parents.gather(1, order)
        above = order.argsort(1).gather(1, parents.clamp(min=0)).where((parents >= 0) & valid, -1)
        return Nodes(self.tokens.gather(1, order).where(valid, 0), above, self.depth.gather(1, order), valid)

    def first(self, count: int) -> Nodes:
        """The first `count` columns."""
        return Nodes(self.tokens[:, :count], self.parents[:, :count], self.depth[:, :count], self.valid[:, :count])


@dataclass(frozen=True, slots=True)
class Template:
    """Rank paths below one token, best first, a parent before its children."""

    parents: Tensor  # [m] int64, -1: the token itself
    ranks: Tensor  # [m] int64, which successor of the parent
    depth: Tensor  # [m] int64, from 1


class Adjacency:
    """The table M[V, s]: the likeliest successors of every token, best first; -1: not known yet.

    Source: 2605.20104, equations 9, 12 and 14; see also Token Recycling (2408.08696).
    """

    def __init__(self, vocabulary: int, successors: int, device: torch.device) -> None:
        self.table = torch.full((vocabulary, successors), -1, dtype=torch.int32, device=device)

    def update(self, tokens: Tensor, likeliest: Tensor) -> None:
        """Replace the rows of tokens [m] by likeliest [m, s]; of equal tokens the last one stays."""
        ordered, index = tokens.sort(stable=True)
        newest = index[torch.cat([ordered[1:] != ordered[:-1], ordered.new_ones(1, dtype=torch.bool)])]
        self.table[tokens[newest]] = likeliest[newest].to(torch.int32)

    def descend(self, roots: Tensor, template: Template) -> Tensor:
        """Tokens of the template below roots [B], one gather per depth: [B, m], -1 where the table knows none."""
        tokens = torch.full((len(roots), len(template.parents)), -1, dtype=torch.int64, device=roots.device)
        for depth in range(1, _deepest(template) + 1):
            at = (template.depth == depth).nonzero()[:, 0]
            above = roots[:, None].expand(-1, len(at)) if depth == 1 else tokens[:, template.parents[at]]
            found = self.table[above.clamp(min=0), template.ranks[at]].long()
            tokens[:, at] = found.where(above >= 0, -1)
        return tokens

    def load(self, saved: Tensor) -> None:
        """Take a saved table's successors, as many as both have. Raises UserError when it is of another vocabulary."""
        if saved.shape[0] != self.table.shape[0]:
            raise UserError(
                f"The adjacency table is of {saved.shape[0]} tokens and the policy has {self.table.shape[0]}: "
                f"remove {TABLE} from the drafter's folder to begin with an empty one"
            )
        shared = min(saved.shape[1], self.table.shape[1])
        self.table[:, :shared] = saved[:, :shared].to(self.table)


def rank_paths(widths: Sequence[int], successors: int) -> list[tuple[int, ...]]:
    """Rank paths of a template with `widths` nodes per depth, best first.

    A path's cost is the product of 2 (rank + 1) along it, as if the successor of rank r had a chance of 1 / (2 r + 2);
    of every depth the cheapest are taken. So the chain of rank 0 is deepest, and early ranks have more descendants.
    """

    def cost(path: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        return prod(2 * (rank + 1) for rank in path), path

    paths: list[tuple[int, ...]] = []
    level: list[tuple[int, ...]] = [()]
    for width in widths:
        level = sorted(((*path, rank) for path in level for rank in range(successors)), key=cost)[:width]
        paths += level
    return sorted(paths, key=cost)


def rank_template(widths: Sequence[int], successors: int, device: torch.device) -> Template:
    """`rank_paths` as tensors."""
    paths = rank_paths(widths, successors)
    index = {path: i for i, path in enumerate(paths)}
    columns = [[index.get(p[:-1], -1) for p in paths], [p[-1] for p in paths], [len(p) for p in paths]]
    return Template(*(torch.tensor(column, dtype=torch.int64, device=device) for column in columns))


def graft(kept: Nodes, template: Template, retrieved: Tensor, below: Tensor, free: Tensor, room: Tensor) -> Nodes:
    """Attach a retrieved subtree below one node of every tree, as far as its budget of nodes allows.

    Args:
        kept: the drafted nodes, [B, c].
        retrieved: [B, m] tokens of the template's nodes, -1 where there is none.
        below: [B] index of the node that the template hangs from, -1: the root.
        free: [B] nodes that may be added, the best ones first. room: [B] deepest depth that may be reached.

    Returns:
        [B, c + m]; a retrieved node that its parent already has as a child costs nothing, and its children go there.
    """
    count = kept.tokens.shape[1]
    under = torch.full_like(retrieved, -2)  # parent of every template node, -2: it has none
    place = torch.full_like(retrieved, -2)  # the node that represents it
    for depth in range(1, _deepest(template) + 1):
        at = (template.depth == depth).nonzero()[:, 0]
        above = below[:, None].expand(-1, len(at)) if depth == 1 else place[:, template.parents[at]]
        token = retrieved[:, at]
        twin = kept.valid[:, None] & (kept.parents[:, None] == above[:, :, None])
        twin &= kept.tokens[:, None] == token[:, :, None]  # [B, nodes of this depth, c]
        has_twin = twin.any(2)
        first = twin.int().argmax(2) if count > 0 else torch.zeros_like(above)
        known = (token >= 0) & (above > -2)
        place[:, at] = first.where(has_twin, count + at).where(known, -2)
        under[:, at] = above.where(known & ~has_twin, -2)
    start = torch.zeros_like(below) if count == 0 else kept.depth.gather(1, below.clamp(min=0)[:, None])[:, 0]
    depth_of = template.depth + start.where(below >= 0, 0)[:, None]  # [B, m]
    fits = (under > -2) & (depth_of <= room[:, None])
    taken = fits & (fits.cumsum(1) <= free[:, None])
    return Nodes(
        torch.cat([kept.tokens, retrieved.where(taken, 0)], dim=1),
        torch.cat([kept.parents, under.where(taken, -1)], dim=1),
        torch.cat([kept.depth, depth_of.where(taken, 1)], dim=1),
        torch.cat([kept.valid, taken], dim=1),
    )


def as_draft(nodes: Nodes) -> Draft:
    """The valid nodes without gaps, as a deterministic tree."""
    order = (~nodes.valid).int().argsort(dim=1, stable=True)
    lengths = nodes.valid.sum(1)
    packed = nodes.select(order, nodes.valid.gather(1, order)).first(int(lengths.max()))
    return Draft(packed.tokens, lengths, parents=packed.parents)


def _deepest(template: Template) -> int:
    return int(template.depth.max()) if len(template.depth) else 0


@dataclass(slots=True)
class Frontier:
    """The candidates that the head will expand next."""

    tokens: Tensor  # [B, K] int64, of the target
    scores: Tensor  # [B, K] float32, log-probability of the path
    index: Tensor  # [B, K] int64, their place among all candidates
    hidden: Tensor  # [B, K, H], the head's state before each
    seen: Tensor  # [B, K, w] bool, ancestors among the places that were expanded already


@dataclass(slots=True)
class Candidates:
    """The head's candidates of a round, depth by depth, and where its rows stopped."""

    tokens: list[Tensor]  # [B, .] each
    scores: list[Tensor]  # -inf: not a candidate
    parents: list[Tensor]
    stage: Tensor  # [B] int64, number of the checkpoint at which the row stopped; their number if it did not

    def best(self, quota: Tensor) -> Nodes:
        """The `quota` [B] best candidates, best first. A child is no better than its parent, and comes after it."""
        scores = torch.cat(self.scores, dim=1)
        depth = torch.cat([torch.full_like(t, d) for d, t in enumerate(self.tokens, 1)], dim=1)
        ordered, order = scores.sort(dim=1, descending=True, stable=True)
        rank = torch.arange(scores.shape[1], device=scores.device)
        every = Nodes(torch.cat(self.tokens, 1), torch.cat(self.parents, 1), depth, scores > -torch.inf)
        stay = (rank < quota[:, None]) & (ordered > -torch.inf)
        return every.select(order, stay).first(int(quota.max()))


class GraftDrafter(Eagle3Drafter):
    """An EAGLE-3 head and an adjacency table, which together draft trees."""

    name = "graft"
    Config = GraftConfig
    needs = "the folder or artifact of an EAGLE-3 drafter"
    trees = True
    samples = cotrains = vllm_scales_drafts = False
    vllm_refusal = "vLLM has no exact verification of draft trees"

    def __init__(self, head: Eagle3Head, policy: Policy, settings: GraftConfig) -> None:
        """Raises UserError when the head was made for another policy, or the policy cannot run trees."""
        check_trees(policy)
        super().__init__(head, policy)
        self.settings = settings
        vocabulary = int(policy.model.config.get_text_config().vocab_size)
        self.successors = min(settings.successors, vocabulary)
        self.adjacency = Adjacency(vocabulary, self.successors, policy.device)
        self._template = rank_template(settings.template, self.successors, policy.device)
        self._width = min(settings.width, head.config.draft_vocab_size)
        self._prunes = settings.variant in ("graft", "tail", "prune")
        self._retrieves = settings.variant in ("graft", "root", "tail")
        self._counts: Counter[str] = Counter()

    @classmethod
    def from_config(cls, policy: Policy, speculation: SpeculationConfig) -> Self:
        """The draft temperature is that of the head's scores."""
        source, temperature = cls.source(speculation), speculation.draft_temperature
        if temperature == "auto":
            raise UserError("speculation.draft_temperature=auto needs sampled drafts, but a graft tree samples none")
        return cls.load(source, policy, speculation.graft).draw(speculation.proposal, temperature)

    def open(self, rows: int, positions: int, k: int) -> None:
        """See `Drafter.open`; the head's cache has places for the candidates that it expands."""
        self._nodes = min(k, self.settings.nodes)
        deepest = min(k, self.settings.depth + _deepest(self._template))
        super().open(rows, positions + self._width * self.settings.depth, deepest)

    @torch.no_grad()
    def propose(self, rows: Rows, budget: Tensor) -> Draft:
        """A tree of at most `nodes` per row, none deeper than budget [B]."""
        nodes = self._drafted(rows, budget)
        drafted = int(nodes.valid.sum())
        if self._retrieves:
            nodes = self._filled(nodes, rows, budget)
        self._counts["drafted_nodes"] += drafted
        self._counts["retrieved_nodes"] += int(nodes.valid.sum()) - drafted
        return as_draft(nodes)

    def _filled(self, kept: Nodes, rows: Rows, budget: Tensor) -> Nodes:
        """The drafted nodes, and retrieved ones in the slots that they leave free."""
        below = _tail(kept) if self.settings.variant == "tail" else torch.full_like(rows.last, -1)
        roots = rows.last
        if kept.tokens.shape[1] > 0:
            roots = kept.tokens.gather(1, below.clamp(min=0)[:, None])[:, 0].where(below >= 0, rows.last)
        retrieved = self.adjacency.descend(roots, self._template)
        free = (self._nodes - kept.valid.sum(1)).where(budget > 0, 0)
        return graft(kept, self._template, retrieved, below, free, budget)

    def learn(self, rows: Rows, draft: Draft, logits: Tensor, verdict: VerifyResult) -> None:
        """The policy's likeliest successors of every verified token; see `Drafter.learn`."""
        tokens = torch.cat([rows.last[:, None], draft.tokens], dim=1)
        ran = torch.nn.functional.pad(drafted(draft), (1, 0), value=True)  # [B, k+1]
        self.adjacency.update(tokens[ran], logits.topk(self.successors).indices[ran])

    def metrics(self) -> dict[str, float]:
        """Nodes by origin, rows by the checkpoint at which the head stopped, and those of the head."""
        return {**self._counts, **super().metrics()}

    # ---- the head's tree ----

    def _drafted(self, rows: Rows, room: Tensor) -> Nodes:
        """The drafted nodes that are kept; a row that the head has nothing to read for has none."""
        count = self.pending[: rows.count]
        if int(count.max()) == 0:
            none = rows.last.new_zeros(rows.count, 0)
            return Nodes(none, none, none, none.bool())
        hidden = self.read(rows, count, int(count.max()))
        room = self.within(rows, room)
        candidates = self._grow(rows, hidden, room.where(count > 0, 0))
        for stage in candidates.stage[(count > 0) & (room > 0)].tolist():
            where = self.settings.checkpoints[stage] if stage < len(self.settings.checkpoints) else "never"
            self._counts[f"stopped_{where}"] += 1
        return candidates.best(self._quota()[candidates.stage])

    def _quota(self) -> Tensor:
        """Drafted nodes that are kept, by stage: [checkpoints + 1]."""
        keep = self.settings.keep
        last = keep[-1] if self.settings.variant == "root" and keep else self._nodes
        return torch.tensor([*keep, last], device=self.adjacency.table.device).clamp(max=self._nodes)

    def _grow(self, rows: Rows, hidden: Tensor, room: Tensor) -> Candidates:
        """Expand from the state after the newest token [B, H], depth by depth, until every row has stopped."""
        stage = torch.full_like(rows.last, len(self.settings.checkpoints))
        scores, tokens = self._children(hidden[:, None], rows, hidden.new_zeros(rows.count, 1, dtype=torch.float32))
        scores = scores.where(room[:, None] >= 1, -torch.inf)
        candidates = Candidates([tokens], [scores], [torch.full_like(tokens, -1)], stage)
        index = torch.arange(self._width, device=tokens.device).expand_as(tokens)
        before = hidden[:, None].expand(-1, self._width, -1)
        seen = torch.zeros(*tokens.shape, 0, dtype=torch.bool, device=tokens.device)
        frontier = Frontier(tokens, scores, index, before, seen)
        for expanded in range(self.settings.depth):
            self._stop_unsure(candidates, expanded)
            going = (stage == len(self.settings.checkpoints)) & (room > expanded + 1)
            if expanded == self.settings.depth - 1 or not bool(going.any()):
                break
            frontier = self._expand(candidates, frontier, rows, going, expanded)
        return candidates

    def _stop_unsure(self, candidates: Candidates, expanded: int) -> None:
        """At a checkpoint, end the rows whose likeliest path so far is below its threshold (2605.20104, algorithm 2).

        A row without candidates at this depth has no room for them, and is skipped.
        """
        if not self._prunes or expanded not in self.settings.checkpoints:
            return
        number = self.settings.checkpoints.index(expanded)
        best = candidates.scores[-1].amax(1)
        unsure = (best > -torch.inf) & (best.exp() < self.settings.thresholds[number])
        candidates.stage[unsure & (candidates.stage == len(self.settings.checkpoints))] = number

    def _expand(self, candidates: Candidates, frontier: Frontier, rows: Rows, going: Tensor, expanded: int) -> Frontier:
        """Run the frontier through the head, add all its children, and return the best of those of rows that go on."""
        width = self._width
        itself = torch.eye(width, dtype=torch.bool, device=going.device).expand(rows.count, -1, -1)
        seen = torch.cat([frontier.seen, itself], dim=2)
        depth = torch.arange(seen.shape[2], device=going.device) // width
        tree = TreePlaces(rows.lengths[:, None] + depth, seen)
        end = int(rows.lengths.max()) + seen.shape[2]
        slots = SlotPass(self.cache, 0, rows.lengths + expanded * width, width, end, tree=tree)
        hidden = self.run(frontier.tokens, frontier.hidden, slots)  # [B, K, H]
        scores, tokens = self._children(hidden, rows, frontier.scores)  # [B, K·K]
        scores = scores.where(going[:, None], -torch.inf)
        offset = sum(t.shape[1] for t in candidates.tokens)
        candidates.tokens.append(tokens)
        candidates.scores.append(scores)
        candidates.parents.append(frontier.index.repeat_interleave(width, dim=1))
        best, at = scores.topk(width, dim=1)
        beam = (at // width)[:, :, None]
        return Frontier(
            tokens.gather(1, at),
            best,
            offset + at,
            hidden.gather(1, beam.expand(-1, -1, hidden.shape[2])),
            seen.gather(1, beam.expand(-1, -1, seen.shape[2])),
        )

    def _children(self, hidden: Tensor, rows: Rows, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Path scores and target tokens of the K likeliest children of nodes [B, n] with `scores`: two [B, n·K]."""
        temperature = torch.where(rows.temperature > 0, rows.temperature, 1.0) * self.draft_temperature.value
        log_p = torch.log_softmax(self.head.logits(hidden).float() / temperature[:, None, None], dim=-1)
        best, columns = log_p.topk(self._width, dim=-1)  # [B, n, K]
        best = scores[:, :, None] + best.clamp(max=0.0)
        return best.flatten(1), self.vocabulary[columns].flatten(1)

    # ---- weights and memory ----

    def save(self, folder: Path, about: dict[str, Any], layout: str = "specforge") -> None:
        """Write the head as `Eagle3Drafter.save` does, and the table in the same folder."""
        from safetensors.torch import save_file

        super().save(folder, about, layout)
        save_file({"successors": self.adjacency.table.contiguous()}, folder / TABLE)

    @classmethod
    def load(cls, source: Path, policy: Policy, settings: GraftConfig | None = None) -> Self:
        """Read a head as `Eagle3Drafter.load` does, and the table where the folder has one.

        Raises UserError when files are missing or broken, or were made for another policy.
        """
        from safetensors.torch import load_file

        drafter = cls(Eagle3Drafter.load(source, policy).head, policy, settings or GraftConfig())
        if (source / TABLE).exists():
            with reading(str(source / TABLE)):
                saved = load_file(source / TABLE)["successors"]
            drafter.adjacency.load(saved)
        return drafter


def _tail(kept: Nodes) -> Tensor:
    """The best of every row's deepest nodes [B], -1 where it has none."""
    count = kept.tokens.shape[1]
    if count == 0:
        return torch.full((len(kept.tokens),), -1, dtype=torch.int64, device=kept.tokens.device)
    key = (kept.depth * (count + 1) - torch.arange(count, device=kept.depth.device)).where(kept.valid, 0)
    return key.argmax(1).where(kept.valid.any(1), -1)
