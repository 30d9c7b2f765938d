"""Two patches for vLLM's CPU build: a wrong kernel, and a start that fails once numba is loaded.

The kernel: `expand_kernel` repeats each request's temperature (and top-k, top-p) over its draft rows; the CPU stand-in
converts its output to int64 first and so writes into a copy: the rows keep uninitialised memory, and speculation above
temperature 0 is not exact (vLLM issue 55005). The replacement is registered through vLLM's own kernel registry, only
where a test call shows the fault, and only in versions for which it was checked; any other that shows it is refused.

The start: the registry calls `vars(x).get` on everything in every loaded module. A part of llvmlite, which vLLM's
n-gram drafter loads, answers `vars` with no dictionary; then no second engine can start and no kernel be replaced.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from forerun.errors import UserError

KERNEL = "vllm.v1.sample.rejection_sampler.expand_kernel"
CHECKED = ("0.32.",)


def expand(
    output: Tensor,  # [N]
    input_val: Tensor,  # [B]
    cu_num_tokens: Tensor,  # [B], ends of the requests' rows
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,  # the kernel's own name
) -> None:
    """output = each of input_val as often as its request has rows, `replace_from` read as `replace_to`."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(input_val == replace_from, torch.full_like(input_val, replace_to), input_val)
    output[: int(cu_num_tokens[-1])] = values.repeat_interleave(counts)


def works(kernel: Callable[..., Any]) -> bool:
    """Whether an expand kernel is right; called with positional arguments, as `expand`."""
    output = torch.full((5,), -77.0)
    kernel(output, torch.tensor([0.5, 0.0]), torch.tensor([2, 5], dtype=torch.int32), 0, 1)
    return output.tolist() == [0.5, 0.5, 1.0, 1.0, 1.0]


def ensure_exact(cpu: bool) -> bool:
    """Make sure that rows get their own temperature; returns whether the kernel was replaced.

    To be called before each use: every engine that vLLM makes registers its kernels anew.

    Raises UserError when the kernel is wrong in a version for which the replacement was not checked.
    """
    if not cpu:
        return False
    import vllm
    from vllm.triton_utils.dispatcher import register_kernels
    from vllm.v1.sample import rejection_sampler

    if works(rejection_sampler._expand):
        return False
    if not vllm.__version__.startswith(CHECKED):
        raise UserError(
            f"vLLM {vllm.__version__} on this CPU verifies drafts at a wrong temperature, and the known repair is for "
            f"versions {', '.join(v + 'x' for v in CHECKED)}; sample at temperature 0, or without speculation"
        )
    let_scan_pass()
    register_kernels({KERNEL: expand})
    if not works(rejection_sampler._expand):
        raise UserError(
            f"vLLM {vllm.__version__} still verifies drafts at a wrong temperature after the repair; sample at "
            "temperature 0, or without speculation"
        )
    return True


def let_scan_pass() -> None:
    """Make vLLM's scan for kernels skip objects whose `vars` is no dictionary."""
    from vllm.triton_utils import dispatcher

    dispatcher.vars = _dictionary  # type: ignore[attr-defined]


def _dictionary(value: Any) -> dict[str, Any]:
    found = builtins.vars(value)
    return found if isinstance(found, dict) else {}
