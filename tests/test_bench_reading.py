"""Results of a benchmark as numbers: every number against one made by hand."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bench_results import NOTHING, grid, measured, only, parsed, result, trial, tuned, two_groups
from scipy.stats import binomtest

from visgraft.bench.costs import costs
from visgraft.bench.evidence import check_evidence
from visgraft.bench.plot_numbers import parameter_points
from visgraft.bench.statistics import mean_of_groups, mean_of_tasks, paired, tables
from visgraft.bench.table import csv, markdown, sheets
from visgraft.bench.trial import Result
from visgraft.errors import VisgraftError


def test_means_are_of_the_tasks_or_of_the_groups_and_say_so() -> None:
    table = only(two_groups())
    linear = table.rows[0]
    tasks, groups = mean_of_tasks(linear, table.tasks), mean_of_groups(linear, table.groups)
    assert tasks is not None and groups is not None
    assert (tasks.name, groups.name) == ("mean of 3 tasks", "mean of 2 groups")
    assert tasks.value == pytest.approx((0.52 + 0.61 + 0.81) / 3)
    assert groups.value == pytest.approx(((0.52 + 0.61) / 2 + 0.81) / 2)


def test_the_interval_over_seeds_has_the_width_that_the_seeds_scatter_gives() -> None:
    rng = np.random.default_rng(0)
    figures = {"linear": {f"t{i}": rng.normal(0.5, 0.02, 8).tolist() for i in range(20)}}
    table = only(grid(figures))
    mean = mean_of_tasks(table.rows[0], table.tasks)
    assert mean is not None and mean.interval.over == "seeds"
    variances = [np.var(seeds, ddof=1) / 8 for seeds in figures["linear"].values()]
    expected = 2 * 1.96 * np.sqrt(sum(variances)) / 20
    assert mean.interval.high - mean.interval.low == pytest.approx(expected, rel=0.08)
    assert mean.interval.low < mean.value < mean.interval.high


def test_with_one_seed_the_interval_is_that_of_the_test_images() -> None:
    one = only(grid({"linear": {"a": (0.9,)}}))
    mean = mean_of_tasks(one.rows[0], one.tasks)
    expected = binomtest(450, 500).proportion_ci(method="wilson")
    assert mean is not None and mean.interval.over == "test images"
    assert (mean.interval.low, mean.interval.high) == pytest.approx((expected.low, expected.high))
    many = only(grid({"linear": {f"t{i}": (0.3 + 0.02 * i,) for i in range(19)}}))
    mean = mean_of_tasks(many.rows[0], many.tasks)
    normal = 2 * 1.96 * np.sqrt(sum(p * (1 - p) / 500 for p in (0.3 + 0.02 * i for i in range(19)))) / 19
    assert mean is not None and mean.interval.high - mean.interval.low == pytest.approx(normal, rel=0.02)


def test_a_method_that_lacks_a_task_has_no_mean_and_the_table_names_the_task() -> None:
    figures = {"linear": {"a": (0.5,), "b": (0.6,)}, "full": {"a": (0.7,), "b": (0.8,)}, "sct": {"a": (0.9,)}}
    results = grid(figures)
    table = only(results)
    assert mean_of_tasks(table.rows[2], table.tasks) is None
    sheet = sheets(results)[0]
    row = dict(zip(sheet.heads, sheet.rows[2], strict=True))
    assert row["a"] == "90.0"
    assert row["b"] == row["mean of 2 tasks"] == row["Δ linear"] == row["Δ full"] == row["minutes per training"] == "–"
    assert sheet.notes == ("–: sct has no result for b, and so no means.",)
    assert [point.label for point in parameter_points(table)] == ["linear", "full"]
    assert not any(line["method"] == "sct" and line["of"] != "task" for line in parsed(csv(results)))


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bf16"},
        {"device": "CPU, 2 threads"},
        {"backbone_digest": "f" * 64},
        {"preprocessing": {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_mode": "squash"}},
        {"preprocessing": {"input_size": [3, 98, 98], "mean": [0.4] * 3, "std": [0.5] * 3, "crop_mode": "squash"}},
    ],
)
def test_results_of_other_conditions_stand_in_a_table_of_their_own(change: dict[str, Any]) -> None:
    first, second = grid({"linear": {"a": (0.5,)}, "sct": {"a": (0.6,)}})
    found = tables([first, replace(second, **change)])
    assert [[row.label for row in table.rows] for table in found] == [["linear"], ["sct"]]


@pytest.mark.parametrize("change", [{"reduced": True}, {"final_parts": "train"}, {"protocol": "vtab-1k"}])
def test_trials_of_other_conditions_stand_in_a_table_of_their_own(change: dict[str, Any]) -> None:
    results = [result(trial("linear", "a"), 0.5), result(trial("sct", "a", **change), 0.6)]
    assert [len(table.rows) for table in tables(results)] == [1, 1]
    assert ("Reduced" in markdown(results)) is ("reduced" in change)


def test_random_weights_of_several_seeds_are_one_condition() -> None:
    results = grid({"linear": {"a": (0.5, 0.6)}})
    results = [
        replace(r, backbone_digest=str(n), trial=replace(r.trial, backbone={**r.trial.backbone, "weights": "none"}))
        for n, r in enumerate(results)
    ]
    assert only(results).condition.digest == ""


def test_recipes_and_epochs_are_rows_of_one_table() -> None:
    results = [
        result(trial("sct", "a", recipe="validated"), 0.6),
        result(trial("sct", "a", recipe="sct-paper"), 0.7),
        result(trial("linear", "a", recipe="validated"), 0.5),
        result(trial("linear", "a", recipe="validated", epochs=20), 0.5),
    ]
    labels = [row.label for row in only(results).rows]
    assert labels == ["linear (10 epochs)", "linear (20 epochs)", "sct", "sct (sct-paper)"]


def test_two_results_for_one_place_and_other_images_are_refused() -> None:
    twice = [result(trial("sct", "a"), 0.6), result(trial("sct", "a", lr=1e-2), 0.7)]
    with pytest.raises(VisgraftError, match=r"a sct final seed 0 has two results, which differ in train; run each"):
        tables(twice)
    other = [result(trial("sct", "a"), 0.6), result(trial("linear", "a", split="other"), 0.7)]
    with pytest.raises(VisgraftError, match="did not use the same images"):
        tables(other)
    with pytest.raises(VisgraftError, match="no final results"):
        tables([])


def test_paired_differences_use_what_both_have_and_count_tasks() -> None:
    first = {"a": (0.7, 0.8), "b": (0.6, 0.6), "c": (0.5,), "d": (0.9,)}
    second = {"a": (0.6, 0.6, 0.1), "b": (0.7, 0.6), "c": (0.5,)}
    linear, sct = only(grid({"sct": first, "linear": second})).rows
    found = paired(sct, linear)
    assert found is not None
    assert found.mean == pytest.approx((0.15 - 0.05 + 0) / 3)
    assert (found.won, found.lost, found.tied, found.tasks, found.pairs) == (1, 1, 1, 3, 5)
    back = paired(linear, sct)
    assert back is not None and back.mean == pytest.approx(-found.mean) and (back.won, back.lost) == (1, 1)
    apart = only(grid({"linear": {"a": (0.5,)}, "sct": {"b": (0.5,)}})).rows
    assert paired(*apart) is None


def test_the_paired_interval_covers_the_true_difference() -> None:
    rng = np.random.default_rng(3)
    covered, widths = 0, []
    for _ in range(100):
        true = rng.normal(0.03, 0.04, 15)  # the tasks' own differences; 0.03 is the mean over all tasks there might be
        figures = {
            "linear": {f"t{i}": (0.5 + rng.normal(0, 0.01, 3)).tolist() for i in range(15)},
            "sct": {f"t{i}": (0.5 + true[i] + rng.normal(0, 0.01, 3)).tolist() for i in range(15)},
        }
        linear, sct = only(grid(figures)).rows
        found = paired(sct, linear)
        assert found is not None and found.interval is not None and found.interval.over == "tasks and seeds"
        covered += found.interval.low <= 0.03 <= found.interval.high
        widths.append(found.interval.high - found.interval.low)
    assert 87 <= covered <= 99
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt((0.04**2 + 2 * 0.01**2 / 3) / 15), rel=0.1)


def test_the_difference_to_a_baseline_is_paired_and_on_all_tasks() -> None:
    sheet = sheets(two_groups())[0]
    rows = [dict(zip(sheet.heads, row, strict=True)) for row in sheet.rows]
    assert [row["Δ linear"] for row in rows] == ["–", "+9.67"]  # (20 - 1 + 10) / 3
    assert "Δ full" not in sheet.heads


def test_costs_are_means_over_the_tasks_and_count_a_search_once() -> None:
    searched = {**NOTHING, "seconds": 300.0}
    results = [
        result(trial("sct", "a", 0), 0.5, seconds=10.0, selection=searched, peak_memory_bytes=3),
        result(trial("sct", "a", 1), 0.5, seconds=30.0, selection=searched, peak_memory_bytes=5),
        result(trial("sct", "b", 0), 0.5, seconds=100.0, parameters=10, outcome="diverged", peak_memory_bytes=4),
    ]
    found = costs(only(results).rows[0], ("a", "b"))
    assert (found.parameters, found.seconds, found.search_seconds) == (28_224, 60.0, 150.0)
    assert (found.peak_memory_bytes, found.diverged) == (5, 1)
    assert costs(only(results).rows[0], ("a", "b", "c")).seconds is None
    assert "diverged trainings" in sheets(results)[0].heads


def test_accuracy_on_the_training_images_is_shown_where_each_task_has_it() -> None:
    head = "top-1 on training images, last epoch"
    results = [
        result(trial("sct", "a", 0), 0.5),  # measured before it was kept
        result(trial("sct", "a", 1), 0.5, learned_top1=0.9),
        result(trial("sct", "b", 0), 0.5, learned_top1=1.0),
        result(trial("linear", "a", 0), 0.5, learned_top1=0.6),
        result(trial("linear", "b", 0), 0.5),
    ]
    rows = [dict(zip(sheet.heads, row, strict=True)) for sheet in sheets(results)[:1] for row in sheet.rows]
    assert {row["method"]: row[head] for row in rows} == {"linear": "–", "sct": "95.0"}
    assert head not in sheets(results[:1])[0].heads


def test_evidence_that_holds_up_passes_after_a_round_trip_through_json() -> None:
    results = [*tuned(), *grid({"linear": {"a": (0.5,)}})]
    check_evidence([Result.from_dict(json.loads(one.to_line())) for one in results])
    assert len(only(results).rows) == 2


def changed(results: list[Result], **values: Any) -> list[Result]:
    """The same, with the final result's selection changed."""
    return [*results[:-1], replace(results[-1], selection={**results[-1].selection, **values})]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (tuned(chosen=2), "but {'lr': 0.002} was the best"),
        (changed(tuned(), rule="test"), "chosen by 'test'"),
        (changed(tuned(), measured_on="test"), "chosen on 'test'"),
        (changed(tuned(), tried=[]), "not those of its trial"),
        (changed(tuned(), rule="none"), "nothing was tried, but settings were"),
        (changed(tuned((0.5, 0.7, 0.8), 2), chosen={"lr": 1e-3}), "the setting chosen is {'lr': 0.001}"),
        (changed(tuned(), chosen={}), "the setting chosen is {}"),
        ([*tuned()[:-1], *tuned((0.5, 0.9, 0.7))[-1:]], "is not the one that was measured on 'val'"),
        ([replace(tuned()[-1], epochs=9)], "after 9 epochs of 10"),
        ([replace(tuned()[0], measured={"val": measured(0.5), "test": measured(0.5)})], "was measured on test"),
        (
            [replace(tuned()[-1], trial=replace(tuned()[-1].trial, train=trial("sct", "a", lr=0.1).train))],
            "did not train with the setting chosen",
        ),
    ],
)
def test_a_choice_that_does_not_hold_up_is_refused_by_name(results: list[Result], message: str) -> None:
    with pytest.raises(VisgraftError, match=r"the result of a sct (tune|final) seed 0 is no evidence: ") as caught:
        check_evidence(results)
    assert message in str(caught.value)


def test_no_table_is_made_of_what_is_no_evidence() -> None:
    with pytest.raises(VisgraftError, match="chosen on 'test'"):
        tables(changed(tuned(), measured_on="test"))
