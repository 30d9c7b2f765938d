"""Keys and values of the sequences in flight: one row per sequence, each with its own length.

A forward writes every row at its own places; entries of a rejected draft are overwritten by the next round before
anything reads them.
A place is where a token's keys and values are in its row; its position is what rotary embeddings and windows count. In
text and in chains they are the same number. Nodes of a draft tree have places of their own and share positions with
nodes of other branches, until `SlotCache.move` puts those of the accepted path where plain decoding would have written.
Axes: R rows, P places, B rows of one forward, n tokens per row, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from forerun.errors import UserError


@dataclass(slots=True)
class SlotCache:
    """Layers are allocated at their first write, when their heads are known."""

    rows: int
    positions: int
    keys: dict[int, Tensor] = field(default_factory=dict)  # layer -> [R, P, K, D]
    values: dict[int, Tensor] = field(default_factory=dict)

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer; `like` [B, K, n, D] gives heads, size, dtype and device."""
        if index not in self.keys:
            shape = (self.rows, self.positions, like.shape[1], like.shape[3])
            self.keys[index] = torch.zeros(shape, dtype=like.dtype, device=like.device)
            self.values[index] = torch.zeros_like(self.keys[index])
        return self.keys[index], self.values[index]

    def copy(self, source: int, target: int, length: int) -> None:
        """Give row `target` the first `length` positions of row `source`."""
        for store in (self.keys, self.values):
            for tensor in store.values():
                tensor[target, :length] = tensor[source, :length]

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
    _masks: dict[tuple[int, int | None], Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.places = self.starts[:, None] + torch.arange(self.tokens, device=self.starts.device)
        self.positions = self.places if self.tree is None else self.tree.positions[:, -self.tokens :]

    def attend(
        self,
        layer: int,
        query: Tensor,  # [B, H, n, D]
        key: Tensor,  # [B, K, n, D]
        value: Tensor,  # [B, K, n, D]
        scale: float | None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:  # [B, n, H, D]
        """Write this forward's keys and values, then attend over everything each row may see."""
        keys, values = self.cache.layer(layer, key)
        rows = torch.arange(self.first_row, self.first_row + query.shape[0], device=query.device)[:, None]
        keys[rows, self.places] = key.transpose(1, 2)
        values[rows, self.places] = value.transpose(1, 2)
        if self.fresh and softcap is None and (window is None or window >= self.tokens):
            grouped = query.shape[1] != key.shape[1]
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
            return out.transpose(1, 2)
        span = slice(self.first_row, self.first_row + query.shape[0])
        past_keys, past_values = (t[span, : self.end].transpose(1, 2) for t in (keys, values))
        mask = self._mask(query.shape[1] // key.shape[1], window, query.dtype)
        return folded_attention(query, past_keys, past_values, mask, scale, softcap).transpose(1, 2)

    def _mask(self, group: int, window: int | None, dtype: torch.dtype) -> Tensor:  # [B, 1, group * n, end]
        if (group, window) not in self._masks:
            at, ahead = self._chain_ahead() if self.tree is None else self._tree_ahead(self.tree)
            if window is not None:
                ahead |= at <= self.positions[:, :, None] - window
            mask = torch.zeros(ahead.shape, dtype=dtype, device=at.device).masked_fill_(ahead, float("-inf"))
            self._masks[group, window] = mask.repeat(1, group, 1)[:, None]
        return self._masks[group, window]

    def _chain_ahead(self) -> tuple[Tensor, Tensor]:
        """Positions of all places [end], and which of them a token must not see [B, n, end]."""
        at = torch.arange(self.end, device=self.starts.device)
        return at, at > self.positions[:, :, None]

    def _tree_ahead(self, tree: TreePlaces) -> tuple[Tensor, Tensor]:
        """The same for a tree: positions [B, 1, end], and [B, n, end]."""
        width = tree.seen.shape[2]
        at = torch.arange(self.end, device=self.starts.device)
        index = at - (self.starts + self.tokens - width)[:, None]  # [B, end], place within the tree, below 0: text
        inside = index.clamp(0, width - 1)
        positions = torch.where(index < 0, at, tree.positions.gather(1, inside))
        seen = tree.seen.gather(2, inside[:, None].expand(-1, self.tokens, -1))
        return positions[:, None], ~((index < 0)[:, None] | (seen & (index < width)[:, None]))


def folded_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float | None, softcap: float | None
) -> Tensor:
    """Grouped-query attention with the query heads of a group laid side by side as extra query rows.

    Heads of a group read the same keys; as rows of one matrix product they read them once. On a CPU this is up to
    five times faster than expanding the keys, and the numbers are the same.

    Args:
        query: [B, H, n, D]. keys, values: [B, K, L, D], K divides H. mask: [B, 1, (H/K)·n, L], added to the scores.

    Returns:
        [B, H, n, D]
    """
    batch, heads, n, size = query.shape
    folded = query.reshape(batch, keys.shape[1], -1, size)
    if softcap is None:
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    else:
        scores = folded @ keys.transpose(2, 3) * (size**-0.5 if scale is None else scale)
        out = (torch.tanh(scores / softcap) * softcap + mask).softmax(-1, dtype=torch.float32).to(values.dtype) @ values
    return out.view(batch, heads, n, size)


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    slots: SlotPass | None = None,
    s_aux: Tensor | None = None,
    **_: object,  # Transformers hands every attention function what any of them may want
) -> tuple[Tensor, None]:
    """Transformers' attention interface over a `SlotPass`, which the caller gives to the model as `slots=`."""
    if slots is None or s_aux is not None:
        why = "it does not hand keyword arguments to its attention" if slots is None else "it uses attention sinks"
        raise UserError(
            f"The local engine cannot run {type(module).__name__}: {why}; use another engine for this model"
        )
    return slots.attend(int(module.layer_idx), query, key, value, scaling, sliding_window, softcap), None  # type: ignore[arg-type]
