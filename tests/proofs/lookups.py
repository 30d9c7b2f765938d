"""What the drafters that look up compute, slow and obvious."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from forerun.config import TrieConfig


def reference_lookup(tokens: Sequence[int], k: int, shortest: int, longest: int) -> list[int]:
    """The definition, slow and obvious: every n from the longest, every place from the left."""
    text = list(tokens)
    for n in range(longest, shortest - 1, -1):
        for end in range(n, len(text)):
            if len(text) > n and text[end - n : end] == text[-n:]:
                return text[end : end + k]
    return []


def reference_continuation(
    texts: Sequence[tuple[int, Sequence[int]]], context: Sequence[int], k: int, settings: TrieConfig
) -> list[int]:
    """What `Corpus.continuation` computes, slow and obvious: every length from the longest, every place of every text.

    Args:
        texts: (tokens without a vote at the beginning, tokens) of the scope, oldest first.
    """
    context, found = list(context), []
    for n in range(min(settings.match_max, len(context)), settings.match_min - 1, -1):
        for head, text in reversed(texts):  # the newest first, and of one text the latest place
            places = range(len(text) - 1, max(head, n) - 1, -1)
            found += [text[o:] for o in places if list(text[o - n : o]) == context[-n:]]
        if found:
            break
    chosen: list[int] = []
    while len(chosen) < k and (found := [rest for rest in found if len(rest) > len(chosen)]):
        votes = Counter(rest[len(chosen)] for rest in found)
        best = max(votes, key=lambda token: votes[token])  # of equals the first seen
        if votes[best] / len(found) < settings.floor:
            break
        chosen.append(best)
        found = [rest for rest in found if rest[: len(chosen)] == chosen]
    return chosen
