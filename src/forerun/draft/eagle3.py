"""EAGLE-3 (Li et al. 2503.01840): one decoder layer that continues the policy's own hidden states.

At position t it reads the fused hidden states g_t of three policy layers and the embedding of the *next* token x_{t+1},
and predicts x_{t+2}. Where no g exists yet, because the policy has not run there, its own output takes g's place.
The head knows a reduced vocabulary of D tokens (d2t); outside of it q is 0, which rejection sampling repairs.
Files are in the layout that vLLM and SpecForge read. Axes: R rows, B live rows, n tokens, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forerun.draft.base import Rows, heat_of_round, sample_draft
from forerun.errors import UserError
from forerun.models import Policy
from forerun.models.cache import SlotCache, SlotPass
from forerun.models.lean import rotate_sign, swap_halves
from forerun.models.load import load_exactly
from forerun.models.taps import check_taps, decoder_layers
from forerun.records import Draft, Verdict


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """Shape of the head. `layers` is the one source of truth for what it reads (numbered as in models/taps.py)."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # the policy's
    draft_vocab_size: int
    layers: tuple[int, ...]
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 8192


class RMSNorm(nn.RMSNorm):
    """In the number format of its input, as the engine runs it, also while float32 weights train under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]"""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Eagle3Head(nn.Module):
    """The trainable part. Parameter names are those of the published checkpoints."""

    d2t: Tensor  # [D] int64, offsets: target id = draft id + d2t
    t2d: Tensor  # [V] bool
    inverse_frequency: Tensor  # [head_dim / 2]
    midlayer: Any

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config = config
        hidden, size, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        self.fc = nn.Linear(hidden * len(config.layers), hidden, bias=False)
        self.midlayer = nn.ModuleDict(
            {
                "input_layernorm": RMSNorm(hidden, eps),  # on the embedding
                "hidden_norm": RMSNorm(hidden, eps),  # on the fused or fed-back hidden state
                "self_attn": nn.ModuleDict(
                    {
                        "q_proj": nn.Linear(2 * hidden, config.num_attention_heads * size, bias=False),
                        "k_proj": nn.Linear(2 * hidden, config.num_key_value_heads * size, bias=False),
                        "v_proj": nn.Linear(2 * hidden, config.num_key_value_heads * size, bias=False),
                        "o_proj": nn.Linear(config.num_attention_heads * size, hidden, bias=False),
                    }
                ),
                "post_attention_layernorm": RMSNorm(hidden, eps),
                "mlp": nn.ModuleDict(
                    {
                        "gate_proj": nn.Linear(hidden, config.intermediate_size, bias=False),
                        "up_proj": nn.Linear(hidden, config.intermediate_size, bias=False),
                        "down_proj": nn.Linear(config.intermediate_size, hidden, bias=False),
                    }
                ),
            }
        )
        self.norm = RMSNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        inverse = config.rope_theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
        self.register_buffer("inverse_frequency", inverse, persistent=False)

    @property
    def vocabulary(self) -> Tensor:
        """Target ids of the draft vocabulary, ascending. [D]"""
        return torch.arange(self.d2t.shape[0], device=self.d2t.device) + self.d2t

    def set_vocabulary(self, target_ids: Tensor) -> None:
        """Make `target_ids` [D], ascending, the draft vocabulary."""
        self.d2t.copy_(target_ids - torch.arange(len(target_ids), device=target_ids.device))
        self.t2d.zero_()[target_ids] = True

    def fuse(self, features: Tensor) -> Tensor:
        """Hidden states at the taps [..., T·H] -> the head's hidden state [..., H]."""
        return self.fc(features.to(self.fc.weight.dtype))

    def query_key_value(self, embedded: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """embedded, hidden [B, n, H], positions [B, n] -> rotated q [B, heads, n, D], k and v [B, kv, n, D]."""
        layer, attention, size = self.midlayer, self.midlayer["self_attn"], self.config.head_dim
        x = torch.cat([layer["input_layernorm"](embedded.to(hidden.dtype)), layer["hidden_norm"](hidden)], dim=-1)
        shape = (*x.shape[:2], -1, size)
        query, key, value = (attention[f"{name}_proj"](x).view(shape) for name in "qkv")
        angle = positions[..., None].float() * self.inverse_frequency
        cos, sin = (torch.cat([t, t], dim=-1)[:, :, None].to(x.dtype) for t in (angle.cos(), angle.sin()))
        query, key = (t * cos + swap_halves(t) * rotate_sign(sin) for t in (query, key))
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Rest of the layer: hidden [B, n, H] before it, attended [B, n, heads, D] -> hidden [B, n, H] after it."""
        layer, mlp = self.midlayer, self.midlayer["mlp"]
        hidden = hidden + layer["self_attn"]["o_proj"](attended.reshape(*hidden.shape[:2], -1))
        x = layer["post_attention_layernorm"](hidden)
        return hidden + mlp["down_proj"](F.silu(mlp["gate_proj"](x)) * mlp["up_proj"](x))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., D]"""
        return self.lm_head(self.norm(hidden))


class Eagle3Drafter:
    """The head at work in an engine: its own cache rows, and what the last verification left to be read in.

    Pending are, per row, the emitted tokens with the policy's hidden states *before* them: the pairs (x_{t+1}, g_t)
    that the head has not read yet. Reading them replaces the entries that it guessed while drafting.
    """

    method = "eagle3"

    def __init__(self, head: Eagle3Head, policy: Policy, *, proposal: str = "sampled", heat: float = 1.0) -> None:
        """`proposal` "argmax" drafts deterministically; `heat` is the drafts' temperature over the rollouts'."""
        check_taps(head.config.layers, len(decoder_layers(policy.model)))
        _check_fit(head.config, policy)
        self.head = head.to(policy.device).eval()
        self.taps = head.config.layers
        self.proposal, self.heat = proposal, heat
        self._embed = policy.model.get_input_embeddings()
        self.vocabulary = head.vocabulary

    def open(self, rows: int, positions: int, k: int) -> None:
        device, width = self.head.fc.weight.device, self.head.fc.in_features
        self.cache = SlotCache(rows, positions)
        self._tokens = torch.zeros(rows, k + 1, dtype=torch.int64, device=device)
        self._features = torch.zeros(rows, k + 1, width, dtype=self.head.fc.weight.dtype, device=device)
        self.pending = torch.zeros(rows, dtype=torch.int64, device=device)

    @torch.no_grad()
    def prefill(self, first_row: int, tokens: Tensor, lengths: Tensor, features: Tensor | None) -> None:
        """Read all pairs of the prompts but the last, which stays pending (as for a row that just emitted a token)."""
        assert features is not None
        rows = torch.arange(first_row, first_row + tokens.shape[0], device=tokens.device)
        last = (lengths - 2).clamp(min=0)  # position of the last pair's hidden state
        self.pending[rows] = (lengths > 1).long()
        self._tokens[rows, 0] = tokens.gather(1, (last + 1).clamp(max=tokens.shape[1] - 1)[:, None])[:, 0]
        self._features[rows, 0] = features[torch.arange(len(rows)), last].to(self._features.dtype)
        if tokens.shape[1] > 2:
            hidden = self.head.fuse(features[:, : tokens.shape[1] - 2])
            slots = SlotPass(
                self.cache, first_row, torch.zeros_like(lengths), hidden.shape[1], hidden.shape[1], fresh=True
            )
            self.run(tokens[:, 1:-1], hidden, slots)

    def copy(self, source: int, target: int) -> None:
        self.cache.copy(source, target, self.cache.positions)
        for store in (self._tokens, self._features, self.pending):
            store[target] = store[source]

    @torch.no_grad()
    def propose(self, rows: Rows, budget: Tensor) -> Draft:
        """Read what is pending, then draft token by token; a row with nothing to read from drafts nothing."""
        count = self.pending[: rows.count]
        lengths = torch.where(count > 0, budget, 0)
        k, n = int(lengths.max()), int(count.max())
        if k == 0:
            return Draft(torch.zeros(rows.count, 0, dtype=torch.int64, device=rows.last.device), lengths)
        hidden = self.read(rows, count, n)
        heat = heat_of_round(self.proposal, rows, self.heat)
        tokens, log_q = [], []
        for slot in range(k):
            token, row = sample_draft(self.head.logits(hidden), rows, slot, heat)
            tokens.append(self.vocabulary[token])
            log_q.append(row)
            if slot < k - 1:
                slots = SlotPass(self.cache, 0, rows.lengths + slot, 1, int(rows.lengths.max()) + slot + 1)
                hidden = self.run(tokens[-1][:, None], hidden[:, None], slots)[:, 0]
        if heat is None:
            return Draft(torch.stack(tokens, dim=1), lengths)
        return Draft(torch.stack(tokens, dim=1), lengths, torch.stack(log_q, dim=1), self.vocabulary)

    def observe(self, rows: Rows, verdict: Verdict, features: Tensor | None) -> None:
        assert features is not None
        n = features.shape[1]
        self._tokens[: rows.count, :n] = verdict.tokens
        self._features[: rows.count, :n] = features.to(self._features.dtype)
        self.pending[: rows.count] = verdict.accepted + 1

    def read(self, rows: Rows, count: Tensor, n: int) -> Tensor:
        """Read what is pending, count [B] pairs of at most n per row; the states [B, H] after the newest tokens."""
        starts = (rows.lengths - count).clamp(min=0)
        slots = SlotPass(self.cache, 0, starts, n, int(starts.max()) + n)
        fused = self.head.fuse(self._features[: rows.count, :n])
        out = self.run(self._tokens[: rows.count, :n], fused, slots)
        return out[torch.arange(rows.count, device=out.device), (count - 1).clamp(min=0)]

    def run(self, tokens: Tensor, hidden: Tensor, slots: SlotPass) -> Tensor:
        """The layer on target tokens [B, n] and the states before them [B, n, H]: the states after them [B, n, H]."""
        query, key, value = self.head.query_key_value(self._embed(tokens), hidden, slots.positions)
        return self.head.finish(hidden, slots.attend(0, query, key, value, None))

    def state_dict(self) -> dict[str, Tensor]:
        return self.head.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the head. Raises UserError when a tensor is missing, unknown or of another shape."""
        load_exactly(self.head, state, "the drafter")
        self.vocabulary = self.head.vocabulary

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write config.json and model.safetensors; `about` records how it was made."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(_to_published(self.head.config, about), indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.head.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path, policy: Policy, *, proposal: str = "sampled", heat: float = 1.0) -> Eagle3Drafter:
        """Read a head in the published layout and check that it fits the policy; keywords as for the constructor.

        Raises:
            UserError: files are missing or broken, or the head was made for another policy.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            config = _from_published(
                json.loads((folder / "config.json").read_text()), len(decoder_layers(policy.model))
            )
            state = load_file(folder / "model.safetensors")
        except (OSError, json.JSONDecodeError, KeyError, SafetensorError) as error:
            raise UserError(f"The drafter in {folder} cannot be read: {type(error).__name__}: {error}") from error
        head = Eagle3Head(config).to(policy.dtype)
        load_exactly(head, state, f"the drafter in {folder}")
        return cls(head, policy, proposal=proposal, heat=heat)


def _check_fit(config: Eagle3Config, policy: Policy) -> None:
    target = policy.model.config.get_text_config()
    for name, ours in (("hidden_size", config.hidden_size), ("vocab_size", config.vocab_size)):
        if ours != getattr(target, name):
            raise UserError(
                f"The drafter was made for a policy with {name} {ours}, and this one has {getattr(target, name)}"
            )


def _to_published(config: Eagle3Config, about: dict[str, Any]) -> dict[str, Any]:
    shape = {k: v for k, v in asdict(config).items() if k != "layers"}
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        **shape,
        "target_hidden_size": config.hidden_size,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": list(config.layers)},
        "forerun": about,
    }


def _from_published(data: dict[str, Any], policy_layers: int) -> Eagle3Config:
    layers = data.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids")
    if layers is None:
        raise UserError(
            "The drafter's config.json does not say which layers it reads (eagle_aux_hidden_state_layer_ids)"
        )
    names = Eagle3Config.__dataclass_fields__.keys() - {"layers"}
    given = {name: data[name] for name in names if name in data}
    given.setdefault("head_dim", data["hidden_size"] // data["num_attention_heads"])
    return Eagle3Config(**given, layers=tuple(layers))
