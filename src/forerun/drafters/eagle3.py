"""EAGLE-3 (Li et al. 2503.01840): one decoder layer that continues the policy's own hidden states.

At position t it reads the fused hidden states g_t of three policy layers and the embedding of the *next* token x_{t+1},
and predicts x_{t+2}. Where no g exists yet, because the policy has not run there, its own output replaces g.
The head drafts a reduced vocabulary of D tokens (d2t); outside of it q is 0, which rejection sampling repairs.
A row longer than the head's own context drafts nothing. Checkpoint formats: eagle3_checkpoints.py.
Axes: R rows, B live rows, n tokens, T auxiliary layers, H hidden size, N sequences, J depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forerun.drafters.base import Drafter, Rows
from forerun.drafters.eagle3_checkpoints import Eagle3Config as Eagle3Config
from forerun.drafters.eagle3_checkpoints import head_files, read_head
from forerun.drafters.files import check_fit, write_drafter
from forerun.drafters.sampled import HeadDrafter, SampledChain
from forerun.drafters.temperature import tempered_head
from forerun.drafters.trainable import TeacherBatch, TrainableHead, scored_bases
from forerun.drafters.unroll import KeysAndValues, causal_attention, compute, unrolled_attention
from forerun.models import Policy
from forerun.models.auxiliary import check_aux_layers, decoder_layers, default_aux_layers
from forerun.models.cache import SlotPass
from forerun.models.checks import require_finite
from forerun.models.fused import rotate_sign, swap_halves
from forerun.models.load import artifact, load_exactly, saved_embedding
from forerun.types import Draft

if TYPE_CHECKING:
    from forerun.config import DraftConfig, SpeculationConfig
    from forerun.drafters.training.trainer import Training, TrainingSetup, Validation


class RMSNorm(nn.RMSNorm):
    """Computes in the dtype of its input, as in the engine, also while float32 weights train under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]"""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Eagle3Head(TrainableHead):
    """The trainable part. Parameter names are those of the published checkpoints."""

    d2t: Tensor  # [D] int64, offsets: target id = draft id + d2t
    t2d: Tensor  # [V] bool
    midlayer: Any

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config = config
        hidden, eps = config.hidden_size, config.rms_norm_eps
        if config.norm_before_fc:
            self.input_norm = RMSNorm(config.aux_width * len(config.layers), eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(config.aux_width, eps) for _ in config.layers)
        self.fc = nn.Linear(config.aux_width * len(config.layers), hidden, bias=False)
        self.midlayer = _midlayer(config)
        self.norm = RMSNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        # no buffer: frequencies stay float32 in a bfloat16 head, or far positions would get other angles
        self._frequencies, self._rotary_scale = rotary(config)

    @property
    def vocabulary(self) -> Tensor:
        return torch.arange(self.d2t.shape[0], device=self.d2t.device) + self.d2t

    def set_vocabulary(self, target_ids: Tensor) -> None:
        """Make `target_ids` [D], ascending, the draft vocabulary."""
        self.d2t.copy_(target_ids - torch.arange(len(target_ids), device=target_ids.device))
        self.t2d.zero_()[target_ids] = True

    def fuse(self, features: Tensor) -> Tensor:
        """Auxiliary hidden states [..., T·H] -> the head's hidden state [..., H]."""
        features = features.to(self.fc.weight.dtype)
        if self.config.norm_before_fc:
            features = self.input_norm(features)
        if self.config.fc_norm:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(features)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, n, head_dim] float32 of the rotary embedding at positions [B, n]."""
        self._frequencies = self._frequencies.to(positions.device)
        angle = positions[..., None].float() * self._frequencies
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos() * self._rotary_scale, angle.sin() * self._rotary_scale

    def query_key_value(self, embedded: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """embedded, hidden [B, n, H], positions [B, n] -> rotated q [B, heads, n, D], k and v [B, kv, n, D]."""
        layer, attention, size = self.midlayer, self.midlayer["self_attn"], self.config.head_dim
        x = torch.cat([layer["input_layernorm"](embedded.to(hidden.dtype)), layer["hidden_norm"](hidden)], dim=-1)
        shape = (*x.shape[:2], -1, size)
        query, key, value = (attention[f"{name}_proj"](x).view(shape) for name in "qkv")
        if self.config.qk_norm:
            query, key = attention["q_norm"](query), attention["k_norm"](key)
        cos, sin = (t[:, :, None].to(x.dtype) for t in self.angles(positions))
        query, key = (t * cos + swap_halves(t) * rotate_sign(sin) for t in (query, key))
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Rest of the layer: hidden [B, n, H] before it, attended [B, n, heads, D] -> hidden [B, n, H] after it."""
        layer, mlp = self.midlayer, self.midlayer["mlp"]
        residual = layer["hidden_norm"](hidden) if self.config.norm_before_residual else hidden
        hidden = residual + layer["self_attn"]["o_proj"](attended.reshape(*hidden.shape[:2], -1))
        x = layer["post_attention_layernorm"](hidden)
        hidden = hidden + mlp["down_proj"](F.silu(mlp["gate_proj"](x)) * mlp["up_proj"](x))
        return self.norm(hidden) if self.config.norm_output else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., D]"""
        return self.lm_head(hidden if self.config.norm_output else self.norm(hidden))

    def embedding(self, policy: Policy) -> Any:
        """Its own input embedding, or the policy's."""
        return self.embed_tokens if self.config.own_embedding else policy.model.get_input_embeddings()

    def unroll(self, policy: Policy, teacher: TeacherBatch, depth: int) -> list[Tensor]:
        length = teacher.tokens.shape[1]
        first = max(0, int(teacher.scored.any(0).float().argmax()) - 1)  # earliest base that any sequence scores
        embedded = self.embedding(policy)(teacher.tokens).detach()
        positions = torch.arange(length, device=teacher.tokens.device)[None]
        hidden = self.fuse(teacher.features[:, :-1])
        run = partial(compute, teacher.tokens.numel() * self.config.kept_bytes)
        query, key, value = run(self.query_key_value, embedded[:, 1:], hidden, positions[:, :-1])
        context = key, value  # pass 0's
        own: list[KeysAndValues] = []  # those of later passes, one key per base
        hidden = run(self.finish, hidden[:, first:], causal_attention(query, key, value)[:, first:])
        results = []
        for j in range(depth):
            last = length - 2 - j  # bases beyond it have no next token to compare with
            rows = scored_bases(teacher.scored, j)[:, first : last + 1]
            results.append(hidden[:, : rows.shape[1]][rows])
            if j == depth - 1 or last - 1 < first:
                break
            kept = last - first  # bases first .. last-1 can go one token further
            hidden = hidden[:, :kept]
            now = slice(first + 1 + j, last + 1 + j)
            query, key, value = run(self.query_key_value, embedded[:, 1:][:, now], hidden, positions[:, now])
            own = [(k[:, :, :kept], v[:, :, :kept]) for k, v in own] + [(key, value)]
            hidden = run(self.finish, hidden, unrolled_attention(query, context, own, first))
        return results


def _midlayer(config: Eagle3Config) -> nn.ModuleDict:
    hidden, size, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    attention: dict[str, nn.Module] = {
        **{name: nn.Linear(2 * hidden, width, bias=config.attention_bias) for name, width in widths.items()},
        "o_proj": nn.Linear(queries, hidden, bias=config.attention_bias),
    }
    if config.qk_norm:
        attention |= {"q_norm": RMSNorm(size, eps), "k_norm": RMSNorm(size, eps)}
    mlp = {
        "gate_proj": nn.Linear(hidden, config.intermediate_size, bias=config.mlp_bias),
        "up_proj": nn.Linear(hidden, config.intermediate_size, bias=config.mlp_bias),
        "down_proj": nn.Linear(config.intermediate_size, hidden, bias=config.mlp_bias),
    }
    return nn.ModuleDict(
        {
            "input_layernorm": RMSNorm(hidden, eps),  # on the embedding
            "hidden_norm": RMSNorm(hidden, eps),  # on the fused or fed-back hidden state
            "self_attn": nn.ModuleDict(attention),
            "post_attention_layernorm": RMSNorm(hidden, eps),
            "mlp": nn.ModuleDict(mlp),
        }
    )


def rotary(config: Eagle3Config) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] float32 of the rotary embedding, and what scales its cos and sin."""
    if config.rope_scaling is None:
        return config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim), 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    shape = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={**config.rope_scaling, "rope_theta": config.rope_theta},
    )
    inverse, scale = ROPE_INIT_FUNCTIONS[config.rope_scaling["rope_type"]](shape, torch.device("cpu"))
    return inverse.float(), float(scale)


class Eagle3Drafter(HeadDrafter):
    """The head in an engine."""

    name = "eagle3"
    needs = "a folder or a shipped artifact"
    vllm_refusal = ""
    vllm_scales_drafts = True

    def __init__(self, head: Eagle3Head, policy: Policy) -> None:
        """Raises UserError when the head was made for another policy."""
        super().__init__(head, policy, layers=1)
        check_aux_layers(head.config.layers, len(decoder_layers(policy.model)))
        check_fit(policy, {"hidden_size": head.config.aux_width, "vocab_size": head.config.vocab_size})
        self.dialect = "forerun"
        self.vocabulary = head.vocabulary
        self._embed = head.embedding(policy)
        self._verifier = {"name_or_path": policy.name, "architectures": [type(policy.model).__name__]}
        self._beyond, self._outgrown = 0, False

    @classmethod
    def train(cls, policy: Policy, setup: TrainingSetup) -> Training[tuple[Drafter, Validation]]:
        from forerun.drafters.training.heads import train_head

        head = new_head(policy, setup.pairs, setup.config)
        result = yield from train_head(head, policy, setup)
        return Eagle3Drafter(head.to(policy.dtype), policy), result

    @classmethod
    def vllm_config(cls, speculation: SpeculationConfig, folder: Path | None) -> dict[str, Any]:
        return {"method": "eagle3", "model": str(folder)}

    @classmethod
    def vllm_files(
        cls, speculation: SpeculationConfig, policy: Policy, source: Path, scratch: Path
    ) -> tuple[Path, Mapping[str, Tensor]]:
        """A head of any dialect, read as the local engine reads it and written again for vLLM.

        vLLM's runners number layers differently where a file leaves it open, and have no place for the map of a full
        vocabulary. The output head is divided by the draft temperature, which scales the logits.
        """
        assert speculation.draft is not None
        layers = len(decoder_layers(policy.model))
        head = read_head(artifact(speculation.draft), layers, saved_embedding(policy, source))
        data, tensors = head_files(head.config, head.state, "specforge")
        tensors["lm_head.weight"] = tempered_head(tensors["lm_head.weight"], speculation.fixed_draft_temperature)
        if head.config.draft_vocab_size == head.config.vocab_size:
            tensors = {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
        write_drafter(scratch / "drafter", data, tensors)
        return scratch / "drafter", head.state

    def open(self, rows: int, positions: int, k: int) -> None:
        super().open(rows, positions, k)
        self._outgrown = positions > self.head.config.max_position_embeddings  # whether a row could be

    def read_prompts(self, tokens: Tensor, features: Tensor, slots: SlotPass) -> None:
        self.run(tokens[:, 1:-1], self.head.fuse(features), slots)

    @torch.no_grad()
    def propose(self, rows: Rows, budget: Tensor) -> Draft:
        """Read what is pending, then draft token by token; a row without pending pairs drafts nothing."""
        count = self.pending[: rows.count]
        lengths = torch.where(count > 0, self.within(rows, budget), 0)
        k, n = int(lengths.max()), int(count.max())
        chain = SampledChain(rows, self.round_temperature(rows), self.vocabulary)
        if k == 0:
            return chain.draft(lengths)
        hidden = self.read(rows, count, n)
        for j in range(k):
            token = chain.extend(self.head.logits(hidden))
            if j < k - 1:
                slots = SlotPass(self.cache, 0, rows.lengths + j, 1, int(rows.lengths.max()) + j + 1)
                hidden = self.run(token[:, None], hidden[:, None], slots)[:, 0]
        return chain.draft(lengths)

    def within(self, rows: Rows, budget: Tensor) -> Tensor:
        """`budget` [B] cut at the head's last position; counts the rows that are cut.

        The newest token is read at the position before its own, and every further draft needs one position more.
        """
        if not self._outgrown:
            return budget
        reach = (self.head.config.max_position_embeddings - rows.lengths + 1).clamp(min=0)
        self._beyond += int((reach < budget).sum())
        return torch.minimum(budget, reach)

    def metrics(self) -> dict[str, float]:
        """Rounds of a row that the head's own context cut short, if any; the draft temperature."""
        beyond = {"rows_beyond_drafter_context": self._beyond} if self._beyond else {}
        return {**beyond, **super().metrics()}

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

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.vocabulary = self.head.vocabulary

    def save(self, folder: Path, about: dict[str, Any], layout: str = "specforge") -> None:
        """Write config.json and model.safetensors; `about` records how it was made.

        Args:
            layout: of the files, "specforge" or "speculators"; vLLM reads both.
        """
        data, tensors = head_files(self.head.config, self.head.state_dict(), layout)
        if layout == "speculators":
            data["speculators_config"] = {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
                "verifier": self._verifier,
            }
        write_drafter(folder, {**data, "forerun": about}, tensors)

    @classmethod
    def load(cls, source: Path, policy: Policy) -> Self:
        """Read a head in any published layout (see `dialect`) and check that it fits the policy.

        Raises UserError when files are missing or broken, or the head was made for another policy.
        """
        layers, embedding = len(decoder_layers(policy.model)), policy.model.get_input_embeddings().weight
        found = read_head(source, layers, embedding)
        head = Eagle3Head(found.config).to(policy.dtype)
        load_exactly(head, found.state, f"the drafter in {source}")
        require_finite(f"The drafter in {source}", head.named_parameters())
        drafter = cls(head, policy)
        drafter.dialect = found.dialect
        return drafter


def new_head(policy: Policy, pairs: Sequence[tuple[list[int], list[int]]], config: DraftConfig) -> Eagle3Head:
    """A new head for this policy, started from the policy's own last layer and output head.

    Its draft vocabulary: see `frequent_tokens`.
    """
    from forerun.drafters.training.heads import frequent_tokens

    target = policy.model.config.get_text_config()
    layers = tuple(config.layers or default_aux_layers(target.num_hidden_layers))
    vocabulary = frequent_tokens(pairs, config.vocab)
    rope = getattr(target, "rope_parameters", None) or {}
    head = Eagle3Head(
        Eagle3Config(
            hidden_size=target.hidden_size,
            intermediate_size=config.intermediate or target.intermediate_size,
            num_attention_heads=target.num_attention_heads,
            num_key_value_heads=target.num_key_value_heads,
            head_dim=getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads,
            vocab_size=target.vocab_size,
            draft_vocab_size=len(vocabulary),
            layers=layers,
            rms_norm_eps=float(getattr(target, "rms_norm_eps", 1e-5)),
            rope_theta=float(rope.get("rope_theta", 10000.0)),
            max_position_embeddings=target.max_position_embeddings,
        )
    )
    head.set_vocabulary(vocabulary)
    _start_from(head, policy.model)
    return head.to(policy.device)


@torch.no_grad()
def _start_from(head: Eagle3Head, model: Any) -> None:
    """Copy what has the same meaning and shape in the policy's last layer; the last auxiliary state is passed on."""
    layer, own = decoder_layers(model)[-1], head.midlayer
    head.fc.weight.normal_(0, 0.01)
    head.fc.weight[:, -head.config.hidden_size :] += torch.eye(head.config.hidden_size, device=head.fc.weight.device)
    head.lm_head.weight.copy_(model.get_output_embeddings().weight[head.vocabulary])
    copies = [  # ours, and theirs, which may be missing
        (own["self_attn"]["o_proj"].weight, _weight(layer, "self_attn", "o_proj")),
        (own["post_attention_layernorm"].weight, _weight(layer, "post_attention_layernorm")),
        (own["hidden_norm"].weight, _weight(layer, "input_layernorm")),
        (head.norm.weight, _weight(model.base_model, "norm")),
    ]
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = own["self_attn"][name].weight
        weight.normal_(0, 0.02)
        copies.append((weight[:, head.config.hidden_size :], _weight(layer, "self_attn", name)))
    for name in ("gate_proj", "up_proj", "down_proj"):
        copies.append((own["mlp"][name].weight, _weight(layer, "mlp", name)))
    for mine, theirs in copies:
        if theirs is not None and theirs.shape == mine.shape:
            mine.copy_(theirs)


def _weight(module: Any, *path: str) -> Any:
    """The weight of a submodule; None where there is none of that name."""
    for name in (*path, "weight"):
        module = getattr(module, name, None)
    return module
