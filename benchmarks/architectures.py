"""Which model families the local engine runs: tiny random models of each, engine against plain forward.

    python -m benchmarks.architectures [FAMILY ...]

For each, the log-probabilities that the engine reports, plain and with n-gram drafts (k = 3, looked up by single
tokens, so that there are drafts to accept and to reject), two samples a prompt, are compared with those of the
Transformers module's own forward of the whole text; texts are longer than every window and chunk. Prints the table of
`docs/models.md`: the largest difference in nats, or the sentence with which the engine refuses the family. Exits with 1
where a family is neither right nor refused.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch

from forerun.config.drafters import NgramConfig
from forerun.drafters.ngram import NgramDrafter
from forerun.engine.local.engine import LocalEngine
from forerun.errors import UserError
from forerun.models import Policy
from forerun.types import Rollout

WORDS, WINDOW, RIGHT = 64, 8, 2e-3
BASE = {
    "vocab_size": WORDS, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 128, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False, "initializer_range": 0.3,
}  # fmt: skip
PROMPTS = [[5, 6, 7, 5, 6, 7, 9, 11, 5, 6, 7, 8], [9, 3], list(range(3, 23)), [4]]

GPT = {"n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
MLA = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 4, "head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
WINDOWED = {"sliding_window": WINDOW}
SHARED = WINDOWED | {
    "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": WORDS, "hidden_size_per_layer_input": 8,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> configuration class, changes to BASE
    "AFMoE": ("AfmoeConfig", WINDOWED),
    "Apertus": ("ApertusConfig", {}),
    "Arcee": ("ArceeConfig", {"hidden_act": "relu2"}),
    "Bamba": ("BambaConfig", MAMBA2 | {"attn_layer_indices": [1, 3]}),
    "BitNet": ("BitNetConfig", {}),
    "BLOOM": ("BloomConfig", {"n_layer": 4, "n_head": 4}),
    "CodeGen": ("CodeGenConfig", GPT | {"rotary_dim": 8}),
    "Cohere": ("CohereConfig", {}),
    "Cohere 2": ("Cohere2Config", WINDOWED),
    "DeepSeek-V2": ("DeepseekV2Config", ROUTED | MLA),
    "DeepSeek-V3, Kimi-K2": ("DeepseekV3Config", ROUTED | MLA),
    "DiffLlama": ("DiffLlamaConfig", {}),
    "Doge": ("DogeConfig", WINDOWED),
    "dots.llm1": ("Dots1Config", ROUTED),
    "ERNIE 4.5": ("Ernie4_5Config", {}),
    "EXAONE 4": ("Exaone4Config", WINDOWED),
    "Falcon": ("FalconConfig", {"alibi": False}),
    "Falcon, ALiBi": ("FalconConfig", {"alibi": True}),
    "Falcon-H1": ("FalconH1Config", MAMBA2 | {"mamba_d_ssm": 96}),
    "Falcon Mamba": ("FalconMambaConfig", {"state_size": 8}),
    "Gemma": ("GemmaConfig", {}),
    "Gemma 2": ("Gemma2Config", WINDOWED),
    "Gemma 3": ("Gemma3TextConfig", WINDOWED),
    "Gemma 3n": (
        "Gemma3nTextConfig",
        SHARED | {
            "laurel_rank": 4, "altup_num_inputs": 2, "intermediate_size": [64] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "Gemma 4": ("Gemma4TextConfig", SHARED),
    "GLM": ("GlmConfig", {}),
    "GLM-4": ("Glm4Config", {}),
    "GLM-4.5": ("Glm4MoeConfig", ROUTED | {"first_k_dense_replace": 1}),
    "GPT-2": ("GPT2Config", GPT),
    "GPT-BigCode": ("GPTBigCodeConfig", GPT),
    "GPT-J": ("GPTJConfig", GPT | {"rotary_dim": 8}),
    "GPT-Neo": (
        "GPTNeoConfig",
        {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4, "window_size": WINDOW},
    ),
    "GPT-NeoX, Pythia": ("GPTNeoXConfig", {}),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, **WINDOWED}),
    "Granite": ("GraniteConfig", {"logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}),
    "Granite 4 (hybrid)": (
        "GraniteMoeHybridConfig",
        MAMBA2 | {
            "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 4, "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
        },
    ),
    "HunYuan": ("HunYuanDenseV1Config", {}),
    "Jamba": (
        "JambaConfig",
        {
            "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4,
            "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8,
        },
    ),
    "Kimi Linear": (
        "KimiLinearConfig",
        ROUTED | MLA | DELTA | {"layer_types": ["linear_attention", "full_attention"] * 2, "num_local_experts": 4},
    ),
    "LFM2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2}),
    "LFM2-MoE": (
        "Lfm2MoeConfig",
        EXPERTS | {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2},
    ),
    "Llama, SmolLM2": ("LlamaConfig", {}),
    "Llama 4": (
        "Llama4TextConfig",
        {
            "attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 1,
        },
    ),
    "LongCat": (
        "LongcatFlashConfig",
        ROUTED | MLA | {"num_layers": 2, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "zero_expert_num": 1,
                        "moe_topk": 2},
    ),
    "Mamba": ("MambaConfig", {"state_size": 8}),
    "Mamba 2": ("Mamba2Config", {"state_size": 8, "num_heads": 8, "head_dim": 12, "n_groups": 1}),
    "MiniCPM3": ("MiniCPM3Config", MLA),
    "MiniMax": ("MiniMaxConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 4}),
    "MiniMax-M2": ("MiniMaxM2Config", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Ministral": ("MinistralConfig", WINDOWED),
    "Ministral 3": ("Ministral3Config", {}),
    "Mistral": ("MistralConfig", WINDOWED),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 4, **WINDOWED}),
    "MPT": ("MptConfig", {"d_model": 48, "n_heads": 4, "n_layers": 4, "max_seq_len": 128}),
    "Nemotron": ("NemotronConfig", {}),
    "Nemotron-H": (
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "attention", "mamba", "attention"], "mamba_num_heads": 8,
            "mamba_head_dim": 12, "ssm_state_size": 8, "n_groups": 1,
        },
    ),
    "OLMo": ("OlmoConfig", {}),
    "OLMo 2": ("Olmo2Config", {}),
    "OLMo 3": ("Olmo3Config", WINDOWED),
    "OLMo Hybrid": (
        "OlmoHybridConfig",
        DELTA | {"layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 4},
    ),
    "OLMoE": ("OlmoeConfig", EXPERTS),
    "OPT": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 48}),
    "Phi": ("PhiConfig", {}),
    "Phi-3, Phi-4": ("Phi3Config", WINDOWED),
    "Phi-MoE": ("PhimoeConfig", {"num_local_experts": 4, **WINDOWED}),
    "Qwen2": ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 2, **WINDOWED}),
    "Qwen2-MoE": ("Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 32}),
    "Qwen3": ("Qwen3Config", {"use_sliding_window": True, "max_window_layers": 2, **WINDOWED}),
    "Qwen3-MoE": ("Qwen3MoeConfig", EXPERTS),
    "Qwen3-Next": ("Qwen3NextConfig", EXPERTS | DELTA),
    "Qwen3.5": ("Qwen3_5TextConfig", DELTA),
    "Qwen3.5-MoE": ("Qwen3_5MoeTextConfig", EXPERTS | DELTA),
    "RecurrentGemma": ("RecurrentGemmaConfig", {"lru_width": 48, "attention_window_size": WINDOW}),
    "RWKV": ("RwkvConfig", {"attention_hidden_size": 48, "context_length": 128}),
    "Seed-OSS": ("SeedOssConfig", {}),
    "SmolLM3": ("SmolLM3Config", {}),
    "StableLM": ("StableLmConfig", {"partial_rotary_factor": 1.0}),
    "StarCoder2": ("Starcoder2Config", WINDOWED),
    "XGLM": ("XGLMConfig", {"d_model": 48, "num_layers": 4, "attention_heads": 4, "ffn_dim": 64}),
    "xLSTM": ("xLSTMConfig", {"num_heads": 4, "num_blocks": 4}),
    "Zamba2": (
        "Zamba2Config",
        {"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "layers_block_type": ["mamba", "hybrid"] * 2},
    ),
}  # fmt: skip


def main() -> None:
    """Judge the families named on the command line, or all."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    bad = False
    print("| family | plain | n-grams, k = 3 |\n|---|---|---|")
    for name in sys.argv[1:] or FAMILIES:
        cells, right = judge(*FAMILIES[name])
        bad |= not right
        print(f"| {name} | {cells} |", flush=True)
    sys.exit(bad)


def judge(config_class: str, changes: dict[str, Any]) -> tuple[str, bool]:
    """The cells of a family's line, and whether it is right or refused."""
    policy = build(config_class, changes)
    try:
        gaps = [largest_gap(policy, k) for k in (0, 3)]
    except UserError as error:
        why = str(error).split(": ", 1)[1].split("; use ")[0]
        return f"refused: {why} |", True
    return " | ".join(f"{gap:.1e}" for gap in gaps), max(gaps) < RIGHT


def build(config_class: str, changes: dict[str, Any]) -> Policy:
    """A tiny random model of a family; weights so large that what a layer sees decides what comes out."""
    import transformers

    shape = BASE | changes
    try:
        config = getattr(transformers, config_class)(**shape)
    except Exception:  # some classes have a `head_dim` that cannot be set
        shape.pop("head_dim")
        config = getattr(transformers, config_class)(**shape)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.25)
    return Policy(model, None, config_class.removesuffix("Config"))


def largest_gap(policy: Policy, k: int) -> float:
    """`gap_of` samples of the engine."""
    drafter = NgramDrafter(NgramConfig(prompt_lookup_min=1)) if k else None
    engine = LocalEngine(policy, drafter, k=k, slots=4)
    gap = gap_of(policy, engine.generate(PROMPTS, max_new_tokens=24, n=2, seed=1))
    assert not k or engine.counters.drafted
    return gap


@torch.no_grad()
def gap_of(policy: Policy, rollouts: list[Rollout]) -> float:
    """Largest difference in nats between the log-probabilities of samples and the module's own."""
    worst = 0.0
    for rollout in rollouts:
        text = torch.tensor([rollout.prompt_ids + rollout.tokens])
        logits = policy.model(input_ids=text, use_cache=False).logits.float()[0, len(rollout.prompt_ids) - 1 : -1]
        exact = logits.log_softmax(-1).gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        worst = max(worst, float((exact - torch.tensor(rollout.logprobs)).abs().max()))
    return worst


if __name__ == "__main__":
    main()
