"""Hugging Face causal language models: loading, saving, hidden-state taps. No speculation, no learning."""

from __future__ import annotations

from forerun.models.load import Policy, load_policy, save_policy

__all__ = ["Policy", "load_policy", "save_policy"]
