"""The run folder, `runs/<UTC time>-<name>`: one file per kind of record; `runs/latest` links to the newest.

Whole files are replaced atomically; the two .jsonl files only grow, line by line, and each line is handed to the system
before the call returns. A killed run leaves at most one torn last line, which `open` removes.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from forerun.errors import UserError
from forerun.tracking.environment import describe_environment
from forerun.tracking.files import disk_errors, write_atomically
from forerun.tracking.metrics import checked_metrics


class RunFolder:
    """The files of one run. Made by `create` for a new run, by `open` for one that is resumed."""

    def __init__(self, path: Path) -> None:
        """Name the files in `path`; use `create` or `open`."""
        self.path = path
        self.config = path / "config.resolved.yaml"  # every setting, defaults included
        self.env = path / "env.json"  # machine, versions, commit
        self.metrics = path / "metrics.jsonl"  # one line per `log`: {"step": 3, "reward/mean": 0.61, ...}
        self.rollouts = path / "rollouts.jsonl"  # one line per sample that was kept
        self.timeline = path / "timeline.json"  # spans of learner and engines, as a trace (`timeline.py`)
        self.summary = path / "summary.json"  # the figures of the final table
        self.report = path / "report.html"

    @classmethod
    def create(cls, root: Path | str, name: str) -> RunFolder:
        """Make `root/<UTC time>-<name>`, never an existing folder, and point `root/latest` at it.

        Raises:
            UserError: the root cannot be written, or `root/latest` is something else than a link.
        """
        root = Path(root)
        stem = f"{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.') or 'run'}"
        with disk_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            path = _make_new(root, stem)
            _point_latest(root, path.name)
        return cls(path)

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """Open an existing run folder (or the `latest` link) to resume; a torn last line is removed.

        Raises:
            UserError: there is no run in that folder.
        """
        run = cls.existing(path)
        for file in (run.metrics, run.rollouts):
            _drop_torn_line(file)
        return run

    @classmethod
    def existing(cls, path: Path | str) -> RunFolder:
        """An existing run folder, to be read: a run may be under way there. Raises UserError when there is none."""
        run = cls(Path(path).resolve())
        if not run.config.exists() and not run.metrics.exists():
            raise UserError(
                f"{path} holds no run (neither config.resolved.yaml nor metrics.jsonl): give the folder of a run, "
                "for example runs/latest."
            )
        return run

    def write_config(self, text: str) -> None:
        """Write the resolved recipe as YAML. Raises UserError when the disk is full."""
        write_atomically(self.config, text)

    def write_env(self) -> dict[str, Any]:
        """Write what this machine is and return it. Raises UserError when the disk is full."""
        env = describe_environment()
        write_atomically(self.env, json.dumps(env, indent=2) + "\n")
        return env

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append one line of metrics; several lines of one step are one step to the report.

        Raises:
            UserError: an undefined name, a value that is not finite, or a full disk.
        """
        self._append(self.metrics, [json.dumps({"step": int(step)} | checked_metrics(step, metrics))])

    def log_rollouts(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append one line per record: step, prompt_id, prompt, text, reward, advantage, tokens (count), finish_reason,
        rounds and, where known, accepted_mask and token_texts (one entry per token).

        Raises:
            UserError: a number in a record is not finite, or the disk is full.
        """
        lines = []
        for record in records:
            try:
                lines.append(json.dumps(dict(record), ensure_ascii=False, allow_nan=False, default=_plain))
            except ValueError as error:
                raise UserError(
                    f"A rollout of step {record.get('step')} (prompt {record.get('prompt_id')}) holds a number that is "
                    "not finite: check that the reward function returns finite numbers."
                ) from error
        self._append(self.rollouts, lines)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json atomically. Raises UserError for a value that is not finite and for a full disk."""
        try:
            text = json.dumps(dict(summary), indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
        except ValueError as error:
            raise UserError(f"The summary of {self.path} holds a number that is not finite ({error}).") from error
        write_atomically(self.summary, text + "\n")

    def truncate_after(self, step: int) -> int:
        """Drop the metric and rollout lines of steps after `step`, which a resumed run will write again.

        Returns:
            How many lines were dropped.
        """
        return sum(_keep_lines(file, step) for file in (self.metrics, self.rollouts))

    def _append(self, path: Path, lines: list[str]) -> None:
        with disk_errors(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(line + "\n" for line in lines)


def _plain(value: Any) -> Any:
    """For json: paths as text, numbers of NumPy and torch as Python's."""
    return str(value) if isinstance(value, Path) else value.item()


def _make_new(root: Path, stem: str) -> Path:
    attempt = 1
    while True:
        path = root / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            attempt += 1


def _point_latest(root: Path, target: str) -> None:
    latest = root / "latest"
    if latest.exists() and not latest.is_symlink():
        raise UserError(f"{latest} is not a link, so it cannot point at the newest run: move it away.")
    draft = root / f".latest-{os.getpid()}"
    draft.unlink(missing_ok=True)
    draft.symlink_to(target, target_is_directory=True)
    os.replace(draft, latest)


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with disk_errors(path), path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        position = end
        while position > 0:  # blocks from the end until the last newline
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            file.truncate(position)


def _keep_lines(path: Path, last_step: int) -> int:
    if not path.exists():
        return 0
    draft, dropped = path.with_name(f".{path.name}.tmp"), 0
    with disk_errors(path):
        try:
            with path.open(encoding="utf-8") as old, draft.open("w", encoding="utf-8") as new:
                for line in old:
                    keep = _step_of(line) <= last_step
                    dropped += not keep
                    new.write(line if keep else "")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    return dropped


def _step_of(line: str) -> float:
    """The step of a line; infinity for a line that does not parse, so that it is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
