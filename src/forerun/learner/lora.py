"""LoRA (2106.09685): low-rank matrices A and B per linear layer are trained, and the live weight is W0 + α/r·B·A.

The live policy holds the merged weights, made anew from W0 after every update and rounded once. The learner's passes
run on those same weights: engine, evaluation, drafters, checksums and the exported policy need not know of LoRA, and a
log-probability is that of the weights that generated. Gradients go to A and B through the merged weight,

    y = x·Wᵀ,   dW = dyᵀ·x,   dB = s·dW·Aᵀ = s·dyᵀ·(x·Aᵀ),   dA = s·Bᵀ·dW = s·(dy·B)ᵀ·x,   s = α/r

as written last: dW [out, in] is never made. A, B and their moments are float32.
bfloat16 weights are rounded stochastically (`optimizer.py`): at first s·B·A is far below the distance between two
bfloat16 numbers. The reference of the KL penalty is the same model with W0 in place of its weights (`left_out`).
Not supported: dropout, matrices that are no nn.Linear (fused experts, Conv1D, embeddings), adapters sharded over ranks;
a layer that the model does not call is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forerun.config import LoraConfig
from forerun.errors import UserError
from forerun.learner.optimizer import stochastic_bfloat16

SETTINGS = "lora.json"  # in a checkpoint: the settings that its adapter was made with


class _MergedLinear(torch.autograd.Function):
    """x·Wᵀ + bias with the live weight W; its gradient arrives at A and B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        (dy,) = gradients
        rows, errors = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])  # [M, in], [M, out]
        to_a = (errors @ b.to(dy.dtype)).T @ rows  # [r, in]
        to_b = errors.T @ (rows @ a.to(x.dtype).T)  # [out, r]
        to_x = dy @ weight if ctx.needs_input_grad[0] else None
        return to_x, None, None, to_a.float() * ctx.scale, to_b.float() * ctx.scale, None


class AdaptedLinear:
    """A linear layer with its A, B and W0; replaces the layer's `forward`."""

    def __init__(self, module: nn.Linear, rank: int, scale: float, source: torch.Generator) -> None:
        """A is uniform within 1/sqrt(in), as peft begins, and B is 0: the policy is what it was."""
        self.module, self.scale, self.without = module, scale, False
        self.base = module.weight.detach().clone()  # [out, in]
        bound, device = 1 / math.sqrt(module.in_features), module.weight.device
        a = torch.empty(rank, module.in_features).uniform_(-bound, bound, generator=source)
        self.a = nn.Parameter(a.to(device))  # [r, in] float32
        self.b = nn.Parameter(torch.zeros(module.out_features, rank, device=device))  # [out, r] float32
        module.forward = self  # type: ignore[method-assign,assignment]

    def __call__(self, x: Tensor) -> Tensor:
        module = self.module
        if self.without:
            return F.linear(x, self.base, module.bias)
        if not torch.is_grad_enabled():
            return F.linear(x, module.weight, module.bias)
        result: Tensor = _MergedLinear.apply(x, module.weight, module.bias, self.a, self.b, self.scale)  # type: ignore[no-untyped-call]
        return result

    @torch.no_grad()
    def merge(self, number: int) -> None:
        """Write W0 + s·B·A into the live weight, in place: other views of it see the change.

        Args:
            number: of the layer, see `stochastic_bfloat16`.
        """
        merged = self.base.float() + (self.b @ self.a) * self.scale
        live = self.module.weight
        live.copy_(stochastic_bfloat16(merged, number) if live.dtype == torch.bfloat16 else merged)


class LoraAdapter:
    """The adapter of a policy. While it lasts, the model's own parameters are frozen."""

    def __init__(self, model: Any, config: LoraConfig) -> None:
        """Put an adapter that changes nothing yet on the chosen layers.

        Raises:
            UserError: a target names no layer, or a layer that cannot be adapted.
        """
        self.model, self.config = model, config
        source = torch.Generator().manual_seed(config.seed)
        chosen = find_targets(model, config.targets)
        model.requires_grad_(False)
        self.layers = {
            name: AdaptedLinear(module, config.rank, config.scale, source) for name, module in chosen.items()
        }

    def parameters(self) -> list[nn.Parameter]:
        """A and B of every layer."""
        return [p for layer in self.layers.values() for p in (layer.a, layer.b)]

    def describe(self) -> str:
        """What is trained, in one line."""
        trained, whole = (sum(p.numel() for p in x.parameters()) for x in (self, self.model))
        return f"LoRA: {trained:,} parameters on {len(self.layers)} layers are trained, the policy has {whole:,}"

    def require_gradients(self) -> None:
        """After a backward pass: every kind of layer must have had its part in it (single experts may sit out).

        Raises:
            UserError: one had none.
        """
        reached = {_last(name) for name, layer in self.layers.items() if layer.b.grad is not None}
        missed = sorted({_last(name) for name in self.layers} - reached)
        if missed:
            raise UserError(
                f"train.lora adapts '{missed[0]}', which {type(self.model).__name__} does not call (its weight is read "
                "directly, or not at all): nothing would be learnt there; name the other layers in train.lora.targets"
            )

    def merge(self) -> None:
        """Make the live weights anew."""
        for number, layer in enumerate(self.layers.values()):
            layer.merge(number)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within, the model computes with W0."""
        self._leave_out(True)
        try:
            yield
        finally:
            self._leave_out(False)

    def _leave_out(self, without: bool) -> None:
        for layer in self.layers.values():
            layer.without = without

    def starting_state(self) -> dict[str, Tensor]:
        """The model's `state_dict` with W0 in place of the live weights."""
        return self.model.state_dict() | {f"{name}.weight": layer.base for name, layer in self.layers.items()}

    def save(self, folder: Path, base: str | None) -> None:
        """Write the adapter in peft's format, in float32.

        Args:
            base: name of the model that it is for; None: no single model is called so.

        Raises:
            OSError: the folder cannot be written.
        """
        from peft import LoraConfig as PeftConfig  # loads slowly
        from safetensors.torch import save

        folder.mkdir(parents=True, exist_ok=True)
        alpha = self.config.scale * self.config.rank
        PeftConfig(
            r=self.config.rank, lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]
            target_modules=self._names(), base_model_name_or_path=base, task_type="CAUSAL_LM", inference_mode=True,
        ).save_pretrained(str(folder))  # fmt: skip
        tensors = {
            f"base_model.model.{name}.lora_{which}.weight": matrix.detach().cpu().contiguous()
            for name, layer in self.layers.items()
            for which, matrix in (("A", layer.a), ("B", layer.b))
        }
        (folder / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))

    def _names(self) -> list[str]:
        """Last parts of the layers' names, unless those would name other modules too."""
        last = {_last(name) for name in self.layers}
        named = {name for name, _ in self.model.named_modules() if _last(name) in last}
        return sorted(last if named == set(self.layers) else self.layers)

    def close(self) -> None:
        """Take the adapter off; the weights stay as they are, and can be trained."""
        for layer in self.layers.values():
            if vars(layer.module).get("forward") is layer:
                del layer.module.forward
        self.model.requires_grad_(True)


def find_targets(model: Any, targets: Sequence[str] | Literal["all-linear"]) -> dict[str, nn.Linear]:
    """The layers to adapt, by name: all linear ones but the output head, or those that `targets` name.

    A target is a module's name, or the end of one after a dot (`q_proj`), as in peft.

    Raises:
        UserError: a target names no module, one that is not a plain linear layer, or one that shares its weight.
    """
    modules = dict(model.named_modules())
    if targets == "all-linear":
        head = model.get_output_embeddings()
        names = [name for name, module in modules.items() if isinstance(module, nn.Linear) and module is not head]
        if not names:
            raise UserError(f"train.lora finds no linear layer in {type(model).__name__}; set train.lora=null")
    else:
        for target in targets:
            if not any(_matches(name, target) for name in modules):
                linear = sorted({_last(n) for n, m in modules.items() if isinstance(m, nn.Linear)})
                raise UserError(
                    f"train.lora.targets names '{target}', and no module of {type(model).__name__} is called so; its "
                    f"linear layers are: {', '.join(linear)}"
                )
        names = [name for name in modules if any(_matches(name, target) for target in targets)]
    _require_adaptable(model, {name: modules[name] for name in names})
    return {name: modules[name] for name in names}


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _require_adaptable(model: Any, chosen: dict[str, nn.Module]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, module in chosen.items():
        if type(module).forward is not nn.Linear.forward:
            raise UserError(f"train.lora cannot adapt '{name}', a {type(module).__name__} and no plain nn.Linear")
        others = [owner for owner in owners[id(module.weight)] if owner != f"{name}.weight"]
        if others:
            raise UserError(
                f"train.lora cannot adapt '{name}', which shares its weight with '{others[0]}'; leave it out of targets"
            )


def save_settings(folder: Path, config: LoraConfig) -> None:
    """Leave the settings in a checkpoint."""
    (folder / SETTINGS).write_text(json.dumps(config.model_dump()))


def read_settings(checkpoint: Path) -> LoraConfig | None:
    """The settings that `save_settings` left; None: the checkpoint has no adapter. Raises OSError or ValueError."""
    file = checkpoint / SETTINGS
    return LoraConfig.model_validate_json(file.read_text()) if file.exists() else None
