"""Shapes of language models, and the parameter counts and cache sizes that follow from them.

Caches are bytes at two bytes per value unless said otherwise. A shape comes from a Hugging Face `config.json` (a dict,
a file or a model folder) or by name from `data/models.json`. Biases and norms are not counted (below 0.1 % of the
parameters). Not supported: convolutions, linear attention.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forerun.errors import UserError
from forerun.simulate.core.tables import load_table, nearest


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture-of-experts layer: `count` experts of width `width`, `active` of them per token, `shared` always on."""

    count: int
    active: int
    width: int
    shared: int = 0
    dense_layers: int = 0  # leading layers with an ordinary MLP


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention: queries and keys are projected through small ranks, the cache holds one latent."""

    query_rank: int
    cache_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of one decoder-only language model."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool = False
    experts: Experts | None = None
    latent: LatentAttention | None = None

    @property
    def family(self) -> str:
        """Operator family: "dense" or "experts"."""
        return "experts" if self.experts else "dense"

    @property
    def attention_params(self) -> int:
        """Parameters of one layer's attention projections."""
        if self.latent is None:
            return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        la = self.latent
        query = la.query_rank * (self.hidden + self.heads * (la.nope_dim + la.rope_dim))
        cache_ = self.hidden * (la.cache_rank + la.rope_dim) + la.cache_rank * self.heads * (la.nope_dim + la.value_dim)
        return query + cache_ + self.heads * la.value_dim * self.hidden

    @property
    def dense_layers(self) -> int:
        """Layers with an ordinary MLP."""
        return self.layers if self.experts is None else self.experts.dense_layers

    @property
    def body_params(self) -> int:
        """All parameters except embedding and head."""
        total = self.layers * self.attention_params + self.dense_layers * 3 * self.hidden * self.mlp
        if self.experts is not None:
            per_layer = 3 * self.hidden * self.experts.width * (self.experts.count + self.experts.shared)
            total += (self.layers - self.dense_layers) * (per_layer + self.hidden * self.experts.count)
        return total

    @property
    def active_body_params(self) -> int:
        """Body parameters that one token passes through."""
        if self.experts is None:
            return self.body_params
        idle = self.experts.count - self.experts.active
        return self.body_params - (self.layers - self.dense_layers) * 3 * self.hidden * self.experts.width * idle

    @property
    def params(self) -> int:
        """All parameters, embedding and head included."""
        return self.body_params + self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def active_params(self) -> int:
        """Parameters per token, embedding and head included."""
        return self.active_body_params + self.params - self.body_params

    @property
    def cache_values_per_layer(self) -> int:
        """Numbers that one token leaves in the cache of one layer."""
        if self.latent is not None:
            return self.latent.cache_rank + self.latent.rope_dim
        return 2 * self.kv_heads * self.head_dim

    def cache_bytes_per_token(self, value_bytes: float = 2.0) -> float:
        """Cache bytes of one token over all layers."""
        return self.layers * self.cache_values_per_layer * value_bytes


def load_model(source: str | Path | dict[str, Any]) -> ModelShape:
    """A model's shape from a name, a `config.json`, a folder that holds one, or the config as a dict.

    A hub name that the table does not know is looked for in the local hub cache; nothing is downloaded.

    Raises:
        UserError: an unknown name (with the nearest), a folder or file that holds no config, or one that lacks a size.
    """
    if isinstance(source, dict):
        return from_config(str(source.get("_name_or_path") or source.get("model_type") or "model"), source)
    path = Path(source)
    config = path / "config.json" if path.is_dir() else path
    if config.suffix == ".json" and config.is_file():
        return from_config(path.name if path.is_dir() else path.parent.name, read_config(config))
    if path.is_dir():
        raise UserError(f"The folder {path} holds no config.json; give a model folder in Hugging Face format.")
    name = str(source)
    if key := _known_name(name):
        return from_config(key, load_table("models")["models"][key])
    if cached := _cached_config(name):
        return from_config(name, read_config(cached))
    known = _lower_names()
    near = known[nearest(name.rsplit("/", 1)[-1].lower(), known)]
    raise UserError(
        f"No model shape is called {name!r}; the nearest is {near!r}. Give a folder with its config.json instead."
    )


def read_config(path: Path) -> dict[str, Any]:
    """A `config.json` as a dict. Raises UserError when it cannot be read, or is no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error}; a model's config.json is a JSON object.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds {type(config).__name__}; a model's config.json is a JSON object.")
    return config


def _cached_config(name: str) -> Path | None:
    """The newest config.json of a hub model that was downloaded before."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    found = sorted((hub / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/config.json"))
    return max(found, key=lambda path: path.stat().st_mtime) if found else None


def _known_name(name: str) -> str | None:
    """The table's name for a model: case, organisation and the usual endings do not count."""
    known = _lower_names()
    short = name.rsplit("/", 1)[-1].lower()
    for ending in ("", "-instruct", "-fp8", "-thinking-2507", "-instruct-2507", "-2507"):
        key = known.get(short.removesuffix(ending))
        if key is not None:
            return load_table("models")["aliases"].get(key, key)
    return None


def _lower_names() -> dict[str, str]:
    table = load_table("models")
    return {key.lower(): key for key in [*table["models"], *table["aliases"]]}


def from_config(name: str, config: dict[str, Any]) -> ModelShape:
    """Read a Hugging Face configuration. Raises UserError when a size is missing or not positive."""
    config = config.get("text_config", config)
    heads = _size(name, config, "num_attention_heads")
    hidden = _size(name, config, "hidden_size")
    return ModelShape(
        name=name,
        layers=_size(name, config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        mlp=_size(name, config, "intermediate_size"),
        vocab=_size(name, config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        experts=_experts(name, config),
        latent=_latent(name, config),
    )


def _size(name: str, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise UserError(f"The configuration of {name!r} has {key}={value!r}; it must be a positive whole number.")
    return value


def _experts(name: str, config: dict[str, Any]) -> Experts | None:
    count = config.get("num_experts") or config.get("n_routed_experts") or config.get("num_local_experts")
    if not count:
        return None
    active = _size(name, config, "num_experts_per_tok")
    if active > count:
        raise UserError(
            f"The configuration of {name!r} routes each token to {active} of {count} experts; {count} is the most."
        )
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    return Experts(count, active, width, config.get("n_shared_experts") or 0, config.get("first_k_dense_replace") or 0)


def _latent(name: str, config: dict[str, Any]) -> LatentAttention | None:
    if not config.get("kv_lora_rank"):
        return None
    keys = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return LatentAttention(*(_size(name, config, key) for key in keys))
