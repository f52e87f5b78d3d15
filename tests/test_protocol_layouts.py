"""FGVC, few-shot sets and ImageNet's further test sets in the folders that the field's programs expect, and shots."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from protocol_tasks import names, opened, refused, task_of, write_image

from visgraft.data.dataset import Example
from visgraft.errors import DataError
from visgraft.protocols.domains import DOMAINS, FOLDERS, TRAIN_FOLDER, labels_of, wordnet_numbers
from visgraft.protocols.few_shot import FEW_SHOT
from visgraft.protocols.fgvc import FGVC
from visgraft.protocols.opening import open_task
from visgraft.protocols.shots import draw_shots, draw_up_to

# FGVC


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("cub_200_2011", "CUB_200_2011/images"),
        ("nabirds", "nabirds/images"),
        ("oxford_flowers", "OxfordFlower"),
        ("stanford_dogs", "Stanford-dogs/Images"),
        ("stanford_cars", "Stanford-cars"),
    ],
)
def test_fgvc_classes_are_renumbered_in_order(tmp_path: Path, name: str, place: str) -> None:
    task = task_of(FGVC, name, classes=3)
    stored = {"train": {"a/1.jpg": 10, "b/1.jpg": 9, "c/1.jpg": 2}, "val": {"b/2.jpg": 9}, "test": {"a/3.jpg": 10}}
    for part, entries in stored.items():
        for image in entries:
            write_image(tmp_path / place / image)
        (tmp_path / task.folder / f"{part}.json").write_text(json.dumps(entries))
    parts = opened(FGVC, task, tmp_path)
    assert parts.classes == ("2", "9", "10")
    assert names(parts.train, tmp_path / place) == [("a/1.jpg", 2), ("b/1.jpg", 1), ("c/1.jpg", 0)]
    assert (parts.val[0].label, parts.tests["test"][0].label) == (1, 2)
    (tmp_path / task.folder / "val.json").write_text('{"d/1.jpg": 11}')
    assert "val.json gives d/1.jpg the class 11, which" in refused(FGVC, task, tmp_path)
    (tmp_path / task.folder / "val.json").write_text('{"b/2.jpg": true}')
    assert "val.json gives b/2.jpg the class True, but must give a whole number" in refused(FGVC, task, tmp_path)
    (tmp_path / task.folder / "val.json").write_text("[1]")
    assert "val.json holds a JSON list instead of an object" in refused(FGVC, task, tmp_path)
    (tmp_path / task.folder / "val.json").write_text("{")
    assert "val.json, line 1, is not JSON" in refused(FGVC, task, tmp_path)


def test_fgvc_classes_may_be_numbers_written_as_text(tmp_path: Path) -> None:
    """As those of CUB's files are."""
    task = task_of(FGVC, "cub_200_2011", classes=3)
    (tmp_path / task.folder).mkdir()
    for part, entries in {
        "train": {"a/1.jpg": "100", "b/1.jpg": "009", "c/1.jpg": "10"},
        "val": {"b/2.jpg": "009"},
        "test": {"a/2.jpg": "100", "c/2.jpg": 10},
    }.items():
        (tmp_path / task.folder / f"{part}.json").write_text(json.dumps(entries))
    parts = opened(FGVC, task, tmp_path)
    assert parts.classes == ("9", "10", "100")
    assert [[e.label for e in of] for of in (parts.train, parts.val, parts.tests["test"])] == [[2, 0, 1], [0], [2, 1]]
    (tmp_path / task.folder / "val.json").write_text('{"b/2.jpg": "9 "}')
    assert "val.json gives b/2.jpg the class '9 '" in refused(FGVC, task, tmp_path)


def examples_of(*counts: int) -> list[Example]:
    return [Example(Path(f"{label}/{i}.png"), label) for label, count in enumerate(counts) for i in range(count)]


# Shots


def test_shots_are_nested_and_each_class_is_drawn_on_its_own() -> None:
    examples = examples_of(20, 30, 16)
    drawn = {shots: draw_shots(examples, shots, seed=1) for shots in (1, 2, 4, 8, 16)}
    for fewer, more in zip((1, 2, 4, 8), (2, 4, 8, 16), strict=True):
        assert set(drawn[fewer]) < set(drawn[more])
    assert [e.label for e in drawn[2]] == [0, 0, 1, 1, 2, 2]
    assert draw_shots(examples_of(20, 30, 16, 20), 8, seed=1)[:24] == drawn[8]
    assert draw_shots(examples, 8, seed=1) == drawn[8] != draw_shots(examples, 8, seed=2)
    positions = [examples.index(e) for e in drawn[16]]
    assert positions == sorted(positions)
    same_size = draw_shots(examples_of(20, 20), 8, seed=1)
    assert [e.path.name for e in same_size[:8]] != [e.path.name for e in same_size[8:]]


def test_a_class_with_too_few_images_is_named() -> None:
    with pytest.raises(DataError, match=r"class 1 \(cat\) has 3 images, fewer than 4 shots"):
        draw_shots(examples_of(5, 3), 4, seed=0, classes=("dog", "cat"))
    assert [e.label for e in draw_up_to(examples_of(5, 3), 4, seed=0)] == [0] * 4 + [1] * 3
    with pytest.raises(DataError, match="must be 1 or more"):
        draw_shots(examples_of(5), 0, seed=0)


# Few-shot sets


@pytest.mark.parametrize(
    ("name", "file", "place"),
    [
        ("food101", "split_zhou_Food101.json", "food-101/images"),
        ("oxford_pets", "split_zhou_OxfordPets.json", "oxford_pets/images"),
        ("stanford_cars", "split_zhou_StanfordCars.json", "stanford_cars"),
        ("oxford_flowers102", "split_zhou_OxfordFlowers.json", "oxford_flowers/jpg"),
    ],
)
def test_split_files_give_shots_of_each_class(tmp_path: Path, name: str, file: str, place: str) -> None:
    task = task_of(FEW_SHOT, f"{name}-8shot", classes=2, images={"train": 16, "val": 8, "test": 4})
    stored = {
        part: [[f"{part}/{kind}{i}.jpg", label, kind] for label, kind in enumerate("ab") for i in range(count)]
        for part, count in (("train", 9), ("val", 5), ("test", 2))
    }
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / task.folder / file).write_text(json.dumps(stored))
    parts = open_task(FEW_SHOT, task, tmp_path, seed=3)
    assert parts.classes == ("a", "b")
    assert parts.train[0].path.parent == tmp_path / place / "train"
    assert [e.label for e in parts.train] == [0] * 8 + [1] * 8 and [e.label for e in parts.val] == [0] * 4 + [1] * 4
    assert open_task(FEW_SHOT, task, tmp_path, seed=4).train != parts.train
    stored["train"] = stored["train"][2:]
    (tmp_path / task.folder / file).write_text(json.dumps(stored))
    assert "class 0 (a) has 7 images" in refused(FEW_SHOT, task, tmp_path)
    stored["val"][1] = ["x.jpg", "0"]
    (tmp_path / task.folder / file).write_text(json.dumps(stored))
    assert f"{file}, val, entry 1 is ['x.jpg', '0']" in refused(FEW_SHOT, task, tmp_path)


def test_aircraft_are_found_by_their_own_lists(tmp_path: Path) -> None:
    task, folder = task_of(FEW_SHOT, "fgvc_aircraft-1shot", classes=2), tmp_path / "fgvc_aircraft"
    folder.mkdir()
    (folder / "variants.txt").write_text("707-320\nDC-9 30\n")
    for number, part in enumerate(("train", "val", "test")):
        lines = f"{number}1 DC-9 30\n{number}2 707-320\n"
        (folder / f"images_variant_{part}.txt").write_text(lines)
    parts = opened(FEW_SHOT, task, tmp_path)
    assert parts.classes == ("707-320", "DC-9 30")
    assert names(parts.tests["test"], folder) == [("images/21.jpg", 1), ("images/22.jpg", 0)]
    (folder / "images_variant_val.txt").write_text("11 DC-9 40\n")
    assert "images_variant_val.txt, line 1: 'DC-9 40' is not in" in refused(FEW_SHOT, task, tmp_path)


# Domain generalisation


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 1,000 classes with three training images, one test image each in every set; nothing opens these files."""
    root = tmp_path_factory.mktemp("domains")
    folders = {TRAIN_FOLDER: wordnet_numbers(), **{folder: tuple(labels_of(t)) for t, folder in FOLDERS.items()}}
    for place, classes in folders.items():
        for name in classes:
            (root / place / name).mkdir(parents=True)
            for number in range(3 if place == TRAIN_FOLDER else 1):
                (root / place / name / f"{number}.JPEG").touch()
    (root / FOLDERS["imagenet-a"] / "README.txt").touch()
    (root / FOLDERS["imagenet-a"] / wordnet_numbers("a")[0] / "._0.JPEG").touch()
    return root


IMAGENET = task_of(DOMAINS, "imagenet", shots=1)


def test_imagenet_and_its_four_sets_lie_where_coop_puts_them() -> None:
    assert TRAIN_FOLDER == "imagenet/images/train"
    assert FOLDERS == {
        "test": "imagenet/images/val",
        "imagenet-v2": "imagenetv2/imagenetv2-matched-frequency-format-val",
        "imagenet-sketch": "imagenet-sketch/images",
        "imagenet-a": "imagenet-adversarial/imagenet-a",
        "imagenet-r": "imagenet-rendition/imagenet-r",
    }


def test_imagenet_and_its_four_sets_are_found(domains: Path) -> None:
    parts = opened(DOMAINS, IMAGENET, domains)
    assert parts.classes == wordnet_numbers() and len(parts.train) == len(parts.val) == 1000
    assert {name: len(e) for name, e in parts.tests.items()} == {
        "test": 1000, "imagenet-v2": 1000, "imagenet-sketch": 1000, "imagenet-a": 200, "imagenet-r": 200
    }  # fmt: skip
    for name in ("test", "imagenet-sketch", "imagenet-a", "imagenet-r"):
        assert all(e.path.parent.name == parts.classes[int(str(e.label))] for e in parts.tests[name])
    assert not {e.path for e in parts.train} & {e.path for e in parts.val}
    assert opened(DOMAINS, IMAGENET, domains, seed=1).train != parts.train


def test_folders_of_imagenet_v2_are_numbers_not_words(domains: Path) -> None:
    found = opened(DOMAINS, IMAGENET, domains).tests["imagenet-v2"]
    assert [e.path.parent.name for e in found] == [str(e.label) for e in found] == [str(i) for i in range(1000)]


@pytest.mark.parametrize("kind", ["a", "r"])
def test_the_200_classes_of_a_and_r_are_among_the_1000(kind: str) -> None:
    some, every = wordnet_numbers(kind), wordnet_numbers()
    assert len(some) == 200 and len(every) == len(set(every)) == 1000
    assert list(some) == sorted(set(some)) and set(some) < set(every) and list(every) == sorted(every)
    assert all(every[label] == number for number, label in labels_of(f"imagenet-{kind}").items())


def test_a_class_folder_of_another_set_is_refused(domains: Path) -> None:
    other = next(number for number in wordnet_numbers() if number not in wordnet_numbers("a"))
    folder = domains / FOLDERS["imagenet-a"] / other
    folder.mkdir()
    try:
        assert f"{folder} is not one of the 200 classes of imagenet-a" in refused(DOMAINS, IMAGENET, domains)
    finally:
        folder.rmdir()


def test_too_few_images_of_an_imagenet_class_are_named(domains: Path) -> None:
    text = refused(DOMAINS, replace(IMAGENET, shots=2), domains)
    assert "n01440764 has 3 images, but 2 to train on and 2 to validate are needed" in text
