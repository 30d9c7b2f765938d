"""What the files of a model or an adapter hold, against what is needed: nothing is loaded in part.

Transformers and peft start a tensor that they do not find with random numbers, or with zeros, and say so in a warning.
Here the names that are missing, unknown or of another shape are an error. What Transformers itself expects to find too
much (rotary tables of old checkpoints, a tied output head) it does not report, and is fine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forerun.errors import UserError

WRAPPERS = {  # names that other programs save under -> what they stand for
    "_orig_mod.": "",  # torch.compile
    "module.": "",  # DistributedDataParallel
    "module._orig_mod.": "",
    "_orig_mod.module.": "",
    "model.language_model.": "model.",  # the text part of a model that also sees
}
MTP = re.compile(r"(model\.)?(mtp\.|mtp_layers\.)")  # heads that `speculation.method=mtp` reads from a policy's folder
LFS = b"version https://git-lfs.github.com/spec/"
SHOWN = 4  # names in an error


@contextmanager
def loading(what: str, folder: str | Path) -> Iterator[None]:
    """Whatever a library raises over foreign files within becomes one sentence: `what` cannot be loaded."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise whatever the bytes provoke
        raise UserError(f"{what} cannot be loaded: {_cause(error, Path(folder))}") from error


def read_model(source: str, name: str, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """A causal language model with all of its weights, and sentences on what was done to load them.

    Raises UserError when a file cannot be read, or tensors are missing, unknown, misshapen or quantised.
    """
    what = f"The model '{name}'"
    with loading(what, source):
        model, info = _from_pretrained(source, dtype, None)
        said = []
        if prefix := _wrapper(info):
            mapping = {f"^{re.escape(prefix)}": WRAPPERS[prefix]}
            model, info = _from_pretrained(source, dtype, mapping)
            said = [f"{what}: its tensors are saved as '{prefix}...'; they were loaded without that prefix"]
    _require_complete(what, model, info)
    if wrong := [n for n, p in model.named_parameters() if p.dtype not in (torch.float32, torch.bfloat16)]:
        raise UserError(
            f"{what} is quantised: {listed(wrong)} cannot be trained; name the model before its quantisation"
        )
    return model, said


def require_finite(what: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises UserError when a weight is NaN or infinite. A bias may be -inf: that masks a token of the vocabulary."""
    bad = [name for name, tensor in tensors if not _finite(tensor)]
    if bad:
        raise UserError(
            f"{what} has weights that are not finite numbers, in {listed(bad)}: the training that made it diverged, or "
            "the file is damaged; take an earlier checkpoint"
        )


def require_same_names(what: str, held: Iterable[str], needed: Iterable[str]) -> None:
    """Raises UserError, with counts and names, when a file holds other tensors than are needed."""
    held, needed = set(held), set(needed)
    if held != needed:
        faults = _faults(len(needed), sorted(needed - held), sorted(held - needed), [])
        raise UserError(f"{what} does not fit: {faults}; nothing was loaded. Export it again with the names of peft")


def spoiled_file(folder: Path) -> str | None:
    """What is wrong with a file of a folder, if one is no more than a pointer, is empty or is cut off."""
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        return None
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".json", ".model")):
        with path.open("rb") as file:
            head = file.read(len(LFS))
        if head == LFS:
            return f"{path} is a Git LFS pointer and not the file itself; run 'git lfs pull' where it was cloned"
        if not head:
            return f"{path} is empty; copy it again"
        try:
            if path.suffix == ".safetensors":
                safe_open(path, "pt").__enter__()
        except SafetensorError as error:
            return f"{path} ({path.stat().st_size} bytes) is cut off or damaged ({error}); copy it again"
    return None


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _from_pretrained(source: str, dtype: torch.dtype, renamed: Mapping[str, str] | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    settings = {"output_loading_info": True, "ignore_mismatched_sizes": True, "key_mapping": renamed}
    both: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **settings)
    model, info = both
    return model, info


def _wrapper(info: Mapping[str, Any]) -> str | None:
    """The prefix without which tensors of the file have the names of missing ones."""
    missing = set(info["missing_keys"])
    for prefix, stands_for in WRAPPERS.items():
        renamed = {stands_for + n.removeprefix(prefix) for n in info["unexpected_keys"] if n.startswith(prefix)}
        if renamed & missing:
            return prefix
    return None


def _require_complete(what: str, model: Any, info: Mapping[str, Any]) -> None:
    unknown = sorted(info["unexpected_keys"])
    heads = {n.removesuffix("eh_proj.weight") for n in unknown if n.endswith(".eh_proj.weight")}  # DeepSeek-V3's
    unknown = [n for n in unknown if not MTP.match(n) and not n.startswith(tuple(heads))]
    misshapen = [f"{n} ({list(held)}, expected {list(need)})" for n, held, need in sorted(info["mismatched_keys"])]
    missing = sorted(info["missing_keys"])
    if missing or unknown or misshapen:
        faults = _faults(len(model.state_dict()), missing, unknown, misshapen)
        raise UserError(f"{what} cannot be loaded: {faults}; its files and its config.json must be of one model")


def _faults(count: int, missing: Sequence[str], unknown: Sequence[str], misshapen: Sequence[str]) -> str:
    parts = [
        f"of {count} tensors {len(missing)} are missing ({listed(missing)})" if missing else "",
        f"{len(unknown)} of the file are unknown ({listed(unknown)})" if unknown else "",
        f"{len(misshapen)} have another shape: {listed(misshapen)}" if misshapen else "",
    ]
    return "; ".join(part for part in parts if part)


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = (bool(torch.isfinite(x)) for x in tensor.detach().aminmax())  # both are NaN where one number is
    return high and (low or (tensor.dim() == 1 and not bool(tensor.isnan().any())))


def _cause(error: Exception, folder: Path) -> str:
    if (found := spoiled_file(folder)) is not None:
        return found
    text = " ".join(str(error).split())[:400] or type(error).__name__
    if isinstance(error, ImportError):
        return f"{text} A policy is trained, and quantised weights cannot be: name the model before its quantisation"
    return text
