"""Labels from several sources: an image in two of them, booleans of any kind of table, and numbers far from zero."""

import csv
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from visgraft.check.findings import task_texts
from visgraft.data.dataset import PARTS, Dataset, Split, known_names
from visgraft.data.label_columns import LabelColumns
from visgraft.data.read import Source, read_data
from visgraft.data.shared_images import with_shared
from visgraft.data.tasks import LabelTask, TaskLabels, written
from visgraft.errors import DataError
from visgraft.serve.naming import NumberAnswer
from visgraft.training.crossval import folds

SEED = Split(0.2, 0.2, 3)


def draw(folder: Path, count: int = 30) -> Path:
    """Pictures in two classes: FOLDER/cat and FOLDER/dog."""
    for number in range(count):
        place = folder / ("cat", "dog")[number % 2] / f"{number:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(place)
    return folder


def winter_table(folder: Path, name: str = "winter.csv", **more: str) -> Path:
    """A table of the same pictures by another label, in another order of names, perhaps with further columns."""
    path = folder.parent / name
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image_path", "label", *more])
        for number, image in enumerate(sorted(folder.rglob("*.png"), key=lambda p: p.stem[::-1])):
            rows.writerow(
                [f"{folder.name}/{image.relative_to(folder)}", ("snow", "none")[number % 3 == 0], *more.values()]
            )
    return path


def parts_of(found: Dataset) -> dict[tuple[str, int], str]:
    """The part of each image, by its name and the number of the task that it is labelled for."""
    return {
        (example.path.name, next(n for n, v in enumerate(example.label.values) if v is not None)): part  # type: ignore[union-attr]
        for part in PARTS
        for example in getattr(found, part)
    }


def torn(parts: dict[tuple[str, int], str]) -> list[str]:
    return sorted({name for (name, task), part in parts.items() if parts.get((name, 1 - task), part) != part})


def test_an_image_of_two_sources_is_in_one_part(tmp_path: Path) -> None:
    photos = draw(tmp_path / "photos")
    both = (("animals", str(photos)), ("winter", str(winter_table(photos))))
    alone = [read_data(place, SEED) for _, place in both]
    drawn = [{e.path.name: part for part in PARTS for e in getattr(one, part)} for one in alone]
    assert any(drawn[1][name] != part for name, part in drawn[0].items()), "drawn apart, some would be torn"
    found = read_data(Source(tasks=both), SEED)
    parts = parts_of(found)
    assert len(parts) == 60 and not torn(parts)
    assert {name: part for (name, task), part in parts.items() if task == 0} == drawn[0]
    assert any("are in the part in which another task has them" in note for note in found.notes)
    swapped = read_data(Source(tasks=both[::-1]), SEED)
    assert {(name, 1 - task): part for (name, task), part in parts_of(swapped).items()} == parts
    assert swapped.fingerprint == found.fingerprint


def test_folds_hold_an_image_of_two_sources_out_of_both(tmp_path: Path) -> None:
    photos = draw(tmp_path / "photos")
    found = read_data(Source(tasks=(("animals", str(photos)), ("winter", str(winter_table(photos))))), SEED).all
    for learned, held in folds(found, 3, 2):
        assert not {found[row].path for row in learned} & {found[row].path for row in held}
        assert len(learned) + len(held) == 60
    assert with_shared(np.arange(4), ["a/b.png", "a/c.png", "./a/b.png", "d.png"]).tolist() == [0, 1, 0, 2]
    assert with_shared(np.array([0, 0, 1, 2]), ["a", "b", "c", "b"]).tolist() == [0, 0, 1, 0]


def test_what_a_source_says_of_its_parts_decides_before_what_is_drawn(tmp_path: Path) -> None:
    photos = draw(tmp_path / "photos")
    table = winter_table(photos)
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["image_path", "label", "split"])
        writer.writeheader()
        for number, row in enumerate(rows):
            writer.writerow({**row, "split": ("train", "train", "val", "test")[number % 4]})
    given = {Path(row["image_path"]).name: ("train", "train", "val", "test")[n % 4] for n, row in enumerate(rows)}
    parts = parts_of(read_data(Source(tasks=(("animals", str(photos)), ("winter", str(table)))), SEED))
    assert {name: part for (name, _), part in parts.items()} == given and not torn(parts)


def test_links_lead_to_the_same_image(tmp_path: Path) -> None:
    photos = draw(tmp_path / "photos")
    for number, image in enumerate(sorted(photos.rglob("*.png"))):
        place = tmp_path / "linked" / ("old", "new")[number % 2] / image.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(image)
    linked = (("animals", str(photos)), ("age", str(tmp_path / "linked")))
    assert not torn(parts_of(read_data(Source(tasks=linked), SEED)))


def test_sources_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    photos = draw(tmp_path / "photos")
    first, second = winter_table(photos, "one.csv", split="train"), winter_table(photos, "two.csv", split="train")
    text = second.read_text(encoding="utf-8").splitlines()
    text[1] = text[1].replace(",train", ",test")
    second.write_text("\n".join(text), encoding="utf-8")
    with pytest.raises(DataError) as refused:
        read_data(Source(tasks=(("a", str(first)), ("b", str(second)))))
    told = str(refused.value)
    assert "is in test for --task b and in train for --task a" in told and "\n" not in told


def test_a_group_that_another_source_would_tear_is_refused(tmp_path: Path) -> None:
    photos = draw(tmp_path / "photos")
    table = winter_table(photos)
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["image_path", "label", "group"])
        writer.writeheader()
        writer.writerows({**row, "group": f"day {number // 5}"} for number, row in enumerate(rows))
    with pytest.raises(DataError, match=r"group day \d would be in two parts, .* give all tables a column split$"):
        read_data(Source(tasks=(("animals", str(photos)), ("winter", str(table)))), SEED)


def test_booleans_are_spelled_alike_in_every_table(tmp_path: Path) -> None:
    photos = draw(tmp_path / "photos", 12)
    images = sorted(str(image) for image in photos.rglob("*.png"))
    held = [number % 2 == 0 for number in range(len(images))]
    pyarrow.parquet.write_table(pyarrow.table({"image_path": images, "wet": held}), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["image_path", "wet"], *zip(images, held, strict=True)])
    lower = (tmp_path / "a.csv").read_text(encoding="utf-8").replace("True", "true").replace("False", "FALSE")
    (tmp_path / "b.csv").write_text(lower, encoding="utf-8")
    read = [read_data(Source(tmp_path / name, labels=LabelColumns(("wet",)))) for name in ("a.parquet", "a.csv")]
    assert [one.classes for one in read] == [("False", "True")] * 2
    for table in ("a.parquet", "a.csv", "b.csv"):
        for known in (("False", "True"), ("false", "true"), ("FALSE", "TRUE")):
            found = read_data(Source(tmp_path / table, labels=LabelColumns(("wet",))), known=known)
            assert found.classes == known
            assert {example.path: example.label for example in found.all} == {
                Path(image): int(value) for image, value in zip(images, held, strict=True)
            }
    assert known_names(("cat", "True"))("Cat") == "Cat"


def test_a_class_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="task 'colour' has the class 'red' twice"):
        LabelTask("colour", "one_class", ("red", "blue", "red"))
    stored = LabelTask("colour", "several_classes", ("red", "blue")).to_json()
    with pytest.raises(ValueError, match="twice"):
        LabelTask.from_json({**stored, "classes": ["red", "red"]})


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (8.5123, 5.0, "8.512"),
        (1_000_012.53, 9.0, "1000012.5"),
        (1_000_012.53, 0.3, "1000012.53"),
        (-20_250.26, 0.5, "-20250.26"),
        (20_250.26, 1e4, "2.025e+04"),
        (0.0, 3.0, "0"),
        (12.0, 0.0, "12"),
    ],
)
def test_numbers_are_written_with_digits_that_show_their_spread(value: float, spread: float, text: str) -> None:
    assert written(value, spread) == text


def test_large_numbers_are_told_apart_wherever_they_are_shown(tmp_path: Path) -> None:
    task = LabelTask("depth", "number", unit="m", mean=1_000_025.0, std=9.0, low=1_000_012.5, high=1_000_043.5)
    assert str(task) == "depth: a number from 1000012.5 to 1000043.5 m"
    assert task_texts(TaskLabels((1_000_012.5,), (task,))) == ["depth=1000012.5 m"]
    said = NumberAnswer(1_000_012.5, "m", 1_000_011.0, 1_000_014.25, task.std)
    assert str(said) == "1,000,012.5 m (1,000,011 to 1,000,014.2)"
    assert said.told() == {"value": 1_000_012.5, "unit": "m", "low": 1_000_011.0, "high": 1_000_014.25}
    assert str(NumberAnswer(33_333.3, "cm", spread=10.0)) == "33,333.3 cm", "as before where that was enough"
