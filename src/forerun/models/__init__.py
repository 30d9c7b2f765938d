"""Hugging Face causal language models: loading, saving, KV cache, auxiliary hidden states, log-probabilities."""

from __future__ import annotations

from forerun.models.load import Policy, load_policy, save_policy

__all__ = ["Policy", "load_policy", "save_policy"]
