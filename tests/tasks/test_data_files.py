"""Data files and data sets as people have them: loaded in full, or refused in one sentence that says what is wrong."""

from __future__ import annotations

import bz2
import copy
import gzip
import json
import lzma
import pickle
from pathlib import Path
from typing import Any

import pytest

from forerun.config import TaskConfig
from forerun.errors import UserError
from forerun.tasks import Task, load_task
from forerun.tasks.files import Number

ROWS = [{"question": f"how much is {i} and {i}", "answer": str(2 * i)} for i in range(20)]
USER = {"role": "user", "content": "q?"}
LINES = "\n".join(json.dumps(row) for row in ROWS)


def task_of(path: Path, content: Any, **settings: Any) -> Task:
    """The jsonl task on a file with this content: bytes, text, or rows."""
    text = content if isinstance(content, str | bytes) else "\n".join(json.dumps(row) for row in content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_task(TaskConfig(name="jsonl", path=str(path), **settings))


def parquet(columns: Any = None) -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist(ROWS) if columns is None else pyarrow.table(columns)
    parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "content",
    [
        LINES.encode(), LINES.encode("utf-8-sig"), LINES.encode("utf-16"), LINES.encode("utf-16-le"),
        LINES.replace("\n", "\r\n\r\n").encode(), json.dumps(ROWS, indent=1).encode(), gzip.compress(LINES.encode()),
        bz2.compress(LINES.encode()), lzma.compress(LINES.encode()), parquet(),
    ],
    ids=["lines", "bom", "utf-16", "utf-16-le", "crlf", "array", "gzip", "bz2", "xz", "parquet"],
)  # fmt: skip
def test_every_usual_file_holds_the_same_problems(content: bytes, tmp_path: Path) -> None:
    task = task_of(tmp_path / "data.jsonl", content)
    train, held_out = task.problems("train"), task.problems("eval")
    assert [p.question for p in held_out] == [ROWS[i]["question"] for i in (9, 19)]
    assert [(p.question, p.answer) for p in train] == [tuple(r.values()) for i, r in enumerate(ROWS) if i % 10 != 9]
    assert task.reward(train[3], "#### 6") == 1.0 and task.splits is not None and task.splits().dropped == {}


def test_csv_keeps_the_text_of_its_cells(tmp_path: Path) -> None:
    text = "question,answer\n" + "\n".join(f'"q, {i}",00{i}.10' for i in range(10))
    assert task_of(tmp_path / "data.csv", text).problems("train")[2].answer == "002.10"
    tabs = task_of(tmp_path / "data.tsv.gz", gzip.compress(text.replace(",00", "\t00").replace("n,a", "n\ta").encode()))
    assert tabs.problems("train")[2].question == "q, 2"


def test_line_separators_inside_of_strings_end_no_line(tmp_path: Path) -> None:
    rows = [{"question": f"a\u2028b\u2029c\x85d\x0b{i}", "answer": i} for i in range(10)]
    text = "\n".join(json.dumps(row, ensure_ascii=False).replace("\\u000b", "\\u000B") for row in rows)
    assert task_of(tmp_path / "data.jsonl", text).problems("train")[4].question == rows[4]["question"]


def test_numbers_keep_their_own_text(tmp_path: Path) -> None:
    numbers = {
        "1e-05": "0.00001",
        "0.10": "0.10",
        "2.5E3": "2500",
        "12345678901234567890.25": "12345678901234567890.25",
    }
    numbers |= {"7": "7", "123456789012345678901": "123456789012345678901", "1e-2000": "1e-2000", "true": "True"}
    lines = [f'{{"question": "q{i}", "answer": {text}, "score": 0.5}}' for i, text in enumerate([*numbers, 1, 2])]
    problems = task_of(tmp_path / "data.jsonl", "\n".join(lines)).problems("train")
    assert [p.answer for p in problems][: len(numbers)] == list(numbers.values())
    task = task_of(tmp_path / "data.jsonl", "\n".join(lines))
    assert task.reward(problems[0], "#### 0.00001") == 1.0 and task.reward(problems[0], "#### 0.0001") == 0.0
    score = problems[0].meta["score"]
    for again in (pickle.loads(pickle.dumps(score)), copy.deepcopy(score)):
        assert isinstance(again, Number) and (again, again.text) == (0.5, "0.5") and json.dumps(again) == "0.5"


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"prompt": [USER], "reward_model": {"ground_truth": "7", "style": "rule"}}, "q?", "7"),
        ({"problem": "q?", "solution": "so 7", "answer": "7", "messages": [USER]}, "q?", "7"),
        ({"prompt": "q?", "ground_truth": 7}, "q?", "7"), ({"prompt": "q?", "solution": "$7$"}, "q?", "$7$"),
        ({"messages": [USER, {"role": "assistant", "content": "7!"}], "answer": ["7"]}, "q?", "7"),
    ],
    ids=["verl and DAPO", "OpenR1", "ground truth", "TRL", "messages"],
)  # fmt: skip
def test_the_columns_of_other_trainers_are_known(row: Any, question: str, answer: str, tmp_path: Path) -> None:
    rows = [json.loads(json.dumps(row).replace("q?", f"q{i}?")) for i in range(10)]
    problem = task_of(tmp_path / "data.jsonl", rows).problems("train")[0]
    assert (problem.question, problem.answer, problem.messages) == (question.replace("?", "0?"), answer, None)


def test_columns_can_be_named_and_rows_bring_system_messages(tmp_path: Path) -> None:
    rows = [
        {"q": f"q{i}", "info": {"gold": i}, "style": "brief", "work": f"#### {i}", "key": f"k{i}"} for i in range(10)
    ]
    columns = {"question": "q", "answer": "info.gold", "system": "style", "solution": "work", "id": "key"}
    problem = task_of(tmp_path / "data.jsonl", rows, columns=columns, suffix=" Go.").problems("train")[3]
    assert (problem.id, problem.question, problem.answer, problem.solution) == ("k3", "q3 Go.", "3", "#### 3")
    assert problem.prompt == [{"role": "system", "content": "brief"}, {"role": "user", "content": "q3 Go."}]


def test_numbers_of_single_precision_are_those_that_were_written(tmp_path: Path) -> None:
    import pyarrow

    columns = {"question": ["a", "b"], "answer": pyarrow.array([0.1, -1234.5], pyarrow.float32())}
    task = task_of(tmp_path / "data.parquet", parquet(columns))
    assert [problem.answer for problem in task.problems("train")] == ["0.1", "-1234.5"]


def test_two_csv_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two columns called 'answer'"):
        task_of(tmp_path / "data.csv", "question,answer,answer,,\nq,1,2,,\n").problems("train")
    assert len(task_of(tmp_path / "more.csv", "question,answer,,\nq,1,,\n").problems("train")) == 1


def test_bytes_are_no_text(tmp_path: Path) -> None:
    for columns, words in (
        ({"question": ["a"], "answer": [b"18"]}, "column 'answer', has bytes of 2 as its answer"),
        ({"question": [b"a"], "answer": ["18"]}, "has bytes where"),
    ):
        with pytest.raises(UserError, match=words):
            task_of(tmp_path / "data.parquet", parquet(columns)).problems("train")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"question": "q", "target": "1"}], r"no answer under 'answer' or .*its columns are question, target"),
        ([{"question": "q", "answer": None}], "no answer"), ([{"question": "q", "answer": " "}], "no answer"),
        ('{"question": "q", "answer": NaN}', "no answer"), ([{"question": "q", "answer": ["1", "2"]}], "list of 2"),
        ([{"question": "q", "answer": "$$"}], "so no completion could be right"),
        ([{"answer": "1"}], "no text under 'question' or 'problem'"), ([{"question": "", "answer": "1"}], "no text"),
        ([{"prompt": [{"role": "system", "content": "x"}], "answer": "1"}], "messages without a question"),
        ([{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"}], "content is not text"),
        ([{"prompt": json.dumps([USER]), "answer": "1"}], "messages that are written as one text"),
        ([{"prompt": str([USER]), "answer": "1"}], "messages that are written as one text"),
        ([{"prompt": "<image>q?", "images": ["x.png"], "answer": "1"}], "asks about an image"),
        ([{"prompt": ["x"], "answer": "1"}], "a message without a 'role'"),
        ([{"prompt": 5, "answer": "1"}], "has int where"),
        ([{"question": "\ud83d", "answer": "1"}], r"half of a surrogate pair"),
        ([{"question": "q", "answer": "\udc00"}], r"half of a surrogate pair"),
        ('{"question": "q", "answer": ' + "9" * 5000 + "}", "more than 4300 digits"),
        ('{"question": "q", "answer": ' + "[" * 100_000 + "}", "nested too deeply"), ("{", "Line 1 of .* is not JSON"),
        ("[1]", "Row 1 of .* holds int, not an object"), ("[{]", "JSON array in .* is not JSON"), ("\n \n", "is empty"),
        ("é".encode("latin-1") * 9, "is not UTF-8 text: byte 0xe9 at offset 0; if it is Latin-1"),
        (gzip.compress(LINES.encode())[:-20], "cannot be unpacked"), (b"PAR1" + b"x" * 40, "Parquet file"),
        (b"PK\3\4...", "a ZIP archive"), (b"version https://git-lfs.github.com/spec/v1", "pointer of Git LFS"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_sentence(content: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as raised:
        task_of(tmp_path / "data.jsonl", content).problems("train")
    assert "\n" not in str(raised.value)


def test_a_reward_of_ones_own_needs_no_answers(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "target": "1"} for i in range(10)]
    assert task_of(tmp_path / "data.jsonl", rows, reward="builtins:max").problems("train")[0].answer == ""


def test_repeated_questions_are_counted_and_never_in_both_splits(tmp_path: Path) -> None:
    rows = [{**row, "answer": i if row["question"] == "how much is 0 and 0" else row["answer"]}
            for row in ROWS for i in range(3)]  # fmt: skip
    task = task_of(tmp_path / "data.jsonl", rows)
    train, held_out = ([p.question for p in task.problems(split)] for split in ("train", "eval"))
    assert len(train) == 18 and len(held_out) == 2 and not set(train) & set(held_out)
    assert task.splits is not None and task.splits().dropped == {"duplicate": 40}
    assert task.splits().warnings() == [
        "40 of 60 problems repeat a question and are left out, 2 of them with another answer than the first"
    ]
    (tmp_path / "held_out.jsonl").write_text("\n".join(LINES.split("\n")[:5]))
    splits = task_of(tmp_path / "data.jsonl", LINES, eval_path=str(tmp_path / "held_out.jsonl"), size=10).splits
    assert splits is not None and (len(splits().train), len(splits().held_out)) == (10, 5)
    assert splits().dropped == {"in_both": 5, "size": 5}
    assert "5 training problems are held-out ones" in splits().warnings()[0]
    with pytest.raises(UserError, match="No training problem is left: 20 of training are held out too"):
        task_of(tmp_path / "data.jsonl", LINES, eval_path=str(tmp_path / "data.jsonl")).problems("train")


def test_few_questions_train_and_hold_nothing_out(tmp_path: Path) -> None:
    task = task_of(tmp_path / "data.jsonl", [*ROWS[:9], *ROWS[:9]])
    assert len(task.problems("train")) == 9
    with pytest.raises(UserError, match=r"No held-out problem is left: 9 repeat .*; 9 are for training; set"):
        task.problems("eval")


def test_all_rows_are_used_unless_a_size_is_set(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": i} for i in range(3000)]
    assert len(task_of(tmp_path / "data.jsonl", rows).problems("train")) == 2700
    assert len(task_of(tmp_path / "data.jsonl", rows, size=100).problems("train")) == 100


def test_gsm8k_rows_of_another_layout_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "gsm.jsonl"
    for answer in (72, None, ["72"], "72"):
        path.write_text(json.dumps({"question": "q", "answer": answer}))
        with pytest.raises(UserError, match=r"Row 1 of .* is not in GSM8K's layout.*task.name=jsonl"):
            load_task(TaskConfig(name="gsm8k", path=str(path))).problems("train")


def test_folders_and_hub_names_are_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(LINES)
    (folder / "test.jsonl").write_text("\n".join(json.dumps({"question": f"e{i}", "answer": 1e-5}) for i in range(3)))
    config = TaskConfig(name="jsonl", path=str(folder), eval_split="test")
    task = load_task(config)
    assert len(task.problems("train")) == 20 and task.problems("eval")[0].answer == "0.00001"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert len(load_task(TaskConfig(name="jsonl", path=str(tmp_path / "saved"))).problems("eval")) == 2
    wrong = {str(folder): "split 'nope'.*set task.split", "nobody/no-such-set": "no file.*check name and network"}
    for path, words in wrong.items():
        with pytest.raises(UserError, match=words) as raised:
            load_task(TaskConfig(name="jsonl", path=path, split="nope")).problems("train")
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="GSM8K cannot be loaded from the hub; give a file"):
        load_task(TaskConfig(name="gsm8k")).problems("train")
    for missing in ("no/such.jsonl", "nothing.jsonl", "a/b/c"):
        with pytest.raises(UserError, match="Cannot read the data file"):
            load_task(TaskConfig(name="jsonl", path=missing)).problems("train")


def test_small_question_spaces_are_told_and_refused_when_nothing_is_left() -> None:
    digits = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    splits = load_task(TaskConfig(name="reasoning_gym", options=digits)).splits
    assert splits is not None and len(splits().train) + splits().dropped["in_both"] <= 200
    assert splits().dropped["duplicate"] > 2000 and f"{len(splits().train)} are left" in splits().warnings()[1]
    three = TaskConfig(name="reasoning_gym", dataset="gcd", options={"min_value": 1, "max_value": 3}, size=200)
    with pytest.raises(UserError, match=r"No training problem is left: \d+ repeat another question, \d of training"):
        load_task(three).problems("train")
    for name in ("seed", "size"):
        with pytest.raises(UserError, match=f"'task.options' sets '{name}'"):
            load_task(TaskConfig(name="reasoning_gym", options={name: 7}))
