"""A smaller causal language model as drafter (Leviathan et al. 2211.17192): same tokens, cache rows of its own.

Each round it first reads what was emitted since it last ran: usually one token, two where the whole draft was accepted
(the last draft was never fed), more where rounds passed without it. Then it samples k tokens one after the other.
Models of one family pad their vocabularies to different widths: only ids that both have are drafted, q is 0 elsewhere.
Axes: R rows, B live rows, P positions, n tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from forerun.drafters.base import Drafter, Rows
from forerun.drafters.sampled import SampledChain, SampledDrafter
from forerun.errors import UserError
from forerun.models import Policy, load_policy, save_policy
from forerun.models.cache import SlotCache, SlotPass
from forerun.models.forward import PolicyForward
from forerun.models.load import artifact, describe_policy, policy_folder
from forerun.models.logprobs import head_sees
from forerun.models.recurrent import recurrent_modules
from forerun.types import Draft, VerifyResult

if TYPE_CHECKING:
    from forerun.config import SpeculationConfig
    from forerun.drafters.training.trainer import Training, TrainingSetup, Validation


class ModelDrafter(SampledDrafter):
    """The draft model in an engine: its KV cache, the rows' tokens, and how many of them the cache holds."""

    name = "model"
    needs = "a folder or hub name of a smaller model"
    title = "the draft model"
    vllm_refusal = ""

    def __init__(self, model: Policy, policy: Policy) -> None:
        """`model` drafts for `policy`. Raises UserError when their tokens differ, or it has recurrent layers."""
        super().__init__(model.model)
        _check_tokens(model, policy)
        _check_layers(model)
        self._width = min(_width(model), _width(policy))
        widths_differ = _width(model) != _width(policy)
        self._drafted = torch.arange(self._width, device=model.device) if widths_differ else None
        model.model.eval()
        self.model = model
        self._forward = PolicyForward(model, ())

    @classmethod
    def locate(cls, draft: str) -> str:
        """A folder or shipped artifact where `draft` is one, else `draft` as a hub name or alias."""
        try:
            return str(artifact(draft))
        except (UserError, OSError):  # a name with a slash sends it into a folder that need not exist
            return draft

    @classmethod
    def train(cls, policy: Policy, setup: TrainingSetup) -> Training[tuple[Drafter, Validation]]:
        """A copy of the policy with fewer layers: `draft.layers`, else the first two and the last two."""
        from forerun.drafters.training.distill import distill, pruned_copy

        _check_layers(policy)
        count = policy.model.config.get_text_config().num_hidden_layers
        layers = setup.config.layers or sorted({0, 1, count - 2, count - 1} & set(range(count)))
        model = pruned_copy(policy, layers)
        result = yield from distill(model, policy, setup)
        return cls(Policy(model.to(policy.dtype), policy.tokenizer, f"{policy.name}, pruned"), policy), result

    @classmethod
    def vllm_config(cls, speculation: SpeculationConfig, folder: Path | None) -> dict[str, Any]:
        return {"method": "draft_model", "model": str(folder)}

    @classmethod
    def vllm_files(
        cls, speculation: SpeculationConfig, policy: Policy, source: Path, scratch: Path
    ) -> tuple[Path, Mapping[str, Tensor]]:
        assert speculation.draft is not None
        folder = policy_folder(speculation.draft)
        return folder, describe_policy(folder).model.state_dict()

    def open(self, rows: int, positions: int, k: int) -> None:
        self._forward.refresh()
        self._cache = SlotCache(rows, positions)
        self._text = torch.zeros(rows, positions + 1, dtype=torch.int64, device=self.model.device)
        self._known = torch.zeros(rows, dtype=torch.int64, device=self.model.device)  # tokens that the cache holds
        self._fed: int | None = None  # drafts that this round's `propose` ran, None: it did not run

    def prefill(self, first_row: int, tokens: Tensor, lengths: Tensor, features: Tensor | None) -> None:
        """Run all but the prompts' last tokens, as the policy did."""
        span = slice(first_row, first_row + len(tokens))
        self._text[span, : tokens.shape[1]] = tokens
        self._known[span] = lengths - 1
        n = min(tokens.shape[1] - 1, self.model.context)
        if n > 0:
            slots = SlotPass(self._cache, first_row, torch.zeros_like(lengths), n, n, fresh=True)
            self._forward(tokens[:, :n].clamp(max=_width(self.model) - 1), slots, head=False)

    def copy(self, source: int, target: int) -> None:
        self._cache.copy(source, target, min(int(self._known[source]), self._cache.positions))
        self._text[target], self._known[target] = self._text[source], self._known[source]

    @torch.no_grad()
    def propose(self, rows: Rows, budget: Tensor) -> Draft:
        """Read what is new, then draft token by token; a row longer than the model's own context drafts nothing."""
        lengths = torch.minimum(budget, (self.model.context - rows.lengths).clamp(min=0))
        k = int(lengths.max())
        chain = SampledChain(rows, self.round_temperature(rows), self._drafted)
        logits = self._read(rows) if k > 0 else rows.temperature.new_zeros(rows.count, 0)
        for j in range(k):
            token = chain.extend(logits)
            if j < k - 1:
                at = (rows.lengths + j + 1).clamp(max=self.model.context - 1)  # beyond it nothing is read again
                logits = self._run(token[:, None], at, int(at.max()) + 1, torch.zeros_like(at))
        self._fed = max(k - 1, 0) if k > 0 else None
        return chain.draft(lengths)

    def observe(self, rows: Rows, verdict: VerifyResult, features: Tensor | None) -> None:
        """Store the emitted tokens; the cache now holds the newest token and the accepted ones of those it ran."""
        n, count = verdict.tokens.shape[1], rows.count
        at = rows.lengths[:, None] + 1 + torch.arange(n, device=rows.lengths.device)  # zeros behind are written over
        self._text[torch.arange(count, device=at.device)[:, None], at] = verdict.tokens
        if self._fed is not None:
            self._known[:count] = rows.lengths + 1 + verdict.accepted.clamp(max=self._fed)
        self._fed = None

    def _read(self, rows: Rows) -> Tensor:
        """Run each row's tokens from the oldest that any row lacks to its newest; logits [B, V] after that one.

        Rows that lack fewer run some again: the same keys and values at the same places.
        """
        open_rows = rows.lengths < self.model.context
        n = int(torch.where(open_rows, rows.lengths + 1 - self._known[: rows.count], 1).max())
        starts = (rows.lengths + 1 - n).clamp(min=0, max=max(self.model.context - n, 0))
        at = starts[:, None] + torch.arange(n, device=starts.device)
        tokens = self._text[: rows.count].gather(1, at)
        newest = (rows.lengths - starts).clamp(max=n - 1)
        return self._run(tokens, starts, int(starts.max()) + n, newest)

    def _run(self, tokens: Tensor, starts: Tensor, end: int, column: Tensor) -> Tensor:
        """Run tokens [B, n] from `starts` [B]; logits of one column [B] per row, of the ids that are drafted: [B, V].

        An id that only the policy has, of its padding, is read as the last one of the model.
        """
        slots = SlotPass(self._cache, 0, starts, tokens.shape[1], end)
        with head_sees(self.model.model, torch.arange(len(tokens), device=tokens.device), column):
            logits, _ = self._forward(tokens.clamp(max=_width(self.model) - 1), slots)
        assert logits is not None
        return logits[:, : self._width]

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write a Hugging Face folder; `about` goes into config.json under "forerun"."""
        save_policy(self.model, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "forerun": about}, indent=2) + "\n")

    @classmethod
    def load(cls, source: str | Path, policy: Policy) -> Self:
        """Load a draft model in the policy's number format and on its device.

        Args:
            source: folder, shipped artifact, hub name or alias.

        Raises UserError when it cannot be found, has no tokenizer, or another vocabulary than the policy.
        """
        try:
            model = load_policy(cls.locate(str(source)), str(policy.dtype).removeprefix("torch."), str(policy.device))
        except UserError as error:
            raise UserError(
                f"speculation.draft={source} is no draft model: {error}; give a folder or a hub name of a smaller "
                "causal language model with the policy's tokenizer"
            ) from error
        return cls(model, policy)


def _width(policy: Policy) -> int:
    """Rows of its head: its tokens, and padding."""
    return int(policy.model.config.get_text_config().vocab_size)


def _check_tokens(model: Policy, policy: Policy) -> None:
    """Token ids must mean the same to both: drafts are verified by id."""
    if model.tokenizer is None or policy.tokenizer is None:
        if _width(model) != _width(policy):
            raise UserError(
                f"The draft model '{model.name}' has {_width(model)} tokens and the policy '{policy.name}' has "
                f"{_width(policy)}, and without both tokenizers it is not known that they share them: save the "
                "tokenizer beside each"
            )
        return
    own, other = model.tokenizer.get_vocab(), policy.tokenizer.get_vocab()
    different = sorted({t for t, _ in own.items() ^ other.items()}, key=lambda t: (other.get(t, -1), t))
    if different:
        raise UserError(
            f"The tokenizers of the draft model '{model.name}' ({len(own)} tokens) and the policy '{policy.name}' "
            f"({len(other)} tokens) differ in {len(different)}, for example {different[0]!r} with id "
            f"{own.get(different[0])} and {other.get(different[0])}: draft with a model that shares the policy's "
            "tokenizer"
        )


def _check_layers(model: Policy) -> None:
    """It runs ahead of the text and back, and reads some of it twice: a recurrent state allows neither."""
    if recurrent_modules(model.model):
        raise UserError(
            f"'{model.name}' has recurrent layers, and a draft model may have none; draft with a model of attention "
            "layers alone, or with another method, e.g. speculation.method=eagle3"
        )
