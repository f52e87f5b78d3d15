"""FGVC: five data sets of fine-grained classes with the splits of visual prompt tuning.

Source: Jia et al., "Visual Prompt Tuning", 2022, and its program (KMnP/vpt): the folders that come with its splits,
src/data/datasets/json_dataset.py and train.py. There, train.json, val.json and test.json map image paths to class
numbers (as text in those of CUB), which are renumbered from 0 in their order. Its FGVC runs train on train.json alone,
the final ones too (only its VTAB runs train on both parts); val.json chooses the settings. Images are resized by their
shorter side and cropped, not squashed.

Here the numbers of train.json give the labels of all three files. That program renumbers each file by itself, so that
the labels of nabirds' val.json, which lacks two of the 555 classes, are not those that it trains on.
"""

from functools import partial
from pathlib import Path

from visgraft.data.dataset import PARTS, Example
from visgraft.errors import DataError
from visgraft.protocols.layouts import place, read_json
from visgraft.protocols.row import TEST, Parts, Protocol, Task


def open_json(folder: Path, task: Task, seed: int, *, images: str = "") -> Parts:
    """Find the images that the three files name; their paths start at the folder `images` in the task's folder.

    The classes are those of train.json, named by their numbers there.

    Raises:
        DataError: a file is missing or is not such a map, or another file has a class that train.json lacks.
    """
    files = {part: folder / f"{part}.json" for part in PARTS}
    stored = {part: _entries(file, task) for part, file in files.items()}
    label = {number: index for index, number in enumerate(sorted(set(stored["train"].values())))}
    found: dict[str, tuple[Example, ...]] = {}
    for part, entries in stored.items():
        unknown = next((name for name, number in entries.items() if number not in label), None)
        if unknown is not None:
            text = f"{files[part]} gives {unknown} the class {entries[unknown]}, which {files['train']} lacks"
            raise DataError(f"{text}; fetch the three files from one source")
        found[part] = tuple(
            Example(place(folder / images, name, str(files[part])), label[number]) for name, number in entries.items()
        )
    return Parts(tuple(str(number) for number in label), found["train"], found["val"], {TEST: found["test"]})


def _entries(file: Path, task: Task) -> dict[str, int]:
    return {name: _whole(number, name, file) for name, number in read_json(file, task.layout).items()}


def _whole(number: object, name: str, file: Path) -> int:
    if isinstance(number, int) and not isinstance(number, bool):
        return number
    if isinstance(number, str) and number.isdecimal():
        return int(number)
    raise DataError(f"{file} gives {name} the class {number!r}, but must give a whole number; fetch it again")


def _row(name: str, folder: str, classes: int, counts: tuple[int, int, int], images: str = "") -> Task:
    below = f"{folder}/{images}" if images else folder
    layout = f"ROOT/{folder}/{{train,val,test}}.json with {{path: class}}, the paths below ROOT/{below}"
    train, val, test = counts
    return Task(
        name,
        "fgvc",
        classes,
        {"train": train, "val": val, TEST: test},
        folder,
        partial(open_json, images=images),
        layout,
    )


FGVC = Protocol(
    "fgvc",
    "FGVC",
    (
        _row("cub_200_2011", "CUB_200_2011", 200, (5_394, 600, 5_794), "images"),
        _row("nabirds", "nabirds", 555, (21_536, 2_393, 24_633), "images"),
        _row("oxford_flowers", "OxfordFlower", 102, (1_020, 1_020, 6_149)),
        _row("stanford_dogs", "Stanford-dogs", 120, (10_800, 1_200, 8_580), "Images"),
        _row("stanford_cars", "Stanford-cars", 196, (7_329, 815, 8_041)),
    ),
    "images of each set's own site; split files of visual prompt tuning, see README of github.com/KMnP/vpt",
    final_parts="train",
    epochs=100,
    squash=False,
)
