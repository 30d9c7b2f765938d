"""Runs whose disk is full in the middle of a checkpoint or of a log line: one sentence, and a resume that goes on.

Either no file may grow beyond a limit (the kernel's, of the processes), or the run has a small disk of its own, filled.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forerun.training.checkpoint import check_sizes, complete_checkpoints
from kill_runs import Zygote, beginning, faults, latest, lines, write_recipe

STEPS, FULL_AT = 4, 2  # the third step's checkpoint is the one that fails
DISK = 'mount -t tmpfs -o size=24M none "$0" && exec "$@"'
RECIPE: dict[str, dict[str, Any]] = {"speculation": {"method": "none"}, "train": {"steps": STEPS}}


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    made = Zygote(tmp_path_factory.mktemp("zygote"), forked=True)
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(tiny: Callable[..., Path], zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """whole(ranks) -> folder of a run that had room."""
    made: dict[int, Path] = {}

    def of(ranks: int) -> Path:
        if ranks not in made:
            recipe = write_recipe(tmp_path_factory.mktemp("whole"), tiny("llama"), **RECIPE)
            assert zygote.live(beginning(recipe, [f"train.ranks={ranks}"], 0)) == 0, zygote.said
            made[ranks] = latest(recipe)
        return made[ranks]

    return of


def told(folder: Path) -> list[dict[str, Any]]:
    """Metrics without times, and samples."""
    apart, rows = ("time/", "perf/"), lines(folder / "metrics.jsonl")
    metrics = [{k: v for k, v in row.items() if not k.startswith(apart)} for row in rows]
    return metrics + lines(folder / "rollouts.jsonl")


def weights_of(folder: Path) -> dict[str, Any]:
    weights: dict[str, Any] = json.loads((folder / "summary.json").read_text())["weights"]
    return weights


def newest(runs: Path, out: Path) -> Path:
    """A copy of the newest run as it is now; `runs` may be another's view of a disk, where links lead astray."""
    name = os.readlink(runs / "latest")
    return Path(shutil.copytree(runs / name, out / name))


def goes_on(
    zygote: Zygote, recipe: Path, words: list[str], full: dict[str, Any], whole: Path,
    runs: Path, free: Callable[[], object],
) -> str:  # fmt: skip
    """A run whose disk is full, and resumed when there is room, ends as one that had room; returns what it said."""
    order, before = {"step": FULL_AT, "who": "disk", **full}, len(zygote.struck)
    assert zygote.live(beginning(recipe, words, 0), [order]) == 2, zygote.said
    half, said = newest(runs, recipe.parent / "half"), zygote.said
    assert len(zygote.struck) == before + 1
    kept = complete_checkpoints(half / "checkpoints")
    assert [p.name for p in kept] == ["step-000001", "step-000002"]
    assert sorted(kept[0].parent.iterdir()) == kept  # and nothing half
    for checkpoint in kept:
        check_sizes(checkpoint)
    free()
    assert zygote.live(beginning(recipe, words, 1)) == 0, zygote.said
    end = newest(runs, recipe.parent / "end")
    assert half.name == end.name and faults(end) == []
    assert told(end) == told(whole) and weights_of(end) == weights_of(whole)
    return said.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "point", "share", "words"),
    [
        (1, "checkpoint", 0.5, "Cannot write the checkpoint"),  # the policy does not fit
        (1, "checkpoint", 1.5, "Cannot write the checkpoint"),  # the optimizer does not, which is three times as large
        (2, "checkpoint", 1.2, "Cannot write the checkpoint"),  # the ranks' parts of it do not
        (1, "train", 0.035, "rollouts.jsonl (File too large)"),  # in the middle of a line
    ],
)
def test_a_file_that_cannot_grow(
    tiny: Callable[..., Path], zygote: Zygote, whole: Callable[[int], Path], tmp_path: Path,
    ranks: int, point: str, share: float, words: str,
) -> None:  # fmt: skip
    """Beyond `share` of the policy's bytes."""
    model, overrides = tiny("llama"), [f"train.ranks={ranks}"]
    recipe = write_recipe(tmp_path, model, **RECIPE)
    full = {"point": point, "bytes": int(share * (model / "model.safetensors").stat().st_size)}
    said = goes_on(zygote, recipe, overrides, full, whole(ranks), tmp_path / "runs", lambda: None)
    assert said.startswith("forerun: ") and words in said


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.5, 1.5])
def test_a_disk_that_is_full(
    tiny: Callable[..., Path], whole: Callable[[int], Path], tmp_path: Path, share: float
) -> None:
    """`share` of the policy's bytes are free when the checkpoint begins."""
    model, place = tiny("llama"), tmp_path / "runs"
    place.mkdir()
    prefix = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", DISK, str(place)]
    try:
        able = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("this system has no unshare")
    if able.returncode:
        pytest.skip(f"this user may not mount a disk: {able.stderr.strip()}")
    recipe = write_recipe(tmp_path, model, **RECIPE)
    room = int(share * (model / "model.safetensors").stat().st_size)
    full = {"point": "checkpoint", "bytes": room, "ballast": str(place / "ballast")}
    zygote = Zygote(tmp_path, prefix=prefix)
    try:
        runs = Path(f"/proc/{zygote.process.pid}/root{place}")
        said = goes_on(zygote, recipe, [], full, whole(1), runs, lambda: (runs / "ballast").unlink())
    finally:
        zygote.close()
    assert said.startswith("forerun: Cannot write the checkpoint") and "step-000003" in said
