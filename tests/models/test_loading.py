"""Models, adapters and drafters load whole or not at all, and the sentence names what is wrong."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from forerun.drafters.eagle3 import Eagle3Drafter
from forerun.errors import UserError
from forerun.models import Policy, load_policy
from tiny_models import random_drafter

State = dict[str, Tensor]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 269060552\n"


@pytest.fixture
def spoilt(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """spoilt(change of the tensors, entries of config.json) -> a folder of a model."""

    def make(change: Callable[[State], State] = lambda state: state, **config: Any) -> Path:
        folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
        rewrite(folder / "model.safetensors", change)
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(data | config))
        return folder

    return make


def rewrite(file: Path, change: Callable[[State], State]) -> None:
    file.write_bytes(save(change(load(file.read_bytes())), {"format": "pt"}))


def refusal(folder: Path, adapter: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_policy(str(folder), "float32", "cpu", None if adapter is None else str(adapter))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("prefix", "stands_for"), [("_orig_mod.", ""), ("module.", ""), ("model.language_model.", "model.")]
)
def test_a_prefix_of_another_program_is_taken_off_and_told(
    spoilt: Callable[..., Path], policy: Policy, prefix: str, stands_for: str
) -> None:
    def wrapped(state: State) -> State:
        return {prefix + n.removeprefix(stands_for) if n.startswith(stands_for) else n: t for n, t in state.items()}

    loaded = load_policy(str(spoilt(wrapped)), "float32", "cpu")
    expected = policy.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())
    assert len(loaded.warnings) == 1 and f"'{prefix}...'" in loaded.warnings[0] and not policy.warnings


def without(part: str) -> Callable[[State], State]:
    return lambda state: {n: t for n, t in state.items() if part not in n}


def one_layer_more(state: State) -> State:
    return state | {n.replace(".3.", ".4."): t.clone() for n, t in state.items() if ".3." in n}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(".2."), "of 39 tensors 9 are missing (model.layers.2.input_layernorm.weight"),
        (without("lm_head"), "1 are missing (lm_head.weight)"),
        (one_layer_more, "9 of the file are unknown (model.layers.4."),
        (lambda s: s | {"lm_head.weight": torch.zeros(10, 48)}, "lm_head.weight ([10, 48], expected [55, 48])"),
        (lambda s: {f"policy.{n}": t for n, t in s.items()}, "39 of the file are unknown (policy.lm_head.weight"),
        (lambda s: s | {"model.norm.weight": torch.full((48,), math.nan)}, "numbers, in model.norm.weight"),
        (lambda s: s | {"model.norm.weight": torch.full((48,), math.inf)}, "numbers, in model.norm.weight"),
    ],
)
def test_tensors_that_are_not_those_of_the_model_are_named(
    spoilt: Callable[..., Path], change: Callable[[State], State], words: str
) -> None:
    assert words in refusal(spoilt(change))


def test_what_transformers_expects_is_no_fault(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("llama", tie_word_embeddings=True), tmp_path / "tied"))
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}
    heads = {"model.layers.4.eh_proj.weight": torch.zeros(48, 96), "mtp.fc.weight": torch.zeros(2, 2)}
    rewrite(folder / "model.safetensors", lambda state: state | rotary | heads)
    assert load_policy(str(folder), "float32", "cpu").warnings == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER, "is a Git LFS pointer"),
        (b"", "is empty"),
        (b"\x00" * 100, "is cut off or damaged"),
        (None, "no file named model.safetensors"),
    ],
)
def test_a_file_that_is_not_the_weights_is_named(
    spoilt: Callable[..., Path], content: bytes | None, words: str
) -> None:
    file = spoilt() / "model.safetensors"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    said = refusal(file.parent)
    assert words in said and "model.safetensors" in said


def test_half_a_file_is_named(spoilt: Callable[..., Path]) -> None:
    file = spoilt() / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert f"{file} ({file.stat().st_size} bytes) is cut off" in refusal(file.parent)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}, "before its quantisation"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "before its quantisation"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "before its quantisation"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads (5)"),
        ({"num_key_value_heads": 3}, "k_proj.weight ([24, 48], expected [36, 48])"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_sentence(
    spoilt: Callable[..., Path], config: dict[str, Any], words: str
) -> None:
    assert words in refusal(spoilt(**config))


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "mps"])
def test_a_device_that_is_not_there_is_one_sentence(tiny: Callable[..., Path], device: str) -> None:
    with pytest.raises(UserError, match=rf"policy\.device={device} cannot be used here .*; this machine has cpu"):
        load_policy(str(tiny("llama")), "float32", device)


# ---- adapters ----


@pytest.fixture
def adapter(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """adapter(change of the tensors, settings of peft) -> folder of an adapter on q and v."""
    from peft import LoraConfig, get_peft_model

    def make(change: Callable[[State], State] = lambda state: state, **settings: Any) -> Path:
        model = load_policy(str(tiny("llama")), "float32", "cpu").model
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings)
        get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
        rewrite(tmp_path / "adapter" / "adapter_model.safetensors", change)
        return tmp_path / "adapter"

    return make


def test_a_whole_adapter_moves_what_it_names(
    tiny: Callable[..., Path], policy: Policy, adapter: Callable[..., Path]
) -> None:
    for settings in ({}, {"use_dora": True}):
        merged = load_policy(str(tiny("llama")), "float32", "cpu", str(adapter(**settings))).model.state_dict()
        moved = [n for n, tensor in policy.model.state_dict().items() if not torch.equal(tensor, merged[n])]
        assert len(moved) == 8 and all("q_proj" in n or "v_proj" in n for n in moved)


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (
            lambda s: {n.replace("base_model.model.", "base_model.model._orig_mod."): t for n, t in s.items()},
            {},
            "of 16 tensors 16 are missing",
        ),
        (
            lambda s: {n.replace("model.layers", "model.language_model.layers"): t for n, t in s.items()},
            {},
            "16 of the file are unknown (base_model.model.model.language_model.layers.0",
        ),
        (lambda s: {n: t for n, t in s.items() if ".0." in n or ".1." in n}, {}, "of 16 tensors 8 are missing"),
        (lambda s: {n: t for n, t in s.items() if "magnitude" not in n}, {"use_dora": True}, "8 are missing"),
    ],
)
def test_an_adapter_that_fits_in_part_is_refused(
    tiny: Callable[..., Path],
    adapter: Callable[..., Path],
    change: Callable[[State], State],
    settings: dict[str, Any],
    words: str,
) -> None:
    assert words in refusal(tiny("llama"), adapter(change, **settings))


def test_a_pointer_in_place_of_an_adapter_is_named(tiny: Callable[..., Path], adapter: Callable[..., Path]) -> None:
    folder = adapter()
    (folder / "adapter_model.safetensors").write_bytes(POINTER)
    assert "adapter_model.safetensors is a Git LFS pointer" in refusal(tiny("llama"), folder)


# ---- drafters ----


def test_a_drafter_that_is_spoilt_is_one_sentence(policy: Policy, tmp_path: Path) -> None:
    random_drafter(policy).save(tmp_path, {})
    file, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    whole = file.read_bytes()
    rewrite(file, lambda state: state | {"norm.weight": torch.full_like(state["norm.weight"], float("nan"))})
    with pytest.raises(UserError, match=r"not finite numbers, in norm\.weight"):
        Eagle3Drafter.load(tmp_path, policy)
    file.write_bytes(POINTER)
    with pytest.raises(UserError, match="is a Git LFS pointer"):
        Eagle3Drafter.load(tmp_path, policy)
    file.write_bytes(whole)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5, "head_dim": None}))
    with pytest.raises(UserError, match="not a multiple of the number of attention heads"):
        Eagle3Drafter.load(tmp_path, policy)
