"""What is wrong with the labels of several tasks: every planted fault is found."""

import csv
from pathlib import Path

import numpy as np
import pytest
from task_tables import COLUMNS, shop, write

from visgraft.check import Report, check_data, quick_check
from visgraft.check.labels import far_out
from visgraft.data.label_columns import LabelColumns
from visgraft.data.read import Source, read_data


@pytest.mark.parametrize(
    ("numbers", "strange"),
    [
        ([*range(10, 60), 999, 999, -1], {-1.0, 999.0}),
        ([*range(10, 60)], set()),
        ([*range(-20, 30), -1], set()),
        ([*range(0, 100), 99], set()),
        (np.exp(np.random.default_rng(0).normal(0, 0.8, 500)).tolist(), set()),
        ([*np.linspace(0, 1, 80), 40.0], {40.0}),
    ],
)
def test_numbers_that_do_not_belong_to_the_others(numbers: list[float], strange: set[float]) -> None:
    assert set(far_out(np.array(numbers, np.float64))) == strange


def faulty(folder: Path) -> Source:
    """A table with planted faults: far numbers, copies that contradict, a task that tells another, groups."""
    table = shop(folder, 60, group=lambda i: f"g{i}")
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    for row in rows:
        row["material"] = {"red": "brick", "blue": "glass"}.get(row["colour"], "")
        row["size"] = "999" if row["image_path"] in ("001.png", "002.png") else row["size"]
    for source, name, change in (
        ("004.png", "a.png", {"size": "12"}),
        ("008.png", "b.png", {"colour": "", "material": ""}),
    ):
        (folder / name).write_bytes((folder / source).read_bytes())
        rows.append({**next(row for row in rows if row["image_path"] == source), "image_path": name, **change})
    columns = LabelColumns(("colour", "material", "size", "tags"), {"size": "mm"}, ("tags",))
    return Source(write(table, rows), labels=columns)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visgraft.check.shortcuts.PERMUTATIONS", 20)
        return check_data(read_data(faulty(tmp_path_factory.mktemp("faulty") / "data")))


def titles(report: Report, kind: str) -> list[str]:
    return [finding.title for finding in report.findings if finding.kind == kind]


def test_planted_faults_of_tasks_are_found(checked: Report) -> None:
    (far,) = (finding for finding in checked.findings if finding.kind == "far_number")
    assert "999 (2)" in far.title and {one.example.path.name for (one,) in far.sets} == {"001.png", "002.png"}
    assert titles(checked, "conflict") == ["1 file with labels that contradict each other: size (1)"]
    assert len(titles(checked, "duplicates")) == 1, "an unknown label contradicts none"
    assert titles(checked, "task_told") == ["colour and material tell each other exactly, on all 52 images with both"]
    assert not titles(checked, "class_in_one_group")


def test_tables_of_tasks(checked: Report) -> None:
    tables = {name: table.to_dict() for name, table in checked.tables.items()}
    assert {"tasks", "numbers", "numbers size", "classes colour", "classes tags", "shortcuts colour"} <= set(tables)
    known = {row["task"]: (row["all"], row["unknown"]) for row in tables["tasks"]}
    assert known["colour"][0] == 52 and known["tags"] == (62, "0.0%")
    assert sum(row["images"] for row in tables["numbers size"]) == known["size"][0] - 2, "without the two far ones"
    assert {row["class"] for row in tables["classes colour"]} == {"red", "blue"}
    assert tables["numbers"][0]["largest"] == 999
    assert any("of colour" in table.title for table in checked.tables.values())


def test_what_is_seen_before_training_names_far_numbers_and_scarce_labels(tmp_path: Path) -> None:
    data = read_data(faulty(tmp_path / "data"))
    lines = quick_check(data)
    assert any(line.startswith("size: 2 numbers far from the others") for line in lines)
    table = shop(tmp_path / "few", 90, size=lambda i: str(i) if i in (1, 2, 4) else "")
    few = read_data(Source(table, labels=COLUMNS))
    told = "\n".join(quick_check(few))
    assert "size: 3 training images with this label" in told and "size: no val image has this label" in told
