"""`forerun score`: a recipe's rewards on a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from command_line import run_here

LINES = [
    {"answer": "18", "completion": "#### 18 eggs"},
    {"answer": 7, "completion": "#### 9^{9^{9}}", "question": "how many?"},
    {"answer": "cat", "completion": "#### act"},
    {"answer": "5", "completion": "#### \ud800\x00"},
]


def written(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


def test_every_line_is_scored_in_order_without_a_model_or_torch(tmp_path: Path) -> None:
    file = written(tmp_path / "lines.jsonl", LINES)
    program = (
        "import sys; from forerun.cli import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    for recipe in ("quickstart", "gsm8k"):
        words = [sys.executable, "-c", program, "score", recipe, file, "--json"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert list(found) == ["rows"] and all(
            set(r) == {"reward", "parts", "seconds", "failed", "fault"} for r in found["rows"]
        )
        assert [row["reward"] for row in found["rows"]] == [1.0, 0.0, 0.0, 0.0]
        assert [row["failed"] for row in found["rows"]] == [False, True, False, False]
        assert max(row["seconds"] for row in found["rows"]) < 5.0


def test_it_uses_the_recipes_rewards_and_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers"))
    lines = [{"answer": "1", "completion": text, "tokens": 3} for text in ("fine", "raise", "hang", "print")]
    file = written(tmp_path / "lines.jsonl", lines)
    several = "task.rewards={rewards_for_tests:does: 2, rewards_for_tests:length: 1}"
    done = run_here("score", "gsm8k", file, several, "task.reward_timeout_s=1", "--json")
    rows = json.loads(done.stdout)["rows"]
    assert [(row["reward"], row["failed"]) for row in rows] == [(4.0, False), (3.0, True), (0.0, True), (4.0, False)]
    assert rows[0]["fault"] == "" and "KeyError" in rows[1]["fault"] and "reward_timeout_s" in rows[2]["fault"]
    assert rows[0]["parts"] == {"does": 0.5, "length": 3.0, "length.tokens": 3.0, "length.cut": 0.0}
    shown = run_here("score", "gsm8k", file, several, "task.reward_timeout_s=1").stdout
    assert "4 answers, mean reward 2.75" in shown and "KeyError" in shown


@pytest.mark.parametrize(
    ("line", "words"),
    [({"answer": "1"}, "no compl"), ({"completion": "1"}, "no answer"), ({"answer": 1, "completion": 2}, "no text")],
)  # fmt: skip
def test_a_line_that_lacks_something_is_one_sentence(tmp_path: Path, line: dict[str, Any], words: str) -> None:
    done = run_here("score", "gsm8k", written(tmp_path / "lines.jsonl", [LINES[0], line]))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"Object 2 of {tmp_path}/lines.jsonl {words}" in done.stderr or words in done.stderr
