"""The gauges of the demo task: exact classes, seeded pictures, and a folder that is whole or absent."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visgraft.drawn import gauges
from visgraft.drawn.gauges import POSITIONS, draw_gauge, draw_gauges
from visgraft.errors import DataError

SIZE = 64


def files_of(root: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below `root`, by its path in it."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pixels_of(position: float, seed: int, size: int = SIZE) -> np.ndarray:
    return np.asarray(draw_gauge(position, np.random.default_rng(seed), size), dtype=np.float64)


def test_same_seed_same_pixels_and_other_seed_other_pixels() -> None:
    first = pixels_of(5, seed=1)
    assert first.shape == (SIZE, SIZE, 3)
    assert np.array_equal(first, pixels_of(5, seed=1))
    assert not np.array_equal(first, pixels_of(5, seed=2))


def needle_line(change: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the changed pixels, shape (count, 2), x and y, and the unit direction, shape (2,), along their streak."""
    rows, columns = np.nonzero(change > 0.35 * change.max())
    points = np.stack([columns, rows], axis=1)
    _, axes = np.linalg.eigh(np.cov(points.T, aweights=change[rows, columns]))
    return points, axes[:, -1]


@pytest.mark.parametrize(("seed", "beyond"), [*((seed, 0.0) for seed in range(24)), (3, 0.4), (7, 0.7)])
def test_needle_seen_in_the_pixels_points_at_the_class_or_between_two(seed: int, beyond: float) -> None:
    # The same generator state draws the same gauge, so what differs from the median over all positions is the needle.
    pictures = np.stack([pixels_of(position + beyond, seed, size=96) for position in range(POSITIONS)])
    lines = [needle_line(change) for change in np.abs(pictures - np.median(pictures, axis=0)).sum(axis=-1)]
    # All needles pass through the hub: the point nearest to the 16 lines.
    across = [np.eye(2) - np.outer(direction, direction) for _, direction in lines]
    offsets = [part @ points.mean(axis=0) for part, (points, _) in zip(across, lines, strict=True)]
    hub = np.linalg.solve(np.sum(across, axis=0), np.sum(offsets, axis=0))
    for position, (points, direction) in enumerate(lines):
        along = (points - hub) @ direction
        ends = sorted([along.max(), -along.min()])
        assert ends[1] > 1.7 * ends[0], "the tail is nearly as long as the needle"
        x, y = direction if along.max() == ends[1] else -direction
        error = (np.degrees(np.arctan2(x, -y)) - (position + beyond) * 360 / POSITIONS + 180) % 360 - 180
        assert abs(error) < 180 / POSITIONS


def test_hundreds_of_needles_are_drawn_within_half_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    angles: list[float] = []

    def record(pen: gauges._Pen, rng: object, colour: object, rim: object, angle: float) -> None:
        hub, tip = pen.place(np.array([0j, 0.7 * -1j * gauges._turn(angle)]))
        angles.append(float(np.degrees(np.arctan2(tip[0] - hub[0], hub[1] - tip[1]))))

    monkeypatch.setattr(gauges, "_draw_needle", record)
    positions = np.arange(320) % POSITIONS
    for index, position in enumerate(positions):
        draw_gauge(int(position), np.random.default_rng(index), 48)
    error = (np.array(angles) - positions * 360 / POSITIONS + 180) % 360 - 180
    assert 3 < np.abs(error).max() < 8.8


def test_folder_layout_counts_and_splits_without_shared_pictures(tmp_path: Path) -> None:
    root = tmp_path / "new" / "gauges"
    assert draw_gauges(root, train=36, val=16, test=20, size=SIZE) == root
    files = files_of(root)
    assert Counter(name.split("/")[0] for name in files) == {"train": 36, "val": 16, "test": 20}
    per_class = Counter(name.split("/")[1] for name in files if name.startswith("train/"))
    assert per_class == {f"position_{number:02d}": 3 if number < 4 else 2 for number in range(POSITIONS)}
    assert len(set(files.values())) == 72
    with Image.open(root / "test" / "position_03" / "00019.png") as picture:
        assert (picture.size, picture.mode) == ((SIZE, SIZE), "RGB")
    assert [path.name for path in root.parent.iterdir()] == ["gauges"]


def test_a_picture_depends_only_on_seed_split_and_number(tmp_path: Path) -> None:
    small = files_of(draw_gauges(tmp_path / "small", train=8, val=0, test=8, size=SIZE, seed=3))
    large = files_of(draw_gauges(tmp_path / "large", train=16, val=4, test=16, size=SIZE, seed=3))
    other = files_of(draw_gauges(tmp_path / "other", train=8, val=0, test=8, size=SIZE, seed=4))
    assert small.items() <= large.items()
    assert small.keys() == other.keys()
    assert not set(small.values()) & set(other.values())


def test_an_empty_folder_is_filled_and_a_full_one_refused(tmp_path: Path) -> None:
    root = tmp_path / "gauges"
    root.mkdir()
    draw_gauges(root, train=1, val=0, test=0, size=SIZE)
    before = files_of(root)
    with pytest.raises(DataError, match=r"gauges already exists and is not an empty folder; remove it or name another"):
        draw_gauges(root, train=2, val=0, test=0, size=SIZE)
    assert files_of(root) == before
    with pytest.raises(DataError, match="not an empty folder"):
        draw_gauges(root / "train" / "position_00" / "00000.png")


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(position: int, rng: np.random.Generator, size: int) -> Image.Image:
        if position == 3:
            raise KeyboardInterrupt
        return draw_gauge(position, rng, size)

    monkeypatch.setattr(gauges, "draw_gauge", interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw_gauges(tmp_path / "gauges", size=SIZE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("position", "size", "message"), [(16, 64, "0 to 15"), (-1, 64, "0 to 15"), (0, 20, "48")])
def test_impossible_gauges_are_refused(position: int, size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        draw_gauge(position, np.random.default_rng(0), size)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"val": -1}, "must not be negative, got .*val=-1"),
        ({"seed": -1}, "must not be negative, got .*seed=-1"),
        ({"size": 20}, "a gauge of 20 pixels cannot be read"),
    ],
)
def test_impossible_folders_are_refused(tmp_path: Path, wrong: dict[str, int], told: str) -> None:
    with pytest.raises(DataError, match=told):
        draw_gauges(tmp_path / "gauges", **wrong)
    assert list(tmp_path.iterdir()) == []
