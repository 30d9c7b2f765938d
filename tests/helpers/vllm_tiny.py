"""What the tests of the vLLM engine share: a tiny policy, heads for it, versions of both, and engines around them.

The policy is a tiny random Llama whose heads are wide enough for vLLM's CPU kernels; its EAGLE-3 head is untrained,
which losslessness must survive. The fixtures are in conftest.py.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from forerun.config import SpeculationConfig
from forerun.drafters.eagle3 import Eagle3Config, Eagle3Drafter, Eagle3Head
from forerun.engine.base import Sampling, Weights
from forerun.engine.local.engine import LocalEngine
from forerun.lossless.distribution import distribution_checks
from forerun.models import Policy, load_policy
from forerun.models.checksum import checksum

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; docs/vllm.md says how"
)
PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [20, 21], [30] * 40]
SHAPE = {"hidden_size": 96, "head_dim": 32, "intermediate_size": 128}
TOLERANCE = 2e-4


def head_for(policy: Policy, vocabulary: list[int], seed: int = 0) -> Eagle3Drafter:
    """An untrained head with heads of 32."""
    target = policy.model.config
    torch.manual_seed(seed)
    config = Eagle3Config(
        hidden_size=target.hidden_size, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        vocab_size=target.vocab_size, draft_vocab_size=len(vocabulary), layers=(0, 1, 3),
    )  # fmt: skip
    head = Eagle3Head(config)
    for parameter in head.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    head.set_vocabulary(torch.tensor(vocabulary))
    return Eagle3Drafter(head, policy)


def version(number: int, policy: Policy, drafter: Any = None) -> Weights:
    """The live weights as a version with tensors."""
    state = {n: t.clone() for n, t in policy.model.state_dict().items()}
    sums = {"policy": checksum(state)}
    if drafter is None:
        return Weights(number, sums, state)
    draft = {n: t.clone() for n, t in drafter.state_dict().items()}
    return Weights(number, {**sums, "draft": checksum(draft)}, state, draft)


def changed(policy: Policy, scale: float, seed: int) -> Policy:
    """The policy with noise on every matrix."""
    other = load_policy(policy.name, "float32", "cpu")
    torch.manual_seed(seed)
    for parameter in other.model.parameters():
        if parameter.dim() > 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=scale * float(parameter.detach().std()))
    return other


def frequent(policy: Policy) -> list[int]:
    """Six tokens that its greedy texts are full of: with them an untrained head is right at times."""
    long = Sampling(60, 0.0, 0, ignore_eos=True)
    counts = Counter(token for r in LocalEngine(policy, slots=8).stream(PROMPTS, long) for token in r.tokens)
    return sorted(token for token, _ in counts.most_common(6))


def make(policy: Policy, drafter: Any, block: dict[str, Any] | None, **limits: Any) -> Any:
    from forerun.engine.vllm.adapter import Limits, VllmEngine

    settings = None if block is None else SpeculationConfig.model_validate(block)
    sizes = {"slots": 8, "cache_gib": 0.02, **limits}
    return VllmEngine.from_live(policy, drafter, settings, limits=Limits(**sizes))


def texts(rollouts: Any) -> list[list[int]]:
    return [r.tokens for r in rollouts]


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def without_repair(patch: pytest.MonkeyPatch) -> None:
    """vLLM's kernel as it came, for the negative controls of the law tests."""
    from vllm.triton_utils.dispatcher import register_kernels
    from vllm.utils import cpu_triton_utils

    from forerun.engine.vllm import adapter as engine
    from forerun.engine.vllm.patches import KERNEL

    register_kernels({KERNEL: cpu_triton_utils._expand_kernel_impl})
    patch.setattr(engine, "ensure_exact", lambda cpu: False)


LAW = {"contexts": [[5, 6, 7], [20, 21]], "samples": 1200, "length": 5}


def law(engine: Any, policy: Policy, drafter: Any) -> list[Any]:
    return distribution_checks(engine, policy, drafter, **LAW, sampling=Sampling(5, 1.0, 11))
