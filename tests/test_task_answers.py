"""What an adapter with several tasks answers: by Python, as lines, JSON and tables, alone and beside others."""

# ruff: noqa: F401, F811  (fixtures are imported here, and then named as arguments)

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from predicting import BACKBONE, TASKS, make, make_tasks, pictures, refused, rows_of, run, shop

from visgraft import load, load_bank, predict, predict_rows, predict_stream, save
from visgraft.data.label_columns import LabelColumns
from visgraft.data.tasks import LabelTask
from visgraft.errors import AdapterError, VisgraftError
from visgraft.measure.conformal import condense
from visgraft.serve.layout import table_layout
from visgraft.serve.naming import NumberAnswer


def raw(path: Path, pictures: list[Path]) -> torch.Tensor:
    """Return the outputs [N, 6] of an adapter, by the model itself."""
    adapted = load(path)
    from PIL import Image

    x = torch.stack([adapted.transform(Image.open(picture).convert("RGB")) for picture in pictures])
    with torch.no_grad():
        return adapted.model(x)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tasks: tasks[1].pop("std"), "task 'size' has no std"),
        (lambda tasks: tasks[1].update(std=True), "task 'size' has the std True"),
        (lambda tasks: tasks[1].update(std="3"), "task 'size' has the std '3'"),
        (lambda tasks: tasks[1].update(mean=math.nan), "task 'size' has the mean nan"),
        (lambda tasks: tasks[1].update(std=1e308), "task 'size' has the std 1e\\+308"),
        (lambda tasks: tasks[1].update(unit=None), "task 'size' has the unit None"),
        (lambda tasks: tasks[0].update(classes=["red", 3, "blue"]), "task 'colour' has classes that are no text"),
        (lambda tasks: tasks[0].pop("kind"), "task 'colour' has no kind"),
        (lambda tasks: tasks[1].update(name="colour"), "of colour, colour, tags two have one name"),
        (lambda tasks: tasks.clear(), "there is no task"),
        (lambda tasks: tasks.append("size"), "task 'size' is no dictionary"),
    ],
)
def test_damaged_tasks_are_named_rather_than_answered(change: Any, told: str, shop: Path, tmp_path: Path) -> None:
    config = json.loads((shop / "adapter_config.json").read_text(encoding="utf-8"))
    change(config["record"]["data"]["tasks"])
    damaged = Path(shutil.copytree(shop, tmp_path / "damaged"))
    (damaged / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(AdapterError, match=f"is damaged: record.data.tasks: {told}; restore it or train again"):
        load(damaged)


def test_each_task_is_answered_by_its_own_outputs(shop: Path, pictures: list[Path]) -> None:
    outputs = raw(shop, pictures)
    colours, sizes, tags = outputs[:, :3].softmax(-1), outputs[:, 3] * 10 + 40, outputs[:, 4:].sigmoid()
    for row, found in enumerate(predict_stream([shop], pictures, top=3, threshold=0)):
        assert found.classes == [] and found.tasks is not None and list(found.tasks) == ["colour", "size", "tags"]
        assert dict(found.tasks["colour"]) == pytest.approx(
            dict(zip(("red", "green", "blue"), colours[row].tolist(), strict=True)), abs=1e-5
        )
        assert [p for _, p in found.tasks["colour"]] == sorted((p for _, p in found.tasks["colour"]), reverse=True)
        size = found.tasks["size"]
        assert isinstance(size, NumberAnswer) and size.unit == "cm"
        assert size.value == pytest.approx(sizes[row].item(), abs=1e-3)
        assert dict(found.tasks["tags"]) == pytest.approx(
            dict(zip(("ring", "dot"), tags[row].tolist(), strict=True)), abs=1e-5
        )
    answers = predict(load(shop), pictures, 2)
    assert [len(one["colour"]) for one in answers] == [2] * len(pictures)
    assert [[p >= 0.5 for _, p in one["tags"]] for one in answers] == [
        [True] * int(count) for count in (tags >= 0.5).sum(1)
    ]


def test_a_loaded_adapter_answers_as_its_folder_does(tmp_path: Path, pictures: list[Path]) -> None:
    folder = make_tasks(tmp_path / "shop", seed=5)
    found = [one.tasks for one in predict_stream([folder], pictures)]
    assert predict(load(folder), pictures) == found
    assert max(len(one["tags"]) for one in found) == 2  # more than the one class that other answers name


def test_a_bank_answers_them_beside_other_adapters(shop: Path, pictures: list[Path], tmp_path: Path) -> None:
    other = make(tmp_path / "other", "lora", classes="xyz")
    bank = load_bank({"shop": shop, "other": other})
    rows = list(predict_rows(bank, [(p, ("shop", "other")[i % 2]) for i, p in enumerate(pictures)]))
    assert [row.tasks is None for row in rows] == [False, True] * (len(pictures) // 2)
    alone = list(predict_stream([shop], pictures))
    for row, expected in zip(rows[::2], alone[::2], strict=True):
        assert row.tasks and expected.tasks
        assert row.tasks["size"].value == pytest.approx(expected.tasks["size"].value, abs=1e-3)  # type: ignore[union-attr]
        assert dict(row.tasks["colour"]) == pytest.approx(dict(expected.tasks["colour"]), abs=1e-5)
    answer = bank([pictures[0]], ["shop"])[0]
    assert answer.tasks == TASKS
    assert answer.probabilities[3].item() == pytest.approx(40 + 10 * answer.logits[3].item(), abs=1e-4)
    assert answer.probabilities[:3].sum().item() == pytest.approx(1, abs=1e-5)


def test_an_ensemble_averages_numbers_in_their_unit(tmp_path: Path, pictures: list[Path]) -> None:
    inches = LabelTask("size", "number", unit="in", mean=15.0, std=4.0, low=8.0, high=24.0)
    wider = LabelTask("size", "number", unit="cm", mean=80.0, std=20.0, low=8.0, high=240.0)
    one, two = make_tasks(tmp_path / "one"), make_tasks(tmp_path / "two", (TASKS[0], wider, TASKS[2]), seed=2)
    three = make_tasks(tmp_path / "three", (TASKS[0], inches, TASKS[2]))
    found = list(predict_stream([one, two], pictures, ensemble=True))
    expected = (raw(one, pictures)[:, 3] * 10 + 40 + raw(two, pictures)[:, 3] * 20 + 80) / 2
    assert [row.tasks["size"].value for row in found] == pytest.approx(expected.tolist(), abs=1e-3)  # type: ignore[index,union-attr]
    with pytest.raises(AdapterError, match="do not answer the same tasks"):
        predict_stream([one, three], pictures, ensemble=True)
    with pytest.raises(AdapterError, match="do not answer the same classes"):
        predict_stream([make(tmp_path / "x", "lora", classes="abcdef"), one], pictures, ensemble=True)


def test_a_threshold_is_for_tasks_with_several_classes(tmp_path: Path, shop: Path, pictures: list[Path]) -> None:
    assert all(len(row["tasks"]["tags"]["classes"]) == 2 for row in rows_of(shop, *pictures, "--threshold", 0))
    without = make_tasks(tmp_path / "without", TASKS[:2])
    assert "threshold is for adapters" in refused(without, pictures[0], "--threshold", 0.3)


def test_lines_and_json_name_each_task(shop: Path, pictures: list[Path]) -> None:
    status, out, _ = run(shop, pictures[0])
    (row,) = rows_of(shop, pictures[0])
    told = row["tasks"]
    assert "classes" not in row and list(told) == ["colour", "size", "tags"]
    assert list(told["size"]) == ["value", "unit"] and told["size"]["unit"] == "cm"
    colour = told["colour"]["classes"][0]
    words = f"{pictures[0]}: colour: {colour['class']} {100 * colour['probability']:.1f} %; size: "
    assert status == 0 and out.startswith(words) and " cm; tags: " in out


def test_a_table_has_columns_of_each_task_and_reads_back_as_labels(
    shop: Path, pictures: list[Path], tmp_path: Path
) -> None:
    from visgraft.data.read import Source, read_data

    status, _, err = run(shop, *pictures, "--out", tmp_path / "t.csv", "--threshold", 0.3)
    assert status == 0, err
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "image", "adapter", "colour", "colour_probability", "size", "tags", "tags_probability"
    ]  # fmt: skip
    found = list(predict_stream([shop], pictures, threshold=0.3))
    for row, one in zip(rows, found, strict=True):
        assert one.tasks
        assert float(row["size"]) == one.tasks["size"].value  # type: ignore[union-attr]
        assert row["tags"] == ";".join(name for name, _ in one.tasks["tags"])
        assert row["tags_probability"].count(";") == max(0, len(one.tasks["tags"]) - 1)
    for number, row in enumerate(rows):
        assert row["tags"], f"row {number} of this seeded adapter has a tag, so that all labels are read"
    told = (tmp_path / "t.csv").read_text()
    (tmp_path / "labels.csv").write_text(told.replace("image,", "image_path,", 1))
    again = read_data(Source(str(tmp_path / "labels.csv"), labels=LabelColumns.of(TASKS)), tasks=TASKS)
    assert sorted(example.label.values[0] for example in again.all) == sorted(  # type: ignore[union-attr]
        TASKS[0].classes.index(row["colour"]) for row in rows
    )


def test_parquet_keeps_kinds_units_and_parts(shop: Path, pictures: list[Path], tmp_path: Path) -> None:
    from pyarrow import parquet

    (tmp_path / "broken.png").write_bytes(b"none")
    images = [*pictures, tmp_path / "broken.png"]
    asked = ("--top", 2, "--batch-size", 4)
    assert run(shop, *pictures, "--out", tmp_path / "t.parquet", *asked)[0] == 0
    table = parquet.read_table(tmp_path / "t.parquet")
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds["colour_2"] == "string" and kinds["size"] == "double" and kinds["tags"].startswith("list<")
    assert table.schema.field("size").metadata == {b"unit": b"cm"}
    status, _, err = run(shop, *images, "--out", tmp_path / "parts", "--part-size", 4, "--skip-broken", *asked)
    assert status == 0, err
    parts = [parquet.read_table(part).to_pylist() for part in sorted((tmp_path / "parts").glob("part-*"))]
    rows = [row for part in parts for row in part]
    assert [{**row, "error": None} for row in rows[:-1]] == [{**row, "error": None} for row in table.to_pylist()]
    assert rows[-1]["error"] and rows[-1]["colour"] is None and rows[-1]["tags"] is None


def test_adapters_of_different_kinds_share_one_table(shop: Path, pictures: list[Path], tmp_path: Path) -> None:
    other = make(tmp_path / "other", "lora", classes="xyz")
    third = make_tasks(tmp_path / "third", (LabelTask("class", "one_class", ("a", "b")), TASKS[1]))
    assert run(shop, other, third, *pictures, "--out", tmp_path / "t.csv")[0] == 0
    with (tmp_path / "t.csv").open(newline="") as file:
        header, *lines = list(csv.reader(file))
    assert len(set(header)) == len(header) and all(len(line) == len(header) for line in lines)
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    assert [bool(row["class"]) for row in rows[:3]] == [False, True, False]
    assert [bool(row["class_"]) for row in rows[:3]] == [False, False, True]
    assert [bool(row["size"]) for row in rows[:3]] == [True, False, True]
    inches = make_tasks(tmp_path / "inches", (TASKS[0], LabelTask("size", "number", unit="in", mean=1.0, std=1.0)))
    told = refused(shop, inches, *pictures, "--out", tmp_path / "u.csv")
    assert "share no column" in told and "in cm" in told and not (tmp_path / "u.csv").exists()
    for options in ((), ("--json",)):  # which have no columns
        code, text, _ = run(shop, inches, *pictures, *options)
        assert code == 0 and text.count("size") == 2 * len(pictures)


@pytest.mark.parametrize("name", ["image", "adapter", "error", "colour_probability"])
def test_no_column_has_the_name_of_another(name: str, shop: Path, tmp_path: Path) -> None:
    record = load(make_tasks(tmp_path / "odd", (TASKS[0], LabelTask(name, "number", mean=1.0)))).record
    names = [column.name for column in table_layout({"odd": record}, 2).columns()]
    assert len({*names, "error"}) == len(names) + 1, names


def test_a_coverage_is_that_of_each_task(shop: Path, pictures: list[Path], tmp_path: Path) -> None:
    one = load(shop)
    sure = {"size": condense(np.arange(1.0, 20.0)), "tags": condense(np.full(19, -np.log(0.4)))}
    sure["colour"] = condense(np.full(19, -np.log(0.3)))
    path = save(one.model, tmp_path / "sure", classes=one.classes, record=one.record.facts, calibrated=sure)
    assert load(path).record.calibrated == sure
    plain = rows_of(path, pictures[0], "--top", 3, "--threshold", 0)[0]["tasks"]
    row = rows_of(path, pictures[0], "--coverage", 0.9)[0]["tasks"]
    size = row["size"]
    assert (size["low"], size["high"]) == pytest.approx((size["value"] - 18, size["value"] + 18))
    assert plain["size"] == {"value": size["value"], "unit": "cm"}
    for task, least in (("tags", 0.4), ("colour", 0.3)):
        inside = {found["class"] for found in plain[task]["classes"] if found["probability"] >= least}
        first = {plain[task]["classes"][0]["class"]} if task == "colour" else set()
        assert {found["class"] for found in row[task]["classes"]} == inside | first
    status, out, _ = run(path, pictures[0], "--coverage", 0.9)
    assert status == 0 and f"({size['low']:.4g} to {size['high']:.4g})" in out
    table = tmp_path / "answers.csv"
    assert run(path, *pictures, "--coverage", 0.9, "--out", table)[0] == 0
    first_row = next(csv.DictReader(table.open(encoding="utf-8")))
    assert float(first_row["size_low"]) < float(first_row["size"]) < float(first_row["size_high"])
    status, _, err = run(path, pictures[0], "--coverage", 0.98)
    assert status == 1 and "task colour: a coverage of 0.98 takes 49 validation images, and there were 19" in err
    del sure["size"]
    path = save(one.model, tmp_path / "part", classes=one.classes, record=one.record.facts, calibrated=sure)
    status, _, err = run(path, pictures[0], "--coverage", 0.9)
    assert status == 1 and "task size is not calibrated, as no validation image had its label" in err
