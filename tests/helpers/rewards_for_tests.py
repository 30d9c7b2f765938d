"""Reward functions as a user would write them."""

from __future__ import annotations

from forerun.tasks import Problem


def has_digit(problem: Problem, completion: str) -> float:
    """1 when the completion starts with a digit."""
    return float(completion[:1].isdigit())


def variety(problem: Problem, completion: str) -> float:
    """Share of different characters: hardly ever the same for two samples of a prompt."""
    return len(set(completion)) / max(1, len(completion))


def raises(problem: Problem, completion: str) -> float:
    """A user's bug."""
    return 1 / 0
