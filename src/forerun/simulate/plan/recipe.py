"""From a recipe to what the planner needs: shapes, batch, lengths, acceptance, and the machine that it runs on.

A recipe is plain data (`Recipe.model_dump()`), so that nothing here needs pydantic or torch. What a recipe cannot say
before it has run (answer lengths, acceptance) is looked up in a cost table, then in the drafter's own config.json, then
assumed; each assumption is a sentence and widens the band. Not supported: pipeline layouts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from forerun.errors import UserError
from forerun.simulate.core.cost_model import CostModel, nominal_cost_model
from forerun.simulate.core.decode import COSTS_AS, FUSES_HIDDEN_STATES, Acceptance, LinearEngine
from forerun.simulate.core.hardware import Hardware, load_hardware, measure_cpu
from forerun.simulate.core.rollout import lengths_with_mean
from forerun.simulate.core.shapes import ModelShape, load_model
from forerun.simulate.plan.calibrate import benchmarked_cost_model, fit_engine
from forerun.simulate.plan.cost_table import CostTable
from forerun.simulate.plan.planner import PlanResult, plan
from forerun.simulate.plan.spec import PlanSpec, spec_from_dict
from forerun.simulate.plan.step_model import drafter_of
from forerun.tracking.environment import accelerator_name

Data = Mapping[str, Any]

PROMPT_TOKENS = 100
LENGTH_SHARE = 0.5  # mean answer over max_new_tokens, where nothing is known
LENGTH_SIGMA = 0.5  # spread of the lognormal lengths
RATE_OF = {"ngram": 0.55}  # conditional acceptance where nothing is known; other drafters: PlanSpec's default
LENGTH_BANDS = {"drafter": 0.25, "assumed": 1.0}  # relative error of seconds, by source of the lengths
ACCEPTANCE_BANDS = {"table": 0.1, "drafter": 0.15, "assumed": 0.35}


@dataclass(frozen=True, slots=True)
class RecipePlan:
    """A recipe ready to be planned. `machine` None: accelerators with an analytical engine (or `costs`)."""

    name: str
    spec: PlanSpec
    model: ModelShape
    machine: CostModel | None
    costs: LinearEngine | None
    drafts: bool  # whether the recipe itself speculates
    assumed: tuple[str, ...]
    length_band: float  # relative error of generation seconds for want of lengths
    acceptance_band: float  # likewise, of acceptance


def plan_recipe(
    recipe: Data, changes: Data | None = None, table: CostTable | None = None, shape: Data | None = None
) -> PlanResult:
    """Plan a recipe; arguments and errors as of `read_recipe`."""
    found = read_recipe(recipe, changes or {}, table, shape)
    return plan(found.spec, found.costs, found.machine, found.model, found.assumed)


def read_recipe(
    recipe: Data,
    changes: Data,
    table: CostTable | None = None,
    shape: Data | None = None,
    here: Hardware | None = None,
) -> RecipePlan:
    """The plan that a recipe asks for.

    Args:
        recipe: the recipe as plain data, defaults included.
        changes: keys of `PlanSpec` that override it; `hardware` names an accelerator or "cpu". Without it the plan is
            for this machine.
        table: costs that `forerun bench` measured; they replace the engine's nominal or analytical ones.
        shape: the policy's configuration where its name is not in the table.
        here: this machine; None finds out.

    Raises:
        UserError: an unknown model, drafter, accelerator or key, or a value that cannot be.
    """
    changes = dict(changes)
    named = changes.pop("hardware", changes.pop("gpu", None))
    hardware = here if here and named is None else hardware_named(str(named or accelerator_name() or "cpu"))
    cluster = hardware.name != "CPU" and (named is not None or recipe["rollout"]["engine"] == "vllm")
    model = load_model(dict(shape) if shape else str(changes.get("model") or recipe["policy"]["model"]))
    inputs = _Inputs(recipe, changes, table)
    values = _fixed(recipe, hardware, cluster) | inputs.lengths() | inputs.speculation() | changes
    spec = spec_from_dict({**values, "model": model.name, "gpu": hardware.name})
    assumed = inputs.sentences
    if cluster and recipe["rollout"]["engine"] == "local" and "engine" not in changes:
        assumed.append("The recipe's local engine is one process; planned is rollout.engine=vllm.")
    machine, costs = None, None
    if cluster:
        costs = fit_engine(table.of(_measured_method(recipe, table))) if table else None
    else:
        spec, machine = _on_one_machine(recipe, spec, hardware, model, table, assumed)
    return RecipePlan(
        name=str(recipe.get("name") or "recipe"),
        spec=spec,
        model=model,
        machine=machine,
        costs=costs,
        drafts=recipe["speculation"]["method"] != "none" and recipe["speculation"]["k"] != 0,
        assumed=tuple(assumed),
        length_band=inputs.length_band,
        acceptance_band=inputs.acceptance_band,
    )


def hardware_named(device: str) -> Hardware:
    """The CPU ("cpu"), measured for 0.1 s, or an accelerator by name. Raises UserError for an unknown one."""
    return measure_cpu() if device.lower() == "cpu" else load_hardware(device)


def _fixed(recipe: Data, hardware: Hardware, cluster: bool) -> dict[str, Any]:
    """What the recipe sets itself."""
    train, rollout = recipe["train"], recipe["rollout"]
    return {
        "gpus": 1,
        "engine": "vllm" if cluster else rollout["engine"],
        "precision": _precision(recipe["policy"]["dtype"], hardware),
        "prompts": train["prompts_per_step"],
        "samples": train["samples_per_prompt"],
        "prompt_tokens": PROMPT_TOKENS,
        "cap_tokens": rollout["max_new_tokens"],
        "slots": rollout["slots"],
        "lag": recipe["loop"]["lag"],
        "logprob_passes": 2.0 if train["kl"] > 0 else 1.0,
        "train_passes": 4.0 if train["gradient_checkpointing"] else 3.0,
        "updates": train["updates_per_step"],
    }


def _precision(dtype: str, hardware: Hardware) -> str:
    if dtype != "auto":
        return {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    emulated = hardware.flops.get("fp32", 0.0) > hardware.flops["bf16"]  # only a CPU lists both
    return "fp32" if emulated else "bf16"


class _Inputs:
    """Lengths and acceptance as far as known before the run, best source first; `sentences` name the sources."""

    def __init__(self, recipe: Data, changes: Data, table: CostTable | None) -> None:
        self.recipe = recipe
        self.changes = changes
        self.table = table
        self.config = drafter_config(recipe["speculation"]["draft"])
        self.sentences: list[str] = []
        self.length_band = self.acceptance_band = 0.0

    def lengths(self) -> dict[str, Any]:
        """Mean and spread of the answers' lengths."""
        cap = self.recipe["rollout"]["max_new_tokens"]
        if "mean_tokens" in self.changes or "trace" in self.changes:
            return {"sigma": LENGTH_SIGMA}
        trained = self.config.get("forerun") or {}
        if trained.get("tokens") and trained.get("rollouts"):
            mean, self.length_band = trained["tokens"] / trained["rollouts"], LENGTH_BANDS["drafter"]
            self.sentences.append(f"Answers of {mean:.0f} tokens on average, as those that the drafter was trained on.")
        else:
            mean, self.length_band = LENGTH_SHARE * cap, LENGTH_BANDS["assumed"]
            self.sentences.append(
                f"Answers of {mean:.0f} tokens on average, half of max_new_tokens: an assumption; a run's own mean is "
                "mean_tokens=."
            )
        train = self.recipe["train"]
        prompts = int(self.changes.get("prompts", train["prompts_per_step"]))
        samples = int(self.changes.get("samples", train["samples_per_prompt"]))
        lengths = lengths_with_mean(float(mean), LENGTH_SIGMA, cap, max(prompts * samples, 1))
        return {"mean_tokens": min(float(mean), float(cap)), "sigma": LENGTH_SIGMA, "trace": tuple(map(float, lengths))}

    def speculation(self) -> dict[str, Any]:
        """Method, k and acceptance."""
        speculation = self.recipe["speculation"]
        method = COSTS_AS.get(speculation["method"], speculation["method"])
        values: dict[str, Any] = {"k": None if speculation["k"] == "auto" else speculation["k"]}
        if method == "none":
            method, values["k"] = "eagle3", None
            self.sentences.append("The recipe does not speculate; planned is an EAGLE-3 drafter with its best k.")
        method = str(self.changes.get("method", method))
        values |= {"method": method, "draft_vocab": self._draft_vocab(method)}
        if method == "model" and speculation["draft"]:
            values["draft"] = speculation["draft"]
        return values | self._acceptance(method)

    def _draft_vocab(self, method: str) -> int:
        if method not in FUSES_HIDDEN_STATES:
            return 0
        return int(self.config.get("draft_vocab_size") or self.recipe["draft"]["vocab"])

    def _acceptance(self, method: str) -> dict[str, Any]:
        if "acceptance" in self.changes or "acceptance_lengths" in self.changes:
            return {}
        if self.table is not None and self.table.methods:
            measured = self.table.acceptance(_measured_method(self.recipe, self.table))
            if measured:
                self.acceptance_band = ACCEPTANCE_BANDS["table"]
                self.sentences.append(f"Acceptance as the cost table measured it, {_lengths_text(measured)}.")
                return {"acceptance_lengths": measured}
        trained = _trained_lengths(self.config)
        if trained:
            self.acceptance_band = ACCEPTANCE_BANDS["drafter"]
            self.sentences.append(f"Acceptance as at the end of the drafter's training, {_lengths_text(trained)}.")
            return {"acceptance_lengths": trained}
        self.acceptance_band = ACCEPTANCE_BANDS["assumed"]
        rate = RATE_OF.get(method, PlanSpec().acceptance)
        self.sentences.append(f"Acceptance of {rate:.2f} per position: an assumption; a measured one is acceptance=.")
        return {"acceptance": rate}


def drafter_config(draft: str | None) -> dict[str, Any]:
    """The config.json of a drafter's folder or shipped artifact; {} where there is none."""
    if not draft:
        return {}
    folders = (Path(draft), Path(str(files("forerun") / "artifacts" / draft)))
    found = next((folder / "config.json" for folder in folders if (folder / "config.json").is_file()), None)
    try:
        config = json.loads(found.read_text(encoding="utf-8")) if found else {}
    except ValueError as error:
        raise UserError(f"The drafter's {found} is no JSON: {error}.") from None
    return config if isinstance(config, dict) else {}


def _trained_lengths(config: Data) -> dict[int, float]:
    """α by k from the conditional rates that a drafter's training ended with."""
    rates = tuple(map(float, (config.get("forerun") or {}).get("acceptance_per_position") or ()))
    return {k: float(Acceptance(rates).length(k)) for k in range(1, len(rates) + 1)}


def _lengths_text(lengths: Mapping[int, float]) -> str:
    return "tokens per round " + ", ".join(f"{alpha:.2f} at k = {k}" for k, alpha in lengths.items())


def _measured_method(recipe: Data, table: CostTable) -> str:
    """The recipe's drafter, or the first that was measured where the recipe has none."""
    method = str(recipe["speculation"]["method"])
    return method if method != "none" else next(iter(table.methods), "none")


def _on_one_machine(
    recipe: Data, spec: PlanSpec, hardware: Hardware, model: ModelShape, table: CostTable | None, assumed: list[str]
) -> tuple[PlanSpec, CostModel]:
    if spec.lag and spec.gpus < 2:
        spec = replace(spec, lag=0)
        assumed.append("One machine generates and trains in turn: planned without lag; gpus=2 plans a second machine.")
    if spec.method == "tree":
        assumed.append("A tree's verified nodes are counted as a chain of k: its rounds are dearer than planned here.")
    drafter = drafter_of(spec, model, measured=table is not None)
    assumed.append("Every group is taken to carry a gradient; one whose samples got equal rewards is not trained on.")
    if recipe["speculation"].get("train", "off") != "off":
        assumed.append("The drafter's own training beside the policy is not in these seconds.")
    context = spec.prompt_tokens + spec.mean_tokens / 2
    machine = nominal_cost_model(hardware, model, drafter, spec.precision, context)
    if table is not None:
        machine = benchmarked_cost_model(machine, table, _measured_method(recipe, table))
    return spec, machine


def combined_band(*bands: float) -> float:
    """One relative error from independent ones: their logarithms add in squares."""
    return math.exp(math.sqrt(sum(math.log1p(band) ** 2 for band in bands))) - 1.0
