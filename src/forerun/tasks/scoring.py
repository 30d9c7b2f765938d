"""From what reward functions return, or how they fail, to one score. Runs in the reward workers.

A function whose second parameter is called `rollout`, or annotated with `Completion`, gets the whole completion; any
other one gets its text without special tokens. It returns a number or named parts, whose sum is then its value. One
that raises, or returns no number that float32 holds, is worth 0 and makes the score a failed one.
"""

from __future__ import annotations

import inspect
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from forerun.errors import UserError, place_of
from forerun.tasks.base import Completion, NotScored, Reward, WeightedReward

LARGEST = 3.4028234663852886e38  # float32


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one completion; `fault` says why a function counted 0."""

    reward: float
    seconds: float
    parts: Mapping[str, float] = field(default_factory=dict)
    outcome: Literal["scored", "failed", "timeout"] = "scored"
    fault: str = ""


def score(rewards: Sequence[WeightedReward], completion: Completion) -> Score:
    """Call all functions; their weighted sum."""
    started = time.perf_counter()
    total, parts, faults = 0.0, {}, []
    for reward in rewards:
        try:
            found = _values(reward, completion)
        except NotScored as error:
            found = {"": 0.0}
            faults.append(f"The reward function '{reward.name}' {error}")
        except BaseException as error:  # SystemExit, too: a reward ends no worker
            found = {"": 0.0}
            line = " ".join(str(error).split())[:300]
            faults.append(f"The reward function '{reward.name}' raised {type(error).__name__}: {line}{place_of(error)}")
        value = sum(found.values())
        total += reward.weight * value
        if len(rewards) > 1:
            parts[_metric_name(reward.name)] = value
        parts |= {_metric_name(f"{reward.name}.{p}") if len(rewards) > 1 else p: n for p, n in found.items() if p}
    if not abs(total) <= LARGEST:
        total, faults = 0.0, [*faults, f"The weighted sum of the rewards is {total}, which is no float32"]
    seconds = time.perf_counter() - started
    return Score(total, seconds, parts, "failed" if faults else "scored", "; ".join(faults))


def takes_rollout(function: Reward) -> bool:
    """Whether the second parameter is called `rollout` or annotated with `Completion`."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin
        return False
    if len(parameters) < 2:
        return False
    return parameters[1].name == "rollout" or bool(re.search(r"\bCompletion\b", str(parameters[1].annotation)))


def check_signature(function: Any, path: str) -> None:
    """Raises UserError when this is no function of two arguments."""
    if not callable(function):
        raise UserError(f"The reward '{path}' is a {type(function).__name__}, not a function")
    if inspect.iscoroutinefunction(function):
        raise UserError(f"The reward '{path}' is an async function; write it as a plain one, rewards run in parallel")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise UserError(
            f"The reward '{path}' takes {signature}, and is called with (problem, completion) or (problem, rollout): "
            f"{error}"
        ) from None


def _values(reward: WeightedReward, completion: Completion) -> dict[str, float]:
    """The function's parts; one without a name where it returns a number."""
    given: Completion | str = completion if takes_rollout(reward.function) else completion.text
    returned = reward.function(completion.problem, given)
    if not isinstance(returned, Mapping):
        return {"": _number(returned, "returned")}
    parts: dict[str, float] = {}
    for part, value in returned.items():
        if (name := _metric_name(part)) in parts:
            raise NotScored(f"returned two parts that metrics would both call '{name}'; rename '{part}'")
        parts[name] = _number(value, f"returned, as '{part}',")
    return parts


def _number(value: Any, returned: str) -> float:
    if inspect.iscoroutine(value):
        value.close()
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        shown = " ".join(repr(value).split())[:60]
        raise NotScored(f"{returned} {shown} ({type(value).__name__}), which is no number") from error
    if not math.isfinite(number) or abs(number) > LARGEST:
        raise NotScored(f"{returned} {number}, which is no finite float32")
    return number


def _metric_name(part: object) -> str:
    """A part's name as metrics write it."""
    return re.sub(r"[^\w.:-]", "_", str(part)) or "_"
