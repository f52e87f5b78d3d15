"""Every cache gives the same pixels; the one on disk is shared, notices changes, and is never half-written."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import SMALL, draw, run, succeed

from visgraft import DataError, Example, Images, TrainConfig, load_images
from visgraft.adapters.directory import TENSORS
from visgraft.data import cache as caches
from visgraft.data.augment import augmentation
from visgraft.data.decode import open_image

FACTS: dict[str, Any] = {
    "input_size": [3, 24, 24], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VISGRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    files = sorted(draw(tmp_path / "data", 4).rglob("*.png"))
    return [Example(path, number % 3) for number, path in enumerate(files)]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The files that are decoded from now on."""
    found: list[Path] = []

    def note(example: Example, background: str) -> Image.Image:
        found.append(example.path)
        return open_image(example, background)

    monkeypatch.setattr("visgraft.data.images.open_image", note)
    return found


def pixels(images: Images) -> torch.Tensor:
    return images.pixels[torch.arange(len(images))]


@pytest.mark.parametrize("cache", ["auto", "disk", "none"])
def test_all_caches_give_the_same_pixels_however_they_are_indexed(cache: str, examples: list[Example]) -> None:
    plain, other = (load_images(examples, FACTS, cache=kind) for kind in ("ram", cache))
    assert torch.equal(pixels(other), pixels(plain))
    assert torch.equal(other.pixels[2:5], plain.pixels[2:5]) and torch.equal(other.pixels[3], plain.pixels[3])
    assert torch.equal(other.pixels[torch.tensor(3)], plain.pixels[3])
    config = TrainConfig(flip=True, rand_augment="rand-m5")
    assert torch.equal(*(augmentation(kind, config)(torch.arange(12), 1) for kind in (plain, other)))
    assert len(other.pixels) == 12 and other.paths == plain.paths


def test_the_file_on_disk_is_read_by_later_runs_and_a_changed_image_is_decoded_anew(
    examples: list[Example], opened: list[Path], folder: Path
) -> None:
    first = load_images(examples, FACTS, cache="disk")
    assert len(opened) == 12 and len(list(folder.iterdir())) == 2
    again = load_images(examples, FACTS, cache="disk")
    assert len(opened) == 12, "nothing is decoded twice"
    assert torch.equal(pixels(first), pixels(again))
    Image.fromarray(np.full((40, 40, 3), 9, np.uint8)).save(examples[5].path)
    changed = load_images(examples, FACTS, cache="disk")
    assert int(changed.pixels[5].max()) == 9
    smaller = load_images(examples, {**FACTS, "input_size": [3, 16, 16]}, cache="disk")
    assert smaller.pixels[0].shape == (3, 16, 16)


def test_methods_share_the_file_and_train_to_the_same_weights_as_without(
    tmp_path: Path, opened: list[Path], folder: Path
) -> None:
    data = draw(tmp_path / "flat", 12)
    counts = []
    for method, cache in (("sct", "disk"), ("lora", "disk"), ("sct", "none"), ("sct", "ram")):
        options = ["--method", method, "--epochs", 2, "--cache", cache, *SMALL]
        succeed("train", data, "--out", tmp_path / f"{method}-{cache}", *options)
        counts.append(len(opened))
    assert counts[1] == counts[0] == 30 and counts[2] > counts[1], "the second method decodes nothing"
    sct = [(tmp_path / f"sct-{cache}" / TENSORS).read_bytes() for cache in ("disk", "none", "ram")]
    assert sct[0] == sct[1] == sct[2]


@pytest.mark.parametrize("cache", ["ram", "disk", "none"])
def test_broken_images_are_named_or_left_out_and_listed(cache: str, examples: list[Example]) -> None:
    examples[4].path.write_text("no image")
    with pytest.raises(DataError, match=str(examples[4].path)):
        pixels(load_images(examples, FACTS, cache=cache))
    for _ in range(2):
        images = load_images(examples, FACTS, cache=cache, skip_broken=True)
        assert [skipped.path for skipped in images.skipped] == [examples[4].path]
        assert "no known image format" in images.skipped[0].reason
        assert len(images) == len(images.pixels) == 11 and examples[4].path not in images.paths
        assert torch.equal(images.pixels[4], load_images(examples[5:6], FACTS).pixels[0])
    if cache == "disk":
        with pytest.raises(DataError, match=str(examples[4].path)):
            load_images(examples, FACTS, cache="disk")


def test_without_any_image_left_there_is_nothing_to_train_on(examples: list[Example]) -> None:
    for example in examples:
        example.path.write_text("no image")
    with pytest.raises(DataError, match="none of the 12 images decodes"):
        load_images(examples, FACTS, skip_broken=True)


def test_a_run_that_is_cut_short_leaves_no_file(
    examples: list[Example], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = iter(range(100))

    def fail(example: Example, background: str) -> Image.Image:
        if next(count) == 5:
            raise KeyboardInterrupt
        return open_image(example, background)

    monkeypatch.setattr("visgraft.data.images.open_image", fail)
    with pytest.raises(KeyboardInterrupt):
        load_images(examples, FACTS, cache="disk")
    assert list(folder.iterdir()) == []


def test_the_files_used_longest_ago_make_room(
    examples: list[Example], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 3 * 24 * 24
    monkeypatch.setattr(caches, "DISK_LIMIT", 9 * size)
    for start in (0, 4, 8):
        load_images(examples[start : start + 4], FACTS, cache="disk")
    assert sum(file.stat().st_size for file in folder.glob("*.uint8")) == 8 * size


def test_a_cache_that_cannot_be_written_and_an_unknown_one_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VISGRAFT_CACHE", str(tmp_path / "file"))
    data = draw(tmp_path / "flat", 6)
    for cache, words in (("disk", "pass --cache none, or point VISGRAFT_CACHE"), ("rom", "must be one of auto, ram")):
        code, out, err = run("train", data, "--out", tmp_path / "x", "--method", "linear", "--cache", cache, *SMALL)
        assert (code, out) == (1, "")
        assert words in err.splitlines()[-1]


def test_auto_takes_the_disk_where_memory_is_short(
    examples: list[Example], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_images(examples, FACTS, cache="auto")
    assert not folder.exists()
    monkeypatch.setattr(caches.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    load_images(examples, FACTS, cache="auto")
    assert len(list(folder.glob("*.uint8"))) == 1


def test_a_run_that_is_cut_short_goes_on_behind_its_last_whole_file(
    examples: list[Example], opened: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "IN_A_FILE", 5)
    plain = load_images(examples, FACTS)
    examples[2].path.write_text("no image")
    told: list[tuple[int, int]] = []

    def stop(done: int, count: int) -> None:
        told.append((done, count))
        if done == 7 and len(told) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_images(examples, FACTS, cache="disk", skip_broken=True, on_progress=stop)
    assert len(list(folder.glob("*.uint8"))) == 1, "the second file was not whole"
    opened.clear()
    images = load_images(examples, FACTS, cache="disk", skip_broken=True, on_progress=stop)
    assert sorted(opened) == sorted(example.path for example in examples[5:]) and told[-1] == (12, 12)
    kept = torch.tensor([i for i in range(12) if i != 2])
    assert [skipped.path for skipped in images.skipped] == [examples[2].path]
    assert images.pixels.shape == (11, 3, 24, 24) and len(list(folder.glob("*.uint8"))) == 3
    for index in (torch.tensor([10, 0, 4, 3, 10]), slice(2, 9), slice(None), 7, torch.tensor(4), -1, slice(1, 9, 3)):
        assert torch.equal(images.pixels[index], plain.pixels[kept][index])
    again = pickle.loads(pickle.dumps(images.pixels))
    assert torch.equal(again[:], images.pixels[:])
    next(iter(sorted(folder.glob("*.uint8")))).unlink()
    opened.clear()
    assert torch.equal(load_images(examples, FACTS, cache="disk", skip_broken=True).pixels[:], again[:])
    assert len(opened) == 12
