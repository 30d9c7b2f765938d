"""The extension class of vLLM's worker, called by `collective_rpc`.

A version is loaded by vLLM's own layer-wise reload, first the policy, then the drafter. vLLM fuses and packs most
matrices, so they cannot be read back; parameters that it keeps under the checkpoint's name and shape are compared after
the load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from forerun.drafters.temperature import tempered_head
from forerun.engine.vllm.sleep import Freed, fingerprints, free
from forerun.errors import UserError

DRAFT_NAMES = (("midlayer.", "model.layers.0."), ("fc.", "model.fc."), ("norm.", "model.norm."))


class WeightReceiver:
    """Mixed into vLLM's worker, whose `model_runner`, `vllm_config` and `reload_weights` it uses."""

    model_runner: Any
    vllm_config: Any
    reload_weights: Any
    forerun_freed: Freed | None = None

    # ---- a proposer class of ours ----

    def forerun_attach(self) -> None:
        """See `TrieProposer.attach`."""
        self.model_runner.drafter.attach(self.model_runner)

    def forerun_open(self) -> None:
        self.model_runner.drafter.open()

    def forerun_drafter_metrics(self) -> dict[str, int]:
        return self.model_runner.drafter.metrics()

    # ---- sleep ----

    def forerun_fingerprints(self) -> dict[str, str]:
        return fingerprints(self.model_runner)

    def forerun_sleep(self, level: int) -> None:
        self.forerun_freed = free(self.model_runner, level)

    def forerun_wake(self) -> None:
        """Allocate the memory again; its contents are lost."""
        assert self.forerun_freed is not None
        self.forerun_freed.refill()
        self.forerun_freed = None

    # ---- weights ----

    def forerun_load(self, groups: Mapping[str, Mapping[str, Tensor]], draft_temperature: float) -> dict[str, int]:
        """Load a version that was checked; per group, how many parameters were read back and agreed.

        Args:
            draft_temperature: relative to that of the rollouts.

        Raises:
            UserError: it may not be loaded; the old weights stay. RuntimeError: vLLM does not hold what it was given.
        """
        agreed = {group: 0 for group, tensors in groups.items() if tensors}
        if "draft" in agreed:
            _check_own_head(self.model_runner, groups["draft"])
        if "policy" in groups:
            policy = groups["policy"]
            self.reload_weights(weights_iterator=iter(policy.items()))
            agreed["policy"] = _read_back(self.model_runner.get_model(), policy, "policy")
        if "draft" in agreed:
            agreed["draft"] = self._forerun_drafter(groups["draft"], draft_temperature)
        return agreed

    def _forerun_drafter(self, state: Mapping[str, Tensor], draft_temperature: float) -> int:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload.layerwise import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        model = self.model_runner.drafter.model
        has_map = getattr(model, "draft_id_to_target_id", None) is not None
        taken = {n: t for n, t in state.items() if n != "t2d" and (n != "d2t" or has_map)}
        if draft_temperature != 1.0:
            taken["lm_head.weight"] = tempered_head(taken["lm_head.weight"], draft_temperature)
        with set_current_vllm_config(self.vllm_config), torch.no_grad():
            initialize_layerwise_reload(model)
            model.load_weights(iter(taken.items()))
            finalize_layerwise_reload(model, self.vllm_config.speculative_config.draft_model_config)
        return _read_back(model, _renamed(taken), "draft")


def _check_own_head(runner: Any, state: Mapping[str, Tensor]) -> None:
    """vLLM shares output heads that are equal at the start: loading the drafter would overwrite the policy's."""
    drafter, policy = runner.drafter.model, runner.get_model()
    if "lm_head.weight" in state and getattr(drafter, "lm_head", None) is getattr(policy, "lm_head", drafter):
        raise UserError(
            "The drafter's output head was equal to the policy's when the engine started, and vLLM shares it since; "
            "start the engine with the drafter's own head"
        )


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An EAGLE-3 head's tensors under vLLM's names where only a prefix differs."""
    found = {}
    for name, tensor in state.items():
        new = next((theirs + name.removeprefix(ours) for ours, theirs in DRAFT_NAMES if name.startswith(ours)), name)
        found["draft_id_to_target_id" if name == "d2t" else new] = tensor
    return found


def _read_back(model: Any, state: Mapping[str, Tensor], what: str) -> int:
    """Compare the parameters that vLLM kept as they came (it pads vocabularies); how many agreed."""
    agreed = 0
    for name, parameter in model.named_parameters():
        sent = state.get(name)
        if sent is None or parameter.shape[1:] != sent.shape[1:] or parameter.shape[0] < sent.shape[0]:
            continue
        if not torch.equal(parameter[: sent.shape[0]].cpu(), sent.to(parameter.dtype).cpu()):
            raise RuntimeError(f"it holds another {name} than the {what} that it was given: the load did not take")
        agreed += 1
    return agreed
