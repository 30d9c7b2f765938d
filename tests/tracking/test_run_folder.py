"""The run folder: what it refuses, what survives a kill, a resume and a full disk. Real files throughout."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from forerun.errors import UserError
from forerun.tracking.environment import describe_environment, machine_line
from forerun.tracking.files import write_atomically
from forerun.tracking.metrics import DEFINITIONS, define, definition_of, nearest_name, unit_of
from forerun.tracking.run_folder import RunFolder

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_create_never_overwrites_and_latest_points_at_the_newest(tmp_path: Path) -> None:
    runs = [RunFolder.create(tmp_path, "quickstart") for _ in range(3)]  # within one second
    assert len({run.path for run in runs}) == 3
    assert (tmp_path / "latest").resolve() == runs[-1].path.resolve()
    assert runs[-1].path.name.partition("Z-")[2].startswith("quickstart")
    assert not list(tmp_path.glob(".latest*"))


def test_a_name_with_slashes_stays_inside_the_root(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path, "../../etc/x y").path.parent == tmp_path


def test_a_latest_that_is_a_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    with pytest.raises(UserError, match="not a link"):
        RunFolder.create(tmp_path, "a")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_by_name_and_step(tmp_path: Path, value: float) -> None:
    run = RunFolder.create(tmp_path, "a")
    with pytest.raises(UserError, match=r"draft/loss is -?(nan|inf) at step 7"):
        run.log(7, {"reward/mean": 0.5, "draft/loss": value})
    assert not run.metrics.exists()  # nothing of the step was written


def test_none_is_a_value(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a")
    run.log(1, {"eval/reward": None, "reward/mean": 1})
    assert lines(run.metrics) == [{"step": 1, "eval/reward": None, "reward/mean": 1.0}]


def test_an_unknown_metric_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a")
    with pytest.raises(UserError, match=r'"rewrd/mean" has no definition; did you mean "reward/mean"'):
        run.log(1, {"rewrd/mean": 0.5})


def test_families_fill_in_their_position_or_name() -> None:
    assert "first 3 drafts" in (definition_of("spec/acceptance_pos_3") or "")
    assert definition_of("reward/my_module:check/mean") is not None
    assert definition_of("spec/acceptance_pos_0") is None
    assert definition_of("spec/acceptance_pos_{i}") is None  # the template is no metric
    assert nearest_name("spec/acceptance_len") == "spec/acceptance_length"


def test_every_definition_is_a_sentence_with_a_unit() -> None:
    for name, sentence in DEFINITIONS.items():
        assert ". Unit: " in sentence and sentence.endswith("."), name
    assert unit_of("time/step") == "seconds"
    with pytest.raises(ValueError, match="must read"):
        define({"mine/loss": "A loss without its unit."})
    with pytest.raises(ValueError, match="already defined"):
        define({"time/step": "Something else. Unit: seconds."})
    prefixes = [name for name in DEFINITIONS if any(other.startswith(name + "/") for other in DEFINITIONS)]
    assert prefixes == []  # some trackers store "a" and "a/b" in one place


def test_resume_drops_what_will_be_run_again(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a")
    for step in range(1, 6):
        run.log(step, {"reward/mean": step})
        run.log_rollouts([{"step": step, "text": "α\u2028β"}, {"step": step, "text": ""}])
    assert run.truncate_after(3) == 2 + 4
    assert [row["step"] for row in lines(run.metrics)] == [1, 2, 3]
    with run.rollouts.open(encoding="utf-8") as file:
        assert [json.loads(line)["step"] for line in file] == [1, 1, 2, 2, 3, 3]
    assert run.truncate_after(3) == 0


def test_open_removes_the_line_that_a_kill_tore(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a")
    run.log(1, {"reward/mean": 1})
    whole = run.metrics.read_bytes()
    with run.metrics.open("ab") as file:
        file.write(b'{"step": 2, "reward/me' + b"a" * 100_000)
    run.rollouts.write_bytes(b'{"step": 1, "te')  # torn before the first newline
    reopened = RunFolder.open(tmp_path / "latest")
    assert reopened.path == run.path.resolve()
    assert reopened.metrics.read_bytes() == whole
    assert reopened.rollouts.read_bytes() == b""
    reopened.log(2, {"reward/mean": 2})
    assert [row["step"] for row in lines(run.metrics)] == [1, 2]


def test_open_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        RunFolder.open(tmp_path)


@needs_full
def test_a_full_disk_while_appending_is_one_sentence(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a")
    run.metrics.symlink_to(FULL)
    run.rollouts.symlink_to(FULL)
    with pytest.raises(UserError, match=r"No space left while writing .*metrics\.jsonl: free space"):
        run.log(1, {"reward/mean": 0.5})
    with pytest.raises(UserError, match=r"No space left while writing .*rollouts\.jsonl: free space"):
        run.log_rollouts([{"step": 1, "text": "x"}])


@needs_full
def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a")
    run.write_summary({"steps": 1})
    (run.path / ".summary.json.tmp").symlink_to(FULL)
    with pytest.raises(UserError, match=r"No space left while writing .*summary\.json"):
        run.write_summary({"steps": 2})
    assert json.loads(run.summary.read_text()) == {"steps": 1}
    assert [path.name for path in run.path.iterdir()] == ["summary.json"]


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot write"):
        write_atomically(tmp_path / "gone" / "a.json", "{}")


def test_rollouts_and_summary_refuse_what_json_cannot_hold(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a")
    with pytest.raises(UserError, match=r"step 4 \(prompt p9\).*reward function"):
        run.log_rollouts([{"step": 4, "prompt_id": "p9", "reward": math.nan}])
    with pytest.raises(UserError, match="not finite"):
        run.write_summary({"reward_end": math.inf})
    run.log_rollouts([{"step": 4, "text": "half a character: \udc80"}])
    assert lines(run.rollouts)[0]["text"] == "half a character: \udc80"


def test_env_names_machine_and_versions_and_no_user(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a")
    env = run.write_env()
    assert json.loads(run.env.read_text()) == env
    assert env["python"] == sys.version.split()[0]
    assert env["cpu"]["cores"] >= 1
    assert "cores" in machine_line(env)
    assert set(describe_environment()) == set(env)


def test_the_room_imports_nothing_heavy() -> None:
    code = (
        "import sys, forerun.report.run_page, forerun.report.console\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
