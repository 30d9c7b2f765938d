"""The contract of rollout engines: one version of policy and drafter, which turns prompts into samples of the policy.

A new engine is one file with a subclass of `RolloutEngine` and one line in `ENGINES` (`forerun/registry.py`).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from forerun.acceptance.truncate import EVERYTHING, Truncation
from forerun.chat import Prompt
from forerun.engine.counters import Counters
from forerun.engine.staleness import StaleDrafterDetector
from forerun.errors import UserError
from forerun.models import Policy
from forerun.models.prompts import PromptEncoder, require_tokenizer
from forerun.types import Rollout, Weights

if TYPE_CHECKING:
    from forerun.config import SpeculationConfig
    from forerun.drafters.base import Drafter

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


OnState = Callable[[str, str, int], None]  # who ("engine", "replica 0"), its new state, its weight version


def nothing() -> None:
    """Default of `RolloutEngine.stream`'s `between`."""


def ignore_state(who: str, state: str, version: int) -> None:
    """Default of `RolloutEngine.on_state`."""


class RolloutEngine(ABC):
    """Base class of engines: the contract, and what all engines share."""

    shares_weights: ClassVar[bool] = False  # whether it runs the live modules, so that `load` needs no tensors

    def __init__(self, policy: Policy, k: int) -> None:
        """`k`: draft tokens per round, of a tree its nodes; 0: plain."""
        self.policy = policy
        self.counters = Counters(accepted_at=[0] * k, drafted_at=[0] * k)  # since the engine was made
        self.timeline: list[tuple[float, int]] = []  # of the latest stream: (seconds, unfinished samples) per round
        self.warnings: list[str] = []
        self.on_state: OnState = ignore_state  # called as "load", "generate" or "idle" begins, and when one is "lost"
        self._running = False  # whether a stream is open
        self._paused = False
        self._detector = StaleDrafterDetector(self.counters.copy())

    @classmethod
    def from_live(cls, policy: Policy, drafter: Drafter | None, speculation: SpeculationConfig, slots: int) -> Self:
        """An engine for a live policy and drafter; plain without a drafter. Every engine of `ENGINES` has it."""
        raise NotImplementedError(f"{cls.__name__}.from_live")

    @classmethod
    def from_folder(cls, policy: str, dtype: str, speculation: SpeculationConfig, slots: int) -> Self:
        """An engine for a policy by name or folder, and the speculation block's drafter. See `from_live`."""
        raise NotImplementedError(f"{cls.__name__}.from_folder")

    @property
    @abstractmethod
    def rule(self) -> str:
        """The acceptance rule in force: "token", "block", "walk" (trees), or "plain" where nothing is drafted."""

    @abstractmethod
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
            only: the wanted (prompt, sample) pairs; each keeps the seed that it has among all.
            between: called before every round, and may `load` or raise: the place to change weights in flight.

        Raises UserError when a prompt is empty, holds an id outside the vocabulary, or fills the model's context.
        """

    def extend(self, requests: Requests) -> bool:
        """Take more samples of the prompts of the stream under way, in `between`; False: not done, or there is none."""
        return False

    def generate(
        self,
        prompts: Sequence[Sequence[int] | Prompt],
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        n: int = 1,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[Rollout]:
        """Samples in the order of the prompts, n each.

        Args:
            prompts: each one token ids; or a text, read as it is (after the tokenizer's start token, without an end
                token); or a list of messages {"role", "content"}, which goes through the model's chat template.

        Raises UserError when a prompt cannot be read; or texts, messages or `stop` are given to a model without a
        tokenizer.
        """
        encoder = PromptEncoder(self.policy.tokenizer, self.policy.name)
        if stop:
            require_tokenizer(self.policy.tokenizer, self.policy.name)
        ids = [encoder.ids(prompt, index) for index, prompt in enumerate(prompts)]
        sampling = Sampling(max_new_tokens, temperature, seed, tuple(stop))
        return sorted(self.stream(ids, sampling, n), key=lambda r: (r.prompt_index, r.sample_index))

    @abstractmethod
    def load(self, weights: Weights) -> Weights:
        """Take a version of policy and drafter; returns version and checksums as held afterwards.

        Raises UserError when a group is missing or partial, or its bytes do not match its checksum.
        """

    def pause(self) -> None:
        """Refuse to start a round until `resume`; sequences in flight are kept."""
        self._paused = True

    def resume(self) -> None:
        """Go on; acceptance is checked as after a load."""
        self._paused = False
        self._detector.restart(self.counters)

    @abstractmethod
    def metrics(self) -> dict[str, Any]:
        """Version, checksums, rule, counters and acceptance since the engine was made."""

    def close(self) -> None:  # noqa: B027 (optional)
        """Free what the engine holds outside Python. It cannot be used afterwards."""

    def _check_not_paused(self) -> None:
        """Before every round. Raises UserError when the engine is paused."""
        if self._paused:
            raise UserError("The engine is paused; call resume() before the next round")

    @contextmanager
    def _streaming(self, version: Callable[[], int]) -> Iterator[Callable[[int], None]]:
        """One stream at a time; gives the function that adds a round's unfinished samples to the timeline.

        Args:
            version: the weight version that is held now.
        """
        self._running = True
        started = time.perf_counter()
        self.timeline = []
        self.on_state("engine", "generate", version())
        try:
            yield lambda unfinished: self.timeline.append((time.perf_counter() - started, unfinished))
        finally:
            self._running = False
            self.counters.seconds += time.perf_counter() - started
            self.on_state("engine", "idle", version())

    def _check_not_running(self) -> None:
        """Raises UserError while a stream is open."""
        if self._running:
            raise UserError("This engine is already generating; finish or close its stream first")

    def _warn_of_collapse(self) -> None:
        """After every round: warn when acceptance fell after the latest load."""
        if warning := self._detector.look(self.counters):
            self.warnings.append(warning)

    @contextmanager
    def _loading(self, version: int) -> Iterator[None]:
        """Report state "load" meanwhile, and the state before it afterwards."""
        self.on_state("engine", "load", version)
        try:
            yield
        finally:
            self.on_state("engine", "generate" if self._running else "idle", version)


def engine_metrics(
    held: Weights, counters: Counters, warnings: Sequence[str], drafter: Mapping[str, float]
) -> dict[str, Any]:
    """`RolloutEngine.metrics` of an engine that holds `held`, without the rule; `drafter`: `Drafter.metrics`."""
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

    Raises UserError when nothing is asked for; or a prompt is empty, fills the context, or is of another tokenizer.
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


def check_drafter(weights: Weights, speculates: bool) -> None:
    """Raises UserError when a version carries a drafter and the engine has none, or the reverse."""
    if speculates != ("draft" in weights.checksums):
        have, want = ("a", "no") if speculates else ("no", "a")
        raise UserError(f"Version {weights.version} carries {want} drafter, but this engine speculates with {have}")


def ends_with_stop(policy: Policy, tokens: list[int], stop: Sequence[str]) -> bool:
    """Whether the newest token completed a stop string; looks back far, as a token may be a single byte."""
    window = max(len(s.encode()) for s in stop) + 8
    text = policy.tokenizer.decode(tokens[-window:])
    return any(s in text for s in stop)
