"""The small frozen records that travel between packages.

Axes in shape comments: B sequences of a batch, k draft tokens, V vocabulary, D draft vocabulary, H hidden size.
Left out: anything that decides something. Records only carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from forerun.workers.shared_memory import Segment

STAGES = ("data", "prepare", "generation", "logprob", "train")  # of a step, as 2604.26779 times them


@dataclass(frozen=True, slots=True)
class Draft:
    """What a drafter proposes for one round of B sequences.

    `tokens[b, :lengths[b]]` are the proposals. `log_q[b, j]` is the log-probability row that `tokens[b, j]` was sampled
    from, over the D entries of `vocabulary` (ascending target ids; None: the whole target vocabulary, D = V).
    `log_q` is None for a deterministic draft, whose q is one-hot. `parents` is None for a chain.
    """

    tokens: Tensor  # [B, k] int64
    lengths: Tensor  # [B] int64, 0 <= lengths <= k
    log_q: Tensor | None = None  # [B, k, D] float32
    vocabulary: Tensor | None = None  # [D] int64
    parents: Tensor | None = None  # [B, k] int64


@dataclass(frozen=True, slots=True)
class VerifyInput:
    """What an acceptance rule reads of one round of B sequences, all on one device.

    The uniforms are float64 in (0, 1), independent of each other and of those that sampled the draft.
    """

    target_logits: Tensor  # [B, k+1, V] of any float type, -inf allowed; not divided by the temperature
    draft: Draft
    temperature: Tensor  # [B], 0 for a greedy sequence
    accept_uniforms: Tensor  # [B, k], decide whether draft tokens are accepted
    residual_uniforms: Tensor  # [B], draw the token that ends the round, from the residual or p


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """Outcome of verification: row b emits `tokens[b, : accepted[b] + 1]`, the last of them not drafted."""

    accepted: Tensor  # [B] int64
    tokens: Tensor  # [B, k+1] int64, zero beyond the emitted ones
    logprobs: Tensor  # [B, k+1] float32, log-probability of the emitted tokens under the target


@dataclass(frozen=True, slots=True)
class Rollout:
    """One finished sample of the policy.

    `logprobs[t]` is the policy's log-probability of `tokens[t]`, taken from the row that verified it (at the sampling
    temperature; at temperature 0, of the unscaled distribution). `versions[t]` is the weight version that emitted it.
    """

    prompt_ids: list[int]
    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    finish_reason: (
        str  # "eos", "stop" (a stop string), "length" (max_new_tokens) or "context" (the model's last position)
    )
    prompt_index: int = 0
    sample_index: int = 0
    rounds: int = 0  # policy forwards that produced `tokens`, prefill not counted
    drafted: list[bool] = field(default_factory=list)  # whether tokens[t] was an accepted draft


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
    checked: bool = False  # the tensors were compared with `checksums` when they arrived in this process

    @property
    def groups(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors that are carried, by group."""
        return {g: s for g, s in (("policy", self.policy), ("draft", self.draft)) if s is not None}
