"""Scenes with four labels: each is exact and readable, none tells another, and a table is there whole or not at all."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.stats import chi2_contingency
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from test_sprites import drawn_pixels

from visgraft.data.label_columns import LabelColumns
from visgraft.data.read import Source, read_data
from visgraft.drawn import scenes
from visgraft.drawn.gauges import draw_gauge_table
from visgraft.drawn.painting import Curve
from visgraft.drawn.scenes import Arranged, arrange_scene, draw_labels, draw_scene, draw_scenes
from visgraft.drawn.sprites import STYLES, TASKS
from visgraft.errors import DataError, VisgraftError

NUMBERS = {"location_percent": "%", "count_number": "", "distance_heights": "heights"}


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def some_labels(seed: int) -> dict[str, int]:
    return {task: int(rng(seed, 8).integers(0, classes, 4)[n]) for n, (task, classes) in enumerate(TASKS.items())}


def arranged(seed: int) -> tuple[dict[str, int], Arranged]:
    labels = some_labels(seed)
    return labels, arrange_scene(labels, rng(seed))


def outlines(found: Arranged) -> list[Curve]:
    """The outlines of what hangs: what is located, what points, and the small ones."""
    return [solid.faces[0][0] for solid in found.scene.solids[1:]]


def mask(points: Curve, side: int = 500) -> np.ndarray:
    picture = Image.new("1", (side, side))
    ImageDraw.Draw(picture).polygon(
        [(x * side, y * side) for x, y in zip(points.real, points.imag, strict=True)], fill=1
    )
    return np.asarray(picture)


def test_no_label_tells_another() -> None:
    labels = draw_labels(9600, rng(1))
    for task, classes in TASKS.items():
        assert np.ptp(np.bincount(labels[task], minlength=classes)) == 0
    for one, other in itertools.combinations(TASKS, 2):
        counts = np.zeros((TASKS[one], TASKS[other]))
        np.add.at(counts, (labels[one], labels[other]), 1)
        assert chi2_contingency(counts).pvalue > 1e-3, f"{one} tells something of {other}"
    again = draw_labels(9600, rng(2))
    assert all(not np.array_equal(labels[task], again[task]) for task in TASKS)


@pytest.mark.parametrize("seed", range(12))
def test_a_scene_shows_what_its_labels_say(seed: int) -> None:
    labels, found = arranged(seed)
    located, pointed, *small = outlines(found)
    rows, columns = np.nonzero(mask(located))
    x = (columns.mean() + 0.5) / 500
    assert 100 * x == pytest.approx(found.numbers["location_percent"], abs=0.3)
    assert int((x - 0.15) / 0.7 * 16) == labels["location"]
    rows, columns = np.nonzero(mask(pointed))
    centre = complex(columns.mean() + 0.5, rows.mean() + 0.5) / 500
    angle = np.rad2deg(np.angle((pointed[0] - centre) * 1j))
    assert abs((angle - 22.5 * labels["orientation"] + 180) % 360 - 180) < 4
    assert len(small) == labels["count"] + 3 == found.numbers["count_number"]
    body, horizon = found.scene.solids[0], found.scene.horizon
    assert horizon is not None
    lowest = np.concatenate([face for face, _ in body.faces]).imag.max()
    depth = scenes.FOCUS / (lowest - horizon)
    assert depth == pytest.approx(found.numbers["distance_heights"], rel=0.01)
    assert int(np.log(depth / 1.1) / np.log(4.5 / 1.1) * 6) == labels["distance"]


@pytest.mark.parametrize("seed", range(12))
def test_nothing_covers_anything_and_all_is_in_its_place(seed: int) -> None:
    _, found = arranged(seed)
    horizon, hanging = found.scene.horizon, outlines(found)
    assert horizon is not None
    assert sum(mask(points).astype(int) for points in hanging).max() == 1
    for one, other in itertools.combinations(hanging, 2):
        assert np.abs(one[:, None] - other[None, :]).min() > scenes.GAP * 0.99
    above = np.concatenate(hanging)
    assert above.imag.max() < horizon - 0.019 and above.imag.min() > 0.019
    assert above.real.min() > 0.019 and above.real.max() < 0.981
    body = np.concatenate([face for face, _ in found.scene.solids[0].faces])
    assert (
        body.imag.min() > horizon and body.imag.max() < 0.99 and body.real.min() > -1e-9 and body.real.max() < 1 + 1e-9
    )
    sizes = [np.abs(points - points.mean()).max() for points in hanging]
    assert min(sizes[:2]) > 1.5 * max(sizes[2:]), "what is counted is told from the rest by its size"


@pytest.mark.parametrize("style", STYLES)
def test_at_98_pixels_as_many_things_hang_apart_as_there_are(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(8):
        labels, found = arranged(seed)
        seen = drawn_pixels(monkeypatch, found.scene, seed, 98, restyled=style == "restyled")
        sky = seen[: int(98 * (found.scene.horizon or 0)) - 2]
        assert ndimage.label(sky, np.ones((3, 3)))[1] == labels["count"] + 5


@pytest.mark.parametrize("task", ["location", "orientation"])
def test_mean_colours_do_not_tell_the_class(task: str) -> None:
    labels = draw_labels(320, rng(3))
    own = [{name: int(values[n]) for name, values in labels.items()} for n in range(320)]
    pictures = [np.asarray(draw_scene(one, rng(9, n), 48), float) for n, one in enumerate(own)]
    features = np.array([[*p.mean((0, 1)), *p.std((0, 1))] for p in pictures]) / 255
    found = cross_val_score(LogisticRegression(max_iter=500), features, labels[task], cv=4).mean()
    assert found < 1 / TASKS[task] + 4 * np.sqrt(1 / TASKS[task] / 320)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_tables_are_read_as_they_were_drawn(tmp_path: Path) -> None:
    counts: dict[str, Any] = {"train": 32, "val": 16, "test": 16, "restyled": 17, "size": 48}
    root = draw_scenes(tmp_path / "s", **counts)
    columns = LabelColumns((*TASKS, *NUMBERS), NUMBERS)
    plain = read_data(Source(table=root / "labels.csv", labels=columns))
    restyled = read_data(Source(table=root / "restyled.csv", labels=columns), tasks=plain.tasks)
    assert [len(part) for part in (plain.train, plain.val, plain.test, restyled.test)] == [32, 16, 16, 17]
    assert [task.kind for task in plain.tasks] == ["one_class"] * 4 + ["number"] * 3
    for example in (*plain.train, *restyled.test):
        location, _, count, distance, percent, number, heights = example.label.values
        shares = [(percent - 15) / 70, np.log(heights / 1.1) / np.log(4.5 / 1.1)]
        assert [int(16 * shares[0]), int(number) - 3, int(6 * shares[1])] == [
            location,
            count_of(plain, count),
            distance,
        ]
    again = draw_scenes(tmp_path / "again", **counts)
    assert files_of(root) == files_of(again)
    assert files_of(root) != files_of(draw_scenes(tmp_path / "other", **counts, seed=1))


def count_of(dataset: Any, label: int) -> int:
    """The label of `draw_labels` behind the number of a class, whose names are sorted."""
    return int(dataset.tasks[2].classes[label].removeprefix("count_")) - 3


def test_gauges_have_readings_off_the_middles_of_their_classes(tmp_path: Path) -> None:
    root = draw_gauge_table(tmp_path / "g", train=64, val=16, test=16, size=48)
    columns = LabelColumns(("position", "reading"), {"reading": "bar"})
    dataset = read_data(Source(table=root / "labels.csv", labels=columns))
    found = np.array([example.label.values for example in dataset.train])
    places = (found[:, 1] - 0.5) / 15 * 16
    assert np.array_equal(places.astype(int), found[:, 0].astype(int))
    assert places.min() > 0 and places.max() < 16 and (np.abs(places % 1 - 0.5) > 0.3).sum() > 15
    assert not (root / "restyled.csv").exists()


def test_mistakes_are_named(tmp_path: Path) -> None:
    labels = dict.fromkeys(TASKS, 1)
    for call, says in (
        (lambda: draw_scene(labels, rng(0), 98, "chalk"), "unknown style 'chalk'"),
        (lambda: draw_scene(labels, rng(0), 32), "use a size of at least 48"),
        (lambda: draw_scene(labels | {"count": 8}, rng(0), 98), "label of count must be 0 to 7, got 8"),
        (lambda: draw_scene({"location": 1}, rng(0), 98), "label of orientation must be 0 to 15, got None"),
        (lambda: draw_scenes(tmp_path / "x", train=0), "train not 0, got train 0, val 200"),
        (lambda: draw_gauge_table(tmp_path / "x", val=-1), "must not be negative"),
        (lambda: draw_scenes(tmp_path / "x", size=32), "use a size of at least 48"),
    ):
        with pytest.raises(DataError, match=says):
            call()
    assert not any(tmp_path.iterdir())
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").touch()
    with pytest.raises(VisgraftError, match="not an earlier result"):
        draw_scenes(tmp_path / "x", train=1)
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "mine"]
