"""The page: offline, escaped, whole when files are missing, and open to more sections."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from forerun.errors import UserError
from forerun.report.page import data_json
from forerun.report.run_page import SECTIONS, Section, write_report
from forerun.tracking.reader import RunData, load_run
from forerun.tracking.run_folder import RunFolder
from pages import Page


def test_the_page_loads_nothing_from_anywhere(run: RunFolder) -> None:
    page = Page(write_report(run.path))
    for tag, attrs in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base"), tag
        assert not {"src", "href", "srcset", "action", "data"} & set(attrs), (tag, attrs)
    assert not re.search(r"url\(|@import|https?:", page.contents["style"][0])
    assert len(page.code()) == 2  # plotly once, and the page's own


def test_only_the_pages_own_scripts_may_run(run: RunFolder) -> None:
    page = Page(write_report(run.path))
    policy = next(attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs)
    allowed = re.findall(r"'sha256-([^']+)'", policy or "")
    assert [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in page.code()] == allowed
    assert "default-src 'none'" in (policy or "")


def test_what_comes_from_files_is_escaped(run: RunFolder) -> None:
    summary = json.loads(run.summary.read_text()) | {"recipe": "<img src=y>", "warnings": ["<script>w</script>"]}
    summary["paths"] = {"<u>": "<script>p</script>"}
    run.write_summary(summary)
    page = Page(write_report(run.path))
    assert {"img", "u"} & {tag for tag, _ in page.tags} == set()
    assert all("alert(" not in body for body in page.code()[1:])
    assert "</script><script>alert('text')</script>" in page.text  # shown as text
    assert "<script>w</script>" in page.text and "<img src=y>" in page.text


def test_data_cannot_close_its_script() -> None:
    hostile = {"x": ["</script><script>alert(1)</script>", "<!--"]}
    assert "<" not in data_json(hostile)
    assert json.loads(data_json(hostile)) == hostile


def test_the_page_holds_verdict_figures_samples_and_definitions(run: RunFolder) -> None:
    page = Page(write_report(run.path))
    for words in (
        "Speculation made generation 1.60x as fast and took 7.5 s off a step of 37.5 s",
        "Warning acceptance fell",
        "drafted and accepted",
        "Tokens emitted per round, bonus token included",
        "Share of rounds in which the first 2 drafts were all accepted.",
        "method: eagle3",
        "1.50 per round",
    ):
        assert words in " ".join(page.text.split()), words
    drawn = page.figures()
    assert {"stages", "mean-step", "compared", "reward", "positions", "acceptance", "timeline", "lengths"} <= set(drawn)
    assert [tag for tag, attrs in page.tags if attrs.get("class") == "a"].count("i") == 2 * 6  # 6 samples have a mask


def test_figures_carry_the_numbers_of_the_files(run: RunFolder) -> None:
    drawn = Page(write_report(run.path)).figures()
    stages = {trace["name"]: trace["y"] for trace in drawn["stages"]["data"]}
    assert stages["generation"] == [12.5] * 3 and stages["other"] == pytest.approx([0.2] * 3)
    held_out = drawn["reward"]["data"][1]
    assert held_out["x"] == [0, 3] and held_out["error_y"]["array"] == [0.03, 0.04]
    mean = {trace["name"]: trace["x"] for trace in drawn["mean-step"]["data"]}
    assert mean["generation"] == [12.5, 20.0] and mean["train"] == [15.0, 15.0]


@pytest.mark.parametrize(
    "name", ["config.resolved.yaml", "env.json", "metrics.jsonl", "rollouts.jsonl", "summary.json"]
)
def test_any_one_file_may_be_missing_and_any_one_alone_is_enough(run: RunFolder, name: str) -> None:
    others = [path for path in run.path.iterdir() if path.name != name]
    content = (run.path / name).read_bytes()
    (run.path / name).unlink()
    assert f"{name} is missing." in Page(write_report(run.path)).text
    for path in others:
        path.unlink()
    (run.path / name).write_bytes(content)
    assert "Nothing to show for:" in Page(write_report(run.path)).text


def test_a_run_killed_early_says_how_far_it_came(run: RunFolder) -> None:
    run.truncate_after(2)
    run.summary.unlink()
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "rew')
    page = Page(write_report(run.path))
    assert "This run has not finished: it left no summary, and its metrics end at step 2." in page.text
    assert "metrics.jsonl has 1 broken line, left out here." in page.text
    assert "1.60x" in page.text  # the comparisons so far


def test_broken_files_are_named_on_the_page_and_no_error(run: RunFolder) -> None:
    run.summary.write_text("{")
    run.env.write_text("[1]")
    run.config.write_text("a: [")
    data = load_run(run.path)
    assert "summary.json cannot be read as a JSON object." in data.missing
    assert "env.json cannot be read as a JSON object." in data.missing
    assert not data.finished
    write_report(run.path)


def test_samples_are_a_dozen_from_first_and_last_step_with_best_and_worst(run: RunFolder) -> None:
    samples = load_run(run.path).samples
    assert [sample["step"] for sample in samples] == [1] * 4 + [3] * 8
    assert [samples[0]["reward"], samples[3]["reward"]] == [0.9, 0.0]
    assert [samples[4]["reward"], samples[-1]["reward"]] == [0.9, 0.0]


def test_sections_can_be_added_and_none_is_named_as_absent(run: RunFolder) -> None:
    def mine(data: RunData) -> str | None:
        return f"<p>{len(data.metrics)} steps and the start</p>"

    sections = [*SECTIONS, Section("Mine", mine), Section("Empty", lambda data: None)]
    page = Page(write_report(run.path, sections))
    assert "4 steps and the start" in page.text
    assert "Nothing to show for: Empty." in page.text


def test_a_folder_without_a_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds none of"):
        write_report(tmp_path)


def test_the_page_defines_the_metrics_of_the_run_s_algorithm_without_torch(run: RunFolder) -> None:
    code = (
        "import sys; from forerun.report.run_page import write_report\n"
        "print(write_report(sys.argv[1]), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(run.report), "False"]
    text = Page(run.report).words
    assert "Share of tokens whose probability ratio was clipped from below." in text and "Not defined" not in text
