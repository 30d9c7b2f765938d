"""What a rollout engine is: it holds one version of policy and drafter, and turns prompts into samples of the policy.

Both engines keep this contract and one test suite holds them to it. Left out: rewards, and who trains the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Protocol

from torch import Tensor

from forerun.acceptance.truncate import EVERYTHING, Truncation
from forerun.errors import UserError
from forerun.models import Policy
from forerun.types import Rollout
from forerun.workers.shared_memory import Segment

Requests = Sequence[tuple[int, int]]  # (prompt, sample)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. Truncated samples are not for training: a learner would have to replay the cuts."""

    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 is greedy
    seed: int = 0
    stop: tuple[str, ...] = ()  # strings that end a completion and stay in it
    ignore_eos: bool = False  # go on to max_new_tokens: for benchmarks
    truncation: Truncation = EVERYTHING


@dataclass(frozen=True, slots=True)
class Weights:
    """One version of everything an engine needs. `checksums` has an entry per group: "policy", and "draft" if any.

    `policy` or `draft` is None where the engine shares the live module and only has to check that it holds these bytes.
    """

    version: int
    checksums: Mapping[str, str]
    policy: Mapping[str, Tensor] | None = None
    draft: Mapping[str, Tensor] | None = None
    segment: Segment | None = None  # where these tensors are in shared memory already

    @property
    def groups(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors that are carried, by group."""
        return {g: s for g, s in (("policy", self.policy), ("draft", self.draft)) if s is not None}


@dataclass(slots=True)
class Counters:
    """What an engine has done since it was made; rates come from differences. Rounds count one per sequence."""

    tokens: int = 0  # emitted
    rows: int = 0  # sequence-rounds, with or without a draft
    rounds: int = 0  # sequence-rounds that verified at least one draft token
    round_tokens: int = 0  # tokens emitted in those
    drafted: int = 0
    accepted_at: list[int] = field(default_factory=list)  # rounds whose first j+1 drafts were all kept
    drafted_at: list[int] = field(default_factory=list)  # rounds that drafted at least j+1
    seconds: float = 0.0

    def minus(self, earlier: Counters) -> Counters:
        """What was added since `earlier`."""
        return self._combine(earlier, -1)

    def plus(self, other: Counters) -> Counters:
        """The sum of two spans."""
        return self._combine(other, 1)

    def copy(self) -> Counters:
        """A snapshot."""
        return self._combine(Counters(), 1)

    def _combine(self, other: Counters, sign: int) -> Counters:
        def lists(a: list[int], b: list[int]) -> list[int]:
            return [x + sign * y for x, y in zip_longest(a, b, fillvalue=0)]

        return Counters(
            tokens=self.tokens + sign * other.tokens,
            rows=self.rows + sign * other.rows,
            rounds=self.rounds + sign * other.rounds,
            round_tokens=self.round_tokens + sign * other.round_tokens,
            drafted=self.drafted + sign * other.drafted,
            accepted_at=lists(self.accepted_at, other.accepted_at),
            drafted_at=lists(self.drafted_at, other.drafted_at),
            seconds=self.seconds + sign * other.seconds,
        )

    @property
    def acceptance_length(self) -> float | None:
        """Tokens emitted per round, the bonus token included; None before the first round."""
        return self.round_tokens / self.rounds if self.rounds else None

    @property
    def acceptance_per_position(self) -> list[float]:
        """Entry j: share of rounds that drafted j+1 tokens or more in which the first j+1 were all kept."""
        return [a / d for a, d in zip(self.accepted_at, self.drafted_at, strict=True) if d]

    @property
    def k_mean(self) -> float | None:
        """Draft tokens verified per round."""
        return self.drafted / self.rounds if self.rounds else None


def nothing() -> None:
    """Between two rounds, unless somebody has something to do there."""


class RolloutEngine(Protocol):
    """The contract."""

    counters: Counters  # since the engine was made
    timeline: list[tuple[float, int]]  # of the latest stream: (seconds, live sequences) per round
    warnings: list[str]

    def stream(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        n: int = 1,
        only: Requests | None = None,
        between: Callable[[], None] = nothing,
    ) -> Iterator[Rollout]:
        """Yield n samples of every prompt as they finish.

        Args:
            only: the samples that are wanted of these, prompt by prompt; each gets the seed that it has among all.
            between: called before every round, and may `load` or raise: the place to change weights in flight.

        Raises:
            UserError: a prompt is empty, holds an id outside the vocabulary, or fills the model's context.
        """

    def generate(
        self,
        prompts: Sequence[list[int] | str],
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        n: int = 1,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[Rollout]:
        """Samples in the order of the prompts, n each. Prompts are token ids or texts (taken as they are)."""

    def load(self, weights: Weights) -> Weights:
        """Take a version of policy and drafter; answers with version and checksums as held afterwards.

        Raises:
            UserError: a group is missing or partial, or its bytes are not those that the checksum names.
        """

    def pause(self) -> None:
        """Stop between two rounds; sequences in flight stay as they are."""

    def resume(self) -> None:
        """Go on after `pause`."""

    def metrics(self) -> dict[str, Any]:
        """Version, checksums, counters and acceptance since the engine was made."""

    def close(self) -> None:
        """Give back what the engine holds outside Python. It cannot be used afterwards."""


def generate_all(
    engine: RolloutEngine, policy: Policy, prompts: Sequence[list[int] | str], sampling: Sampling, n: int
) -> list[Rollout]:
    """`RolloutEngine.generate` by means of `stream`: texts become token ids, samples stand in the order of prompts."""
    ids = [policy.tokenizer(p)["input_ids"] if isinstance(p, str) else list(p) for p in prompts]
    return sorted(engine.stream(ids, sampling, n), key=lambda r: (r.prompt_index, r.sample_index))


def engine_metrics(
    held: Weights, counters: Counters, warnings: Sequence[str], drafter: Mapping[str, float]
) -> dict[str, Any]:
    """`RolloutEngine.metrics` of an engine that holds `held`; `drafter`: what the drafter counts by itself."""
    return {
        "version": held.version,
        "checksums": dict(held.checksums),
        "tokens": counters.tokens,
        "rounds": counters.rounds,
        "drafted": counters.drafted,
        "acceptance_length": counters.acceptance_length,
        "acceptance_per_position": counters.acceptance_per_position,
        "k_mean": counters.k_mean,
        "seconds": counters.seconds,
        "warnings": list(warnings),
        "drafter": dict(drafter),
    }


def requested(prompts: int, n: int, only: Requests | None) -> Requests:
    """All samples of all prompts, or those of `only`, prompt by prompt."""
    return [(p, s) for p in range(prompts) for s in range(n)] if only is None else sorted(only)


def check_request(prompts: Sequence[list[int]], sampling: Sampling, n: int, vocabulary: int, context: int) -> None:
    """Refuse what no engine can sample.

    Raises:
        UserError: nothing is asked for; or a prompt is empty, fills the context, or is of another tokenizer.
    """
    if not prompts or n < 1 or sampling.max_new_tokens < 1:
        raise UserError(
            f"Nothing to generate: {len(prompts)} prompts, n = {n}, max_new_tokens = {sampling.max_new_tokens}"
        )
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"Prompt {index} is empty; a policy needs at least one token to start from")
        if len(prompt) >= context:
            raise UserError(f"Prompt {index} has {len(prompt)} tokens, the engine's context is {context}; shorten it")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise UserError(
                f"Prompt {index} holds a token id outside 0 .. {vocabulary - 1}: it is for another tokenizer"
            )
