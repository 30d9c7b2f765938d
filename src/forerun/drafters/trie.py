"""Drafts from other samples of the same prompt: live siblings, finished samples, earlier epochs.

Samples of one prompt repeat each other (SRT 2601.09083, DAS 2511.13841, HistoRL 2508.18588). The longest suffix of a
sample that occurs in the corpus, between match_min and match_max tokens, is continued by the most frequent next token,
token by token, as in a walk down a suffix trie: the occurrences that continue with the chosen token vote for the next
one. Ties go to the newest text. The trie itself is never built: its nodes are sets of occurrences, which follow from
the places of the first match_min tokens. Those are indexed, so memory is linear in the corpus and eviction exact.

Emitted tokens enter the corpus at once. Drafts are one-hot functions of committed tokens, so stopping at a frequency
floor obeys non-anticipation. A seed's text depends on what was decoded in the same batch; its distribution does not.
Scope "global" pools all prompts in one first-in-first-out corpus, as the suffix cache of Arctic Inference does.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forerun.config import SpeculationConfig, TrieConfig
from forerun.drafters.files import reading
from forerun.drafters.lookup import LookupDrafter, refuse_draft_temperature
from forerun.errors import UserError
from forerun.models import Policy

VLLM_PROPOSER = "forerun.engine.vllm.proposer.TrieProposer"
VLLM_SETTINGS = "forerun_trie"  # key of vLLM's additional_config
_GAP = -1  # before and behind every text in the store: no token matches it
_OFFSET_BITS = 32  # an occurrence is one integer: number of its text, offset of the token that follows


@dataclass(slots=True)
class Text:
    """A prompt, or a sample with the end of its prompt before it. `head` tokens are context only: they get no vote."""

    number: int  # in the order of arrival: the newest text has the highest
    scope: bytes
    epoch: int
    head: int
    is_prompt: bool
    start: int = 0  # of its tokens in the store
    room: int = 0  # how many fit there before it has to move
    length: int = 0
    alive: bool = True


@dataclass(slots=True)
class Scope:
    """Texts that are searched together: the places that follow each n-gram of match_min tokens."""

    epoch: int = 0  # visits so far
    visit: int = -1  # the latest one's mark
    places: dict[tuple[int, ...], array[int]] = field(default_factory=dict)
    texts: dict[int, Text] = field(default_factory=dict)


@dataclass(slots=True)
class CorpusCounts:
    """Texts and tokens held; expired: by age in epochs; evicted: because the corpus was full."""

    texts: int = 0
    tokens: int = 0
    expired_texts: int = 0
    expired_tokens: int = 0
    evicted_texts: int = 0
    evicted_tokens: int = 0


class Corpus:
    """Texts by scope, evicted oldest first. All tokens are in one array: one operation checks all occurrences."""

    def __init__(self, settings: TrieConfig) -> None:
        self.settings = settings
        self.counts = CorpusCounts()
        self.scopes: dict[bytes, Scope] = {}
        self.prompts: dict[bytes, Text] = {}  # by their token ids
        self.texts: dict[int, Text] = {}  # alive, the oldest first
        self._next = 0
        self._store = np.full(1024, _GAP, dtype=np.int32)
        self._used = 1
        self._starts = np.zeros(64, dtype=np.int64)  # of text number - self._oldest
        self._oldest = 0

    def visit(self, prompt: Sequence[int], mark: int) -> bytes:
        """A prompt is sampled; its first visit under a mark starts an epoch of its scope. Returns the scope's key."""
        identity = np.asarray(prompt, dtype=np.int32).tobytes()
        key = identity if self.settings.scope == "prompt" else b""
        scope = self.scopes.setdefault(key, Scope())
        if scope.visit != mark:
            scope.visit, scope.epoch = mark, scope.epoch + 1
            oldest = scope.epoch - self.settings.window if self.settings.scope == "prompt" else -1
            for text in [t for t in scope.texts.values() if t.epoch <= oldest]:  # they have left the window
                self.counts.expired_texts += 1
                self.counts.expired_tokens += text.length
                self._remove(text)
        if identity in self.prompts:  # one copy of each prompt, as young as its latest visit
            self._remove(self.prompts[identity])
        self.prompts[identity] = text = self._new(key, scope.epoch, head=0, is_prompt=True)
        self.extend(text, prompt)
        return key

    def begin(self, scope: bytes, context: Sequence[int]) -> Text:
        """A new sample; `context` is the end of its prompt, which matches but does not vote."""
        epoch = self.scopes.setdefault(scope, Scope()).epoch
        text = self._new(scope, epoch, head=len(context), is_prompt=False)
        self.extend(text, context)
        return text

    def extend(self, text: Text, tokens: Sequence[int]) -> None:
        """Append tokens and index them. A text that was evicted stays forgotten."""
        if not text.alive or not tokens:
            return
        before = text.length
        self._append(text, tokens)
        self.counts.tokens += len(tokens)
        places = self.scopes[text.scope].places
        for offset, gram in self._grams(text, before):
            places.setdefault(gram, array("q")).append(text.number << _OFFSET_BITS | offset)
        while self.counts.tokens > self.settings.max_tokens:
            oldest = next(iter(self.texts.values()))
            self.counts.evicted_texts += 1
            self.counts.evicted_tokens += oldest.length
            self._remove(oldest)
            if not self.scopes[oldest.scope].texts:
                del self.scopes[oldest.scope]

    def continuation(self, scope: bytes, context: Sequence[int], k: int) -> list[int]:
        """At most k tokens after `context`; for the definition see `tests/proofs/lookups.py`."""
        following = self._occurrences(scope, context) if k > 0 else np.zeros(0, dtype=np.int64)
        chosen: list[int] = []
        while len(chosen) < k:
            if len(following) == 1:  # the usual case after a long match: one occurrence
                rest = self._store[following[0] : following[0] + k - len(chosen)].tolist()
                return chosen + (rest[: rest.index(_GAP)] if _GAP in rest else rest)
            tokens = self._store[following]
            following, tokens = following[tokens != _GAP], tokens[tokens != _GAP]
            if len(tokens) == 0:
                break
            token, votes = Counter(tokens.tolist()).most_common(1)[0]  # of equals the first seen, the newest
            if votes / len(tokens) < self.settings.floor:
                break
            chosen.append(token)
            following = following[tokens == token] + 1
        return chosen

    def tokens_of(self, text: Text) -> np.ndarray:  # [length] int32
        """A view of all its tokens, head included."""
        return self._store[text.start : text.start + text.length]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that `restore` needs: tokens [T], texts [N, 5], scope_tokens [K], scopes [S, 2]."""
        keys = {key: place for place, key in enumerate(self.scopes)}
        texts = [(t.length, t.head, t.epoch, keys[t.scope], int(t.is_prompt)) for t in self.texts.values()]
        scopes = [(len(key) // 4, scope.epoch) for key, scope in self.scopes.items()]
        tokens = np.concatenate([np.zeros(0, np.int32), *(self.tokens_of(t) for t in self.texts.values())])
        return {
            "tokens": torch.from_numpy(tokens),
            "texts": torch.tensor(texts, dtype=torch.int64).view(-1, 5),
            "scope_tokens": torch.from_numpy(np.frombuffer(b"".join(self.scopes), dtype=np.int32).copy()),
            "scopes": torch.tensor(scopes, dtype=torch.int64).view(-1, 2),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up, into an empty corpus, what `tensors` gave; a smaller max_tokens evicts the oldest."""
        lengths, epochs = tensors["scopes"].T.tolist()
        keys = [part.numpy().tobytes() for part in tensors["scope_tokens"].split(lengths)]
        parts = tensors["tokens"].split(tensors["texts"][:, 0].tolist())
        for part, (_, head, epoch, place, is_prompt) in zip(parts, tensors["texts"].tolist(), strict=True):
            self.scopes.setdefault(keys[place], Scope(epochs[place]))
            text = self._new(keys[place], epoch, head, bool(is_prompt))
            if is_prompt:
                self.prompts[part.numpy().tobytes()] = text
            self.extend(text, part.tolist())

    def _occurrences(self, scope: bytes, context: Sequence[int]) -> np.ndarray:
        """Places in the store behind the longest suffix of `context` that occurs, those in the newest text first."""
        shortest = self.settings.match_min
        found = self.scopes[scope].places.get(tuple(context[-shortest:])) if scope in self.scopes else None
        if found is None or len(context) < shortest:
            return np.zeros(0, dtype=np.int64)
        places = np.array(found, dtype=np.int64)
        at = self._starts[(places >> _OFFSET_BITS) - self._oldest] + (places & ((1 << _OFFSET_BITS) - 1))
        for n in range(shortest + 1, min(self.settings.match_max, len(context)) + 1):
            if len(at) == 1:
                break
            longer = self._store[at - n] == context[-n]
            if not longer.any():
                break
            at, places = at[longer], places[longer]
        return at[np.argsort(-places)]

    def _new(self, scope: bytes, epoch: int, head: int, is_prompt: bool) -> Text:
        text = Text(self._next, scope, epoch, head, is_prompt)
        self._next += 1
        self.texts[text.number] = self.scopes[scope].texts[text.number] = text
        self.counts.texts += 1
        return text

    def _remove(self, text: Text) -> None:
        scope = self.scopes[text.scope]
        for gram in {gram for _, gram in self._grams(text, 0)}:
            places = np.array(scope.places[gram], dtype=np.int64)
            kept = places[places >> _OFFSET_BITS != text.number]
            if len(kept):
                scope.places[gram] = array("q", kept.tobytes())
            else:
                del scope.places[gram]
        if text.is_prompt:
            del self.prompts[self.tokens_of(text).tobytes()]
        del self.texts[text.number], scope.texts[text.number]
        text.alive = False
        self.counts.texts -= 1
        self.counts.tokens -= text.length

    def _grams(self, text: Text, start: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(offset of a token, the n-gram before it) for the tokens from `start` that have a vote and enough context."""
        shortest = self.settings.match_min
        first = max(start, text.head, shortest)
        tokens = self.tokens_of(text)[first - shortest :].tolist()
        for place in range(text.length - first):
            yield first + place, tuple(tokens[place : place + shortest])

    # ---- the store: [gap] text [gap ...] text [gap ...] ----

    def _append(self, text: Text, tokens: Sequence[int]) -> None:
        if text.length + len(tokens) > text.room:
            self._move(text, max(2 * text.room, text.length + len(tokens)))
        end = text.start + text.length
        self._store[end : end + len(tokens)] = tokens
        text.length += len(tokens)

    def _move(self, text: Text, room: int) -> None:
        """Give a text a larger place at the end of the store; the old one is reclaimed when the store is full."""
        if self._used + room + 1 > len(self._store):
            self._compact(room + 1)
        self._store[self._used : self._used + text.length] = self.tokens_of(text)
        text.room = room
        self._put(text)

    def _compact(self, wanted: int) -> None:
        """Copy the texts into a new store of twice the size that they and `wanted` tokens need."""
        old, lengths = self._store, [t.length + 1 for t in self.texts.values()]
        self._store = np.full(max(1024, 2 * (sum(lengths) + wanted)), _GAP, dtype=np.int32)
        self._used, self._oldest = 1, next(iter(self.texts), self._next)
        self._starts = np.zeros(max(64, 2 * (self._next - self._oldest)), dtype=np.int64)
        for text in self.texts.values():
            self._store[self._used : self._used + text.length] = old[text.start : text.start + text.length]
            text.room = text.length
            self._put(text)

    def _put(self, text: Text) -> None:
        text.start = self._used
        self._used += text.room + 1
        place = text.number - self._oldest
        if place >= len(self._starts):
            self._starts = np.concatenate([self._starts, np.zeros(place + 1, dtype=np.int64)])
        self._starts[place] = text.start


@dataclass(slots=True)
class TrieRow:
    """A cache row's place in the corpus; a prompt's row has no text of its own yet."""

    corpus: Corpus
    scope: bytes
    recent: list[int]  # newest tokens, match_max of them at most
    text: Text | None = None

    def sample(self) -> TrieRow:
        if self.text is not None:
            return self
        return TrieRow(self.corpus, self.scope, self.recent, self.corpus.begin(self.scope, self.recent))

    def extend(self, tokens: Sequence[int]) -> None:
        assert self.text is not None, "a live row holds a sample"
        self.corpus.extend(self.text, tokens)
        self.recent = [*self.recent, *tokens][-self.corpus.settings.match_max :]

    def continuation(self, k: int) -> list[int]:
        return self.corpus.continuation(self.scope, self.recent, k)


class TrieDrafter(LookupDrafter):
    """A `Corpus` that lives as long as the drafter, and the text of every cache row.

    The corpus is no weight: weight versions do not cover it. Checkpoints keep it (`save`, `load`), and a restored one
    drafts exactly as the original would have.
    """

    name = "trie"
    Config = TrieConfig

    def __init__(self, settings: TrieConfig) -> None:
        super().__init__()
        self.settings = settings
        self.corpus = Corpus(settings)
        self._opened = 0

    @classmethod
    def from_config(cls, policy: Policy, speculation: SpeculationConfig) -> TrieDrafter:
        """With the corpus of `speculation.draft`, or an empty one."""
        refuse_draft_temperature(speculation)
        if speculation.draft is None:
            return cls(speculation.trie)
        return cls.load(Path(speculation.draft), speculation.trie)

    @classmethod
    def vllm_config(cls, speculation: SpeculationConfig, folder: Path | None) -> dict[str, Any]:
        """A proposer class of ours: the drafts of vLLM's own suffix decoding come from all prompts."""
        return {"method": "custom_class", "model": VLLM_PROPOSER}

    @classmethod
    def vllm_additional_config(cls, speculation: SpeculationConfig) -> dict[str, Any]:
        """The proposer's settings, and the corpus that it begins with."""
        return {VLLM_SETTINGS: {**speculation.trie.model_dump(), "folder": speculation.draft}}

    def open(self, rows: int, positions: int, k: int) -> None:
        """Forget the rows, keep the corpus; a prompt's next visit starts an epoch."""
        super().open(rows, positions, k)
        self._opened += 1

    def prompt(self, tokens: list[int]) -> TrieRow:
        scope = self.corpus.visit(tokens, self._opened)
        return TrieRow(self.corpus, scope, tokens[-self.settings.match_max :])

    def metrics(self) -> dict[str, int]:
        """See `CorpusCounts`."""
        return asdict(self.corpus.counts)

    def description(self) -> dict[str, Any]:
        return {"trie": self.settings.model_dump(), "counts": self.metrics()}

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write corpus.safetensors (see `Corpus.tensors`) and config.json: settings, counts and `about`."""
        from safetensors.torch import save_file

        super().save(folder, about)
        save_file(self.corpus.tensors(), folder / "corpus.safetensors")

    @classmethod
    def load(cls, folder: Path, settings: TrieConfig) -> TrieDrafter:
        """A drafter with the corpus of `folder`, under `settings`.

        Raises UserError when files are missing or broken, or the corpus was pooled by another scope.
        """
        from safetensors.torch import load_file

        with reading(f"The corpus in {folder}"):
            data = json.loads((folder / "config.json").read_text())
            scope, counts = data["trie"]["scope"], CorpusCounts(**data["counts"])
            tensors = load_file(folder / "corpus.safetensors")
        if scope != settings.scope:
            raise UserError(
                f"The corpus in {folder} has scope '{scope}', and speculation.trie.scope is '{settings.scope}'; set "
                "them equal, or begin an empty corpus with speculation.draft=null"
            )
        drafter = cls(settings)
        drafter.corpus.counts = replace(counts, texts=0, tokens=0)
        drafter.corpus.restore(tensors)
        return drafter
