"""The commands on the pages are commands: each `forerun train` line resolves, and so does each `forerun plan` line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from command_line import run_here

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "cluster").iterdir())]
HOLDERS = {"RECIPE", "my-recipe.yaml"}  # names that stand for the reader's own


def train_commands(text: str) -> list[list[str]]:
    """Words after `forerun train`; lines that end in a backslash are one, shell comments are none of it."""
    joined = re.sub(r"\\\n#?\s*", "", text).replace('"${what[@]}"', "gsm8k")  # of slurm.sh: RECIPE, or --resume
    found = [shlex.split(line.strip("`'"), comments=True) for line in re.findall(r"forerun train ([^\n`']+)", joined)]
    return [words for words in found if words and words[0][0] not in "-." and not {"...", *HOLDERS} & set(words)]


def rows_of_settings(text: str) -> list[list[str]]:
    """Settings in the table at the top of docs/scaling.md."""
    rows = re.findall(r"^\| [^|]+ \| `(rollout\.engine=[^`]+)`", text, re.MULTILINE)
    return [["gsm8k", *row.split()] for row in rows]


COMMANDS = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)}"[:100])
    for page in PAGES
    for words in train_commands(page.read_text()) + rows_of_settings(page.read_text())
]


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_of_the_pages_resolves(words: list[str]) -> None:
    done = run_here("train", *words, "--dry-run")
    assert done.returncode == 0, done.stderr + done.stdout


def test_the_jobs_of_the_cluster_pages_fill_their_gpus() -> None:
    slurm = (ROOT / "docs" / "cluster" / "slurm.sh").read_text()
    settings = dict(re.findall(r"([a-z_.]+)=([^\s\\]+)", slurm[slurm.index("forerun train") :]))
    nodes, gpus = (int(re.search(rf"#SBATCH --{name}=(\d+)", slurm)[1]) for name in ("nodes", "gpus-per-node"))  # type: ignore[index]
    used = int(settings["rollout.replicas"]) + int(settings["train.ranks"]) + 1  # the driver's
    assert (
        used == nodes * gpus and settings["policy.device"] == f"cuda:{gpus - 1}" and f"--num-gpus={gpus - 1}" in slurm
    )
    assert yaml.safe_load((ROOT / "docs" / "cluster" / "ray.yaml").read_text())["max_workers"] == 2
