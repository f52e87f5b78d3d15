"""Measuring an adapter with several tasks where some of their labels are missing: each is named, and never all."""

import csv
from pathlib import Path

import pytest
from task_tables import COLUMNS, shop, write
from test_cli import run, succeed

from visgraft import Backbone, TrainConfig
from visgraft.core.configure import configure
from visgraft.data.label_columns import LabelColumns
from visgraft.data.read import Source, read_data, with_column
from visgraft.errors import DataError
from visgraft.report.page import gather, render
from visgraft.training.run import Watch, train_folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Colour, size and tags, learned from a table."""
    folder = tmp_path_factory.mktemp("left-out")
    method, _ = configure("linear", {})
    train_folder(
        Source(shop(folder / "shop"), labels=COLUMNS),
        folder / "adapter",
        backbone=Backbone("test_vit", "none", 32),
        method_config=method,
        train_config=TrainConfig(epochs=2, warmup_epochs=0, precision="fp32"),
    )
    return folder / "adapter"


def rows_of(adapter: Path) -> list[dict[str, str]]:
    """The rows of its table, with whole paths and all of them for testing."""
    with (adapter.parent / "shop" / "shop.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{**row, "image_path": str(adapter.parent / "shop" / row["image_path"]), "split": "test"} for row in rows]


def without(rows: list[dict[str, str]], *names: str) -> list[dict[str, str]]:
    return [{name: cell for name, cell in row.items() if name not in names} for row in rows]


def told(err: str) -> list[str]:
    return [line for line in err.splitlines() if "left out: " in line]


def test_a_table_without_a_column_says_which_tasks_are_not_measured(adapter: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "some.csv", without(rows_of(adapter), "size"))
    found = succeed("eval", adapter, table)
    assert set(found["tasks"]) == {"colour", "tags"} and not found["classes_missing"]
    assert found["tasks_left_out"] == {"size": f"{table} has no column size"}
    code, out, err = run("eval", adapter, table)
    assert code == 0 and "size" not in out
    assert told(err) == [f"warning: left out: size ({table} has no column size); the figures say nothing about it"]


def test_a_column_without_a_label_in_the_part_is_named_too(adapter: Path, tmp_path: Path) -> None:
    rows = [{**row, "colour": "", "tags": "|"} for row in rows_of(adapter)]
    found = succeed("eval", adapter, write(tmp_path / "blank.csv", rows))
    assert set(found["tasks"]) == {"size"} and found["classes_missing"] == []
    assert set(found["tasks_left_out"].values()) == {"no test image has a label of it"}
    every = succeed("eval", adapter, write(tmp_path / "all.csv", rows_of(adapter)))
    assert every["tasks_left_out"] == {} and set(every["tasks"]) == {"colour", "size", "tags"}


def test_where_none_is_left_nothing_is_measured(adapter: Path, tmp_path: Path) -> None:
    nothing = write(tmp_path / "nothing.csv", without(rows_of(adapter), "size", "colour", "tags"))
    code, _, err = run("eval", adapter, nothing)
    assert code == 1 and "has none of the adapter's label columns colour, size, tags" in err
    rows = [{**row, "colour": "" if i % 2 else "red", "tags": "|"} for i, row in enumerate(rows_of(adapter))]
    rows = [{**row, "split": "train" if row["colour"] else "test"} for row in rows]
    code, _, err = run("eval", adapter, write(tmp_path / "part.csv", without(rows, "size")))
    (line,) = (line for line in err.splitlines() if line.startswith("error:"))
    told = "no test image has a label of colour, size, tags; fill in some, or choose another part with --split"
    assert code == 1 and line.endswith(told), line


def test_folders_of_some_tasks_and_the_report_say_it_as_well(adapter: Path, tmp_path: Path) -> None:
    for i, row in enumerate(rows_of(adapter)[:8]):
        place = tmp_path / "colours" / "test" / ("red", "blue")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(Path(row["image_path"]).read_bytes())
    found = succeed("eval", adapter, "--task", f"colour={tmp_path / 'colours'}")
    assert found["tasks_left_out"] == {name: f"no --task {name}=FOLDER is given" for name in ("size", "tags")}
    page = render(
        gather([adapter], Source(write(tmp_path / "some.csv", without(rows_of(adapter), "size"))), part="test")
    )
    assert "size is left out: " in page and "has no column size" in page


def test_training_names_what_no_validation_image_tells(tmp_path: Path) -> None:
    table = shop(tmp_path / "shop")
    with table.open(encoding="utf-8", newline="") as file:
        rows = [{**row, "size": row["size"] if row["split"] == "train" else ""} for row in csv.DictReader(file)]
    method, _ = configure("linear", {})
    warned = list[str]()
    figures = train_folder(
        Source(write(table, rows), labels=COLUMNS),
        tmp_path / "adapter",
        backbone=Backbone("test_vit", "none", 32),
        method_config=method,
        train_config=TrainConfig(epochs=1, warmup_epochs=0, precision="fp32"),
        watch=Watch(warning=warned.append),
    )
    assert "no validation image has a label of size, which the figures say nothing about" in warned
    assert set(figures["tasks"]) == {"colour", "tags"}


def test_a_table_without_the_one_column_that_was_learned_is_told_by_its_name(adapter: Path, tmp_path: Path) -> None:
    """A table with a column label, the usual one, is read as before."""
    rows = rows_of(adapter)
    columns = LabelColumns(("colour",), {}, (), ("colour",))
    there, usual = write(tmp_path / "there.csv", rows), [{**row, "label": row["colour"] or "red"} for row in rows]
    assert with_column(there, "colour", False) == Source(there, labels=columns)
    assert with_column(write(tmp_path / "label.csv", without(usual, "colour")), "colour", False).labels is None
    bare = with_column(write(tmp_path / "bare.csv", without(rows, "colour")), "colour", False)
    with pytest.raises(DataError, match=r"bare\.csv has no column colour; its columns are"):
        read_data(bare)
