"""Sleep: frees the memory of an idle engine.

On a GPU this is vLLM's own: level 1 moves the weights to host memory and drops the KV cache, level 2 drops both. vLLM's
CPU build cannot; there the storage of the KV cache, and at level 2 of the weights, is freed here, inside the worker.
Memory comes back as zeros in the cache and NaN in the weights, so that a part which no later load fills is noticed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from forerun.models.checksum import checksum

LEVELS = (1, 2)
PACKED = "cpu_linear"  # where vLLM's CPU build keeps its packed copy of a layer's matrix


@dataclass(slots=True)
class Freed:
    """Storages whose memory was freed, and their sizes."""

    cache: list[tuple[torch.UntypedStorage, int]] = field(default_factory=list)
    weights: list[tuple[torch.UntypedStorage, int]] = field(default_factory=list)

    def refill(self) -> None:
        """Allocate the memory again: zeros for the cache, bytes of ones (NaN) for the weights."""
        for storages, value in ((self.cache, 0), (self.weights, 255)):
            for storage, size in storages:
                storage.resize_(size)
                torch.empty(0, dtype=torch.uint8).set_(storage).fill_(value)


def free(runner: Any, level: int) -> Freed:
    """Free the memory of a runner on a CPU: its KV cache, and at level 2 the weights of policy and drafter."""
    freed = Freed(cache=_drop(_tensors(runner.kv_caches)))
    if level == 2:
        models = _models(runner).values()
        for module in (module for model in models for module in model.modules()):
            if PACKED in vars(module):
                delattr(module, PACKED)
        freed.weights = _drop(parameter for model in models for parameter in model.parameters())
    return freed


def fingerprints(runner: Any) -> dict[str, str]:
    """A checksum of the parameters that each model holds, as vLLM laid them out: equal before and after a sleep.

    vLLM's CPU build keeps most matrices outside the parameters; there only the others are covered.
    """
    return {
        group: checksum({n: p for n, p in model.named_parameters() if p.numel()})
        for group, model in _models(runner).items()
    }


def _models(runner: Any) -> dict[str, nn.Module]:
    drafter = getattr(getattr(runner, "drafter", None), "model", None)
    return {"policy": runner.get_model()} | ({} if drafter is None else {"draft": drafter})


def _tensors(caches: Iterable[Any]) -> Iterator[Tensor]:
    for cache in caches:
        yield from (cache,) if isinstance(cache, Tensor) else _tensors(cache)


def _drop(tensors: Iterable[Tensor]) -> list[tuple[torch.UntypedStorage, int]]:
    """Free the storages of tensors, which may share them."""
    storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    sizes = [(storage, storage.nbytes()) for storage in storages.values() if storage.nbytes()]
    for storage, _ in sizes:
        storage.resize_(0)
    return sizes
