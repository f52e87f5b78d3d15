"""Few-shot learning: five data sets with 1, 2, 4, 8 and 16 training images per class, from CoOp's split files.

Source: Zhou et al., "Learning to Prompt for Vision-Language Models", 2022, and its program (KaiyangZhou/CoOp:
DATASETS.md and datasets/), whose folders and files are expected here; NOAH and others follow it. k training images of
each class and min(k, 4) validation images are drawn with the seed from the files' train and val parts. The draws are
our own, with the same rule: CoOp's and NOAH's depend on the state of Python's generator. The final run trains on the k
images alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from visgraft.data.dataset import PARTS, Example
from visgraft.errors import DataError, nearest
from visgraft.protocols.layouts import place, read_json, read_text
from visgraft.protocols.row import TEST, Parts, Protocol, Task
from visgraft.protocols.shots import draw_shots

SHOTS = (1, 2, 4, 8, 16)
MOST_VALIDATION = 4  # images per class


def open_split(folder: Path, task: Task, seed: int, *, file: str, images: str = "") -> Parts:
    """Find the images of a split file {"train": [[path, label, class name], ...], "val": ..., "test": ...}.

    The paths start at the folder `images` in the task's folder.

    Raises:
        DataError: the file is missing or is not one of these, or a class has too few images for the shots.
    """
    stored = read_json(folder / file, task.layout)
    found, names = dict[str, tuple[Example, ...]](), dict[int, str]()
    for part in PARTS:
        if not isinstance(stored.get(part), list):
            raise DataError(f"{folder / file} has no list {part!r}; fetch it again")
        rows = [_row_of(row, f"{folder / file}, {part}, entry {i}") for i, row in enumerate(stored[part])]
        found[part] = tuple(Example(place(folder / images, path, str(folder / file)), n) for path, n, _ in rows)
        names |= {label: name for _, label, name in rows}
    classes = tuple(names.get(label, str(label)) for label in range(task.classes))
    return _with_shots(classes, found, task, seed)


def _row_of(row: Any, where: str) -> tuple[str, int, str]:
    match row:
        case [str(path), int(label), str(name)] if label >= 0:
            return path, label, name
    raise DataError(f"{where} is {row!r}, but must be [path, label, class name]; fetch the file again")


def open_aircraft(folder: Path, task: Task, seed: int) -> Parts:
    """Find the images of FGVC-Aircraft by its own lists of variants, whose lines are `number variant`.

    Raises:
        DataError: a list is missing or has a line with no known variant, or a class has too few images for the shots.
    """
    classes = tuple(
        line.strip() for line in read_text(folder / "variants.txt", task.layout).splitlines() if line.strip()
    )
    label = {name: index for index, name in enumerate(classes)}
    found: dict[str, tuple[Example, ...]] = {}
    for part in PARTS:
        file, examples = folder / f"images_variant_{part}.txt", []
        for number, line in enumerate(read_text(file, task.layout).splitlines(), 1):
            name, _, variant = line.strip().partition(" ")
            if not name:
                continue
            if variant not in label:
                hint = nearest(variant, classes, 1)
                raise DataError(f"{file}, line {number}: {variant!r} is not in {folder / 'variants.txt'}{hint}")
            examples.append(Example(place(folder / "images", f"{name}.jpg", f"{file}, line {number}"), label[variant]))
        found[part] = tuple(examples)
    return _with_shots(classes, found, task, seed)


def _with_shots(classes: tuple[str, ...], found: dict[str, tuple[Example, ...]], task: Task, seed: int) -> Parts:
    train, val = found["train"], found["val"]
    if task.shots:
        train = draw_shots(train, task.shots, seed, classes=classes)
        val = draw_shots(val, min(task.shots, MOST_VALIDATION), seed, classes=classes)
    return Parts(classes, train, val, {TEST: found["test"]})


@dataclass(frozen=True)
class _Set:
    name: str
    classes: int
    test: int
    folder: str
    layout: str
    open: Callable[[Path, Task, int], Parts]

    def task(self, shots: int) -> Task:
        val = min(shots, MOST_VALIDATION)
        images = {"train": shots * self.classes, "val": val * self.classes, TEST: self.test}
        return Task(
            f"{self.name}-{shots}shot", self.name, self.classes, images, self.folder, self.open, self.layout, shots
        )


def _set(name: str, classes: int, test: int, folder: str, file: str, images: str = "") -> _Set:
    below = f"{folder}/{images}" if images else folder
    layout = f"ROOT/{folder}/{file}, its paths below ROOT/{below}"
    return _Set(name, classes, test, folder, layout, partial(open_split, file=file, images=images))


_AIRCRAFT = "ROOT/fgvc_aircraft/{variants,images_variant_train,images_variant_val,images_variant_test}.txt and images/"
_SETS = (
    _set("food101", 101, 30_300, "food-101", "split_zhou_Food101.json", "images"),
    _set("oxford_pets", 37, 3_669, "oxford_pets", "split_zhou_OxfordPets.json", "images"),
    _set("stanford_cars", 196, 8_041, "stanford_cars", "split_zhou_StanfordCars.json"),
    _set("oxford_flowers102", 102, 2_463, "oxford_flowers", "split_zhou_OxfordFlowers.json", "jpg"),
    _Set("fgvc_aircraft", 100, 3_333, "fgvc_aircraft", _AIRCRAFT, open_aircraft),
)

FEW_SHOT = Protocol(
    "few-shot",
    "few-shot learning",
    tuple(one.task(shots) for one in _SETS for shots in SHOTS),
    "images and split files as DATASETS.md of github.com/KaiyangZhou/CoOp says",
    final_parts="train",
    epochs=100,
)
