"""Benchmarks of several labels, of numbers and of several classes per image."""

import json
import math
from csv import DictReader as csv_rows
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_results import parsed, result, trial
from sklearn.metrics import average_precision_score, r2_score
from task_tables import COLUMNS, shop, write
from test_cli import run, succeed

from visgraft import Backbone
from visgraft.bench.evidence import check_evidence
from visgraft.bench.ledger import read_file
from visgraft.bench.plan import Request, plan
from visgraft.bench.running import TrialSources, measure
from visgraft.bench.settings import Recipe
from visgraft.bench.statistics import mean_of_tasks, tables
from visgraft.bench.sweep import State, sweep
from visgraft.bench.table import csv, markdown, sheets
from visgraft.bench.trial import Measured, split_digest
from visgraft.cli.bench_progress import describe
from visgraft.data.label_columns import LabelColumns
from visgraft.data.tasks import LabelTask
from visgraft.errors import DataError
from visgraft.executors.here import Here
from visgraft.protocols.folder import folder_protocol
from visgraft.training.fit import Answers

TYPED = ("--label", "colour,size,tags", "--number", "size=mm", "--several", "tags")


def thirds(i: int) -> str:
    return ("train", "val", "test")[i % 3]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table with a class, a number and several classes, in three parts."""
    return shop(tmp_path_factory.mktemp("data") / "shop", split=thirds)


@pytest.fixture(scope="module")
def swept(table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[State, Path]:
    """A sweep of a linear probe over two settings, measured on a further test set too."""
    other = shop(table.parent.parent / "other", 24, seed=1, split=lambda i: "test")
    protocol = folder_protocol(table, shifted={"other": other}, labels=COLUMNS)
    recipe = Recipe(trials=2, overrides={"epochs": 2})
    request = Request(protocol, table, ("linear",), Backbone("test_vit", "none", 32), recipe, precision="fp32")
    file = tmp_path_factory.mktemp("results") / "shop.jsonl"
    return sweep(plan(request), TrialSources(protocol, table), file, Here()), file


def test_a_trial_is_measured_by_the_mean_of_its_labels(swept: tuple[State, Path]) -> None:
    state, file = swept
    assert not state.failed and not state.left
    found = read_file(file)
    check_evidence(found)
    final = found[-1]
    assert final.trial.protocol == "folder-shop-colour-size-tags" and final.trial.classes == 5
    assert set(final.measured) == {"test", "other"}
    for one in (*final.measured.values(), found[0].measured["val"]):
        assert one.measure == "mean" and one.top1 is None and one.macro_f1 is None and one.per_class == ()
        own = one.by_label
        shares = [own["colour"]["top1"], max(0.0, own["size"]["r2"]), own["tags"]["mean_average_precision"]]
        assert one.figure == pytest.approx(sum(shares) / 3)
        assert own["size"]["unit"] == "mm" and own["size"]["images"] < one.images
        assert one.figure_ci95[0] < one.figure < one.figure_ci95[1]


def test_settings_are_chosen_on_validation_images_by_that_mean(swept: tuple[State, Path]) -> None:
    *tuned, final = read_file(swept[1])
    assert final.selection["measure"] == "mean" and final.selection["measured_on"] == "val"
    figures = [one.measured["val"].figure for one in tuned]
    assert [one["figure"] for one in final.selection["tried"]] == figures
    best = tuned[figures.index(max(figures))]
    assert final.trial.train["lr"] == best.trial.train["lr"]


def test_tables_say_what_each_column_measures(swept: tuple[State, Path]) -> None:
    results = read_file(swept[1])
    main, labels, shifted = sheets(results)
    assert ", other " in describe(results[-1]) and " % (mean of the labels), " in describe(results[-1])
    assert main.title.endswith(": mean of the labels (%)") and "Cells: mean of the labels, R² counted" in main.caption
    assert "mean of 1 task (mean of the labels)" in main.heads and not any("macro" in head for head in main.heads)
    assert not any("top-1 on training images" in head for head in main.heads)
    constant = results[-1].measured["test"].by_label["size"]["constant_mae"]
    assert labels.heads == [
        "method", "colour: top-1 (%)", "size: R² (%)",
        f"size: mean absolute error (constant answer: {constant:.3g} mm)", "tags: mean average precision (%)",
    ]  # fmt: skip
    assert shifted.heads == ["method", "test (mean of the labels)", "other (mean of the labels)"]
    line = next(line for line in parsed(csv(results)) if line["task"])
    assert (line["top1"], line["measure"]) == ("", "mean")
    assert float(line["figure"]) == results[-1].measured["test"].figure
    assert (float(line["low"]), float(line["high"])) == pytest.approx(results[-1].measured["test"].figure_ci95)


def test_lines_written_before_there_were_other_measures_are_read() -> None:
    """Their figure is top-1."""
    old: dict[str, Any] = {
        "images": 4, "top1": 0.75, "top1_ci95": [0.3, 0.95], "macro_f1": 0.7, "calibration_error": 0.1,
        "per_class": [1.0, None], "restricted_to": None,
    }  # fmt: skip
    found = Measured.from_dict(old)
    assert (found.measure, found.figure, found.figure_ci95) == ("top1", 0.75, (0.3, 0.95))
    assert found.per_class == (1.0, None) and found.by_label == {}


def test_several_classes_are_measured_by_average_precision() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(30, 4), (torch.rand(30, 4) > 0.6).float()
    labels[:, 3] = 0
    found = measure(Answers(logits, labels, 0.1), 4)
    each = [average_precision_score(labels[:, n], logits[:, n]) for n in range(3)]
    assert found.measure == "mean_average_precision" and found.figure == pytest.approx(sum(each) / 3)
    assert found.per_class[:3] == pytest.approx(tuple(each)) and found.per_class[3] is None
    assert found.top1 is None and found.macro_f1 is not None and found.calibration_error is not None


def test_a_number_is_measured_by_r2_and_a_training_that_diverged_too() -> None:
    torch.manual_seed(0)
    true = torch.rand(40) * 10
    task = LabelTask("size", "number", unit="cm", mean=5.0, std=2.0, low=0.0, high=10.0)
    said = true + torch.randn(40)
    found = measure(Answers(((said - 5) / 2)[:, None], true[:, None], 0.1, tasks=(task,)), 1)
    assert found.measure == "r2" and found.figure == pytest.approx(r2_score(true, said), abs=1e-5)
    assert found.by_label["size"]["r2"] == pytest.approx(found.figure)
    lost = measure(Answers(torch.full((40, 1), math.nan), true[:, None], 0.1, tasks=(task,)), 1)
    assert lost.figure == 0.0 and lost.by_label["size"]["r2"] < 0.0


def test_a_table_of_tasks_with_different_measures_names_each() -> None:
    r2 = Measured(100, None, None, None, None, (), measure="r2", figure=0.5, figure_ci95=(0.3, 0.6))
    results = [
        result(trial("linear", "a"), 0.8),
        result(trial("linear", "b"), 0.0, measured={"test": r2}),
    ]
    (found,) = tables(results)
    text = markdown(results)
    assert "different measures (%)" in text and "| a | b (R²) | mean of 2 tasks (different measures) |" in text
    assert "Cells: top-1 (a) and R² (b), R² counted as 0 below 0, in percent" in text
    mean = mean_of_tasks(found.rows[0], ["b"])
    assert mean is not None and mean.interval[:2] == pytest.approx((0.3, 0.6))


def test_the_command_takes_label_columns(table: Path, tmp_path: Path) -> None:
    small = ("--backbone", "test_vit", "--weights", "none", "--image-size", 32)
    command = ("bench", "run", "folder", "--root", table, "--methods", "linear", "--dry-run", *small, *TYPED)
    (row,) = succeed(*command, "--out", tmp_path)
    assert row["task"] == "shop-colour-size-tags"
    (found,) = succeed("bench", "check", "folder", "--root", table, *TYPED)
    assert found["ok"] and "colour: one of 2 classes" in found["text"] and "size: a number from" in found["text"]


def refused(*words: object) -> str:
    """The line that a command prints."""
    code, _, err = run(*words)
    *_, line = (line for line in err.splitlines() if line.startswith("error:"))
    assert code == 1 and "Traceback" not in err
    return line


def test_what_several_labels_do_not_go_with_is_one_line(table: Path, tmp_path: Path) -> None:
    check = ("bench", "check", "folder", "--root", table, *TYPED)
    assert "shots are drawn per class, so every image needs exactly one" in refused(*check, "--shots", "1,2")
    assert "is no table; give a .csv" in refused(*check, "--shifted", f"x={table.parent}")
    assert "is no table; give a .csv" in refused("bench", "check", "folder", "--root", table.parent, "--label", "size")
    rows = [{"image_path": str(table.parent / "000.png"), "colour": "red", "tags": "far|dot"}]
    lacking = write(tmp_path / "lacking.csv", rows)
    assert "has no column size" in refused(*check, "--shifted", f"x={lacking}")
    strange = write(tmp_path / "strange.csv", [{**rows[0], "colour": "green", "size": "3.5"}])
    told = f"strange.csv has classes that {table} lacks: green; leave its rows out"
    assert told in refused(*check, "--shifted", f"x={strange}")
    assert "use --label, --number, --several, --one-class, --shots, --shifted" in refused(
        "bench", "check", "offline", "--number", "size"
    )


def test_a_part_without_any_label_of_a_task_is_refused(tmp_path: Path) -> None:
    """Its figure would be of the other labels, and compare with no other part's."""
    table = shop(tmp_path / "shop", 30, split=thirds, size=lambda i: "" if i % 3 == 2 else f"{i}.5")
    protocol = folder_protocol(table, labels=LabelColumns(("colour", "size")))
    request = Request(protocol, table, ("linear",), Backbone("test_vit", "none", 32), Recipe("default"))
    with pytest.raises(DataError, match="no test image has a label size; fill in some, or leave the column out"):
        plan(request)


def test_numbers_in_another_unit_are_another_trial(table: Path) -> None:
    def digest(unit: str) -> str:
        labels = LabelColumns(("size",), {"size": unit} if unit else {"size": ""})
        (task,) = folder_protocol(table, labels=labels).tasks
        return split_digest(task.open(table, task, 0), table)

    assert len({digest("mm"), digest("cm"), digest("")}) == 3


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"measure": "new"}, "its measure is 'new'"),
        ({"figure": None}, "its figure is None"),
        ({"by_label": None}, "by_label does not hold"),
        ({"by_label": {"size": {"images": 3}}}, "by_label does not hold"),
        ({"by_label": {"size": {"r2": 0.5}}}, "by_label does not hold"),
    ],
)
def test_a_line_of_other_figures_is_told_by_its_number(
    swept: tuple[State, Path], tmp_path: Path, wrong: dict[str, Any], says: str
) -> None:
    """Of a later version, say, which tables and plots would stumble over."""
    line = json.loads(swept[1].read_text(encoding="utf-8").splitlines()[-1])
    line["measured"]["test"] |= wrong
    (tmp_path / "odd.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    for verb in ("table", "plot"):
        code, _, err = run("bench", verb, tmp_path)
        assert code == 1 and f"odd.jsonl, line 1 is no result of this version ({says}" in err


@pytest.mark.parametrize("name", ["a/b", "../../up", "x" * 300, "a\\b"])
def test_a_column_of_any_name_is_a_file_in_the_folder_of_results(table: Path, tmp_path: Path, name: str) -> None:
    """A path in it would lead elsewhere, and a long name would be refused after the training."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = [{**row, "image_path": str(table.parent / row["image_path"])} for row in csv_rows(file)]
    odd = write(tmp_path / "odd.csv", [{name if key == "size" else key: cell for key, cell in r.items()} for r in rows])
    found = folder_protocol(odd, labels=LabelColumns((name,), {name: "mm"})).name
    assert Path(found).name == found and len(f"{found}.jsonl".encode()) < 255 and found.startswith("folder-odd-")
    other = folder_protocol(odd, labels=LabelColumns((name, "colour"), {name: "mm"})).name
    assert other != found
