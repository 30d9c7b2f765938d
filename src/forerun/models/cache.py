"""Keys, values and recurrent states of the sequences in flight: one row per sequence, each with its own length.

A forward writes every row at its own places; entries of a rejected draft are overwritten by the next round before
anything reads them.
A place is where a token's keys and values are in its row; its position is what rotary embeddings and windows count. In
text and in chains they are the same number. Nodes of a draft tree have places of their own and share positions with
nodes of other branches, until `SlotCache.move` puts those of the accepted path where plain decoding would have written.
How Transformers' modules use a pass: `interface.py`. Recurrent layers: `recurrent.py`.
Axes: R rows, P places, B rows of one forward, n tokens per row, H query heads, K key-value heads, D head size (of a
value, E).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from forerun.models.recurrent import PassStates, RowStates


@dataclass(slots=True)
class SlotCache:
    """Layers are allocated at their first write, when their heads are known."""

    rows: int
    positions: int
    longest: int | None = None  # tokens of the longest text; None: as many as there are positions
    keys: dict[int, Tensor] = field(default_factory=dict)  # layer -> [R, P, K, D]
    values: dict[int, Tensor] = field(default_factory=dict)  # layer -> [R, P, K, E]
    states: RowStates = field(init=False)

    def __post_init__(self) -> None:
        self.states = RowStates(self.rows)

    def layer(self, index: int, key: Tensor, value: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer; `key` [B, K, n, D] and `value` [B, K, n, E] (None: as `key`) give their kind."""
        if index not in self.keys:
            self.keys[index], self.values[index] = (
                like.new_zeros(self.rows, self.positions, like.shape[1], like.shape[3])
                for like in (key, key if value is None else value)
            )
        return self.keys[index], self.values[index]

    def copy(self, source: int, target: int, length: int) -> None:
        """Give row `target` the first `length` positions of row `source`, and its states."""
        for store in (self.keys, self.values):
            for tensor in store.values():
                tensor[target, :length] = tensor[source, :length]
        self.states.copy(source, target)

    def move(self, rows: Tensor, sources: Tensor, targets: Tensor) -> None:
        """Copy single places in every layer: [m] places `sources` of `rows` to `targets`, all read before any write."""
        for store in (self.keys, self.values):
            for tensor in store.values():
                tensor[rows, targets] = tensor[rows, sources]


@dataclass(frozen=True, slots=True)
class TreePlaces:
    """The last w places of a pass, its own n tokens included: everything below them is plain text.

    `positions[b, i]` is the position of the i-th of them, and `seen[b, j, i]` whether token j of the pass sees it.
    """

    positions: Tensor  # [B, w] int64
    seen: Tensor  # [B, n, w] bool


@dataclass(slots=True)
class SlotPass:
    """One forward over rows `first_row .. first_row + B` of a cache, row b starting at place `starts[b]`.

    Token i of row b is at place starts[b] + i. In a chain that is its position, and it sees every place up to its
    own; with a `tree`, it sees the text below the tree's places and of those the ones that the tree names.
    """

    cache: SlotCache
    first_row: int
    starts: Tensor  # [B] int64
    tokens: int  # n
    end: int  # largest place that is written, plus one
    fresh: bool = False  # every start is 0: nothing is cached yet
    tree: TreePlaces | None = None
    places: Tensor = field(init=False)  # [B, n]
    positions: Tensor = field(init=False)  # [B, n]
    states: PassStates = field(init=False)
    _masks: dict[tuple[int, int | None], Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.places = self.starts[:, None] + torch.arange(self.tokens, device=self.starts.device)
        if self.tree is not None:
            self.tree = replace(self.tree, positions=self._within(self.tree.positions))
        self.positions = self._within(self.places) if self.tree is None else self.tree.positions[:, -self.tokens :]
        self.states = PassStates(self.cache.states, self.span, self.fresh)

    def _within(self, positions: Tensor) -> Tensor:
        """Those of drafts' padding, which nobody reads, stay below the end of the longest text.

        A model may have no more, and some compute all rows with the largest position of a pass.
        """
        return positions if self.cache.longest is None else positions.clamp(max=self.cache.longest - 1)

    @property
    def span(self) -> slice:
        """The pass's rows."""
        return slice(self.first_row, self.first_row + len(self.starts))

    def keep(self, last: Tensor | None = None) -> None:
        """Let recurrent states follow the text up to token last[b] of row b, [B]; None: all tokens.

        Keys and values need none of this: those beyond the text are overwritten before anything reads them.
        """
        self.states.keep(last)

    def store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys [B, K, n, D] and values [B, K, n, E]; returns all that the rows have, [B, K, end, D or E]."""
        keys, values = self.cache.layer(layer, key, value)
        rows = torch.arange(self.first_row, self.first_row + key.shape[0], device=key.device)[:, None]
        keys[rows, self.places] = key.transpose(1, 2)
        values[rows, self.places] = value.transpose(1, 2)
        if self.fresh:
            return key, value
        return keys[self.span, : self.end].transpose(1, 2), values[self.span, : self.end].transpose(1, 2)

    def attend(
        self,
        layer: int,
        query: Tensor,  # [B, H, n, D]
        key: Tensor,  # [B, K, n, D]
        value: Tensor,  # [B, K, n, E]
        scale: float | None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:  # [B, n, H, E]
        """Write this forward's keys and values, then attend over everything each row may see."""
        keys, values = self.store(layer, key, value)
        if self.fresh and softcap is None and (window is None or window >= self.tokens):
            return causal_attention(query, keys, values, scale).transpose(1, 2)
        mask = self._mask(query.shape[1] // key.shape[1], window, query.dtype)
        return folded_attention(query, keys, values, mask, scale, softcap).transpose(1, 2)

    def _mask(self, group: int, window: int | None, dtype: torch.dtype) -> Tensor:  # [B, 1, group * n, end]
        if (group, window) not in self._masks:
            at, seen = self.seen()
            seen = seen & (at <= self.positions[:, :, None])
            if window is not None:
                seen = seen & (at > self.positions[:, :, None] - window)
            mask = torch.zeros(seen.shape, dtype=dtype, device=at.device).masked_fill_(~seen, float("-inf"))
            self._masks[group, window] = mask.repeat(1, group, 1)[:, None]
        return self._masks[group, window]

    def seen(self) -> tuple[Tensor, Tensor]:
        """Positions of all places [B or 1, 1, end], and whether a token may see them, its position aside.

        The second [B or 1, n or 1, end] is about the branches of a tree alone: in a chain all are seen.
        """
        at = torch.arange(self.end, device=self.starts.device)
        if self.tree is None:
            return at[None, None], torch.ones_like(at, dtype=torch.bool)[None, None]
        width = self.tree.seen.shape[2]
        index = at - (self.starts + self.tokens - width)[:, None]  # [B, end], place within the tree, below 0: text
        inside = index.clamp(0, width - 1)
        positions = torch.where(index < 0, at, self.tree.positions.gather(1, inside))
        seen = self.tree.seen.gather(2, inside[:, None].expand(-1, self.tokens, -1))
        return positions[:, None], (index < 0)[:, None] | (seen & (index < width)[:, None])


def causal_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """Attention of a text to itself: query [B, H, n, D], keys [B, K, n, D], values [B, K, n, E] -> [B, H, n, E]."""
    grouped = query.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)


def folded_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Grouped-query attention with the query heads of a group laid side by side as extra query rows.

    Heads of a group read the same keys; as rows of one matrix product they read them once. On a CPU this is up to
    five times faster than expanding the keys, and the numbers are the same.

    Args:
        query: [B, H, n, D]. keys: [B, K, L, D], values: [B, K, L, E], K divides H.
        mask: [B, 1 or K, (H/K)·n, L], added to the scores.
        sinks: [H], a score of each head for attending to nothing.

    Returns:
        [B, H, n, E]
    """
    batch, heads, n, size = query.shape
    folded = query.reshape(batch, keys.shape[1], -1, size)
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
        return out.view(batch, heads, n, -1)
    scores = folded @ keys.transpose(2, 3) * (size**-0.5 if scale is None else scale)
    scores = (scores if softcap is None else torch.tanh(scores / softcap) * softcap) + mask
    if sinks is not None:
        nothing = sinks.view(1, keys.shape[1], -1, 1).repeat_interleave(n, dim=2).expand(batch, -1, -1, -1)
        scores = torch.cat([scores, nothing.to(scores.dtype)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., : keys.shape[2]].to(values.dtype)
    return (weights @ values).view(batch, heads, n, -1)
