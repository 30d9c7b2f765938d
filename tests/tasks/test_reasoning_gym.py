"""Every dataset of reasoning-gym can be won, in each form in which a policy may answer."""

from __future__ import annotations

import json

import pytest

from forerun.config import TaskConfig
from forerun.tasks import Completion, Problem, Task, load_task
from forerun.tasks import reasoning_gym as module
from forerun.tasks.scoring import Score, score

pytest.importorskip("reasoning_gym")

from reasoning_gym.factory import DATASETS

NOT_ALONE = {"composite"}  # made of other datasets
UNSOLVED = {"boxnet", "rush_hour"}  # there is no solution in the dataset
EXAMPLES = {"graph_color": "possible_answer", "propositional_logic": "example_answer"}
EXAMPLES |= {"rubiks_cube": "example_correct_answer"}  # of entries without one right answer
FORMS = ["#### {}", "First this.\n#### {}\n", "\\boxed{{{}}}", "So it is $\\boxed{{{}}}$.", "{}", "<answer>{}</answer>"]
GARBAGE = ["", "[[", "-1", "{}", "1e999", "2^2 x 5", "(", "None", "\\frac{1}{0}", "a b c"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One held-out problem in place of hundreds."""
    monkeypatch.setattr(module, "EVAL_SIZE", 1)


def judged(task: Task, problem: Problem, text: str) -> Score:
    return score(task.rewards, Completion(problem, text, text))


def own_answer(name: str, problem: Problem) -> str:
    found = problem.meta["metadata"][EXAMPLES[name]] if name in EXAMPLES else problem.meta["answer"]
    return json.dumps(found) if isinstance(found, dict) else str(found)


@pytest.mark.parametrize("name", sorted(set(DATASETS) - NOT_ALONE - UNSOLVED))
def test_the_right_answer_is_paid_in_every_form(name: str) -> None:
    task = load_task(TaskConfig(name="reasoning_gym", dataset=name, size=3), seed=5)
    for problem in task.problems("train"):
        assert problem.question.endswith("after ####")
        answer = own_answer(name, problem)
        for form in FORMS:
            found = judged(task, problem, form.format(answer))
            assert found.reward == 1.0, (form, answer, found.fault)


@pytest.mark.parametrize("name", sorted(set(DATASETS) - NOT_ALONE - {"game_of_life_halting"}))  # pays any text
def test_an_answer_that_makes_no_sense_is_worth_nothing(name: str) -> None:
    """Checkers that raise at it are counted, and end nothing."""
    task = load_task(TaskConfig(name="reasoning_gym", dataset=name, size=1), seed=5)
    (problem,) = task.problems("train")
    for garbage in GARBAGE:
        found = judged(task, problem, f"#### {garbage}")
        assert found.reward == 0.0 or garbage in own_answer(name, problem)


def test_a_checker_that_raises_is_a_failure() -> None:
    task = load_task(TaskConfig(name="reasoning_gym", dataset="prime_factorization", size=1))
    found = judged(task, task.problems("train")[0], "#### 2^2 x 5")
    assert found.outcome == "failed" and "raised ValueError" in found.fault
