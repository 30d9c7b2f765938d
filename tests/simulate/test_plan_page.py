"""The plan's page: offline, safe, drawn from the same numbers; and the command that writes it."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from forerun.cli import app
from forerun.errors import UserError
from forerun.report.plan_page import write_plan
from forerun.simulate.plan.planner import plan
from forerun.simulate.plan.run import plan_run

RECORDED = Path(__file__).parent / "recorded_run"
SMALL = {"model": "Qwen3-8B", "gpu": "H100", "gpus": 8, "prompts": 16, "samples": 8, "mean_tokens": 1500, "k": 3}


def figures(page: str) -> dict[str, dict[str, Any]]:
    found = re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script>', page)
    return {name: json.loads(text.replace("\\u003c", "<").replace("\\u003e", ">")) for name, text in found}


def without_variables(value: Any) -> Any:
    """A figure whose CSS variables are replaced by a colour that plotly knows."""
    if isinstance(value, dict):
        return {key: without_variables(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_variables(inner) for inner in value]
    return "#123456" if isinstance(value, str) and value.startswith("--") else value


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return plan(SMALL | {"lag": 1}).to_dict()


def test_the_page_draws_the_numbers_of_the_json(result: dict[str, Any], tmp_path: Path) -> None:
    page = write_plan(result, tmp_path / "plan.html").read_text()
    drawn = figures(page)
    heat = drawn["plan-heat-step"]["data"][0]
    cells = {(cell["k"], cell["alpha"]): cell["step"] for cell in result["heat_map"]}
    shown = {
        (int(k), float(alpha)): heat["z"][i][j]
        for i, k in enumerate(heat["y"])
        for j, alpha in enumerate(heat["x"])
        if heat["z"][i][j] is not None
    }
    assert shown == cells
    by_k = next(trace for trace in drawn["plan-k"]["data"] if trace["name"] == "step")
    assert by_k["y"] == [row["step_speedup"] for row in result["by_k"]]
    sweep = {trace["name"]: trace for trace in drawn["plan-sweep-speedup"]["data"]}
    assert sweep["lag 1"]["y"] == [row["step_speedup"] for row in result["sweep"] if row["lag"] == 1]
    assert len(drawn) == 10
    said = html.unescape(page)
    for note in result["notes"]:
        assert note in said


def test_every_figure_is_one_that_plotly_takes(result: dict[str, Any], tmp_path: Path) -> None:
    import plotly.graph_objects as go

    recipe = yaml.safe_load((RECORDED / "config.resolved.yaml").read_text())
    for plain_data in (result, plan_run(RECORDED, recipe)):
        page = write_plan(plain_data, tmp_path / "plan.html").read_text()
        for name, drawn in figures(page).items():
            flat = {key.replace(".", "_"): value for key, value in drawn["layout"].items()}
            assert go.Figure(without_variables(drawn["data"]), without_variables(flat)).data, name


def test_the_page_loads_nothing_and_escapes_names(result: dict[str, Any], tmp_path: Path) -> None:
    evil = json.loads(json.dumps(result))
    evil["spec"]["model"] = "<img src=x onerror=alert(1)>"
    page = write_plan(evil, tmp_path / "plan.html").read_text()
    assert "<img" not in page and "&lt;img src=x" in page
    assert not re.search(r'<(script|link|img|iframe)[^>]+(src|href)="', page)
    assert "default-src 'none'" in page


def test_a_calibrated_run_shows_its_errors_first(tmp_path: Path) -> None:
    recipe = yaml.safe_load((RECORDED / "config.resolved.yaml").read_text())
    page = write_plan(plan_run(RECORDED, recipe), tmp_path / "plan.html").read_text()
    assert page.index("<h2>Calibration</h2>") < page.index("<h2>How the run would go otherwise</h2>")
    assert page.index("<h2>How the run would go otherwise</h2>") < page.index("<h2>Step</h2>")
    assert "Fitted on the odd steps" in page


def test_a_plan_that_speculation_does_not_help_says_so(tmp_path: Path) -> None:
    poor = plan(SMALL | {"acceptance": 0.05, "k": 8}).to_dict()
    assert "plain decoding is the plan" in write_plan(poor, tmp_path / "plan.html").read_text()


def test_a_page_that_cannot_be_written_is_one_sentence(result: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot write"):
        write_plan(result, tmp_path / "no" / "such" / "plan.html")


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words])


def test_the_command_plans_recipes_keys_and_runs(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    keys = ("hardware=H100", "gpus=4", "train.prompts_per_step=8", "acceptance=0.8")
    done = run("gsm8k", "policy.model=Qwen3-8B", *keys, "--json", "--html", str(page))
    said = json.loads(done.stdout)
    assert (said["spec"]["gpu"], said["spec"]["prompts"], said["spec"]["acceptance"]) == ("H100", 8, 0.8)
    assert page.stat().st_size > 1e6
    assert json.loads(run("model=Qwen3-8B", "gpus=2", "prompts=4", "--json").stdout)["spec"]["gpus"] == 2
    answer = json.loads(run(str(RECORDED), "--json").stdout)
    assert answer["calibration"]["tested_steps"] == [2, 4, 6, 8]
    assert "SmolLM2-135M on 1 x CPU" in run("quickstart", "hardware=cpu").stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["quickstart", "gpuss=3"], "no key 'gpuss'; the nearest is 'gpus'"),
        (["quickstart", "trian.steps=3"], "did you mean 'train'"),
        (["quickstart", "hardware=H101"], "nearest is 'H100'"),
        (["nowhere"], "No recipe is called 'nowhere'"),
        (["model=Qwen3-8B", "--costs", "x.json"], "--costs belongs to a recipe"),
        (["quickstart", "--costs", "x.json"], "Cannot read the cost table"),
        (["--paper", "--html", "x.html"], "--html draws a plan"),
        (["--validate", "--data", "none.csv"], "none.csv"),
    ],
)
def test_the_command_s_mistakes_are_one_sentence(words: list[str], sentence: str) -> None:
    error = run(*words).exception
    assert isinstance(error, UserError) and sentence in str(error) and "\n" not in str(error)


def test_validation_without_rows_is_that_of_round_costs() -> None:
    shown = run("--validate", "--json")
    found = json.loads(shown.stdout)
    assert shown.exit_code == 0 and found["rows"] == 0 and not found["families"]
    errors = [abs(row["error"]) for row in found["rounds"] if row["role"] == "test"]
    assert len(errors) >= 15 and max(errors) < 0.15
    assert "round costs alone" in run("--validate").stdout
