"""What drafters of sampled chains share: weights, drafting token by token, and a head's pending pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from forerun.acceptance.random import Purpose, inverse_cdf_log, round_keys, uniforms
from forerun.drafters.base import Drafter, Rows
from forerun.drafters.temperature import Temperature, draft_temperature_of
from forerun.drafters.trainable import TrainableHead
from forerun.errors import UserError
from forerun.models import Policy
from forerun.models.cache import SlotCache, SlotPass
from forerun.models.load import artifact, load_exactly
from forerun.types import Draft, VerifyResult

if TYPE_CHECKING:  # an engine with a drafter needs no recipe, and so no pydantic
    from forerun.config import SpeculationConfig


class SampledDrafter(Drafter):
    """Base class of drafters with weights that sample their chains."""

    trains = samples = True
    needs: ClassVar[str]  # what `speculation.draft` names, for the error without one
    title: ClassVar[str] = "the drafter"  # in errors about its weights

    def __init__(self, module: nn.Module) -> None:
        """`module`: its weights. Drafts are drawn at the temperature of the rollouts, see `draw`."""
        self._module = module
        self.draw("sampled", 1.0)

    def draw(self, proposal: str, draft_temperature: Temperature) -> Self:
        """Set how drafts are drawn; returns itself.

        Args:
            proposal: "sampled", or "argmax": the likeliest tokens, with a one-hot q.
            draft_temperature: relative to that of the rollouts, or "auto", see temperature.py.

        Raises UserError when it is "auto", and nothing is sampled.
        """
        self.proposal = proposal
        self.draft_temperature = draft_temperature_of(draft_temperature, proposal)
        return self

    @classmethod
    def from_config(cls, policy: Policy, speculation: SpeculationConfig) -> Self:
        drafter = cls.load(cls.source(speculation), policy)
        return drafter.draw(speculation.proposal, speculation.draft_temperature)

    @classmethod
    def source(cls, speculation: SpeculationConfig) -> Any:
        """What `load` takes. Raises UserError when the recipe names no drafter, or one that does not exist."""
        if speculation.draft is None:
            raise UserError(f"speculation.method={cls.name} needs speculation.draft, {cls.needs}")
        return cls.locate(speculation.draft)

    @classmethod
    def locate(cls, draft: str) -> Any:
        """Folder of a drafter: a folder or shipped artifact."""
        return artifact(draft)

    @classmethod
    def load(cls, source: Path, policy: Policy) -> Self:
        """Read a saved drafter. Raises UserError when it does not fit the policy."""
        raise NotImplementedError(f"{cls.__name__}.load")

    def state_dict(self) -> dict[str, Tensor]:
        return self._module.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        load_exactly(self._module, state, self.title)

    def learn(self, rows: Rows, draft: Draft, logits: Tensor, verdict: VerifyResult) -> None:
        self.draft_temperature.learn(rows, draft, logits, verdict)

    def metrics(self) -> Mapping[str, float]:
        return self.draft_temperature.metrics()

    def round_temperature(self, rows: Rows) -> float | None:
        """The draft temperature of a round; None: one-hot drafts, as `proposal` or greedy rows ask."""
        greedy = self.proposal == "argmax" or bool((rows.temperature == 0).all())
        return None if greedy else self.draft_temperature.value


class HeadDrafter(SampledDrafter):
    """Base class of heads that continue the policy's hidden states: a KV cache, and per row the pairs to read next.

    Pair p is (x_{p+1}, h_p): a token with the policy's hidden states before it. Pending are the pairs that the last
    round emitted and, for a head of n layers, n - 1 older ones: layer j had guessed the tokens j places further on, and
    reads them again now that they are known. Reading replaces the cache entries that were guessed while drafting.
    """

    cotrains = True

    def __init__(self, head: Any, policy: Policy, layers: int) -> None:
        super().__init__(head)
        self.head = head.to(policy.device).eval()
        self.aux_layers = head.config.layers
        self._layers = layers

    def trainable_head(self) -> TrainableHead:
        return self.head

    def open(self, rows: int, positions: int, k: int) -> None:
        weight, config = next(self.head.parameters()), self.head.config
        width, size = k + self._layers, config.aux_width * len(config.layers)
        self.cache = SlotCache(rows, positions + self._layers - 1, positions - k - 1)
        self._tokens = torch.zeros(rows, width, dtype=torch.int64, device=weight.device)
        self._features = torch.zeros(rows, width, size, dtype=weight.dtype, device=weight.device)
        self.pending = torch.zeros(rows, dtype=torch.int64, device=weight.device)

    @torch.no_grad()
    def prefill(self, first_row: int, tokens: Tensor, lengths: Tensor, features: Tensor | None) -> None:
        """Read all pairs of the prompts but the last n, which stay pending (as for a row that just emitted them)."""
        assert features is not None
        layers, rows = self._layers, slice(first_row, first_row + len(tokens))
        count = (lengths - 1).clamp(max=layers)
        places = (lengths - 1 - count)[:, None] + torch.arange(layers, device=tokens.device)  # [P, n]
        batch = torch.arange(len(tokens), device=tokens.device)[:, None]
        self.pending[rows] = count
        self._tokens[rows, :layers] = tokens[batch, (places + 1).clamp(max=tokens.shape[1] - 1)]
        known = features[batch, places.clamp(max=features.shape[1] - 1)]
        self._features[rows, :layers] = known.to(self._features.dtype)
        width = tokens.shape[1] - 1 - layers
        if width > 0:
            slots = SlotPass(self.cache, first_row, torch.zeros_like(lengths), width, width, fresh=True)
            self.read_prompts(tokens, features[:, :width], slots)

    def read_prompts(self, tokens: Tensor, features: Tensor, slots: SlotPass) -> None:
        """Run the head over pairs 0 .. n-1 of prompts: tokens [P, L], features [P, n, T·H]."""
        raise NotImplementedError(f"{type(self).__name__}.read_prompts")

    def copy(self, source: int, target: int) -> None:
        self.cache.copy(source, target, self.cache.positions)
        for store in (self._tokens, self._features, self.pending):
            store[target] = store[source]

    def observe(self, rows: Rows, verdict: VerifyResult, features: Tensor | None) -> None:
        assert features is not None
        count, older = self.pending[: rows.count], self._layers - 1
        kept = count.clamp(max=older)
        batch = torch.arange(rows.count, device=count.device)[:, None]
        source = (count - kept)[:, None] + torch.arange(older, device=count.device)  # [B, n - 1]
        target = kept[:, None] + torch.arange(features.shape[1], device=count.device)  # [B, new]
        for store, new in ((self._tokens, verdict.tokens), (self._features, features.to(self._features.dtype))):
            store[: rows.count, :older] = store[batch, source]
            store[batch, target] = new
        self.pending[: rows.count] = kept + verdict.accepted + 1


class SampledChain:
    """A chain draft that grows position by position."""

    def __init__(self, rows: Rows, draft_temperature: float | None, vocabulary: Tensor | None) -> None:
        """`vocabulary` [D]: target ids of the drafter's logits; None: all of the target's."""
        self._rows, self._temperature, self._vocabulary = rows, draft_temperature, vocabulary
        self._tokens: list[Tensor] = []
        self._log_q: list[Tensor] = []

    def extend(self, logits: Tensor) -> Tensor:
        """Draw the next position from logits [B, D]; its target ids [B]."""
        column, log_q = sample_draft(logits, self._rows, len(self._tokens), self._temperature)
        token = column if self._vocabulary is None else self._vocabulary[column]
        self._tokens.append(token)
        self._log_q.append(log_q)
        return token

    def draft(self, lengths: Tensor) -> Draft:
        """What was drawn, of which `lengths` [B] count."""
        if not self._tokens:
            return Draft(self._rows.last.new_zeros(self._rows.count, 0), lengths)
        tokens = torch.stack(self._tokens, dim=1)
        if self._temperature is None:
            return Draft(tokens, lengths)
        return Draft(tokens, lengths, torch.stack(self._log_q, dim=1), self._vocabulary)


def sample_draft(logits: Tensor, rows: Rows, position: int, draft_temperature: float | None) -> tuple[Tensor, Tensor]:
    """Draw draft position `position` of every row from the drafter's logits [B, D]; greedy rows take their argmax.

    Args:
        draft_temperature: relative to that of the rollouts; None: every row takes its argmax.

    Returns:
        Tokens [B] as indices into D, and the log-probabilities [B, D] that they were drawn from (with None, where q is
        one-hot, the logits).
    """
    if draft_temperature is None:
        return logits.argmax(-1), logits
    warm = rows.temperature > 0
    temperature = torch.where(warm, rows.temperature, 1.0) * draft_temperature
    log_q = torch.log_softmax(logits.float() / temperature[:, None], dim=-1)
    keys = round_keys(rows.lengths, position + 1)[:, position:]
    drawn = inverse_cdf_log(log_q, uniforms(rows.seeds, keys, Purpose.DRAFT)[:, 0])
    return torch.where(warm, drawn, logits.argmax(-1)), log_q
