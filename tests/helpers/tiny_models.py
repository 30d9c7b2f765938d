"""Tiny real models: random weights, real configurations, a real tokenizer with a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from forerun.drafters.eagle3 import Eagle3Config, Eagle3Drafter, Eagle3Head
from forerun.models import Policy

DATA = Path(__file__).parents[3] / "shared" / "data"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
ALPHABET = ["</s>", *"0123456789+-= \n#abcdefghijklmnopqrstuvwxyzASTWQ:.,?<>/"]


def tiny_tokenizer(vocabulary: list[str], template: str | None = TEMPLATE) -> Any:
    """One token per character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=vocabulary[0], unk_token=vocabulary[0])
    fast.chat_template = template
    return fast


def tiny_config(family: str, **changes: Any) -> Any:
    """A small real configuration of a model family."""
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": len(ALPHABET), "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 128,
        "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False,
        "initializer_range": 0.3,
    }  # fmt: skip
    shape |= {"sliding_window": 8} if family.startswith("gemma") else {}
    names = {
        "llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "mistral": "MistralConfig",
        "gemma2": "Gemma2Config", "gemma3": "Gemma3TextConfig",
    }  # fmt: skip
    return getattr(transformers, names[family])(**(shape | changes))


def save_tiny(
    folder: Path, family: str = "llama", seed: int = 0, template: str | None = TEMPLATE, **changes: Any
) -> Path:
    """Write a tiny model with its tokenizer in Hugging Face format."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer(ALPHABET[: config.vocab_size], template).save_pretrained(folder)
    return folder


def random_head(policy: Policy, vocabulary: list[int] | None = None, seed: int = 0, scale: float = 0.15) -> Eagle3Head:
    """An untrained head for a policy: a poor drafter, which losslessness must survive."""
    target = policy.model.config
    torch.manual_seed(seed)
    ids = torch.tensor(vocabulary if vocabulary is not None else list(range(target.vocab_size)))
    head = Eagle3Head(
        Eagle3Config(
            hidden_size=target.hidden_size,
            intermediate_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=target.vocab_size,
            draft_vocab_size=len(ids),
            layers=(0, 1, 3),
        )
    )
    for parameter in head.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, scale)
    head.set_vocabulary(ids)
    return head.to(policy.dtype)


def random_drafter(policy: Policy, vocabulary: list[int] | None = None, seed: int = 0) -> Eagle3Drafter:
    """`random_head` at work."""
    return Eagle3Drafter(random_head(policy, vocabulary, seed), policy)
