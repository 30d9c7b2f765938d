"""The two repairs of vLLM's CPU build: that they work, that they are still needed, and what happens without them."""

from __future__ import annotations

from typing import Any

import pytest

from forerun.drafters.eagle3 import Eagle3Drafter
from forerun.errors import UserError
from forerun.models import Policy
from vllm_tiny import law, needs_vllm, without_repair

pytestmark = needs_vllm
slow = pytest.mark.slow


@slow
def test_the_law_test_catches_the_kernel_without_its_repair(
    fresh: Any, small: Policy, drafter: Eagle3Drafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of `test_sampled_texts_have_the_policys_law`."""
    without_repair(monkeypatch)
    assert not all(check.passed for check in law(fresh, small, drafter))


def test_vllm_still_needs_the_repair() -> None:
    """Fails when vLLM has fixed its kernel: engine/vllm/patches.py can go."""
    from vllm.utils import cpu_triton_utils

    from forerun.engine.vllm.patches import expand, works

    assert works(expand)
    assert not works(cpu_triton_utils._expand_kernel_impl)


def test_vllms_scan_for_kernels_still_fails_beside_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when vLLM has fixed it: `let_scan_pass` can go."""
    pytest.importorskip("llvmlite.binding")
    from vllm.triton_utils import dispatcher

    from forerun.engine.vllm.patches import let_scan_pass

    monkeypatch.delattr(dispatcher, "vars", raising=False)
    with pytest.raises(AttributeError):
        dispatcher._rebind_kernels([])
    let_scan_pass()
    dispatcher._rebind_kernels([])


def test_a_broken_kernel_of_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from vllm.v1.sample import rejection_sampler

    from forerun.engine.vllm.patches import ensure_exact

    monkeypatch.setattr(rejection_sampler, "_expand", lambda *_: None)
    monkeypatch.setattr(vllm, "__version__", "9.9.9")
    with pytest.raises(UserError, match="wrong temperature"):
        ensure_exact(True)
