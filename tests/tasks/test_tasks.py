"""Prompts, worked solutions and rewards, on real generators and real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forerun.config import TaskConfig
from forerun.errors import UserError
from forerun.tasks import load_task
from forerun.tasks.reasoning_gym import chain_sum_solution
from forerun.tasks.reward import final_answer, math_reward
from tiny_models import DATA

SUMS = {"min_terms": 3, "max_terms": 5, "min_digits": 2, "max_digits": 2}


def test_chain_sum_solutions_are_right_and_splits_are_apart() -> None:
    task = load_task(TaskConfig(name="reasoning_gym", options=SUMS, size=300), seed=3)
    train, held_out = task.problems("train"), task.problems("eval")
    assert not {p.question for p in train} & {p.question for p in held_out}
    for problem in [*train, *held_out]:
        assert problem.solution is not None and task.reward(problem, problem.solution) == 1.0
    assert sum(task.reward(p, "#### 17") for p in train) < 10  # and a wrong answer is wrong
    assert [p.question for p in task.problems("eval")] == [
        p.question for p in load_task(TaskConfig(name="reasoning_gym", options=SUMS), seed=9).problems("eval")
    ]


def test_worked_sums_go_tens_before_units() -> None:
    lines = chain_sum_solution("15 - 43 + 30 - 7 + 88").split("\n")
    assert lines == [
        "15 - 43 = 15 - 40 - 3 = -25 - 3 = -28", "-28 + 30 = 2", "2 - 7 = -5", "-5 + 88 = -5 + 80 + 8 = 75 + 8 = 83",
        "#### 83",
    ]  # fmt: skip


def test_partial_credit_is_not_paid() -> None:
    task = load_task(TaskConfig(name="reasoning_gym", options=SUMS, size=50))
    problem = task.problems("train")[0]
    assert task.reward(problem, f"#### {problem.answer}") == 1.0
    assert task.reward(problem, f"#### {problem.answer}5") == task.reward(problem, "") == 0.0


def test_gsm_symbolic_brings_its_own_solutions() -> None:
    task = load_task(TaskConfig(name="reasoning_gym", dataset="gsm_symbolic", size=20))
    assert all(p.solution and task.reward(p, p.solution) == 1.0 for p in task.problems("train"))
    with pytest.raises(UserError, match="cannot make 'no_such_dataset'"):
        load_task(TaskConfig(name="reasoning_gym", dataset="no_such_dataset"))


@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason="needs ../shared/data/gsm8k, which users do not have")
def test_gsm8k_from_files() -> None:
    config = TaskConfig(
        name="gsm8k", path=str(DATA / "gsm8k/train.jsonl"), eval_path=str(DATA / "gsm8k/test.jsonl"), size=400
    )
    task = load_task(config)
    problems = task.problems("train")
    assert len(problems) == 400 and "<<" not in str(problems[0].solution)
    assert all(task.reward(p, str(p.solution)) == 1.0 for p in problems[:60])
    assert sum(task.reward(p, "The answer is 12345.") for p in problems[:60]) == 0


@pytest.mark.parametrize(
    ("answer", "completion", "reward"),
    [
        ("72", "so 48 + 24 = 72", 1.0), ("72", "#### 72", 1.0), ("72", "#### 71\nno, 72?", 0.0),
        ("0.5", "\\boxed{\\frac{1}{2}}", 1.0), ("1000", "It costs $1,000", 1.0), ("72", "", 0.0), ("3", "no idea", 0.0),
    ],
)  # fmt: skip
def test_math_reward(answer: str, completion: str, reward: float) -> None:
    assert math_reward(answer, completion) == reward


def test_final_answer_prefers_the_marked_one() -> None:
    assert final_answer("1 + 2 = 3\n#### 3\nbye 9") == "3"
    assert final_answer("\\boxed{a{b}c} and 5") == "a{b}c"
    assert final_answer("first 4, then -1,234.5 eur") == "-1234.5"


def test_jsonl_rows_and_their_faults(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"q{i}", "answer": i}) for i in range(20)))
    task = load_task(TaskConfig(name="jsonl", path=str(path), suffix=" Answer:"))
    assert len(task.problems("train")) == 18 and len(task.problems("eval")) == 2
    assert task.problems("train")[0].question == "q0 Answer:"
    for text, words in (("{", "Line 1 of"), ("[1]", "not an object"), ('{"answer": 1}', "no text"), ("", "is empty")):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            load_task(TaskConfig(name="jsonl", path=str(path), eval_path=str(path))).problems("train")
