"""What a GPU makes of speculation: round costs of an 8B-shaped policy, and the quickstart's policy with its drafters.

    python -m benchmarks.gpu [--minutes 9] [--recipe quickstart] [--memory-gb N] [--out FILE]
    python -m benchmarks.gpu --toy      # the same code at toy sizes on the CPU; its figures say nothing

Rounds (torch and Transformers only): Qwen3-8B with random weights and an EAGLE-3 head, batch 1 to 256, context 512 and
4,096; round cost by k, the share of the memory bandwidth that is reached, and the speed-up that would follow at given
acceptance lengths. Acceptance is not measured there; see `gpu_shapes.py`.
Quickstart (everything that the recipe needs): real acceptance and speed-up at batch 1 to 128, for the drafter that
ships, n-grams, and EAGLE-3 and MTP heads that are trained on the spot.
Engines (vLLM as well): the local engine and vLLM on that policy, plain and with the recipe's drafter; `engines.py`.
What does not fit, is not installed or is not reached within `--minutes` is listed in the JSON with its reason. Without
a GPU: one sentence, no file, exit code 0. Runs from the repository root, whether or not forerun is installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parent.parent
if importlib.util.find_spec("forerun") is None:
    sys.path.insert(0, str(ROOT / "src"))

if TYPE_CHECKING:
    from benchmarks.common import Setting
    from benchmarks.gpu_shapes import Case, Models
    from forerun.config import Recipe

SCHEMA = 1
NO_GPU = "No GPU is at hand (torch sees no CUDA device), so nothing is measured; --toy runs the code on the CPU"
MEMORY_SHARE = 0.95  # of the free memory that a case may be reckoned to take
ROUNDS_SHARE = 0.6  # of the time, where the quickstart follows
QUICKSTART_SHARE = 0.75  # of what is left then
QUICKSTART_BATCHES = (8, 32, 128, 1, 64, 16, 4, 2)  # most important first
TRAINED_HERE = ("eagle3", "mtp")
SAMPLING_SLOTS = 128  # of the samples that drafters are trained on
REPEATS = 3  # of the quickstart's generations, and of the engines'
ENGINE_BATCHES, ENGINE_TOKENS = (32, 8, 1), 128  # most important first; the samples' limit
HOW = {
    "policy": "random weights, made on the device; drafter: one EAGLE-3 layer as wide as the policy's, random weights",
    "context": "the caches are filled with random numbers in place of a prefill",
    "seconds": "a round of the local engine, host work included, synchronised; median of turns, k by k in turns",
    "round_cost": "round over plain round, median of the ratios of one turn; k = 0 is a second plain engine: noise",
    "parts": "forward_s, verify_s, draft_s: parts of round_s by CUDA events, waits for the host's launches included",
    "bytes": "weights once (without an untied embedding table), keys and values of all rows; k times the drafter's",
    "acceptance": "synthetic, at the rate given, set by a few small operations after verification; none is measured",
    "speedup": "acceptance length over round cost, for lengths that are assumed",
}


class OutOfTime(Exception):
    """The time that the command was given is over."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds until a deadline."""

    end: float

    @classmethod
    def of(cls, seconds: float) -> Clock:
        """A clock that starts now."""
        return cls(time.perf_counter() + seconds)

    def left(self) -> float:
        return self.end - time.perf_counter()

    def check(self) -> None:
        """Raises OutOfTime when nothing is left."""
        if self.left() <= 0:
            raise OutOfTime


@dataclass(slots=True)
class Document:
    """The result, written anew whenever something was added, so that a killed command leaves what it had."""

    path: Path
    data: dict[str, Any]

    def save(self) -> None:
        """Write the file as it is now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=2) + "\n")


def describe_device(device: str, toy: bool) -> dict[str, Any]:
    """Name, memory, versions, and the bandwidth by the table of accelerators and by a copy."""
    import torch

    cuda = device == "cuda"
    name = torch.cuda.get_device_name(0) if cuda else "cpu"
    peak, source = peak_bandwidth(name)
    return {
        "name": name,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "torch": torch.__version__, "cuda": torch.version.cuda, "driver": driver_version() if cuda else None,
        "peak_bytes_per_s": peak, "peak_source": source,
        "copy_bytes_per_s": copy_bytes_per_s(device, 1 << (20 if toy else 30)),
    }  # fmt: skip


def peak_bandwidth(name: str) -> tuple[float | None, str]:
    """Memory bandwidth in bytes/s of a device as its driver spells it, and where it is from; None: not in the table."""
    from forerun.errors import UserError
    from forerun.simulate.core.hardware import load_hardware

    if any(word in name.upper().split() for word in ("PCIE", "NVL")):
        return None, f"the table of accelerators has no PCIe or NVL cards, and this is '{name}'"
    try:
        hardware = load_hardware(name)
    except UserError as error:
        return None, str(error)
    return hardware.memory_bytes_per_s, f"{hardware.name} of forerun/simulate/core/data/hardware.json (peaks)"


def copy_bytes_per_s(device: str, count: int, repeats: int = 5) -> float:
    """Bytes read and written per second by the device's own copy of `count` bytes: what a kernel can reach."""
    import torch

    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds: list[float] = []
    for _ in range(repeats + 1):  # the first copy warms up
        started = time.perf_counter()
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * count / statistics.median(seconds[1:])


def driver_version() -> str | None:
    """As nvidia-smi tells it; None where it does not."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() if done.returncode == 0 else []
    return lines[0].strip() if lines else None


# ---- rounds ----


def free_bytes(device: str) -> float:
    """Memory that a case could have on `device`: the driver's free bytes and what torch holds unused."""
    import torch

    if device != "cuda":
        return float("inf")
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return float(torch.cuda.mem_get_info()[0] + held)


@dataclass(slots=True)
class Rounds:
    """The first part: its cases in order, as far as the time reaches; `run` can be called again to go on."""

    section: dict[str, Any]  # of the document
    save: Callable[[], None]
    peak: float | None
    memory: float | None  # bytes; None: what is free
    todo: list[Case] = field(default_factory=list)

    def run(self, models: Models, device: str, clock: Clock) -> None:
        """Measure until nothing is left to do or the time is over."""
        while self.todo and clock.left() > 0:
            case = self.todo[0]
            try:
                self._case(models, device, case, clock)
            except OutOfTime:
                return
            del self.todo[0]
            self._note()

    def _case(self, models: Models, device: str, case: Case, clock: Clock) -> None:
        import torch

        from benchmarks.gpu_shapes import case_bytes, measure_case, refusal

        room = MEMORY_SHARE * (free_bytes(device) if self.memory is None else self.memory)
        why = refusal(case_bytes(models, case), room, case)
        if why is None:
            try:
                rows = measure_case(models, case, self.peak, clock.check)
                self.section["cells"] += rows
                print(*map(row_text, rows), sep="\n", flush=True)
            except torch.OutOfMemoryError as error:
                why = f"out of memory: {str(error).splitlines()[0]}"
        if why is not None:
            self.section["skipped"].append({"batch": case[0], "context": case[1], "reason": why})
            print(f"skipped: {why}", flush=True)
        release()

    def _note(self) -> None:
        from benchmarks.gpu_shapes import cases_text

        self.section["not_reached"] = cases_text(self.todo)
        self.save()


def release() -> None:
    """Give back the memory of what nobody holds any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def row_text(row: dict[str, Any]) -> str:
    """One line of the table."""
    share = "" if row["bandwidth_share"] is None else f"  {100 * row['bandwidth_share']:.0f} % of the bandwidth"
    return (
        f"batch {row['batch']:>3} context {row['context']:>4} k {row['k']}  {1e3 * row['round_s']:8.2f} ms  "
        f"round cost {row['round_cost']:.2f}{share}"
    )


def start_rounds(document: Document, toy: bool, memory: float | None) -> tuple[Rounds, Models | None]:
    """The section of the first part and its models; None where they cannot be made, with the reason in the section."""
    section: dict[str, Any] = {"cells": [], "skipped": [], "not_reached": []}
    document.data["rounds"] = section
    device = "cpu" if toy else "cuda"
    import torch

    try:
        from benchmarks.gpu_shapes import ACCEPTANCE_RATE, QWEN3_8B, TOY, cases_text, make_models
    except ImportError as error:
        section["skipped"].append({"reason": f"it cannot be imported: {error}"})
        print(f"rounds: skipped: {section['skipped'][0]['reason']}", flush=True)
        return Rounds(section, document.save, None, memory), None
    shape = TOY if toy else QWEN3_8B
    section |= {
        "shape": shape.name, "policy": shape.policy, "draft_vocabulary": shape.draft_vocabulary,
        "dtype": str(shape.dtype)[6:], "temperature": 1.0, "verify": "block", "turns": shape.turns,
        "rounds_per_turn": shape.rounds, "synthetic_acceptance_rate": ACCEPTANCE_RATE, "how": HOW,
        "not_reached": cases_text(shape.cases),
    }  # fmt: skip
    rounds = Rounds(section, document.save, document.data["device"]["peak_bytes_per_s"], memory, list(shape.cases))
    try:
        models = make_models(shape, device)
    except torch.OutOfMemoryError as error:
        section["skipped"].append({"reason": f"{shape.name} does not fit: {str(error).splitlines()[0]}"})
        return rounds, None
    print(f"{shape.name}: made with random weights", flush=True)
    return rounds, models


# ---- quickstart ----


def load_quickstart(recipe: str | None) -> tuple[Setting | None, str]:
    """The recipe with its policy and task, or None and why not."""
    if recipe is None:
        return None, "no recipe was named: --toy takes part in this only with --recipe"
    try:
        from benchmarks.common import load_setting
        from forerun.errors import UserError
    except ImportError as error:
        return None, f"recipes need more than torch and Transformers: {error}"
    try:
        return load_setting(recipe), ""
    except (UserError, ImportError) as error:
        return None, str(error)


@dataclass(slots=True)
class Quickstart:
    """The second part: drafters by batch, as far as the time reaches."""

    setting: Setting
    section: dict[str, Any]
    save: Callable[[], None]
    clock: Clock
    folder: Path  # of the drafters that are trained here
    batches: Sequence[int] = QUICKSTART_BATCHES
    longest_s: float = 0.0  # of the cells so far

    def run(self) -> None:
        """The shipped drafter at every batch, then each one that is trained here, then n-grams."""
        recipe = self.setting.recipe
        if recipe.speculation.tokens:
            self._measure(f"{recipe.speculation.method} of the recipe", recipe)
        for method in TRAINED_HERE:
            self._trained(method)
        self._measure("ngram", self._with(method="ngram", draft=None))

    def _with(self, **speculation: Any) -> Recipe:
        recipe = self.setting.recipe
        k = recipe.speculation.tokens or 3
        return recipe.model_copy(update={"speculation": recipe.speculation.model_copy(update={"k": k} | speculation)})

    def _trained(self, method: str) -> None:
        name, folder = f"{method} trained here", self.folder / method
        recipe = self._with(method=method, draft=None)
        try:
            self.section["training"][method] = self._train(recipe, folder)
        except OutOfTime:
            self._not_reached(name, self.batches, "the time was over before or while it was trained")
            return
        self._measure(name, self._with(method=method, draft=str(folder)))

    def _train(self, recipe: Recipe, folder: Path) -> dict[str, Any]:
        """Samples of the policy and training on them; raises OutOfTime."""
        from forerun.training.drafter import train_drafter

        self.clock.check()
        slots = max(SAMPLING_SLOTS, recipe.rollout.slots)
        recipe = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"slots": slots})})
        started = time.perf_counter()
        work = train_drafter(recipe, self.setting.policy, self.setting.task, folder)
        while True:
            try:
                next(work)
            except StopIteration as end:
                return {"seconds": time.perf_counter() - started, **end.value}
            self.clock.check()

    def _measure(self, name: str, recipe: Recipe) -> None:
        from benchmarks.speculation import measure

        setting = self.setting
        prompts = setting.held_out(max(self.batches))
        for place, batch in enumerate(self.batches):
            if self.clock.left() < 1.5 * self.longest_s:
                return self._not_reached(name, self.batches[place:], "the time was over")
            started = time.perf_counter()
            some = [prompts[i % len(prompts)] for i in range(max(4, batch))]
            rows = measure(setting.policy, recipe, some, batch, [recipe.speculation.tokens], REPEATS)
            self.longest_s = max(self.longest_s, time.perf_counter() - started)
            self.section["rows"] += [{"drafter": name, "prompts": len(some), **row} for row in rows]
            self.save()
            for row in rows:
                print(f"{name}: batch {batch:>3} k {row['k']}  {row['speedup']:.2f}x at {row['acceptance_length']:.2f} "
                      f"tokens a round, round cost {row['round_cost']:.2f}", flush=True)  # fmt: skip

    def _not_reached(self, name: str, batches: Sequence[int], why: str) -> None:
        self.section["not_reached"] += [{"drafter": name, "batch": batch, "reason": why} for batch in batches]
        self.save()


def run_quickstart(document: Document, setting: Setting, clock: Clock, batches: Sequence[int]) -> None:
    """Fill the section of the second part."""
    recipe = setting.recipe
    section: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"), "dtype": str(setting.policy.dtype)[6:], "repeats": REPEATS,
        "training": {}, "rows": [], "not_reached": [],
    }  # fmt: skip
    document.data["quickstart"] = section
    with tempfile.TemporaryDirectory() as folder:
        Quickstart(setting, section, document.save, clock, Path(folder), batches).run()
    document.save()


# ---- engines ----


def run_engines(document: Document, setting: Setting, clock: Clock, tokens: int = ENGINE_TOKENS) -> None:
    """Fill the section of the third part."""
    section: dict[str, Any] = {"rows": [], "not_reached": []}
    document.data["engines"] = section
    if importlib.util.find_spec("vllm") is None:
        section["skipped"] = "vLLM is not installed; docs/vllm.md says how"
    elif not setting.recipe.speculation.tokens:
        section["skipped"] = f"the recipe '{setting.recipe.name}' does not speculate"
    if "skipped" in section:
        print(f"engines: skipped: {section['skipped']}", flush=True)
        return
    from benchmarks.engines import line, measure

    for place, batch in enumerate(ENGINE_BATCHES):
        if clock.left() <= 0:
            section["not_reached"] = list(ENGINE_BATCHES[place:])
            break
        rows = measure(setting, ["local", "vllm"], batch, tokens, REPEATS)
        section["rows"] += rows
        print(*map(line, rows), sep="\n", flush=True)
        document.save()
    document.save()


# ---- the command ----


def run(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """All parts, within the time; returns what the file holds."""
    from forerun.tracking.environment import describe_environment

    started, clock = time.perf_counter(), Clock.of(60 * options.minutes)
    about = describe_device(device, options.toy)
    head = {"benchmark": "gpu", "schema": SCHEMA, "toy": options.toy, "minutes": options.minutes}
    document = Document(
        options.out or default_path(about["name"], options.toy),
        {**head, "device": about, "environment": describe_environment()},
    )
    setting, why = load_quickstart(options.recipe)
    memory = None if options.memory_gb is None else 1e9 * options.memory_gb
    rounds, models = start_rounds(document, options.toy, memory)
    share = 1.0 if setting is None else ROUNDS_SHARE
    if models is not None:
        rounds.run(models, device, Clock.of(share * clock.left()))
    if setting is None:
        document.data["quickstart"] = {"skipped": why}
        print(f"quickstart: skipped: {why}", flush=True)
    else:
        run_quickstart(document, setting, Clock.of(QUICKSTART_SHARE * clock.left()), options.batches)
        run_engines(document, setting, clock)
        if models is not None:
            rounds.run(models, device, clock)
    document.data["seconds"] = time.perf_counter() - started
    document.save()
    print(f"{document.path} ({document.data['seconds']:.0f} s)")
    return document.data


def default_path(device: str, toy: bool) -> Path:
    """benchmarks/results/gpu_<name>.json"""
    name = "toy" if toy else device.lower().replace("nvidia ", "").replace(" ", "_")
    return ROOT / "benchmarks" / "results" / f"gpu_{name}.json"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; --toy leaves the recipe out unless one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="no measurement begins after them")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--recipe", help="of the second part (quickstart)")
    parser.add_argument(
        "--batches", default=",".join(map(str, QUICKSTART_BATCHES)), help="of the second part, in order"
    )
    parser.add_argument("--memory-gb", type=float, help="memory for a case beside the weights; default: what is free")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    options.batches = [int(b) for b in options.batches.split(",")]
    if options.recipe is None and not options.toy:
        options.recipe = "quickstart"
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    options = parse(arguments)
    import torch

    if not options.toy and not torch.cuda.is_available():
        print(NO_GPU)
        return
    run(options, "cpu" if options.toy else "cuda")


if __name__ == "__main__":
    main()
