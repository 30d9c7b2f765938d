"""A policy sharded over ranks by FSDP2: built a layer at a time, streamed and saved a parameter at a time.

Every decoder layer is a unit that is gathered for its forward and its backward pass and freed again; embeddings, final
norm and head are one more. The sharded parameters are float32 and are the masters; passes run in the policy's dtype
(rounded to the nearest), gradients are reduced in float32. They are SUMMED over the ranks: the loss is divided by the
tokens of the whole batch already (`parallel.py`). Every micro-batch is reduced, so that no rank ever holds a whole
gradient beyond one unit. Checkpoints are torch.distributed.checkpoint's, keyed by parameter name: they load on any
number of ranks. With tensor parallelism (`tensor_parallel.py`) the mesh has a second dimension, over which layers were
split before: "dp" and "tp". Not supported: pipeline parallelism, buffers that change in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from forerun.errors import UserError
from forerun.learner.optimizer import MasterOptimizer
from forerun.learner.tensor_parallel import parallelize, plan_of
from forerun.models import Policy
from forerun.models.auxiliary import decoder_layers

DIVISOR = 1.0  # of the summed gradients


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A policy without its weights, as it is sent to a rank."""

    model_class: type
    config: Any  # transformers.PretrainedConfig
    name: str
    dtype: torch.dtype
    aliases: dict[str, str]  # tied parameters: name -> name of the one that is stored


def blueprint(policy: Policy) -> Blueprint:
    """How to build `policy` again."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in policy.model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            aliases[name] = first[id(parameter)]
    return Blueprint(type(policy.model), policy.model.config, policy.name, policy.dtype, aliases)


def store_weights(policy: Policy, file: Path) -> None:
    """Write every parameter once, and every buffer (also those that a Hugging Face folder leaves out)."""
    model = policy.model
    tensors = {name: p.detach().cpu() for name, p in model.named_parameters()}
    torch.save(tensors | {name: b.cpu() for name, b in model.named_buffers(remove_duplicate=False)}, file)


def build_sharded(plan: Blueprint, file: Path, mesh: DeviceMesh, device: torch.device, learns: bool) -> Any:
    """The model of a blueprint with the stored weights, of which this rank keeps its part.

    One unit at a time is read whole. A model that learns has float32 parameters; one that does not keeps its dtype.

    Args:
        mesh: of the dimensions "dp", over which units are sharded, and "tp", over which layers are split.

    Raises:
        UserError: the model cannot be split.
    """
    tensors = torch.load(file, mmap=True, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        model = plan.model_class(plan.config)
    split = plan_of(model, mesh["tp"].size()) if mesh["tp"].size() > 1 else {}
    names = {module: name for name, module in model.named_modules()}
    tied = set(plan.aliases.values())
    made: dict[str, nn.Parameter] = {}

    def parameter(name: str) -> nn.Parameter:
        name = plan.aliases.get(name, name)
        if name in made:
            return made[name]
        values = tensors[name].to(device, torch.float32 if learns else None)
        result = nn.Parameter(values.contiguous(), requires_grad=learns)
        return made.setdefault(name, result) if name in tied else result

    for unit in [*decoder_layers(model), model]:
        for module in unit.modules():
            _fill(module, names[module], parameter, tensors, device)
        if split:
            parallelize(unit, f"{names[unit]}." if names[unit] else "", split, mesh["tp"])
            _tie(unit, plan.aliases if unit is model else {})
        _shard(unit, mesh["dp"], plan.dtype if learns else torch.float32)
    return model.eval()


def _fill(module: nn.Module, prefix: str, parameter: Any, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Give a module of the skeleton its own parameters and buffers."""
    start = f"{prefix}." if prefix else ""
    for key, value in list(module.named_parameters(recurse=False, remove_duplicate=False)):
        if value.is_meta:
            setattr(module, key, parameter(start + key))
    for key, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
        if buffer.is_meta:
            setattr(module, key, tensors[start + key].to(device, copy=True))


def _tie(model: nn.Module, aliases: Mapping[str, str]) -> None:
    """Make one again what was split twice."""
    for name, stored in aliases.items():
        (owner, _, key), (of, _, stored_key) = name.rpartition("."), stored.rpartition(".")
        setattr(model.get_submodule(owner), key, getattr(model.get_submodule(of), stored_key))


def _shard(unit: Any, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    compute = None if dtype == torch.float32 else dtype
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
    unit.set_gradient_divide_factor(DIVISOR)
    unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other that divides


@torch.no_grad()
def whole_parameters(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, whole, in `dtype` and on the CPU, one at a time. All ranks must go through it."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach().to(dtype).full_tensor().cpu()


# ---- checkpoints ----


def save_shards(folder: Path, model: Any, optimizer: MasterOptimizer, reference: Any | None) -> None:
    """Every rank writes its part of masters, moments and reference. Raises UserError when one of them cannot."""
    state: dict[str, Any] = {"updates": torch.tensor(optimizer.updates)}
    for name, master in _masters(model, optimizer):
        state[f"master.{name}"] = master.detach()
        for key, value in optimizer.inner.state.get(master, {}).items():
            if value is not None:
                state[f"{key}.{name}"] = value
    if reference is not None:
        state |= {f"reference.{name}": p.detach() for name, p in reference.named_parameters()}
    try:
        dcp.save(state, checkpoint_id=folder)
    except CheckpointException as error:
        raise UserError(f"Cannot write {folder}: {_cause(error)}") from None


def load_shards(
    folder: Path, model: Any, optimizer: MasterOptimizer, reference: Any | None, alone: bool = False
) -> None:
    """Inverse of `save_shards`, on any number of ranks; `alone`: into a model that is not sharded.

    Raises:
        UserError: the folder is broken, or of another model.
    """
    try:
        known = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        masters = _masters(model, optimizer)
        state: dict[str, Any] = {f"master.{name}": master.detach() for name, master in masters}
        state["updates"] = torch.tensor(0)
        if reference is not None and any(key.startswith("reference.") for key in known):
            state |= {f"reference.{name}": p.detach() for name, p in reference.named_parameters()}
        moments: list[tuple[nn.Parameter, str, str]] = []  # master, what, key
        for name, master in masters:
            found = [what for what in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer") if f"{what}.{name}" in known]
            moments += [(master, what, f"{what}.{name}") for what in found]
        for master, what, key in moments:
            state[key] = torch.tensor(0.0) if what == "step" else torch.zeros_like(master.detach())
        dcp.load(state, checkpoint_id=folder, no_dist=alone)
    except (CheckpointException, OSError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{folder} cannot be loaded: {_cause(error)}") from None
    for master, what, key in moments:
        optimizer.inner.state[master][what] = state[key]
    optimizer.updates = int(state["updates"])
    optimizer.round()


def load_whole(folder: Path, model: Any, optimizer: MasterOptimizer, reference: Any | None) -> None:
    """What a learner in one process saved (`Learner.save`), each rank its part of it.

    Raises:
        UserError: the checkpoint is broken, or of another model.
    """
    try:
        _take_parts(folder, model, optimizer, reference)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{folder} cannot be loaded: {_cause(error)}") from None


@torch.no_grad()
def _take_parts(folder: Path, model: Any, optimizer: MasterOptimizer, reference: Any | None) -> None:
    saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
    state = saved["inner"]["state"]  # {number of the master: {what: values}}
    for number, (master, values) in enumerate(zip(optimizer.masters, saved["masters"], strict=True)):
        master.copy_(_part(values, master))
        for what, value in state.get(number, {}).items():
            alike = value.shape == master.shape  # else it is the number of steps
            optimizer.inner.state[master][what] = _part(value, master) if alike else value.clone()
    optimizer.updates = saved["updates"]
    if reference is not None and (folder / "reference.pt").exists():
        kept = torch.load(folder / "reference.pt", map_location="cpu", weights_only=True, mmap=True)
        for name, parameter in reference.named_parameters():
            parameter.copy_(_part(kept[name], parameter))


def _part(values: Tensor, like: Any) -> Tensor:
    """`values` sharded as `like` is, without a message: split first, and the parts sharded."""
    mesh, local = like.device_mesh, values.to(like.device)
    dimensions = dict(zip(mesh.mesh_dim_names, like.placements, strict=True))
    for name in ("tp", "dp"):
        placement = dimensions.get(name, Replicate())
        if not placement.is_replicate():  # FSDP2 calls it strided where both divide one dimension
            part = distribute_tensor(local, mesh[name], [Shard(placement.dim)], src_data_rank=None)
            local = part.to_local()
    return DTensor.from_local(local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def _masters(model: Any, optimizer: MasterOptimizer) -> list[tuple[str, nn.Parameter]]:
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return list(zip(names, optimizer.masters, strict=True))


def _cause(error: BaseException) -> str:
    """The first sentence of the first rank's failure."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    cause = next(iter(failures.values()))[0] if failures else error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
