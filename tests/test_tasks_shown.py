"""Several tasks where they are measured and shown: figures on any images, folds, verdicts and the report."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, r2_score
from task_tables import COLUMNS, shop
from typer.testing import CliRunner

from visgraft import Backbone, MethodConfig, TrainConfig, list_methods
from visgraft.cli.app import build
from visgraft.data.dataset import Example
from visgraft.data.label_columns import LabelColumns
from visgraft.data.read import Source, read_data
from visgraft.data.tasks import LabelTask, TaskLabels
from visgraft.errors import AdapterError, DataError
from visgraft.measure.by_task import OutputsOf, explained, figures_on, images_of_task
from visgraft.measure.conformal import condense
from visgraft.measure.evaluation import score_tasks
from visgraft.measure.numbers import number_figures
from visgraft.report.coverage import number_coverage
from visgraft.report.page import ReportPage, gather, render
from visgraft.report.section import ClassAnswers, NumberAnswers
from visgraft.search import compare
from visgraft.search.run import _unanswered
from visgraft.search.verdict import confused_pairs, difference, is_guessing
from visgraft.training.crossval import Predictions, folds, possible_folds
from visgraft.training.folds import cross_validate
from visgraft.training.run import train_folder

BACKBONE = Backbone("test_vit", "none", 32)
SMALL = ["--backbone", "test_vit", "--weights", "none", "--image-size", "32"]
TASKS = (
    LabelTask("colour", "one_class", ("blue", "red", "rust")),
    LabelTask("size", "number", unit="mm", mean=30.0, std=10.0, low=10, high=50),
    LabelTask("tags", "several_classes", ("bar", "dot")),
)
NAN = math.nan


def known_answers(count: int = 60, skill: Sequence[float] = (1, 1, 1)) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers [2, count, 6] and labels [count, 4], every fifth label unknown; a `skill` of 0 is chance."""
    random = np.random.default_rng(0)
    colour, size = random.integers(0, 3, count), random.normal(30, 10, count)
    tags = random.integers(0, 2, (count, 2))
    labels = torch.tensor(np.column_stack([colour, size, tags]), dtype=torch.float32)
    said = []
    for _ in range(2):
        one = np.eye(3)[colour] * skill[0] + random.random((count, 3))
        number = 30 + skill[1] * (size - 30) + random.normal(0, 4, count)
        several = (tags * skill[2] + random.random((count, 2))) / 2
        said.append(np.column_stack([one / one.sum(1, keepdims=True), number, several]))
    for column, start in enumerate((0, 1, 2)):
        labels[start::5, column if column < 2 else slice(2, 4)] = NAN
    return torch.tensor(np.array(said), dtype=torch.float32), labels


def test_figures_on_all_images_are_those_of_the_evaluation() -> None:
    answers, labels = known_answers()
    found = [score_tasks(one, labels, TASKS, resamples=0).by_task for one in answers]
    expected = [np.mean([one[task.name].figure for one in found]) for task in TASKS]
    assert figures_on(answers, labels, TASKS)(np.arange(60)) == pytest.approx(expected, abs=1e-6)


def test_figures_on_some_images_count_those_with_the_label_and_repeat_what_is_drawn_twice() -> None:
    answers, labels = known_answers()
    rows = np.array([1, 1, 2, 3, 4, 6, 7, 8, 9, 11, 12, 20, 40])
    colour, size, tags = figures_on(answers, labels, TASKS)(rows)
    own = [i for i in rows if not labels[i, 0].isnan()]
    assert colour == pytest.approx((answers[:, own, :3].argmax(-1) == labels[own, 0]).double().mean().item())
    own = [i for i in rows if not labels[i, 1].isnan()]
    assert size == pytest.approx(np.mean([r2_score(labels[own, 1], one[own, 3]) for one in answers]), abs=1e-5)
    own = [i for i in rows if not labels[i, 2].isnan()]
    assert tags == pytest.approx(np.mean([average_precision_score(labels[own, 2:], one[own, 4:]) for one in answers]))
    only_unknown = np.flatnonzero(labels[:, 0].isnan().numpy())
    assert np.isnan(figures_on(answers, labels, TASKS)(only_unknown)[0])


def test_what_is_explained_is_never_below_zero_and_unknown_without_scatter() -> None:
    true = np.array([1.0, 2.0, 3.0])
    assert explained(np.array([[3.0, 2.0, 1.0]]), true) == 0.0
    assert explained(np.array([[1.0, 2.0, 3.0], [9.0, 9.0, 9.0]]), true) == 0.5
    assert np.isnan(explained(np.array([[1.0, 2.0]]), np.array([2.0, 2.0])))


def test_predictions_of_several_tasks_have_a_mean_and_each_task_alone() -> None:
    answers, labels = known_answers()
    found = Predictions(answers, labels, (), TASKS)
    assert set(found.by_task) == {"colour", "size", "tags"} and found.macro_f1 is None and not found.multi_label
    assert found.figure == pytest.approx(np.mean([one.figure for one in found.by_task.values()]), abs=1e-6)
    assert found.interval[0] < found.figure < found.interval[1]
    each = found.task_figures()
    assert [one["images"] for one in each.values()] == [48, 48, 48]
    assert each["colour"]["top1_ci95"][0] < each["colour"]["top1"] <= each["colour"]["top1_ci95"][1]
    assert (
        each["size"]["mae_ci95"][0] < each["size"]["mae"] < each["size"]["mae_ci95"][1] < each["size"]["constant_mae"]
    )
    worse = Predictions(known_answers(skill=(0.1, 1, 1))[0], labels, (), TASKS)
    assert difference(found, worse).mean > 0 and difference(found, worse).clear
    assert not difference(found.by_task["size"], worse.by_task["size"]).clear


@pytest.mark.parametrize(
    ("skill", "guessed"), [((1, 1, 1), set()), ((0, 1, 0), {"colour", "tags"}), ((0, 0, 0), {"colour", "size", "tags"})]
)
def test_each_task_is_held_against_its_constant(skill: tuple[float, ...], guessed: set[str]) -> None:
    answers, labels = known_answers(200, skill)
    found = Predictions(answers, labels, (), TASKS)
    assert {name for name, one in found.by_task.items() if is_guessing(one)} == guessed
    assert is_guessing(found) == (len(guessed) == 3)
    told = _unanswered([found])
    assert bool(told) == bool(guessed) and all(name in told[0] for name in guessed if told)


def test_confused_pairs_are_numbered_among_all_outputs() -> None:
    answers, labels = known_answers(300)
    answers[:, :, 1:3] = answers[:, :, 1:3].sum(-1, keepdim=True) / 2 + 1e-3 * torch.rand(2, 300, 2)
    shifted = (TASKS[1], TASKS[0], TASKS[2])
    found = Predictions(answers[..., [3, 0, 1, 2, 4, 5]], labels[:, [1, 0, 2, 3]], (), shifted)
    assert confused_pairs([found]) == [(2, 3)], "red from rust, behind the output of size"


# ---- folds ----


def examples_of(count: int, grouped: bool = False) -> list[Example]:
    random = np.random.default_rng(1)
    made = []
    for i in range(count):
        colour = 2 if i % 10 == 0 else int(random.integers(0, 2))
        tags = (int(random.integers(0, 2)),) if random.random() < 0.5 else None
        size = float(random.normal()) if i % 3 else None
        label = TaskLabels((colour, size, tags), TASKS)
        made.append(Example(Path(f"{i}.png"), label, f"g{i // 2}" if grouped else None))
    return made


@pytest.mark.parametrize("grouped", [False, True])
def test_folds_keep_every_share_and_groups_whole(grouped: bool) -> None:
    made = examples_of(100, grouped)
    found = folds(made, 5, 2, seed=3)
    assert len(found) == 10
    for repeat in (found[:5], found[5:]):
        assert sorted(np.concatenate([held for _, held in repeat]).tolist()) == list(range(100))
    for learned, held in found:
        assert not set(learned.tolist()) & set(held.tolist())
        assert not {made[i].group for i in learned if grouped} & {made[i].group for i in held if grouped}
        rare = sum(made[i].label.values[0] == 2 for i in held)  # type: ignore[union-attr]
        unknown = sum(made[i].label.values[1] is None for i in held)  # type: ignore[union-attr]
        assert 1 <= rare <= 3 and (grouped or 5 <= unknown <= 9)
    assert [held.tolist() for _, held in folds(made, 5, 2, seed=3)] == [held.tolist() for _, held in found]
    assert [held.tolist() for _, held in folds(made, 5, 2, seed=4)] != [held.tolist() for _, held in found]
    assert possible_folds(made) == 5


def test_a_class_or_a_task_with_fewer_images_than_folds_is_named() -> None:
    made = examples_of(31)
    with pytest.raises(DataError, match=r"need 5 images .* colour=rust \(4\)"):
        folds(made, 5, 1)
    assert possible_folds(made) == 4
    few = [e._replace(label=TaskLabels((i % 3, 1.0 if i < 3 else None, ()), TASKS)) for i, e in enumerate(made)]
    with pytest.raises(DataError, match=r"size \(3\)"):
        folds(few, 5, 1)


# ---- trained ----


def learn(data: Source, out: Path, config: MethodConfig, epochs: int = 8) -> Path:
    recipe = TrainConfig(epochs=epochs, warmup_epochs=0, batch_size=8, precision="fp32", lr=0.01)
    train_folder(data, out, backbone=BACKBONE, method_config=config, train_config=recipe)
    return out


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shop(tmp_path_factory.mktemp("tasks") / "data")


@pytest.fixture(scope="module")
def source(table: Path) -> Source:
    return Source(table, labels=COLUMNS)


@pytest.fixture(scope="module")
def runs(source: Source, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [learn(source, folder / name, list_methods()[name].Config()) for name in ("linear", "alore")]


@pytest.fixture(scope="module")
def report(runs: list[Path], source: Source) -> ReportPage:
    return gather(runs, source)


def test_the_page_has_a_section_for_each_task(report: ReportPage) -> None:
    assert report.figure == "mean of the tasks" and report.verdict.count("mean of the tasks") == 1
    page = render(report)
    for section in report.sections:
        kinds = {question.task.name: type(question.answers) for question in section.questions if question.task}
        assert kinds == {"colour": ClassAnswers, "size": NumberAnswers, "tags": ClassAnswers}
        assert section.measured is None
        assert (
            section.row.interval is not None and section.row.interval[0] < section.row.figure < section.row.interval[1]
        )  # type: ignore[operator]
        for number, name in ((1, "confusion"), (1, "mistakes"), (2, "scatter"), (2, "far"), (3, "classes")):
            assert f'id="{section.row.anchor}-task-{number}-{name}"' in page
        assert f'id="{section.row.anchor}-task-3-confusion"' not in page
    assert 'id="run-1-parts"' in page or 'id="run-2-parts"' in page
    assert "answered size (mm)" in page or "image/svg+xml" in page
    assert "nan" not in re.sub(r"data:image[^\"]*", "", page).lower().split()


def test_the_numbers_on_the_page_are_the_evaluations(report: ReportPage, source: Source) -> None:
    section = report.sections[0]
    assert section.seen is not None
    found = section.seen.evaluation.by_task["size"]
    shown = next(q.answers for q in section.questions if q.task and q.task.name == "size")
    assert isinstance(shown, NumberAnswers) and shown.figures is found
    worst = (found.answers - found.truth).abs()  # type: ignore[union-attr]
    assert [abs(one.answered - one.true) for one in shown.far_off] == pytest.approx(
        worst.sort(descending=True).values[:8]
    )
    named = {e.path.name: e.label.values[1] for e in read_data(source).val}  # type: ignore[union-attr]
    assert all(named[one.file] == pytest.approx(one.true) for one in shown.far_off), "the right pictures"
    assert shown.above == pytest.approx(float((found.answers - found.truth).mean()), abs=1e-4)  # type: ignore[union-attr]
    rows = [row for row in report.task_rows if row.task.name == "size"]
    assert [row.run for row in rows] == [section.row.name for section in report.sections]
    assert rows[0].figure == found.r2 and rows[0].mae == found.mae and rows[0].lead is None and rows[1].lead is not None  # type: ignore[union-attr]
    assert json.dumps(report.rows) and set(report.rows[0]["tasks"]) == {"colour", "size", "tags"}


def test_the_leads_of_the_tasks_make_that_of_the_mean(report: ReportPage) -> None:
    each = [row.lead.points for row in report.task_rows if row.lead is not None]
    whole = report.differences[1]
    assert len(each) == 3 and whole is not None and whole.points == pytest.approx(np.mean(each), abs=1e-6)


def test_without_data_the_page_holds_what_training_recorded(runs: list[Path], report: ReportPage) -> None:
    bare = gather(runs)
    assert [row["figure"] for row in bare.rows] == pytest.approx([row["figure"] for row in report.rows])
    assert {row.task.name for row in bare.task_rows} == {"colour", "size", "tags"}
    assert "With --data" in render(bare)


def test_info_tells_what_each_task_reached(runs: list[Path]) -> None:
    words = ["info", str(runs[0])]
    found = CliRunner().invoke(build(words), words)
    assert found.exit_code == 0 and "None" not in found.stdout
    lines = found.stdout.split("validation: mean of the tasks ")[1].splitlines()
    assert [line.partition(":")[0] for line in lines[1:] if line.startswith("  ")] == ["  colour", "  size", "  tags"]


def test_a_single_number_is_judged_by_r2(table: Path, tmp_path: Path) -> None:
    only = Source(table, labels=LabelColumns(("size",), {"size": "mm"}))
    run = learn(only, tmp_path / "size", list_methods()["linear"].Config(), 20)
    found = gather([run], only)
    assert found.figure == "R²" and " reaches an R² of " in found.verdict
    assert len(found.sections[0].questions) == 1 and 'id="run-1-task-1-scatter"' in render(found)


def test_runs_with_other_tasks_are_not_compared(table: Path, runs: list[Path], tmp_path: Path) -> None:
    other = Source(table, labels=LabelColumns(("colour", "size"), {"size": ""}))
    run = learn(other, tmp_path / "other", list_methods()["linear"].Config(), 1)
    with pytest.raises(AdapterError, match="cannot be compared"):
        gather([runs[0], run])


def test_the_images_of_one_task_are_those_with_its_label(source: Source) -> None:
    from visgraft.data.images import load_images

    config = {
        "input_size": (3, 32, 32),
        "interpolation": "bicubic",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "crop_pct": 1.0,
    }
    images = load_images(read_data(source).train, config, outputs=5)
    colour = images_of_task(images, 0)
    there = ~images.labels[:, 0].isnan()
    assert len(colour) == int(there.sum()) < len(images) and colour.labels.dtype == torch.int64 and not colour.tasks
    assert torch.equal(colour.pixels[:], images.pixels[torch.nonzero(there).flatten()])
    assert torch.equal(colour.pixels[3], images.pixels[int(torch.nonzero(there)[3])])
    assert images_of_task(images, 2).multi_label and images_of_task(images, 1).tasks == (images.tasks[1],)
    whole = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 5))
    x = torch.rand(2, 3, 1, 1)
    assert torch.equal(OutputsOf(whole, slice(1, 3))(x), whole(x)[:, 1:3])


def test_cross_validation_has_figures_of_each_task(source: Source) -> None:
    setting: dict[str, Any] = {"backbone": BACKBONE, "method_config": list_methods()["linear"].Config()}
    recipe = TrainConfig(epochs=8, warmup_epochs=0, batch_size=16, precision="fp32", lr=0.01)
    found = cross_validate(source, **setting, train_config=recipe, folds=3, repeats=2).to_dict()
    assert found["measure"] == "mean" and found["macro_f1"] is None and found["images"] == 60
    assert found["figure"] == pytest.approx(
        np.mean(
            [
                found["tasks"]["colour"]["top1"],
                max(0, found["tasks"]["size"]["r2"]),
                found["tasks"]["tags"]["mean_average_precision"],
            ]
        ),
        abs=1e-3,
    )
    assert found["tasks"]["size"]["images"] == 48 and found["interval"][0] < found["figure"] < found["interval"][1]
    assert json.dumps(found)


def test_compare_prints_every_task_and_a_command_that_names_the_columns(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visgraft.search.run.FEW_IMAGES", 20)
    words = ["compare", str(table), "--label", "colour,size,tags", "--number", "size=mm", "--methods", "linear,bitfit"]
    told = CliRunner().invoke(
        build(["compare"]), [*words, "--trials", "1", "--epochs", "2", *SMALL, "--precision", "fp32"]
    )
    assert told.exit_code == 0, told.output
    for word in (
        "colour",
        "size",
        "tags",
        "constant",
        "R²",
        "mean AP",
        "top-1",
        "--label colour,size,tags --number size=mm",
    ):
        assert word in told.output
    assert "macro-F1" not in told.output


def test_a_comparison_keeps_the_figures_of_each_task(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visgraft.search.run.FEW_IMAGES", 20)
    found = compare(source, ("linear", "bitfit"), backbone=BACKBONE, precision="fp32", trials=1, epochs=2)
    values = found.to_dict()
    assert values["measure"] == "mean" and json.dumps(values)
    first, second = values["results"]
    assert set(first["tasks"]) == {"colour", "size", "tags"} and first["macro_f1"] is None
    gains = second["task_gains"]
    assert second["gain"]["mean"] == pytest.approx(np.mean([one["mean"] for one in gains.values()]), abs=1e-6)


def test_intervals_of_numbers_are_measured_by_level_and_group() -> None:
    truth = torch.arange(40.0)
    said = truth + torch.tensor([0.5, 1.5] * 20)  # every other image is further off than half of the validation images
    found = number_figures(said, truth, 20.0, np.arange(40), 0)
    calibrated = condense(np.r_[np.full(32, 1.0), np.full(8, 2.0)])
    groups = ["near", "far"] * 20
    shown = number_coverage(calibrated, found, groups, np.arange(40))
    assert shown is not None and shown.images == 40
    reached = {row.level: (row.share, row.size) for row in shown.levels}
    assert reached == {level: (1.0, pytest.approx(2.0)) for level in (0.8, 0.9, 0.95)}
    assert {row.name: row.share for row in shown.groups} == {"near": 1.0, "far": 1.0}
    narrow = number_coverage(condense(np.full(40, 1.0)), found, groups, np.arange(40))
    assert narrow is not None and {row.name: row.share for row in narrow.groups} == {"near": 1.0, "far": 0.0}
    few = number_coverage(condense(np.full(10, 1.0)), found, (), np.arange(40))
    assert few is not None and "takes 19 validation images" in few.levels[-1].wanting and few.groups == ()
    assert number_coverage(None, found, (), np.arange(40)) is None
