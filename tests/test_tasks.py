"""Several labels of one image: what columns of a table hold, how parts are drawn, what the loss and figures say."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from sklearn.metrics import r2_score
from support import vit
from torch.nn import functional as F

from visgraft.data.dataset import Dataset, Split
from visgraft.data.examples import Coded
from visgraft.data.images import Images, load_images, make_labels
from visgraft.data.label_columns import LabelColumns, found_kind
from visgraft.data.read import Source, read_data, with_column
from visgraft.data.stratify import draw_marked
from visgraft.data.task_tensors import known, membership, task_answers
from visgraft.data.tasks import LabelTask, TaskLabels, column_slices, outputs_of
from visgraft.errors import DataError, VisgraftError
from visgraft.measure.evaluation import evaluate, score_tasks
from visgraft.options import TrainConfig
from visgraft.training.task_loss import TaskLoss, constant_cost

ALL = Split(0, 0)
NAN = math.nan
TASKS = (
    LabelTask("colour", "one_class", ("blue", "green", "red")),
    LabelTask("tags", "several_classes", ("new", "sale")),
    LabelTask("reading", "number", unit="bar", mean=4.0, std=2.0, low=1.0, high=9.0),
)
LABELS = torch.tensor(
    [[0.0, 1.0, 0.0, 3.0], [2.0, NAN, NAN, 5.0], [NAN, 0.0, 0.0, NAN], [1.0, 1.0, 1.0, 8.0]]
)  # of four images


def write(folder: Path, header: str, lines: list[str], name: str = "shop.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(len(lines)):
        shade = 10 * number % 256
        Image.new("RGB", (4, 4), (shade, 255 - shade, number % 256)).save(folder / f"{number:03}.png")
    text = [f"image_path,{header}", *(f"{number:03}.png,{line}" for number, line in enumerate(lines))]
    (folder / name).write_text("\n".join(text) + "\n", encoding="utf-8")
    return folder / name


def shop(folder: Path, count: int = 60, **options: str) -> Dataset:
    lines = [f"{'red' if n % 3 else 'blue'},{'new|sale' if n % 2 else 'new'},{n * 1.5}" for n in range(count)]
    lines[4], lines[5] = ",sale,", "red,|,7.5"
    columns = LabelColumns.parsed(options.pop("label", "colour,tags,reading"), options.pop("number", None), None, None)
    return read_data(Source(write(folder, "colour,tags,reading", lines), labels=columns), Split(seed=1))


def message(table: Path, label: str | None = None, **kinds: str | None) -> str:
    every: dict[str, Any] = {"number": None, "several": None, "one_class": None, **kinds}
    with pytest.raises(DataError) as caught:
        read_data(Source(table, labels=LabelColumns.parsed(label, **every)), ALL)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_kinds_are_found_by_the_cells(tmp_path: Path) -> None:
    data = shop(tmp_path)
    assert [(task.name, task.kind, task.classes) for task in data.tasks] == [
        ("colour", "one_class", ("blue", "red")),
        ("tags", "several_classes", ("new", "sale")),
        ("reading", "number", ()),
    ]
    assert data.classes == outputs_of(data.tasks) == ("colour=blue", "colour=red", "tags=new", "tags=sale", "reading")
    numbers = [e.label.values[2] for e in data.train if e.label.values[2] is not None]
    reading = data.tasks[2]
    assert reading.mean == pytest.approx(np.mean(numbers)) and reading.std == pytest.approx(np.std(numbers))
    assert (reading.low, reading.high) == (min(numbers), max(numbers))
    assert all(example.label.tasks == data.tasks for example in data.all)


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", "2", "3", ""], "one_class"),
        (["1.5", "2", ""], "number"),
        ([str(n) for n in range(21)], "number"),
        ([str(n) for n in range(20)], "one_class"),
        (["a|b", "a"], "several_classes"),
        (["a|b", "c"], "one_class"),
        (["a; b", "b"], "several_classes"),
        (["-1e3", "2.5e-2"], "number"),
        ([f"{n}_{n % 3}" for n in range(40)], "one_class"),
        (["1,5", "2,5"], "one_class"),
        ([f"{n}.1.0" for n in range(40)], "one_class"),
    ],
)
def test_a_kind(cells: list[str], kind: str) -> None:
    assert found_kind("c", cells, "t.csv") == kind


def test_a_kind_can_be_set_and_one_column_of_classes_is_an_ordinary_data_set(tmp_path: Path) -> None:
    table = write(tmp_path, "code,size", [f"{n % 4},{n % 7}" for n in range(40)])
    read = lambda **given: read_data(  # noqa: E731
        Source(table, labels=LabelColumns.parsed(*(given.get(k) for k in ("label", "number", "several", "one_class"))))
    )
    plain = read(label="code")
    assert plain.tasks == () and plain.classes == ("0", "1", "2", "3") and isinstance(plain.train[0].label, int)
    assert read(one_class="size").classes == tuple("0123456")
    found = read(number="size=mm").tasks
    assert [(task.name, task.kind, task.unit) for task in found] == [("size", "number", "mm")]
    assert [task.kind for task in read(label="code,size", number="Size").tasks] == ["one_class", "number"]


def test_a_column_is_found_however_unicode_writes_its_accents(tmp_path: Path) -> None:
    table = write(tmp_path, "Gro\u0308sse,art", [f"{n / 2},{'ab'[n % 2]}" for n in range(40)])
    data = read_data(Source(table, labels=LabelColumns.parsed("art", "gr\u00f6sse=cm", None, None)))
    assert [(task.name, task.kind, task.unit) for task in data.tasks] == [
        ("art", "one_class", ""), ("gr\u00f6sse", "number", "cm")
    ]  # fmt: skip
    other = write(tmp_path, "gr\u00f6sse", [str(n / 2) for n in range(40)], "other.csv")
    assert len(read_data(Source(other), tasks=data.tasks).all) == 40
    with pytest.raises(DataError, match="given a label twice"):
        LabelColumns(("gr\u00f6sse", "Gro\u0308sse"))


def test_a_model_is_measured_by_the_column_that_it_learned(tmp_path: Path) -> None:
    table = write(tmp_path, "label,code,notes", [f"x,{'ab'[n % 2]},{n}" for n in range(40)])
    found = read_data(Source(table, labels=LabelColumns.parsed("code", None, None, None)))
    assert found.label_column == "code" and found.classes == ("a", "b")
    again = read_data(with_column(table, "code", False), known=("a", "b"))
    assert again.label_column == "code" and [e.path for e in again.test] == [e.path for e in found.test]
    assert with_column(tmp_path, "code", False) == Source(tmp_path) and with_column(table, "kind", False).labels is None


def test_blank_cells_are_unknown_and_a_row_without_a_label_is_left_out(tmp_path: Path) -> None:
    lines = [f"{'ab'[n % 2]},{n / 2}" for n in range(30)]
    lines[3], lines[4], lines[5] = ",", "a,", ",nan"
    data = read_data(
        Source(write(tmp_path, "kind,size", lines), labels=LabelColumns.parsed("kind,size", None, None, None)), ALL
    )
    by_name = {example.path.name: example.label.values for example in data.all}
    assert "003.png" not in by_name and "005.png" not in by_name and len(by_name) == 28
    assert by_name["004.png"] == (0, None)
    assert any("2 images without any label" in note for note in data.notes)


def test_blank_cells_of_the_only_column_are_unknown_too(tmp_path: Path) -> None:
    lines = [f"{'ab'[n % 2]},{'new|sale' if n % 3 else 'new'}" for n in range(30)]
    lines[3:6] = [",|", "nan,", "a,nan"]
    table = write(tmp_path, "kind,tags", lines)
    data = read_data(Source(table, labels=LabelColumns.parsed("kind", None, None, None)), ALL)
    assert data.classes == ("a", "b") and len(data.all) == 28 and not data.multi_label
    assert data.notes == ("left out 2 images without any label",)
    again = read_data(with_column(table, "kind", False), ALL, known=("a", "b"))
    assert len(again.all) == 28 and again.fingerprint == data.fingerprint
    for named in (("tags", None), (None, "tags")):  # its kind found or said
        data = read_data(Source(table, labels=LabelColumns.parsed(named[0], None, named[1], None)), ALL)
        labels = {example.path.name: example.label for example in data.all}
        assert len(labels) == 28 and labels["003.png"] == () and "004.png" not in labels, "| is none of the classes"
    write(tmp_path, "kind,tags", ["a,"] * 30)
    with pytest.raises(DataError, match="has no label in any row; fill in tags"):
        read_data(Source(table, labels=LabelColumns.parsed(None, None, "tags", None)), ALL)


def test_a_blank_number_may_be_nan_where_it_is_the_only_column(tmp_path: Path) -> None:
    table = write(tmp_path, "size", ["nan", "NaN", *(str(n / 2) for n in range(30))])
    data = read_data(Source(table, labels=LabelColumns.parsed("size", None, None, None)), ALL)
    assert data.tasks[0].kind == "number" and len(data.all) == 30


def test_the_draw_does_not_depend_on_the_lines_order(tmp_path: Path) -> None:
    data = shop(tmp_path)
    table = tmp_path / "shop.csv"
    head, *lines = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join([head, *reversed(lines)]) + "\n", encoding="utf-8")
    again = read_data(Source(table, labels=LabelColumns.parsed("colour,tags,reading", None, None, None)), Split(seed=1))
    for part in ("train", "val", "test"):
        assert [e.path for e in getattr(data, part)] == [e.path for e in getattr(again, part)]
    assert again.fingerprint == data.fingerprint and again.tasks == data.tasks
    other = read_data(Source(table, labels=LabelColumns.parsed("colour,reading", None, None, None)), Split(seed=1))
    assert other.fingerprint != data.fingerprint


def test_parts_keep_the_shares_of_every_label() -> None:
    rng = np.random.default_rng(0)
    rare = (rng.random(600) < 0.04).astype(int)
    labels = Coded.of(
        TaskLabels((int(a), tuple(np.flatnonzero(b)), float(c)), TASKS)
        for a, b, c in zip(rare, rng.random((600, 2)) < 0.1, rng.normal(size=600), strict=True)
    )
    parts = draw_marked(labels, 0.15, 0.2, 3)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(600))
    for part, share in (("test", 0.2), ("val", 0.15)):
        assert abs(len(parts[part]) - share * 600) <= 12
        assert abs(rare[parts[part]].sum() - share * rare.sum()) <= 1.5
    again = draw_marked(labels, 0.15, 0.2, 3)
    assert all((parts[part] == again[part]).all() for part in parts)
    assert not np.array_equal(parts["test"], draw_marked(labels, 0.15, 0.2, 4)["test"])


def test_images_of_a_group_stay_together(tmp_path: Path) -> None:
    lines = [f"{'ab'[n % 2]},{n / 2},g{n // 4}" for n in range(80)]
    columns = LabelColumns.parsed("kind,size", None, None, None)
    data = read_data(Source(write(tmp_path, "kind,size,group", lines), labels=columns))
    groups = [{example.group for example in getattr(data, part)} for part in ("train", "val", "test")]
    assert all(groups) and not (groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2])


def test_folders_are_tasks_of_their_own(tmp_path: Path) -> None:
    for place, classes in (("animals", ("cat", "dog")), ("plants", ("fern", "moss", "rose"))):
        for name in classes:
            folder = tmp_path / place / name
            folder.mkdir(parents=True)
            for number in range(10):
                Image.new("RGB", (4, 4), (number, len(name), 0)).save(folder / f"{number}.png")
    pairs = tuple((name, str(tmp_path / name)) for name in ("animals", "plants"))
    data = read_data(Source(tasks=pairs))
    assert [(task.name, task.classes) for task in data.tasks] == [
        ("animals", ("cat", "dog")), ("plants", ("fern", "moss", "rose"))
    ]  # fmt: skip
    assert len(data.all) == 50
    for example in data.all:
        own = 0 if "animals" in example.path.parts else 1
        assert example.label.values[1 - own] is None
        assert data.tasks[own].classes[example.label.values[own]] == example.path.parent.name
    again = read_data(Source(tasks=pairs[:1]), tasks=data.tasks)
    assert again.tasks == data.tasks and {e.label.values[1] for e in again.all} == {None}
    with pytest.raises(DataError, match=r"is no table, .*, or name what a folder answers: --task animals=FOLDER"):
        read_data(Source(tmp_path / "animals"), tasks=data.tasks)
    with pytest.raises(DataError, match="no task birds, only animals, plants"):
        read_data(Source(tasks=(("birds", pairs[0][1]),)), tasks=data.tasks)
    for name in ("animals", "Animals"):
        with pytest.raises(DataError, match="--task animals is given twice"):
            Source(tasks=(pairs[0], (name, pairs[0][1])))
    (tmp_path / "animals" / "cat").rename(tmp_path / "animals" / "a=cat")
    (tmp_path / "plants" / "fern").rename(tmp_path / "plants" / "cat")
    with pytest.raises(DataError, match="--task: x and x=a both have an output called x=a=cat; rename one of these"):
        read_data(Source(tasks=(("x", pairs[0][1]), ("x=a", pairs[1][1]))))


def test_every_mistake_has_a_line(tmp_path: Path) -> None:
    lines = [f"{'ab'[n % 2]},{n / 2},x" for n in range(30)]
    table = write(tmp_path, "kind,size,same", lines)
    assert "no column sise" in message(table, "kind,sise") and "did you mean size" in message(table, "kind,sise")
    assert "column image_path is no label" in message(table, "kind,image_path")
    assert "column kind is given a label twice" in message(table, "kind,Kind")
    assert "column size is given a kind twice" in message(table, number="size", several="size")
    assert "--number size=cm,=mm has a unit without a column" in message(table, number="size=cm,=mm")
    for wrong in ("size", (), {}, "size"), (("size",), ("size",)), (("size",), {}, "size"):
        with pytest.raises(DataError, match=r"is the text 'size'; give a tuple|give a unit for each column"):
            LabelColumns(*wrong)  # type: ignore[arg-type]
    assert "column size is given a kind twice" in message(table, "size", number="size", one_class="size")
    assert "column same has only one class, x" in message(table, "kind,same")
    assert "kind is 'a', which is no number" in message(table, "size", number="kind") and ", line 2:" in message(
        table, "size", number="kind"
    )
    odd = write(tmp_path / "odd", "size", [*map(str, range(30)), "about 5"])
    assert "most of column size are numbers, but 'about 5' is none" in message(odd, "size")
    for name, cell in (("comma", '"{},5"'), ("percent", "{} %"), ("apart", '"{},000.5"'), ("space", "{} 000")):
        odd = write(tmp_path / name, "kind,size", [f"{'ab'[n % 2]},{cell.format(n + 1)}" for n in range(30)])
        told = message(odd, "kind,size")
        assert "most of column size are numbers, but" in told and "is none; write it as 3.5" in told, told
    flat = write(tmp_path / "flat", "kind,size", [f"{'ab'[n % 2]},3.5" for n in range(20)])
    assert "only the number 3.5 in column size" in message(flat, "kind,size")
    for name, offset, step in (("far", 1e9, 0.1), ("small", 0.0, 1e-300), ("denormal", 0.0, 1e-42)):
        close = write(tmp_path / name, "kind,size", [f"{'ab'[n % 2]},{offset + step * n!r}" for n in range(30)])
        assert "in column size are from" in (told := message(close, "kind", number="size"))
        assert "vary too little" in told and "differences from" in told
    far = write(tmp_path / "large", "size", ["1", "2", "-1e308"])
    assert ", line 4: size is -1e308, but numbers go up to 1e+30" in message(far, number="size")
    empty = write(tmp_path / "empty", "kind,size", [","] * 5)
    assert "no class at all" in message(empty, "kind,size", number="size")
    with pytest.raises(DataError, match="is no table, and the labels kind are columns of one"):
        read_data(Source(tmp_path, labels=LabelColumns.parsed("kind", None, None, None)))
    clash = write(tmp_path / "clash", "a,a=b", [f"{'bc'[n % 2]},{n / 2}" for n in range(30)])
    assert "a and a=b both have an output called a=b" in message(clash, "a,a=b")
    alone = write(
        tmp_path / "alone", "kind,size,split", [f"{'ab'[n % 2]},{n / 2},train" for n in range(9)] + ["c,2,test"]
    )
    assert "classes of kind have no train image: c" in message(alone, "kind,size", number="size")


def test_labels_as_numbers(tmp_path: Path) -> None:
    data = shop(tmp_path)
    by_name = {example.path.name: row for example, row in zip(data.all, make_labels(data.all), strict=True)}
    assert by_name["004.png"].isnan().tolist() == [True, False, False, True]
    assert by_name["005.png"].tolist() == [1, 0, 0, 7.5]
    there, own = known(LABELS, TASKS[1], column_slices(TASKS)[1])
    assert there.tolist() == [True, False, True, True] and own.tolist() == [[1, 0], [0, 0], [1, 1]]
    marks = membership(LABELS, TASKS)
    assert marks.shape == (4, 3 + 2 + 5) and marks.sum(1).tolist() == [3, 2, 0, 4]
    assert marks[0, 5:].argmax() < marks[1, 5:].argmax() < marks[3, 5:].argmax()


def test_the_loss_is_the_mean_over_known_labels_in_units_of_a_constant_answer() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 6)
    loss = TaskLoss(TASKS, LABELS, TrainConfig())
    z = (LABELS[[0, 1, 3], 3] - 4) / 2
    each = [
        F.cross_entropy(logits[[0, 1, 3], :3], torch.tensor([0, 2, 1]), reduction="sum") / math.log(3),
        F.binary_cross_entropy_with_logits(
            logits[[0, 2, 3], 3:5], LABELS[[0, 2, 3], 1:3], reduction="none"
        ).mean(1).sum() / float(torch.special.entr(torch.tensor([2 / 3, 1 / 3])).sum()),
        F.smooth_l1_loss(logits[[0, 1, 3], 5], z, reduction="sum") / constant_cost(TASKS[2], LABELS[[0, 1, 3], 3]),
    ]  # fmt: skip
    assert loss(logits, LABELS).item() == pytest.approx(sum(each).item() / 9, rel=1e-6)
    heavier = TaskLoss(TASKS, LABELS, TrainConfig(task_weights=("reading=3",)))
    assert heavier(logits, LABELS).item() == pytest.approx((each[0] + each[1] + 3 * each[2]).item() / 9, rel=1e-6)
    unknown = torch.full_like(LABELS, NAN)
    assert loss(logits.requires_grad_(), unknown).item() == 0


def test_a_constant_answer_costs_one_whatever_the_unit() -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1.0, 1e6):
        own = torch.tensor(rng.normal(5, 2, 300) * scale, dtype=torch.float32)
        task = LabelTask("n", "number", mean=float(own.mean()), std=float(own.std()))
        loss = TaskLoss((task,), own[:, None], TrainConfig())
        best = min(loss(torch.full((300, 1), c), own[:, None]).item() for c in np.linspace(-1, 1, 201))
        assert best == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("size=2",), "write NAME=WEIGHT with one of colour, tags, reading"),
        (("reading",), "write NAME=WEIGHT"),
        (("reading=x",), "no number"),
        (("reading=0",), "above 0"),
    ],
)
def test_a_wrong_weight(given: tuple[str, ...], told: str) -> None:
    with pytest.raises(VisgraftError, match=told):
        TaskLoss(TASKS, LABELS, TrainConfig(task_weights=given))


def test_pieces_of_a_batch_add_up_to_its_loss() -> None:
    torch.manual_seed(0)
    logits, loss = torch.randn(4, 6), TaskLoss(TASKS, LABELS, TrainConfig(class_weights="balanced"))
    parts = [
        loss(logits[rows], LABELS[rows]) * loss.known_labels(LABELS[rows]) / loss.known_labels(LABELS)
        for rows in ([0, 1], [2], [3])
    ]
    assert sum(parts).item() == pytest.approx(loss(logits, LABELS).item(), rel=1e-6)


def test_figures_of_each_task() -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(10, 3, 200)
    said = truth + rng.normal(0, 1, 200)
    task = LabelTask("reading", "number", mean=10.0, std=3.0)
    labels = torch.tensor(truth, dtype=torch.float32)[:, None]
    labels[:10] = NAN
    found = score_tasks(torch.tensor(said, dtype=torch.float32)[:, None], labels, (task,)).by_task["reading"]
    own = slice(10, None)
    assert found.images == 190
    assert found.mae == pytest.approx(np.abs(said - truth)[own].mean(), rel=1e-4)
    assert found.rmse == pytest.approx(np.sqrt(((said - truth)[own] ** 2).mean()), rel=1e-4)
    assert found.r2 == pytest.approx(r2_score(truth[own], said[own]), rel=1e-4)
    assert found.spearman == pytest.approx(spearmanr(truth[own], said[own]).statistic, rel=1e-4)
    assert found.constant_mae == pytest.approx(np.abs(truth[own] - 10).mean(), rel=1e-4)
    for name in ("mae", "rmse", "r2", "spearman"):
        low, high = found.intervals[name]
        assert low < getattr(found, name) < high and high - low < 0.4 * abs(getattr(found, name))


def test_a_task_without_labels_is_left_out_of_the_mean() -> None:
    logits = torch.randn(4, 6)
    labels = LABELS.clone()
    labels[:, 3] = NAN
    found = score_tasks(task_answers(logits, TASKS), labels, TASKS)
    assert list(found.by_task) == ["colour", "tags"]
    assert found.figure == pytest.approx(np.mean([one.figure for one in found.by_task.values()]))
    with pytest.raises(DataError, match="none of the images has a label"):
        score_tasks(task_answers(logits, TASKS), torch.full_like(labels, NAN), TASKS)


def test_answers_are_probabilities_and_numbers_in_their_unit() -> None:
    answers = task_answers(torch.tensor([[0.0, 0.0, math.log(2.0), 0.0, math.log(3.0), 0.5]]), TASKS)[0]
    assert answers.tolist() == pytest.approx([0.25, 0.25, 0.5, 0.5, 0.75, 5.0])


def test_a_head_of_other_outputs_is_refused(tmp_path: Path) -> None:
    data = shop(tmp_path)
    facts = {
        "input_size": (3, 16, 16),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    images: Images = load_images(data.train, facts, outputs=len(data.classes))
    assert images.tasks == data.tasks and images.labels.shape == (len(data.train), 4)
    with pytest.raises(DataError, match=r"3 tasks with 5 outputs in all, but the model's head has 4"):
        evaluate(vit(num_classes=4), images)
    assert evaluate(vit(num_classes=5), images).by_task.keys() == {"colour", "tags", "reading"}
    assert Counter(len(row) for _, row in images.batches(1)) == {1: len(images)}
