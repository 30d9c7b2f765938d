"""The prompts of every step: which, in which order, and how fast."""

from __future__ import annotations

import random
import time

from forerun.tasks import Problem
from forerun.training.prompts import problems_of_step


def reference(problems: list[Problem], step: int, count: int, seed: int) -> list[Problem]:
    """The same, with a shuffle for every place."""
    chosen = []
    for place in range(step * count, (step + 1) * count):
        epoch, index = divmod(place, len(problems))
        order = random.Random(f"{seed}/{epoch}").sample(range(len(problems)), len(problems))
        chosen.append(problems[order[index]])
    return chosen


def test_the_order_is_that_of_a_shuffle_per_epoch() -> None:
    problems = [Problem(str(i), f"q{i}", "") for i in range(11)]
    for seed in (0, 7):
        for step in (0, 1, 2, 9, 1, 30):  # also back, as after a resume
            for count in (1, 4, 25):
                assert problems_of_step(problems, step, count, seed) == reference(problems, step, count, seed)


def test_a_large_data_set_is_shuffled_once() -> None:
    problems = [Problem(str(i), f"q{i}", "") for i in range(100_000)]
    started = time.perf_counter()
    for step in range(40, 44):
        problems_of_step(problems, step, 512, 3)
    assert time.perf_counter() - started < 5  # 80 s with a shuffle per prompt
