"""A policy is a Hugging Face causal language model with its tokenizer, loaded by folder, hub name or alias."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from forerun.errors import UserError
from forerun.models.checks import loading, read_model, require_finite, require_same_names
from forerun.models.prompts import ALIASES, PromptEncoder, load_tokenizer, model_source

POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
UNLIMITED = 2**20  # positions: of recurrent models, and of ALiBi's whose configuration names none


@dataclass(frozen=True, slots=True)
class Policy:
    """The model that is trained, that generates and that verifies: one module, three roles."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    name: str
    warnings: tuple[str, ...] = ()  # what was done to load it

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def context(self) -> int:
        """Positions that the model was made for; a model without a limit gets a large one."""
        config = self.model.config.get_text_config()
        known = (getattr(config, name, None) for name in POSITION_KEYS)
        return next((int(limit) for limit in known if limit is not None), UNLIMITED)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a completion: the tokenizer's and those of the model's generation settings."""
        ids = self.model.generation_config.eos_token_id if self.model.generation_config is not None else None
        own = self.tokenizer.eos_token_id if self.tokenizer is not None else None
        return frozenset(int(i) for i in [*(ids if isinstance(ids, list) else [ids]), own] if i is not None)

    def encode(self, question: str, chat: bool = True, system: str | None = None) -> list[int]:
        """Token ids of a question, through the chat template unless `chat` is false; see `PromptEncoder`."""
        return PromptEncoder(self.tokenizer, self.name, chat, system).encode(question)


def load_policy(model: str, dtype: str = "auto", device: str = "auto", adapter: str | None = None) -> Policy:
    """Load a model and its tokenizer, merge a LoRA adapter into it where one is named.

    Args:
        model: folder, hub name, or alias (`smollm2-135m`).
        dtype: "float32", "bfloat16" or "auto".
        device: torch device, or "auto".
        adapter: LoRA folder or name of a shipped artifact.

    Raises UserError when the model, its tokenizer or the adapter cannot be loaded whole, or the device is not there.
    """
    source = model_source(model)
    place = resolve_device(device)
    loaded, said = read_model(source, model, resolve_dtype(dtype, place))
    tokenizer = load_tokenizer(model)
    if adapter is not None:
        merge_adapter(loaded, artifact(adapter))
    loaded.to(place)
    merged = "" if adapter is None else f" with the adapter '{adapter}'"
    require_finite(f"The model '{model}'{merged}", loaded.named_parameters())
    return Policy(loaded.eval(), tokenizer, model, tuple(said))


def describe_policy(folder: Path) -> Policy:
    """A policy's configuration, tokenizer, end tokens and tensor shapes, without its weights.

    Raises UserError when the folder holds no model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    with loading(f"The model '{folder}'", folder):
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    tokenizer = load_tokenizer(str(folder))
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return Policy(model, tokenizer, str(folder))


def policy_folder(name: str) -> Path:
    """Folder of a model: an alias, a shipped artifact or a folder.

    Raises UserError when it is none of these (hub names must be downloaded first: the engine checks what it loads).
    """
    return ALIASES[name]() if name in ALIASES else artifact(name)


def saved_embedding(policy: Policy, source: Path) -> Tensor:
    """The policy's input embedding [V, H], read from the files in the folder `source`.

    Raises UserError when no file holds it.
    """
    from safetensors import safe_open

    wanted = policy.model.get_input_embeddings().weight
    names = [name for name, parameter in policy.model.named_parameters() if parameter is wanted]
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if found := [name for name in names if name in file.keys()]:  # noqa: SIM118 (it is no mapping)
                return file.get_tensor(found[0])
    raise UserError(f"No safetensors file in {source} holds the policy's embedding, {' or '.join(names)}")


def save_policy(policy: Policy, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write the policy in Hugging Face format (safetensors, config, tokenizer).

    Args:
        state: weights in place of the policy's own.

    Raises UserError when the disk is full or the folder cannot be written.
    """
    try:
        policy.model.save_pretrained(folder, state_dict=state)
        if policy.tokenizer is not None:
            policy.tokenizer.save_pretrained(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"Cannot save the policy to {folder}: {_first_line(error)}; free space or choose another 'runs'"
        ) from error


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """load_state_dict that refuses missing, unknown and misshapen tensors, see `check_shapes`."""
    check_shapes(state, {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}, what)
    module.load_state_dict(dict(state))


def check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raises UserError when a tensor is missing, unknown or of another shape; number formats may differ."""
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        raise UserError(f"The weights of {what} do not match: missing {missing or 'none'}, unknown {unknown or 'none'}")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise UserError(f"{name} of {what} has shape {list(state[name].shape)}, expected {list(shape)}")


def merge_adapter(model: nn.Module, folder: Path) -> None:
    """Add a LoRA adapter (peft's format) to the weights of `model`, in place.

    Raises UserError when the folder holds no adapter, or the adapter does not fit the model, tensor by tensor.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    with loading(f"The adapter in {folder}", folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
        adapted = PeftModel.from_pretrained(model, str(folder))  # type: ignore[arg-type]
        needed = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        require_same_names(f"The adapter in {folder}", load_peft_weights(str(folder), device="cpu"), needed)
        if not hasattr(adapted.base_model, "merge_and_unload"):
            raise UserError(f"The adapter in {folder} ({adapted.peft_type}) cannot be merged into weights; use LoRA")
        adapted.merge_and_unload()
        model.requires_grad_(True)  # peft froze what it wrapped


def artifact(name: str) -> Path:
    """Folder of a shipped artifact, or `name` itself where it is a folder. Raises UserError when neither exists."""
    shipped = Path(str(resources.files("forerun") / "artifacts"))
    for folder in (Path(name), shipped / name):
        if folder.is_dir():
            return folder
    names = sorted(p.name for p in shipped.iterdir() if p.is_dir() and not p.name.startswith("_"))
    raise UserError(f"'{name}' is neither a folder nor a shipped artifact (those are: {', '.join(names) or 'none'})")


def resolve_device(device: str) -> torch.device:
    """ "auto" is the first CUDA device, or the CPU. Raises UserError for a device that this machine does not have."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.cuda.device_count()
        raise UserError(
            f"policy.device={device} cannot be used here ({_first_line(error)[:120]}); this machine has "
            f"{', '.join(['cpu', *(f'cuda:{i}' for i in range(count))])}: name one of them, or auto"
        ) from error
    return place


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the hardware multiplies it natively, else float32."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    return torch.bfloat16 if native_bfloat16(device) else torch.float32


def native_bfloat16(device: torch.device) -> bool:
    """Whether `device` has bfloat16 multiply units (GPU: by query; CPU: AVX512-BF16 or AMX in the CPU's flags)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
