"""Drawn tasks: every label is exact, the look says nothing about it, and a folder is there whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from visgraft.drawn import painting, sprites
from visgraft.drawn.painting import Curve, Scene, Solid, paint
from visgraft.drawn.sprites import TASKS, arrange, class_name, draw_sprite, draw_sprites
from visgraft.errors import DataError


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def outline(scene: Scene) -> Curve:
    """The outline of a scene's only solid."""
    assert len(scene.solids) == 1 and len(scene.solids[0].faces) == 1
    return scene.solids[0].faces[0][0]


def covered(points: Curve, side: int = 800) -> np.ndarray:
    """Which pixels a polygon covers, found by crossing numbers and not by the painter."""
    rows, columns = np.mgrid[0:side, 0:side]
    x, y = (columns + 0.5) / side, (rows + 0.5) / side
    inside = np.zeros(x.shape, dtype=bool)
    for a, b in zip(points, np.roll(points, -1), strict=True):
        crosses = (a.imag > y) != (b.imag > y)
        inside ^= crosses & (x < (b.real - a.real) * (y - a.imag) / (b.imag - a.imag + 1e-300) + a.real)
    return inside


def areas(scene: Scene) -> np.ndarray:
    """The areas of the fronts of a scene's solids."""
    fronts = [solid.faces[0][0] for solid in scene.solids]
    return np.array([abs((points.conjugate() * np.roll(points, -1)).imag.sum()) / 2 for points in fronts])


@pytest.mark.parametrize("label", [0, 5, 15])
def test_the_location_is_the_bin_of_the_centre_of_the_area(label: int) -> None:
    for seed in range(4):
        mask = covered(outline(arrange("location", label, rng(seed))))
        x = ((np.nonzero(mask)[1] + 0.5) / mask.shape[1]).mean()
        place = (x - 0.15) / 0.7 * 16
        assert int(place) == label and 0.25 < place - label < 0.75


@pytest.mark.parametrize("label", [0, 3, 8, 13])
def test_the_orientation_is_where_the_front_points(label: int) -> None:
    for seed in range(6):
        points = outline(arrange("orientation", label, rng(seed)))
        rows, columns = np.nonzero(covered(points, 300))
        centre = complex(columns.mean() + 0.5, rows.mean() + 0.5) / 300
        tip = points[0]  # every shape with a front is drawn from there
        angle = np.rad2deg(np.angle((tip - centre) * 1j)) % 360  # clockwise from the top
        wrong = (angle - label * 22.5 + 180) % 360 - 180
        assert abs(wrong) < 3.5


def drawn_pixels(monkeypatch: pytest.MonkeyPatch, scene: Scene, seed: int, side: int, *, restyled: bool) -> np.ndarray:
    """Return which pixels differ from the ground, drawn in one colour, with no shadow and nothing a camera adds."""
    monkeypatch.setattr(painting, "SHADOW", (0, 0, 0, 0))
    monkeypatch.setattr(painting, "draw_background", lambda rng, side: Image.new("RGB", (side, side), (128, 128, 128)))
    monkeypatch.setattr(painting, "_rule", lambda *_: None)
    for name in ("photograph", "_grain"):
        monkeypatch.setattr(painting, name, lambda picture, rng: picture)
    pixels = np.asarray(paint(scene, rng(seed), side, restyled=restyled), float)
    changed = np.abs(pixels - pixels[0, 0]).max(axis=-1) > 20  # more than LANCZOS rings at an edge
    return np.asarray(ndimage.binary_fill_holes(changed))


@pytest.mark.parametrize("style", sprites.STYLES)
@pytest.mark.parametrize("task", ["location", "orientation"])
def test_of_all_labels_the_pixels_fit_their_own_best(task: str, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        scenes = [arrange(task, label, rng(seed)) for label in range(TASKS[task])]
        masks = np.array([covered(outline(scene), 98) for scene in scenes])
        for label in range(seed, TASKS[task], 4):
            seen = drawn_pixels(monkeypatch, scenes[label], seed, 98, restyled=style == "restyled")
            overlap = (masks & seen).sum((1, 2)) / (masks | seen).sum((1, 2))
            assert np.argmax(overlap) == label
            # A chalk line is drawn around the outline, so more may be seen than is covered, but not less.
            assert (masks[label] & ~seen).sum() < 0.05 * masks[label].sum()
            shift = np.subtract(ndimage.center_of_mass(seen), ndimage.center_of_mass(masks[label]))
            assert np.abs(shift).max() < 0.5


@pytest.mark.parametrize("style", sprites.STYLES)
def test_as_many_things_are_seen_in_the_pixels_as_the_label_says(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in range(TASKS["count"]):
        scene = arrange("count", label, rng(label, 4))
        seen = drawn_pixels(monkeypatch, scene, label, 196, restyled=style == "restyled")
        assert ndimage.label(seen, np.ones((3, 3)))[1] == label + 3


@pytest.mark.parametrize("task", TASKS)
def test_nothing_is_cut_off_by_the_border(task: str) -> None:
    for index in range(160):
        scene = arrange(task, index % TASKS[task], rng(5, index))
        points = np.concatenate([face for solid in scene.solids for face, _ in solid.faces])
        assert points.real.min() > -1e-9 and points.real.max() < 1 + 1e-9
        assert points.imag.min() > 0.01 and points.imag.max() < 0.99


def test_the_sizes_of_the_things_do_not_tell_how_many_there_are() -> None:
    sizes = [areas(arrange("count", i % 8, rng(6, i))).mean() for i in range(800)]
    assert abs(np.corrcoef(sizes, np.arange(800) % 8)[0, 1]) < 0.13


def test_the_apparent_size_leaves_two_distances_open() -> None:
    """The small solid looks as large as the large one does two bins farther away."""
    found: dict[int, set[int]] = {}
    for index in range(240):
        label = index % TASKS["distance"]
        front = arrange("distance", label, rng(7, index)).solids[-1].faces[0][0].real
        seems = np.log(0.55 * 0.8 / (front.max() - front.min()) / 1.1) / np.log(4.5 / 1.1) * 6  # were it a large one
        assert abs(seems - np.floor(seems) - 0.5) < 0.21, "where in the bin it stands would tell its true size"
        found.setdefault(int(np.floor(seems)), set()).add(label)
    assert found == {seems: {seems, seems - 2} & set(range(6)) for seems in range(8)}


@pytest.mark.parametrize("label", range(8))
def test_the_count_is_the_number_of_separate_things(label: int) -> None:
    scene = arrange("count", label, rng(label, 1))
    assert len(scene.solids) == label + 3
    mask = sum(covered(solid.faces[0][0], 600).astype(int) for solid in scene.solids)
    assert mask.max() == 1, "none overlaps another"
    assert ndimage.label(mask, np.ones((3, 3)))[1] == label + 3  # a star's tips are a pixel wide
    points = np.concatenate([solid.faces[0][0] for solid in scene.solids])
    assert points.real.min() > 0 and points.real.max() < 1 and points.imag.min() > 0 and points.imag.max() < 1


@pytest.mark.parametrize("label", range(6))
def test_the_distance_is_that_of_the_nearest_solid_by_size_and_by_contact(label: int) -> None:
    edges = np.geomspace(1.1, 4.5, 7)
    for seed in range(8):
        scene = arrange("distance", label, rng(seed, label))
        assert scene.horizon is not None
        depths = [solid.depth for solid in scene.solids]
        assert depths == sorted(depths, reverse=True) and len(depths) >= 3
        assert edges[label] < depths[-1] < edges[label + 1] and depths[-2] > 1.2 * depths[-1]
        for solid in scene.solids:
            points, front = np.concatenate([face for face, _ in solid.faces]), solid.faces[0][0]
            assert (points.imag.max() - scene.horizon) * solid.depth == pytest.approx(0.55, rel=0.01)
            width = (front.real.max() - front.real.min()) * solid.depth / (2 * 0.55)
            assert min(abs(width - true) for true in (0.25, 0.4)) < 0.001
            assert points.imag.min() > scene.horizon, "all are lower than the camera"


@pytest.mark.parametrize("task", TASKS)
def test_a_picture_depends_on_the_generator_and_the_label_alone(task: str) -> None:
    first, again = (draw_sprite(task, 1, rng(3), 64) for _ in range(2))
    assert first.mode == "RGB" and first.size == (64, 64)
    assert first.tobytes() == again.tobytes() != draw_sprite(task, 1, rng(4), 64).tobytes()
    other = draw_sprite(task, 1, rng(3), 64, "restyled")
    assert np.abs(np.asarray(first, float) - np.asarray(other, float)).mean() > 10


@pytest.mark.parametrize("style", sprites.STYLES)
def test_the_look_is_the_same_for_every_label(style: str) -> None:
    """One state of the generator: the corner, where no sprite of these labels is, looks the same."""
    for seed in range(4):
        pictures = [np.asarray(draw_sprite("location", label, rng(seed), 64, style)) for label in (0, 7)]
        assert np.array_equal(pictures[0][:6, -6:], pictures[1][:6, -6:])


@pytest.mark.parametrize("task", ["location", "orientation"])
def test_mean_colours_do_not_tell_the_class(task: str) -> None:
    labels = np.arange(320) % TASKS[task]
    pictures = [np.asarray(draw_sprite(task, label, rng(9, i), 48), float) for i, label in enumerate(labels)]
    features = np.array([[*p.mean((0, 1)), *p.std((0, 1))] for p in pictures]) / 255
    found = cross_val_score(LogisticRegression(max_iter=500), features, labels, cv=4).mean()
    assert found < 1 / TASKS[task] + 4 * np.sqrt(1 / TASKS[task] / 320)


def test_edges_are_smooth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slanted edge has many shades where it would have two if each pixel were in or out."""
    square = Scene((Solid.flat(np.array([0.2 + 0.2j, 0.81 + 0.25j, 0.75 + 0.8j, 0.2 + 0.75j])),))
    drawn_pixels(monkeypatch, square, 0, 64, restyled=False)  # leaves the painter without noise and blur
    picture = np.asarray(paint(square, rng(1), 64, restyled=False), float)
    assert len(np.unique(picture[10:20, 20:44], axis=None)) > 8


def test_a_folder_is_drawn_whole_with_its_restyled_pictures(tmp_path: Path) -> None:
    root = draw_sprites("distance", tmp_path / "d", train=7, val=6, test=6, restyled=6, size=48)
    found = {str(p.relative_to(root).parent): len(list(p.parent.iterdir())) for p in root.rglob("*.png")}
    assert found["images/train/distance_00"] == 2 and found["restyled/distance_05"] == 1 and len(found) == 24
    again = draw_sprites("distance", tmp_path / "e", train=1, val=0, test=0, restyled=6, size=48)
    for name in ("images/train/distance_00/00000.png", "restyled/distance_05/00005.png"):
        assert (root / name).read_bytes() == (again / name).read_bytes()
    with (
        Image.open(root / "images/test/distance_00/00000.png") as test,
        Image.open(root / "images/train/distance_00/00000.png") as train,
    ):
        assert test.tobytes() != train.tobytes()
    with pytest.raises(DataError, match="already exists and is not an empty folder"):
        draw_sprites("distance", root)
    assert not list(tmp_path.glob(".*"))


def test_mistakes_are_named(tmp_path: Path) -> None:
    for call, says in (
        (lambda: draw_sprites("locaton", tmp_path / "x"), "did you mean location"),
        (lambda: draw_sprites("count", tmp_path / "x", train=-1), "must not be negative"),
        (lambda: draw_sprites("count", tmp_path / "x", size=32), "use a size of at least 48"),
        (lambda: draw_sprite("count", 8, rng(0), 64), "must be 0 to 7, got 8"),
        (lambda: draw_sprite("count", 1, rng(0), 64, "chalk"), "unknown style 'chalk'"),
        (lambda: draw_sprite("count", 1, rng(0), 32), "use a size of at least 48"),
    ):
        with pytest.raises(DataError, match=says):
            call()
    assert not (tmp_path / "x").exists()
    assert class_name("count", 0) == "count_03"


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(task: str, label: int, generator: np.random.Generator, size: int, style: str) -> Image.Image:
        if label == 3:
            raise KeyboardInterrupt
        return draw_sprite(task, label, generator, size, style)

    monkeypatch.setattr(sprites, "draw_sprite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw_sprites("count", tmp_path / "count", size=48)
    assert list(tmp_path.iterdir()) == []
