"""Published EAGLE-3 files: tiny checkpoints in each layout, read here and compared with a slow forward of the layout.

The configs and tensor names below are those of published heads (SpecForge and SafeAILab flat files, EAGLE-3.1,
ModelOpt, speculators), with small sizes. The reference knows no cache, no batch and no module of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from forerun.drafters.base import Rows
from forerun.drafters.eagle3 import Eagle3Drafter
from forerun.drafters.eagle3_checkpoints import read_head
from forerun.engine.local.engine import LocalEngine
from forerun.errors import UserError
from forerun.models import Policy, load_policy
from forerun.models.load import artifact
from forerun.types import Draft
from tiny_models import random_drafter

VOCABULARY, HIDDEN = 55, 48  # the tiny policy's
DRAFTED = [0, 3, 4, 9, 17, 18, 30, 41, 54]
TEXT = [5, 6, 7, 30, 2, 41, 9, 12, 3]
TOLERANCE = 2e-4
LAYER_NAMES = [
    "hidden_norm", "input_layernorm", "post_attention_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
    "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj",
]  # fmt: skip
FLAT: dict[str, Any] = {  # SpecForge configs/*-eagle3.json
    "architectures": ["LlamaForCausalLMEagle3"], "attention_bias": False, "bos_token_id": 1, "head_dim": 8,
    "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": 32, "max_position_embeddings": 2048,
    "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 1, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": VOCABULARY, "draft_vocab_size": len(DRAFTED),
}  # fmt: skip
SPECULATORS: dict[str, Any] = {  # RedHatAI/*-speculator.eagle3
    "architectures": ["Eagle3DraftModel"], "draft_vocab_size": len(DRAFTED), "eagle_aux_hidden_state_layer_ids": None,
    "fc_norm": False, "norm_before_fc": False, "norm_before_residual": True, "norm_output": False,
    "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "policy", "architectures": []}},
    "speculators_model_type": "eagle3", "speculators_version": "0.2.0", "target_hidden_size": None,
    "tie_word_embeddings": False, "transformer_layer_config": {
        "model_type": "llama", "head_dim": 8, "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": 32,
        "num_attention_heads": 4, "num_hidden_layers": 1, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@dataclass(frozen=True)
class Published:
    """A checkpoint: config.json, tensors under the names of the file, and what the layout makes of them."""

    config: dict[str, Any]
    prefix: str = "midlayer."
    aux_layers: tuple[int, ...] = (1, 2, 3)  # inputs of the policy's layers
    dialect: str = "specforge"
    file: str = "model.safetensors"
    absolute: bool = False
    embedding: bool = False
    norms: frozenset[str] = frozenset()
    rope: dict[str, Any] = field(default_factory=dict)
    layers: int = 4  # of the policy

    @property
    def shape(self) -> dict[str, Any]:
        """The layer's settings, wherever the dialect keeps them; speculators leaves Llama's defaults out."""
        defaults = {"rms_norm_eps": 1e-6, "head_dim": HIDDEN // 4}
        return {**defaults, **self.config, **self.config.get("transformer_layer_config", {})}

    def tensors(self) -> dict[str, Tensor]:
        torch.manual_seed(0)
        s = self.shape
        hidden, heads, keys = s["hidden_size"], 4 * s["head_dim"], 2 * s["head_dim"]
        sizes = {
            "q_proj": (heads, 2 * hidden), "k_proj": (keys, 2 * hidden), "v_proj": (keys, 2 * hidden),
            "o_proj": (hidden, heads), "gate_proj": (32, hidden), "up_proj": (32, hidden), "down_proj": (hidden, 32),
        }  # fmt: skip
        found = {"fc.weight": torch.randn(hidden, len(self.aux_layers) * HIDDEN) * 0.1, "norm.weight": scale(hidden)}
        for name in LAYER_NAMES:
            leaf = name.rpartition(".")[2]
            weight = torch.randn(sizes[leaf]) * 0.2 if leaf in sizes else scale(hidden)
            found[f"{self.prefix}{name}.weight"] = weight
            if s.get("mlp_bias" if "mlp" in name else "attention_bias") and leaf in sizes:
                found[f"{self.prefix}{name}.bias"] = torch.randn(sizes[leaf][0]) * 0.3
        if s.get("model_type") == "qwen3":
            found |= {f"{self.prefix}self_attn.{n}_norm.weight": scale(s["head_dim"]) for n in "qk"}
        if "norm_before_fc" in self.norms:
            found["input_norm.weight"] = scale(len(self.aux_layers) * HIDDEN)
        if "fc_norm" in self.norms:
            found |= {f"fc_norm.{i}.weight": scale(HIDDEN) for i in range(len(self.aux_layers))}
        if self.embedding:
            found["embed_tokens.weight"] = torch.randn(VOCABULARY, hidden) * 0.5
        if self.prefix.startswith("model."):
            found = {name if name.startswith("model.") else f"model.{name}": t for name, t in found.items()}
        ids = torch.tensor(DRAFTED)
        found |= {"lm_head.weight": torch.randn(len(ids), hidden) * 0.3}
        found |= {"d2t": ids if self.absolute else ids - torch.arange(len(ids))}
        return found | {"t2d": torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, ids, True)}

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        if self.file.endswith(".bin"):
            torch.save(self.tensors(), folder / self.file)
        else:
            save_file(self.tensors(), folder / self.file)
        return folder


def scale(size: int) -> Tensor:
    return 1 + 0.4 * torch.randn(size)


def flat(**changes: Any) -> dict[str, Any]:
    return {**FLAT, **changes}


def speculators(layer: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        **SPECULATORS,
        **changes,
        "transformer_layer_config": {**SPECULATORS["transformer_layer_config"], **(layer or {})},
    }


IDS = "eagle_aux_hidden_state_layer_ids"
OUTPUTS = {"eagle_config": {IDS: [0, 1, 2], "use_aux_hidden_state": True}}  # the same tensors as the inputs 1, 2, 3
PUBLISHED = {
    "specforge": Published(flat(**OUTPUTS)),
    "angelslim": Published(flat(**{IDS: [1, 2, 3]}), prefix="layers.0."),
    "with-model-prefix": Published(flat(**{IDS: [3, 1, 2]}), prefix="model.layers.0."),
    "safeailab": Published(
        {key: value for key, value in FLAT.items() if key not in ("head_dim", "rope_scaling")},
        aux_layers=(2, 4, 5), file="pytorch_model.bin", layers=8,
    ),
    "absolute-ids": Published(flat(**OUTPUTS), absolute=True),
    "eagle3.1": Published(
        flat(**OUTPUTS, fc_norm=True, norm_output=True), norms=frozenset({"fc_norm", "norm_output"})
    ),
    "modelopt": Published(
        flat(eagle_config={IDS: [], "norm_before_fc": True, "return_hidden_post_norm": True}),
        aux_layers=(2, 4, 5), layers=8, norms=frozenset({"norm_before_fc", "norm_output"}),
    ),
    "own-embedding": Published(flat(**OUTPUTS), embedding=True),
    "narrow": Published(flat(**OUTPUTS, hidden_size=32, target_hidden_size=HIDDEN), embedding=True),
    "linear": Published(
        flat(**OUTPUTS, rope_scaling={"type": "linear", "factor": 2.0}), rope={"rope_type": "linear", "factor": 2.0}
    ),
    "llama3": Published(flat(**OUTPUTS, rope_scaling=LLAMA3), rope=LLAMA3),
    "yarn": Published(flat(**OUTPUTS, rope_scaling=YARN), rope=YARN),
    "speculators": Published(
        speculators(**{IDS: [1, 2, 3]}), prefix="layers.0.", dialect="speculators",
        norms=frozenset({"norm_before_residual"}),
    ),
    "speculators-all-norms": Published(
        speculators(**{IDS: [1, 2, 3]}, norm_before_fc=True, fc_norm=True, norm_output=True), prefix="layers.0.",
        dialect="speculators", norms=frozenset({"norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"}),
    ),
    "speculators-biased": Published(
        speculators({"attention_bias": True, "mlp_bias": True}, norm_before_residual=False), prefix="layers.0.",
        dialect="speculators", aux_layers=(2, 4, 5), layers=8,
    ),
    "speculators-qwen3": Published(
        speculators({"model_type": "qwen3", "attention_bias": True}, **{IDS: [0, 2]}), prefix="layers.0.",
        dialect="speculators", aux_layers=(0, 2), norms=frozenset({"norm_before_residual"}),
    ),
}  # fmt: skip


# --- the reference ----------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """The published forward from the file's own tensors: every step runs the whole text again."""

    published: Published
    policy_embedding: Tensor

    def __post_init__(self) -> None:
        self.tensors = {n.removeprefix("model."): t for n, t in self.published.tensors().items()}
        self.prefix = self.published.prefix.removeprefix("model.")

    def norm(self, x: Tensor, name: str) -> Tensor:
        eps = self.published.shape["rms_norm_eps"]
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * self.tensors[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.tensors[f"{name}.weight"].T
        return out + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else out

    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [n, 1, head_dim]; scaled kinds as Transformers' Llama turns them."""
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        s = self.published.shape
        theta = s.get("rope_theta") or s["rope_parameters"]["rope_theta"]
        at = torch.arange(length)
        if not self.published.rope:
            angle = at[:, None] / theta ** (torch.arange(0, s["head_dim"], 2) / s["head_dim"])
            cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        else:
            rope = {**self.published.rope, "rope_theta": theta}
            names = ("hidden_size", "head_dim", "num_attention_heads", "max_position_embeddings")
            config = LlamaConfig(**{name: s[name] for name in names}, rope_parameters=rope)
            cos, sin = (t[0] for t in LlamaRotaryEmbedding(config)(torch.zeros(1), at[None]))
        return cos[:, None], sin[:, None]

    def fuse(self, features: Tensor) -> Tensor:
        norms = self.published.norms
        if "norm_before_fc" in norms:
            features = self.norm(features, "input_norm")
        if "fc_norm" in norms:
            parts = features.split(HIDDEN, dim=-1)
            features = torch.cat([self.norm(part, f"fc_norm.{i}") for i, part in enumerate(parts)], dim=-1)
        return self.linear(features, "fc")

    def states(self, tokens: list[int], hidden: Tensor) -> Tensor:
        """Outputs [n, H] of the layer on the pairs (token, state before it)."""
        p, layer, n = self.published, self.prefix, len(tokens)
        own = self.tensors.get("embed_tokens.weight", self.policy_embedding)
        normed = self.norm(hidden, f"{layer}hidden_norm")
        around = normed if "norm_before_residual" in p.norms else hidden
        x = torch.cat([self.norm(own[tokens], f"{layer}input_layernorm"), normed], dim=-1)
        query, key, value = (
            self.linear(x, f"{layer}self_attn.{w}_proj").view(n, -1, p.shape["head_dim"]) for w in "qkv"
        )
        if p.shape.get("model_type") == "qwen3":
            query, key = self.norm(query, f"{layer}self_attn.q_norm"), self.norm(key, f"{layer}self_attn.k_norm")
        cos, sin = self.angles(n)

        def turn(t: Tensor) -> Tensor:
            first, second = t.chunk(2, dim=-1)
            return t * cos + torch.cat([-second, first], dim=-1) * sin

        query, key = turn(query), turn(key)
        out = torch.zeros_like(query)
        for head in range(4):
            for i in range(n):
                scores = key[: i + 1, head // 2] @ query[i, head] / p.shape["head_dim"] ** 0.5
                out[i, head] = scores.softmax(0) @ value[: i + 1, head // 2]
        hidden = around + self.linear(out.flatten(1), f"{layer}self_attn.o_proj")
        x = self.norm(hidden, f"{layer}post_attention_layernorm")
        gate = F.silu(self.linear(x, f"{layer}mlp.gate_proj")) * self.linear(x, f"{layer}mlp.up_proj")
        return hidden + self.linear(gate, f"{layer}mlp.down_proj")

    def rows(self, text: list[int], features: Tensor, drafts: list[int]) -> Tensor:
        """Log-probabilities [k, D] over `DRAFTED` of the drafts after `text`, drafted one after the other."""
        tokens, hidden, found = text[1:], self.fuse(features), []
        for draft in drafts:
            out = self.states(tokens, hidden)[-1]
            normed = self.norm(out, "norm")
            found.append((self.tensors["lm_head.weight"] @ normed).log_softmax(0))
            fed = normed if "norm_output" in self.published.norms else out
            tokens, hidden = [*tokens, draft], torch.cat([hidden, fed[None]])
        return torch.stack(found)


def policy_of(tiny: Callable[..., Path], published: Published) -> Policy:
    return load_policy(str(tiny("llama", num_hidden_layers=published.layers)), "float32", "cpu")


def features_of(policy: Policy, aux_layers: tuple[int, ...], text: list[int]) -> Tensor:
    """The inputs of layers `aux_layers`, by Transformers' own numbering: [n, T·H]."""
    with torch.no_grad():
        states = policy.model(torch.tensor([text]), output_hidden_states=True).hidden_states
    return torch.cat([states[layer][0] for layer in aux_layers], dim=-1)


def first_draft(drafter: Eagle3Drafter, features: Tensor, text: list[int], k: int) -> Draft:
    drafter.open(1, 64, k)
    drafter.prefill(0, torch.tensor([text]), torch.tensor([len(text)]), features[None])
    rows = Rows(*(torch.tensor([x]) for x in (text[-1], len(text) - 1, 11)), torch.ones(1))
    return drafter.propose(rows, torch.tensor([k]))


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_head_drafts_as_its_layout_says(tiny: Callable[..., Path], tmp_path: Path, name: str) -> None:
    published = PUBLISHED[name]
    policy = policy_of(tiny, published)
    drafter = Eagle3Drafter.load(published.write(tmp_path), policy)
    assert drafter.dialect == published.dialect and drafter.aux_layers == published.aux_layers
    features = features_of(policy, published.aux_layers, TEXT[:-1])
    draft = first_draft(drafter, features, TEXT, 4)
    assert draft.vocabulary is not None and draft.vocabulary.tolist() == DRAFTED and draft.log_q is not None
    reference = Reference(published, policy.model.get_input_embeddings().weight.detach())
    expected = reference.rows(TEXT, features, draft.tokens[0].tolist())
    torch.testing.assert_close(draft.log_q[0], expected, atol=TOLERANCE, rtol=0)
    for wrong in wrong_readings(published):  # negative control: each convention shows in these numbers
        aux_layers = wrong.aux_layers if len(wrong.aux_layers) == len(published.aux_layers) else published.aux_layers
        other = features_of(policy, aux_layers, TEXT[:-1])
        rows = Reference(wrong, reference.policy_embedding).rows(TEXT, other, draft.tokens[0].tolist())
        assert float((rows - expected).abs().max()) > 20 * TOLERANCE


def wrong_readings(published: Published) -> list[Published]:
    """The same file read against its layout: other auxiliary layers, and the norms that leave no tensor switched."""
    shifted = replace(published, aux_layers=tuple(layer - 1 if layer else 1 for layer in published.aux_layers))
    switched = [replace(published, norms=published.norms ^ {n}) for n in ("norm_before_residual", "norm_output")]
    unscaled = [replace(published, rope={})] if published.rope else []
    return [shifted, *switched, *unscaled]


def test_a_published_head_is_lossless_at_work(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Greedy text with a head of another width, of its own embedding, is the policy's."""
    policy = policy_of(tiny, PUBLISHED["narrow"])
    drafter = Eagle3Drafter.load(PUBLISHED["narrow"].write(tmp_path), policy)
    prompts = [[5, 6, 7], [9], TEXT]
    plain = LocalEngine(policy, slots=2).generate(prompts, max_new_tokens=20, temperature=0.0)
    engine = LocalEngine(policy, drafter, k=3, slots=2)
    assert [r.tokens for r in engine.generate(prompts, max_new_tokens=20, temperature=0.0)] == [r.tokens for r in plain]
    assert engine.metrics()["drafted"] > 0


def test_a_copy_of_the_policys_embedding_is_not_kept(policy: Policy, tmp_path: Path) -> None:
    published = PUBLISHED["own-embedding"]
    folder = published.write(tmp_path)
    same = {**published.tensors(), "embed_tokens.weight": policy.model.get_input_embeddings().weight.detach().clone()}
    save_file(same, folder / "model.safetensors")
    drafter = Eagle3Drafter.load(folder, policy)
    assert not drafter.head.config.own_embedding and "embed_tokens.weight" not in drafter.state_dict()


def test_unordered_ids_take_their_rows_along(policy: Policy, tmp_path: Path) -> None:
    published = PUBLISHED["absolute-ids"]
    drafters = [Eagle3Drafter.load(published.write(tmp_path / "sorted"), policy)]
    tensors, order = published.tensors(), torch.tensor([4, 1, 8, 0, 2, 7, 3, 6, 5])
    tensors |= {"d2t": tensors["d2t"][order], "lm_head.weight": tensors["lm_head.weight"][order]}
    published.write(tmp_path / "mixed")
    save_file(tensors, tmp_path / "mixed" / "model.safetensors")
    drafters.append(Eagle3Drafter.load(tmp_path / "mixed", policy))
    assert torch.equal(drafters[0].vocabulary, drafters[1].vocabulary)
    assert torch.equal(drafters[0].head.lm_head.weight, drafters[1].head.lm_head.weight)


def test_offsets_without_t2d(policy: Policy, tmp_path: Path) -> None:
    """Neighbouring tokens have equal offsets, which no ids have; where there are none, nothing is guessed."""
    published = PUBLISHED["specforge"]
    tensors = published.tensors()
    del tensors["t2d"]
    published.write(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    assert Eagle3Drafter.load(tmp_path, policy).vocabulary.tolist() == DRAFTED
    save_file({**tensors, "d2t": torch.arange(1, 10) * 2}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="could be offsets or target ids"):
        Eagle3Drafter.load(tmp_path, policy)


def test_our_older_files_number_inputs() -> None:
    """The shipped head was written when `eagle_config` held our own numbers."""
    found = read_head(artifact("quickstart-eagle3"), 30, torch.zeros(1, 576))
    assert found.dialect == "forerun" and found.config.layers == (2, 15, 27)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("specforge", {"eagle_config": {}}, "not three layers of a policy with 4"),
        ("specforge", {"num_hidden_layers": 2}, "num_hidden_layers 2; only 1"),
        ("specforge", {"hidden_act": "gelu"}, "hidden_act gelu; only silu"),
        ("specforge", {"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state False"),
        ("specforge", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rotary embedding is .*dynamic"),
        ("specforge", {"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}}, "mrope_section"),
        ("specforge", {"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25"),
        ("specforge", {"model_type": "deepseek_v3"}, "model_type 'deepseek_v3'"),
        ("specforge", {"quantization_config": {"bits": 4}}, "quantised"),
        ("specforge", {"intermediate_size": ...}, "lacks intermediate_size"),
        ("specforge", {"draft_vocab_size": 12}, "draft_vocab_size is 12, but d2t has 9 entries"),
        ("specforge", {"vocab_size": 60}, "agree with the 9 tokens|vocab_size 60, and this one has 55"),
        ("specforge", {"fc_norm": True}, r"missing \['fc_norm.0.weight'"),
        ("eagle3.1", {"fc_norm": False}, r"unknown \['fc_norm.0.weight'"),
        ("narrow", {"target_hidden_size": 40}, r"fc.weight .* expected \[32, 120\]"),
        ("speculators", {"norm_before_residual": ...}, "lacks norm_before_residual"),
        ("speculators", {"speculators_model_type": "peagle"}, "type 'peagle'"),
        ("speculators", {"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, r"layers \[1, 2, 9\], but the policy has"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(
    policy: Policy, tmp_path: Path, name: str, change: dict[str, Any], sentence: str
) -> None:
    published = PUBLISHED[name]
    config = {**published.config, **change}
    config = {key: value for key, value in config.items() if value is not ...}
    published.write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=sentence):
        Eagle3Drafter.load(tmp_path, policy)


def test_other_configs_and_tensors_are_refused(policy: Policy, tmp_path: Path) -> None:
    published = PUBLISHED["specforge"]
    published.write(tmp_path)
    tensors = published.tensors()
    for name, tensor, sentence in (
        ("layers.1.mlp.up_proj.weight", torch.ones(2), "unknown .*layers.1.mlp.up_proj.weight"),
        ("d2t", torch.full((9,), 70), "neither 9 offsets nor as many target ids of 55 tokens"),
        ("fc.weight", torch.ones(48, 96), r"fc.weight .* has shape \[48, 96\], expected \[48, 144\]"),
    ):
        save_file({**tensors, name: tensor}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=sentence):
            Eagle3Drafter.load(tmp_path, policy)
    for name, sentence in (("lm_head.weight", "no lm_head.weight"), ("d2t", "no d2t that says which")):
        save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=sentence):
            Eagle3Drafter.load(tmp_path, policy)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model.safetensors nor pytorch_model.bin"):
        Eagle3Drafter.load(tmp_path, policy)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"not tensors")
    with pytest.raises(UserError, match=r"pytorch_model.bin cannot be read"):
        Eagle3Drafter.load(tmp_path, policy)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="of no EAGLE-3 head"):
        Eagle3Drafter.load(tmp_path, policy)
    PUBLISHED["narrow"].write(tmp_path)
    save_file(
        {n: t for n, t in PUBLISHED["narrow"].tensors().items() if "embed" not in n}, tmp_path / "model.safetensors"
    )
    with pytest.raises(UserError, match=r"hidden size 32 and no embed_tokens\.weight"):
        Eagle3Drafter.load(tmp_path, policy)


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["specforge", "speculators"])
@pytest.mark.parametrize("name", ["specforge", "eagle3.1", "narrow", "llama3", "speculators-qwen3"])
def test_written_head_is_read_back(tiny: Callable[..., Path], tmp_path: Path, layout: str, name: str) -> None:
    policy = policy_of(tiny, PUBLISHED[name])
    drafter = Eagle3Drafter.load(PUBLISHED[name].write(tmp_path / "published"), policy)
    drafter.save(tmp_path / "ours", {"epochs": 3}, layout)
    again = Eagle3Drafter.load(tmp_path / "ours", policy)
    assert again.head.config == drafter.head.config and again.dialect == {"specforge": "forerun"}.get(layout, layout)
    for key, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["forerun"] == {"epochs": 3} and config["eagle_aux_hidden_state_layer_ids"] == list(drafter.aux_layers)


def test_written_names_are_the_published_ones(policy: Policy, tmp_path: Path) -> None:
    drafter = random_drafter(policy, vocabulary=DRAFTED)
    for layout, prefix in (("specforge", "midlayer."), ("speculators", "layers.0.")):
        drafter.save(tmp_path / layout, {}, layout)
        outer = ["d2t", "fc.weight", "lm_head.weight", "norm.weight", "t2d"]
        names = sorted([*outer, *(f"{prefix}{name}.weight" for name in LAYER_NAMES)])
        assert sorted(load_file(tmp_path / layout / "model.safetensors")) == names
    config = json.loads((tmp_path / "speculators" / "config.json").read_text())
    assert config.keys() - {"forerun"} <= SPECULATORS.keys()
    assert config["speculators_config"]["verifier"]["architectures"] == ["LlamaForCausalLM"]
    flat_config = json.loads((tmp_path / "specforge" / "config.json").read_text())
    assert flat_config["eagle_config"][IDS] == [-1, 0, 2]  # SGLang adds one
    assert set(FLAT) - set(flat_config) <= {"bos_token_id", "torch_dtype", "use_cache"}
    with pytest.raises(UserError, match="specforge or speculators, not 'gguf'"):
        drafter.save(tmp_path / "other", {}, "gguf")
