"""Rewards in processes of their own: whatever one does, the others are paid and the run goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import psutil
import pytest

from forerun.config import TaskConfig
from forerun.errors import UserError
from forerun.tasks import Completion, Problem, load_task
from forerun.tasks.scoring import Score
from forerun.tasks.workers import RewardWorkers
from forerun.tracking.metrics import definition_of

DEADLINE_S = 1.0
PROBLEM = Problem("p/1", "2 + 3", "5")

Make = Callable[..., RewardWorkers]


@pytest.fixture
def workers() -> Iterator[Make]:
    """workers(**task settings); closed after the test, which must leave no process behind."""
    made: list[RewardWorkers] = []

    def make(**settings: Any) -> RewardWorkers:
        config = TaskConfig(name="jsonl", path="none.jsonl", **({"reward_timeout_s": DEADLINE_S} | settings))
        made.append(RewardWorkers(config))
        return made[-1]

    yield make
    for one in made:
        one.close()
    assert not children_of_rewards()


def children_of_rewards() -> list[int]:
    return [
        p.pid for p in psutil.Process().children(recursive=True) if "forerun.workers.server" in " ".join(p.cmdline())
    ]


def completion(text: str, **more: Any) -> Completion:
    return Completion(PROBLEM, text, text, **more)


def scored(pool: RewardWorkers, *texts: str) -> list[Score]:
    return [future.result() for future in [pool.submit(completion(text)) for text in texts]]


def test_what_goes_wrong_in_one_answer_harms_no_other(workers: Make) -> None:
    pool = workers(reward="rewards_for_tests:does", reward_workers=2)
    texts = ["fine", "raise", "hang", "fine", "die", "crash", "exit", "none", "list", "word", "nan", "inf", "large"]
    texts += ["part", "coroutine", "deep", "fine", "stop", "child", "fine"]
    found = dict(zip(texts, scored(pool, *texts), strict=True))
    assert {text for text, score in found.items() if score.outcome == "timeout"} == {"hang", "stop", "child"}
    assert {text for text, score in found.items() if score.outcome == "scored"} == {"fine"}
    assert found["fine"].reward == 0.5 and all(score.reward == 0.0 for t, score in found.items() if t != "fine")
    assert all(score.seconds < DEADLINE_S + 0.5 for score in found.values())
    assert (
        "raised KeyError: 'no such key' (" in found["raise"].fault and "rewards_for_tests.py:" in found["raise"].fault
    )
    assert "ended with code 7" in found["die"].fault and "killed by signal 11" in found["crash"].fault
    assert "returned None (NoneType), which is no number" in found["none"].fault
    assert "returned 1e+39, which is no finite float32" in found["large"].fault
    assert not [p for p in psutil.Process().children(recursive=True) if "sleep" in p.name()]


def test_a_computation_that_holds_the_interpreter_ends_at_its_deadline(workers: Make) -> None:
    pool = workers(reward="rewards_for_tests:does", reward_workers=1)
    scored(pool, "fine")
    started = time.perf_counter()
    first, second = scored(pool, "power", "fine")
    assert (first.outcome, second.outcome) == ("timeout", "scored") and time.perf_counter() - started < 4.0


def test_processes_of_a_reward_can_be_ended_and_answer_nothing(workers: Make) -> None:
    pool = workers(reward="rewards_for_tests:does", reward_workers=1, reward_timeout_s=10)
    found = scored(pool, "terminate", "pool", "fork", "fine", "terminate")
    assert [(one.reward, one.outcome) for one in found] == [
        (15.0, "scored"), (2.0, "scored"), (0.5, "scored"), (0.5, "scored"), (15.0, "scored"),
    ]  # fmt: skip


def test_what_a_reward_has_started_in_a_session_of_its_own_ends_with_it(workers: Make) -> None:
    assert scored(workers(reward="rewards_for_tests:does"), "session")[0].outcome == "timeout"
    until, child = time.monotonic() + 5.0, ["sleep", f"1000.{os.getpid()}"]
    while any(p.info["cmdline"] == child for p in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_the_default_reward_pays_beside_what_sympy_never_finishes(workers: Make) -> None:
    texts = ["#### 5", "#### 9^{9^{9}}", "\\boxed{5}", "#### 9999999!", "#### " + "(" * 3000, "it is 5."]
    assert [score.reward for score in scored(workers(), *texts)] == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]


def test_the_first_failure_is_told_once_and_too_many_end_the_run(workers: Make) -> None:
    pool = workers(reward="rewards_for_tests:does")
    texts = ["fine"] * 14 + ["raise"] * 6
    pool.settle([completion(text) for text in texts], scored(pool, *texts))
    with pytest.raises(
        UserError, match=r"'does' raised KeyError.* 20 of the last 20 answers, more than task.reward_fail"
    ):
        pool.settle([completion("raise")] * 20, scored(pool, *["raise"] * 20))
    (warning,) = pool.warnings
    assert "'does' raised KeyError" in warning and "on problem 'p/1' for the answer 'raise'; it counts 0" in warning


def test_failures_of_a_shipped_checker_never_end_a_run() -> None:
    pytest.importorskip("reasoning_gym")
    config = TaskConfig(name="reasoning_gym", dataset="prime_factorization")
    pool = RewardWorkers(config)
    problem = load_task(config).problems("eval")[0]
    garbage = [Completion(problem, "#### 2^2 x 5", "")] * 20
    pool.settle(garbage, [future.result() for future in [pool.submit(one) for one in garbage]])
    pool.close()
    assert len(pool.warnings) == 1 and "raised ValueError" in pool.warnings[0]


def test_a_reward_sees_the_rollout_or_its_text_and_several_are_weighted(workers: Make) -> None:
    whole = Completion(PROBLEM, "5", "<s>5</s>", "length", [1, 5], 2)
    assert workers(reward="rewards_for_tests:sees").submit(whole).result().reward == 1.0
    parts = workers(reward="rewards_for_tests:length").submit(whole).result()
    assert (parts.reward, dict(parts.parts)) == (3.0, {"tokens": 2.0, "cut": 1.0})
    several = {"task": 2.0, "rewards_for_tests:length": 0.1, "rewards_for_tests:has_digit": -1.0}
    found = workers(rewards=several).submit(whole).result()
    assert found.reward == pytest.approx(2.0 + 0.3 - 1.0)
    assert dict(found.parts) == {"task": 1.0, "length": 3.0, "length.tokens": 2.0, "length.cut": 1.0, "has_digit": 1.0}


def test_no_part_is_lost_to_another_of_like_name(workers: Make, tmp_path: Path) -> None:
    file = tmp_path / "parts_of_any_name.py"
    file.write_text(
        "def chinese(problem, completion):\n    return {'正确': 1.0, '格式': 0.5}\n\n"
        "def alike(problem, completion):\n    return {'a b': 1.0, 'a_b': 0.5}\n"
    )
    found = scored(workers(reward=f"{file}:chinese"), "5")[0]
    assert (found.reward, dict(found.parts)) == (1.5, {"正确": 1.0, "格式": 0.5})
    assert definition_of("reward/正确/mean") is not None
    found = scored(workers(reward=f"{file}:alike"), "5")[0]
    assert found.outcome == "failed" and "two parts that metrics would both call 'a_b'; rename 'a_b'" in found.fault


def test_a_reward_is_a_file_of_the_working_directory(
    workers: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside.py").write_text("WORTH = 0.25\n")
    (tmp_path / "my_own_reward.py").write_text(
        "import beside\n\ndef score(problem, completion):\n    return beside.WORTH\n"
    )
    monkeypatch.chdir(tmp_path)
    for path in ("my_own_reward.py:score", "my_own_reward:score", f"{tmp_path}/my_own_reward.py:score"):
        assert scored(workers(reward=path), "5")[0].reward == 0.25


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def score(:\n", r"SyntaxError: .*broken_reward.py:1\)"),
        ("\nscore = undefined\n", r"NameError: name 'undefined' is not defined \(.*broken_reward.py:2\)"),
        ("raise RuntimeError('no key')\n", r"RuntimeError: no key \(.*broken_reward.py:1\)"),
        ("import no_such_library\n", r"No module named 'no_such_library' \(.*broken_reward.py:1\)"),
        ("import sys\nsys.exit(1)\n", r"SystemExit: 1 \(.*broken_reward.py:2\)"),
        ("x = 1\n", "has no attribute 'score'"),
        ("score = 1\n", "is a int, not a function"),
        ("def score(problem):\n    return 1\n", r"takes \(problem\), and is called with \(problem, completion\)"),
        ("async def score(problem, completion):\n    return 1\n", "is an async function"),
    ],
)
def test_a_reward_that_cannot_be_imported_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "broken_reward.py").write_text(text)
    with pytest.raises(UserError, match=words):
        load_task(TaskConfig(name="jsonl", path="x", reward=f"{tmp_path}/broken_reward.py:score"))


def test_a_missing_module_or_file_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("no_such_reward:score", "no_such_reward.py:score"):
        with pytest.raises(UserError, match=rf"cannot import '{path}': .*{tmp_path}"):
            load_task(TaskConfig(name="jsonl", path="x", reward=path))


SCRIPT = """
from forerun.config import TaskConfig
from forerun.tasks import Completion, Problem
from forerun.tasks.workers import RewardWorkers
import sys

WORTH = 0.75
worth = lambda problem, completion: WORTH

def told(problem, completion):
    print("from the reward")
    return worth(problem, completion)

if "hang" in sys.argv:
    told = lambda problem, completion: __import__("time").sleep(1000)

pool = RewardWorkers(TaskConfig(name="jsonl", path="x", reward="__main__:told", reward_timeout_s=100))
future = pool.submit(Completion(Problem("p", "q", "a"), "text", "text"))
if "hang" in sys.argv:
    import time
    time.sleep(1.0)
    print("ready", flush=True)
print(future.result().reward, "torch" in sys.modules)
"""


def test_a_function_of_a_script_travels_by_value_and_its_prints_go_to_stderr(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "0.75 False\n", done.stderr
    assert "from the reward" in done.stderr


def test_workers_end_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    driver = subprocess.Popen([sys.executable, "script.py", "hang"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None and driver.stdout.readline() == "ready\n"
    children = psutil.Process(driver.pid).children(recursive=True)
    assert children
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def test_a_worker_that_is_killed_while_it_starts_is_replaced(workers: Make, tmp_path: Path) -> None:
    file = tmp_path / "dies_twice.py"
    file.write_text(
        "import os, pathlib, signal, sys\n"
        f"tries = pathlib.Path({str(tmp_path / 'tries')!r})\n"
        "if tries.exists():\n"
        "    tries.write_text(tries.read_text() + '.')\n"
        "    if len(tries.read_text()) <= int(os.environ['DEATHS']):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n\n"
        "def score(problem, completion):\n    return 1.0\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        for deaths in ("2", "3"):
            (tmp_path / "tries").write_text("")
            patch.setenv("DEATHS", deaths)
            future = workers(reward=f"{file}:score").submit(completion("5"))
            if deaths == "2":
                assert future.result().reward == 1.0
            else:
                with pytest.raises(UserError, match="killed by signal 9, 3 times before it was ready"):
                    future.result()


def test_closing_does_not_wait_for_answers_under_way(workers: Make) -> None:
    pool = workers(reward="rewards_for_tests:hangs", reward_timeout_s=100.0, reward_workers=2)
    futures = [pool.submit(completion("5")) for _ in range(6)]
    wait(futures, 1.5)
    started = time.perf_counter()
    pool.close()
    assert time.perf_counter() - started < 5.0 and all(future.done() for future in futures)
