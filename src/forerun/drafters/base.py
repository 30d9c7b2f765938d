"""The drafter's contract. A new drafter is one file with a subclass of `Drafter` and one line in `DRAFTERS`.

Non-anticipation: whether position j of a draft is proposed may depend only on what is known before its token is
sampled. The `log_q` that a draft carries is the very tensor that its tokens were sampled from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from forerun.errors import UserError
from forerun.models import Policy
from forerun.types import Draft, VerifyResult

if TYPE_CHECKING:  # an engine with a drafter needs no recipe, and so no pydantic
    from forerun.config import SpeculationConfig
    from forerun.config.drafters import DrafterConfig
    from forerun.drafters.trainable import TrainableHead
    from forerun.drafters.training.trainer import Training, TrainingSetup, Validation


@dataclass(frozen=True, slots=True)
class Rows:
    """The live sequences of a round, in cache rows 0 .. B-1.

    Row b has `lengths[b]` tokens in the policy's cache; `last[b]` is its newest token, which is not among them yet and
    will sit at position lengths[b].
    """

    last: Tensor  # [B] int64
    lengths: Tensor  # [B] int64
    seeds: Tensor  # [B] int64, one per request
    temperature: Tensor  # [B] float32, 0 is greedy

    @property
    def count(self) -> int:
        return self.last.shape[0]


class Drafter:
    """Base class of drafters: what the engine calls, and what a recipe needs to know before one is made.

    A drafter without state defines `name`, `from_config` and `propose`; the other methods do nothing by default.
    """

    name: ClassVar[str]  # in a recipe: `speculation.method`
    Config: ClassVar[type[DrafterConfig] | None] = None  # its settings; None: it has none
    trains: ClassVar[bool] = False  # its weights must be given or trained before RL (`forerun draft`)
    samples: ClassVar[bool] = False  # its chains are sampled from a q of its own; else q is one-hot
    cotrains: ClassVar[bool] = False  # it can be co-trained with the policy, see `trainable_head`
    trees: ClassVar[bool] = False  # it proposes trees
    vllm_refusal: ClassVar[str] = "vLLM has no drafter of this kind"  # why vLLM cannot run it; "": it can
    vllm_scales_drafts: ClassVar[bool] = False  # vLLM can draft at another temperature than that of the rollouts

    aux_layers: tuple[int, ...] = ()  # policy layers whose inputs it reads

    # ---- made from a recipe ----

    @classmethod
    def from_config(cls, policy: Policy, speculation: SpeculationConfig) -> Self:
        """The drafter of a speculation block. Raises UserError when it cannot be found or does not fit the policy.

        A drafter without a block of its own name reads `speculation.settings`, see `own_settings`.
        """
        raise NotImplementedError(f"{cls.__name__}.from_config")

    @classmethod
    def own_settings(cls, speculation: SpeculationConfig) -> Any:
        """`speculation.settings` as this drafter's `Config`."""
        assert cls.Config is not None, f"{cls.__name__} has no Config"
        return cls.Config.model_validate(speculation.settings)

    @classmethod
    def train(cls, policy: Policy, setup: TrainingSetup) -> Training[tuple[Drafter, Validation]]:
        """Train one on texts of the policy; returns it with its `Validation`. Every drafter that `trains` has this."""
        raise NotImplementedError(f"{cls.__name__}.train")

    @classmethod
    def vllm_config(cls, speculation: SpeculationConfig, folder: Path | None) -> dict[str, Any]:
        """Its entries of vLLM's `speculative_config`. `folder`: of `vllm_files`, if it has any."""
        raise NotImplementedError(f"{cls.__name__}.vllm_config")

    @classmethod
    def vllm_additional_config(cls, speculation: SpeculationConfig) -> dict[str, Any]:
        """What vLLM hands to a proposer class of ours: entries of its `additional_config`."""
        return {}

    @classmethod
    def vllm_files(
        cls, speculation: SpeculationConfig, policy: Policy, source: Path, scratch: Path
    ) -> tuple[Path, Mapping[str, Tensor]] | None:
        """Folder with its weights as vLLM reads them, and the tensors that a weight version carries; None: no weights.

        Args:
            policy: configuration and shapes, see `describe_policy`; its weights are in the folder `source`.
            scratch: folder for what has to be written.

        Raises UserError when the drafter cannot be read.
        """
        return None

    # ---- in an engine ----

    def open(self, rows: int, positions: int, k: int) -> None:
        """Allocate `rows` sequences of at most `positions` tokens, drafts of at most `k`; forget the earlier ones."""

    def prefill(self, first_row: int, tokens: Tensor, lengths: Tensor, features: Tensor | None) -> None:
        """Prompts tokens [P, L] of `lengths` [P] entered rows first_row, first_row + 1, ...

        features [P, L-1, T·H]: the policy's auxiliary hidden states, for all but each prompt's last token.
        """

    def copy(self, source: int, target: int) -> None:
        """Row `target` continues what row `source` holds."""

    def propose(self, rows: Rows, budget: Tensor) -> Draft:
        """Draft at most budget [B] tokens per row; a tree: paths of at most that many, and at most `k` nodes in all."""
        raise NotImplementedError(f"{type(self).__name__}.propose")

    def observe(self, rows: Rows, verdict: VerifyResult, features: Tensor | None) -> None:
        """Row b emitted verdict.tokens[b, : accepted[b] + 1], and its sample keeps them all: none beyond its end.

        features [B, n, T·H]: the policy's auxiliary hidden states for the n tokens that it just ran (newest token and
        drafts); of a tree, for the newest token and the accepted path.
        """

    def learn(self, rows: Rows, draft: Draft, logits: Tensor, verdict: VerifyResult) -> None:
        """Learn from a verified round; may change how later rounds are drafted. Default: nothing.

        Called once per round, plain ones too, after verification and before `observe`.

        Args:
            logits: [B, k+1, V] of the policy, not divided by the temperature: row 0 after the newest token, row j + 1
                after draft position j. Not to be kept or copied whole: nothing in a round is larger.
            verdict: the result of verification, also where a sample ends inside its accepted run.
        """

    def metrics(self) -> Mapping[str, float]:
        """Counts since the drafter was made, and settings that it tunes, as they are now."""
        return {}

    # ---- weights ----

    def trainable_head(self) -> TrainableHead:
        """What is co-trained with the policy. Every drafter that `cotrains` has one."""
        raise NotImplementedError(f"{type(self).__name__}.trainable_head")

    def state_dict(self) -> dict[str, Tensor]:
        """Its weights, empty when it has none.

        Only what a weight version covers and a learner sends. A corpus is no weight: it stays with the engine, and is
        written to the folder of `save`.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace its weights. Raises UserError when a tensor is missing, unknown or of another shape."""
        if state:
            raise UserError(f"The drafter '{self.name}' has no weights, but the state holds {sorted(state)}")

    def description(self) -> dict[str, Any]:
        """What `save` writes to config.json in addition to its name."""
        return {}

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write it, memory included, to a folder from which it can be loaded; `about` records how it was made.

        Default: config.json alone.
        """
        folder.mkdir(parents=True, exist_ok=True)
        data = {"method": self.name, **self.description(), "forerun": about}
        (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n")


def check_draft(drafter: Drafter, draft: Draft, budget: Tensor, k: int, vocabulary: int) -> None:
    """Raises UserError, naming the drafter, when what it proposed for `budget` [B] is no draft."""
    fault = _misshapen(draft, len(budget), k)
    if not fault:
        most = budget if draft.parents is None else torch.full_like(budget, k)
        outside = ((draft.tokens < 0) | (draft.tokens >= vocabulary)).any()
        long = ((draft.lengths < 0) | (draft.lengths > most.clamp(max=draft.tokens.shape[1]))).any()
        if not bool(outside | long):
            return
        if bool(outside):
            fault = f"a token outside the policy's vocabulary 0 .. {vocabulary - 1}"
        else:
            fault = f"{draft.lengths.tolist()} tokens where at most {most.tolist()} were asked for"
    raise UserError(f"The drafter '{getattr(drafter, 'name', type(drafter).__name__)}' proposed {fault}")


def _misshapen(draft: Draft, batch: int, k: int) -> str:
    """What is wrong with the tensors of a draft of `batch` rows; "" when nothing is."""
    if not isinstance(draft, Draft):
        return f"{draft!r:.40}; `propose` returns a Draft (forerun.types)"
    integers = {"tokens": draft.tokens, "lengths": draft.lengths}
    if draft.parents is not None:
        integers["parents"] = draft.parents
    for name, tensor in integers.items():
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            return f"{name} of type {kind}; they are a tensor of torch.int64"
        shape, wanted = list(tensor.shape), f"[{batch}]" if name == "lengths" else f"[{batch}, up to {k}]"
        if shape[:1] != [batch] or len(shape) != (1 if name == "lengths" else 2) or max(shape[1:], default=0) > k:
            return f"{name} of shape {shape}; the policy expects {wanted}"
    if draft.log_q is not None and draft.log_q.shape[:2] != draft.tokens.shape:
        return f"log_q of shape {list(draft.log_q.shape)} for tokens of shape {list(draft.tokens.shape)}"
    return ""


def deterministic_draft(proposals: Sequence[Sequence[int]], device: torch.device) -> Draft:
    """A chain draft of fixed tokens (q is one-hot, log_q None), padded to the longest proposal."""
    lengths = [len(p) for p in proposals]
    k = max(lengths, default=0)
    padded = [[*p, *([0] * (k - len(p)))] for p in proposals]
    tokens = torch.tensor(padded, dtype=torch.int64, device=device).view(len(proposals), k)
    return Draft(tokens, torch.tensor(lengths, dtype=torch.int64, device=device))


def emitted(verdict: VerifyResult) -> list[list[int]]:
    """The tokens that each row emitted, as plain lists."""
    accepted, tokens = verdict.accepted.tolist(), verdict.tokens.tolist()
    return [row[: a + 1] for a, row in zip(accepted, tokens, strict=True)]
