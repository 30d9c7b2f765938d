"""Fits: exact on made-up engines, honest on what rows cannot tell, blind to the test half of measured rows."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost_tables import bench_rows, write_table
from forerun.errors import UserError
from forerun.simulate.core.constants import round_cost_error, serving_constants
from forerun.simulate.core.decode import LinearEngine, acceptance_from_lengths, acceptance_length
from forerun.simulate.core.fitting import map_fit, nonnegative_least_squares, relative_errors
from forerun.simulate.core.hardware import load_hardware
from forerun.simulate.core.operators import Layout, Replica, Tuning
from forerun.simulate.core.rollout import simulate_rollout
from forerun.simulate.core.shapes import load_model
from forerun.simulate.plan.calibrate import fit_engine, held_out_error
from forerun.simulate.plan.cost_table import read_cost_table
from forerun.simulate.validation.round_costs import constants_of, fit_rounds, round_cost, round_errors, round_points
from forerun.simulate.validation.serving import ServingRow, fit_serving, predict_s, read_rows
from forerun.simulate.validation.validate import validate

MEASURED = Path(__file__).parents[2] / "../shared/data/simulator/measured_decode.csv"
needs_rows = pytest.mark.skipif(not MEASURED.is_file(), reason=f"the measured rows are not at {MEASURED}")


def made_up_rows(truth: Tuning, model: str = "Qwen3-8B") -> list[ServingRow]:
    shape, gpu = load_model(model), load_hardware("H100")
    rows = []
    for tensor in (1, 2, 4):
        for prompt in (512, 1024, 2048):
            for output in (256, 1024):
                for batch in (4, 8, 16, 32, 64):
                    replica = Replica(shape, gpu, Layout(tensor))
                    row = ServingRow("vllm 1", replica, prompt, output, batch, 1.0)
                    rows.append(replace(row, measured_s=float(predict_s([row], truth)[0])))
    return rows


def test_constants_of_a_made_up_engine_are_found() -> None:
    truth = Tuning(host_s=4e-3, sequence_s=30e-6, memory=1.1, compute=1.3)
    rows = made_up_rows(truth)
    found = fit_serving(rows).tuning(rows[0].group, "dense")
    test = [row for row in rows if not row.fitted]
    assert relative_errors(predict_s(test, found), np.array([row.measured_s for row in test]))["worst"] < 0.03
    assert found.host_s == pytest.approx(truth.host_s, rel=0.15)


def test_the_fit_never_sees_the_test_half() -> None:
    rows = made_up_rows(Tuning(host_s=3e-3))
    corrupted = [row if row.fitted else replace(row, measured_s=row.measured_s * 17.0) for row in rows]
    assert 0 < sum(row.fitted for row in rows) < len(rows)
    assert fit_serving(rows) == fit_serving(corrupted)
    assert fit_serving(rows) == fit_serving([row for row in rows if row.fitted])


def test_a_fit_says_what_it_did_not_identify() -> None:
    rows = made_up_rows(Tuning())
    entry = fit_serving(rows).groups[rows[0].group]
    assert "experts" in entry.not_identified  # a dense model has none
    assert "compute" not in entry.not_identified


@needs_rows
def test_the_measured_fit_never_sees_the_test_half() -> None:
    rows, _ = read_rows(MEASURED)
    own = [row for row in rows if row.group[0] == "Qwen3-32B"]
    corrupted = [row if row.fitted else replace(row, measured_s=1e3) for row in own]
    assert fit_serving(own) == fit_serving(corrupted)


@needs_rows
def test_repeated_and_relabelled_measurements_stay_in_one_half() -> None:
    rows, _ = read_rows(MEASURED)
    halves: dict[tuple[str, str, str, float], set[bool]] = {}
    for row in rows:
        key = (row.replica.model.name, row.replica.gpu.name, row.engine.split()[0], row.measured_s)
        halves.setdefault(key, set()).add(row.fitted)
    assert len(halves) < len(rows)
    assert all(len(half) == 1 for half in halves.values())


@needs_rows
def test_the_targets_hold_on_the_test_half_and_the_shipped_constants_are_this_fit() -> None:
    found = validate(MEASURED)
    assert found["rows"] == 689 and not found["skipped"]
    for family in found["families"]:
        assert family["reached"], family
        assert family["shipped"]["median"] == pytest.approx(family["test"]["median"], abs=0.002)
    assert len(found["groups"]) == 26
    json.dumps(found, allow_nan=False)


@needs_rows
def test_another_file_with_the_same_columns_is_taken_and_strange_rows_are_named(tmp_path: Path) -> None:
    with MEASURED.open(newline="") as handle:
        records = list(csv.DictReader(handle))[::9]
    strange = [
        records[0] | {"system": "tpu_v7"},
        records[0] | {"pp_size": "4"},
        records[0] | {"isl": "-5"},
        records[0] | {"gemm_quant_mode": "nvfp4"},
        records[0] | {"silicon_tpot_ms": ""},
    ]
    path = tmp_path / "other.csv"
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(records[0]))
        writer.writeheader()
        writer.writerows(records + strange)
    found = validate(path)
    assert found["rows"] == len(records)
    assert len(found["skipped"]) == len(strange)
    assert any("tpu_v7" in sentence for sentence in found["skipped"])


@needs_rows
def test_a_file_without_a_row_to_fit_takes_the_shipped_constants(tmp_path: Path) -> None:
    with MEASURED.open(newline="") as handle:
        records = list(csv.DictReader(handle))
    rows, _ = read_rows(MEASURED)
    path = tmp_path / "test_half.csv"
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(records[0]))
        writer.writeheader()
        writer.writerows(record for record, row in zip(records, rows, strict=True) if not row.fitted)
    for family in validate(path)["families"]:
        assert family["fit"] == {"rows": 0}
        assert family["reached"] and family["test"] == family["shipped"]


def test_unreadable_files_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No measured rows"):
        validate(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text("isl,osl\n1,2\n")
    with pytest.raises(UserError, match="lacks the columns backend"):
        validate(tmp_path / "bad.csv")


def test_round_costs_of_published_engines() -> None:
    rows = round_errors()
    assert all(row["sign_right"] for row in rows if "sign_right" in row)
    assert all(abs(row["error"]) <= 0.15 for row in rows if row["role"] == "test")
    assert all(abs(row["error"]) <= 0.12 for row in rows if row["role"] == "fit")


def test_round_constants_do_not_see_their_test_points() -> None:
    points = round_points()
    corrupted = [point if point.fitted else replace(point, c=9.0) for point in points]
    assert fit_rounds(points) == fit_rounds(corrupted)
    assert round_cost(replace(points[0], k=0), fit_rounds(points)[points[0].engine]) == pytest.approx(1.0)


def test_heads_of_one_engine_have_constants_of_their_own_and_others_take_the_pooled_ones() -> None:
    points = round_points()
    tunings = fit_rounds(points)
    heads = {
        point.analytical.drafter.method: constants_of(point, tunings) for point in points if "2025" in point.engine
    }
    assert heads["eagle3"].token_s > heads["eagle1"].token_s
    assert tunings["vllm skyrl"] == tunings["vllm 2025-07"] not in heads.values()
    assert round_cost_error() > 0.1  # the planner's band does not profit from them


TRUE = LinearEngine(0.04, 0.002, 1e-6, 0.003, 0.0008, 0.004, 0.0002, prompt_token_s=0.002)


def test_an_engine_is_recovered_from_its_benchmark() -> None:
    found = fit_engine(bench_rows(TRUE))
    for name in ("step_s", "sequence_s", "cached_s", "verify_fixed_s", "row_s", "draft_fixed_s", "draft_row_s"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-6), name
    assert found.prompt_token_s == pytest.approx(TRUE.sequence_s)
    assert found.not_identified == ()
    assert fit_engine(bench_rows(TRUE, noise=0.05)).error < 0.1
    assert held_out_error(bench_rows(TRUE)) < 1e-6
    assert 0.01 < held_out_error(bench_rows(TRUE, noise=0.05)) < 0.3


def test_the_held_out_error_notices_an_engine_that_is_not_linear() -> None:
    rows = bench_rows(TRUE)
    bent = [row | {"plain_step_s": row["plain_step_s"] * (3.0 if row["batch"] == 16 else 1.0)} for row in rows]
    assert held_out_error(bent) > 0.3


def test_a_fitted_engine_predicts_a_rollout() -> None:
    lengths, engine = np.array([30.0, 60.0, 90.0, 120.0] * 4), fit_engine(bench_rows(TRUE, noise=0.05))
    for k in (0, 3):
        ours, true = (
            simulate_rollout(costs, lengths, replicas=1, k=k, alpha=acceptance_length(k, 0.7), slots=8).seconds
            for costs in (engine, TRUE)
        )
        assert ours == pytest.approx(true, rel=0.1)


def test_poor_benchmarks_are_told_apart() -> None:
    rows = [row for row in bench_rows(TRUE) if row["batch"] == 4 and row["context"] == 64]
    said = " ".join(fit_engine(rows).not_identified)
    assert "same batch" in said and "about the same context" in said
    plain = [row for row in rows if row["k"] == 0]
    assert "no row drafts" in " ".join(fit_engine(plain).not_identified)
    assert fit_engine(plain).plain_s(4, 64) == pytest.approx(float(TRUE.plain_s(4, 64)))
    with pytest.raises(UserError, match="no benchmark rows"):
        fit_engine([])
    with pytest.raises(UserError, match="plain_step_s=None"):
        fit_engine([{"k": 0, "batch": 1, "context": 3}])


def test_contexts_that_hardly_differ_do_not_price_the_cache() -> None:
    """Noise on nearly equal contexts would fit any price; the given one stands, and the rest is still found."""
    rows = [row for row in bench_rows(TRUE) if row["context"] == 256]
    wobbly = [row | {"context": row["context"] + (3 if row["batch"] == 4 else 0)} for row in rows]
    found = fit_engine(wobbly, cached_s=TRUE.cached_s)
    assert found.cached_s == TRUE.cached_s and "cached_s" in " ".join(found.not_identified)
    assert found.sequence_s == pytest.approx(TRUE.sequence_s, rel=0.02)
    assert float(found.plain_s(8.0, 1024.0)) == pytest.approx(float(TRUE.plain_s(8.0, 1024.0)), rel=0.02)


def test_a_cost_table_is_read_and_its_acceptance_pooled(tmp_path: Path) -> None:
    other = {"method": "ngram", "k": 2, "batch": 1, "context": 9, "plain_step_s": 1.0, "round_s": 1.1}
    table = read_cost_table(write_table(tmp_path / "bench.json", [*bench_rows(TRUE), other]))
    assert table.methods == ["eagle3", "ngram"]
    assert len(table.of("eagle3")) == 36 and len(table.of("ngram")) == 10  # every plain row counts for both
    lengths = table.acceptance("eagle3")
    assert lengths == pytest.approx({k: sum(0.7**j for j in range(k + 1)) for k in (1, 3, 5)})
    later = [row for row in bench_rows(TRUE) if row["k"] not in (1, 3)]
    below = read_cost_table(write_table(tmp_path / "later.json", later)).acceptance("eagle3")
    assert below == pytest.approx({k: sum(0.7**j for j in range(k + 1)) for k in (1, 2, 3, 4, 5)})
    assert table.acceptance("ngram") == {}
    with pytest.raises(UserError, match="no rows of 'mtp'; it has eagle3, ngram"):
        table.of("mtp")


def test_noise_in_the_acceptance_of_a_cost_table_is_held_to_what_can_be(tmp_path: Path) -> None:
    rows = [row for row in bench_rows(TRUE) if row["k"] and row["batch"] == 1]
    said = {1: 1.95, 3: 4.0, 5: 3.9}  # 3 grows by more than 2 x 0.95, 5 falls
    noisy = [row | {"acceptance_length": said[row["k"]]} for row in rows]
    lengths = read_cost_table(write_table(tmp_path / "bench.json", noisy)).acceptance("eagle3")
    assert lengths == pytest.approx({1: 1.95, 3: 3.85, 5: 3.9}, abs=1e-6)
    assert acceptance_from_lengths(lengths).length(5.0) == pytest.approx(3.9, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"round_s": None}, "Row 2 of .* has round_s=None"),
        ({"batch": 0}, "has batch 0"),
        ({"context": -4}, "context -4"),
        ({"plain_step_s": "fast"}, "plain_step_s='fast'"),
        ({"round_s": -1.0}, "has round_s -1.0; it must be positive"),
        ({"draft_s": 9.0}, "parts of it"),
    ],
)
def test_a_wrong_row_of_a_cost_table_is_named(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    rows = bench_rows(TRUE)[:2]
    with pytest.raises(UserError, match=sentence):
        read_cost_table(write_table(tmp_path / "bench.json", [rows[0], rows[1] | change]))


def test_what_is_no_cost_table_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot read the cost table"):
        read_cost_table(tmp_path / "none.json")
    for text, sentence in (("[]", "lacks machine"), ("{", "Cannot read"), ('{"machine": 1, "rows": []}', "lacks ver")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match=sentence):
            read_cost_table(tmp_path / "bad.json")
    whole = '{"machine": 1, "versions": 1, "policy": 1, "rows": 3}'
    (tmp_path / "bad.json").write_text(whole)
    with pytest.raises(UserError, match="rows are no list"):
        read_cost_table(tmp_path / "bad.json")


def test_estimators() -> None:
    columns = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert nonnegative_least_squares(columns, np.array([3.0, 5.0, 7.0])) == pytest.approx([1.0, 2.0])
    assert (
        nonnegative_least_squares(columns, np.array([3.0, 2.0, 1.0]))[1] == 0.0
    )  # a falling line has no positive slope
    x = np.linspace(1, 5, 20)
    measured = 2.0 + 3.0 * x
    measured[3] *= 4  # one wild point
    fit = map_fit(lambda p: p[0] + p[1] * x, measured, np.array([1.0, 1.0]), np.array([2.0, 2.0]))
    assert fit.values == pytest.approx([2.0, 3.0], rel=0.1)
    assert relative_errors(np.array([]), np.array([])) == {"rows": 0}


def test_shipped_constants_fall_back_from_group_to_engine_to_default() -> None:
    shipped = serving_constants()
    exact = shipped.tuning(("Qwen3-32B", "H100", "vllm 0.12.0"), "dense")
    pooled = shipped.tuning(("Qwen3-8B", "GB200", "vllm"), "dense")
    assert exact != pooled != Tuning()
    assert shipped.tuning(("Qwen3-8B", "GB200", "unheard-of"), "dense") == Tuning()
