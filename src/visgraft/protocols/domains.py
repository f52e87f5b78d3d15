"""Domain generalisation: training on 16 images of each ImageNet class, tests on ImageNet and four sets of its classes.

Source: CoOp's and NOAH's programs (KaiyangZhou/CoOp, DATASETS.md; ZhangYuanhan-AI/NOAH), with CoOp's folders.
Settings are chosen on 4 further training images of each class; the final run trains on the 16 alone. Labels are always
0 to 999, the place of a class's WordNet number among the sorted 1,000. ImageNet-A and ImageNet-R have images of 200
classes only; answers are taken among those, as CoOp does and as both sets' authors propose, while NOAH takes them among
all 1,000.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

from visgraft.data.dataset import Example
from visgraft.errors import DataError, VisgraftError
from visgraft.protocols.layouts import class_folders
from visgraft.protocols.row import TEST, Parts, Protocol, Task
from visgraft.protocols.shots import order_of_class

TRAIN_FOLDER = "imagenet/images/train"
FOLDERS = {
    TEST: "imagenet/images/val",
    "imagenet-v2": "imagenetv2/imagenetv2-matched-frequency-format-val",
    "imagenet-sketch": "imagenet-sketch/images",
    "imagenet-a": "imagenet-adversarial/imagenet-a",
    "imagenet-r": "imagenet-rendition/imagenet-r",
}
LAYOUT = f"ROOT/{{{','.join((TRAIN_FOLDER, *FOLDERS.values()))}}}/<class>/<images>"
MOST_VALIDATION = 4  # images per class


@cache
def wordnet_numbers(kind: str = "") -> tuple[str, ...]:
    """Return the sorted WordNet numbers of ImageNet's 1,000 classes, or of the 200 of ImageNet-A ("a") or -R ("r").

    They come with timm.

    Raises:
        VisgraftError: timm no longer has them.
    """
    name = f"imagenet_{kind}_synsets.txt" if kind else "imagenet_synsets.txt"
    file = files("timm") / "data" / "_info" / name
    if not file.is_file():
        raise VisgraftError(f"timm has no {name}; install timm 1.0.28 or another version that has it")
    return tuple(file.read_text(encoding="utf-8").split())


def labels_of(test: str) -> Mapping[str, int]:
    """Return the labels, from 0 to 999, of the class folders that a test set may have.

    Those of ImageNet-V2 are named by the labels themselves: 10 comes after 9, not after 1.
    """
    every = {number: label for label, number in enumerate(wordnet_numbers())}
    if test == "imagenet-v2":
        return {str(label): label for label in every.values()}
    if test in ("imagenet-a", "imagenet-r"):
        return {number: every[number] for number in wordnet_numbers(test[-1])}
    return every


def open_imagenet(folder: Path, task: Task, seed: int) -> Parts:
    """Draw the shots and the validation images, and find all test sets; `folder` is the one that holds all sets.

    Raises:
        DataError: a folder is missing, a class folder has a name that the set does not have, or holds too few images.
    """
    names = wordnet_numbers()
    stored = class_folders(folder / TRAIN_FOLDER, labels_of("train"), "the classes of ImageNet", task.layout)
    val_shots = min(task.shots, MOST_VALIDATION)
    train, val = list[Example](), list[Example]()
    for label, found in stored.items():
        inner = folder / TRAIN_FOLDER / names[label]
        if len(found) < task.shots + val_shots:
            needed = f"{task.shots} to train on and {val_shots} to validate"
            raise DataError(f"{inner} has {len(found)} images, but {needed} are needed; complete it")
        order = order_of_class(len(found), label, seed)
        train += [Example(inner / found[i], label) for i in sorted(order[: task.shots])]
        val += [Example(inner / found[i], label) for i in sorted(order[task.shots : task.shots + val_shots])]
    tests = {test: tuple(_examples(folder / place, test, task)) for test, place in FOLDERS.items()}
    return Parts(names, tuple(train), tuple(val), tests)


def _examples(folder: Path, test: str, task: Task) -> Iterator[Example]:
    labels = labels_of(test)
    name = {label: name for name, label in labels.items()}
    what = f"the {len(labels):,} classes of {'ImageNet' if test == TEST else test}"
    for label, found in class_folders(folder, labels, what, task.layout).items():
        inner = folder / name[label]
        yield from (Example(inner / image, label) for image in found)


_IMAGES = {
    "train": 16_000, "val": 4_000, TEST: 50_000,
    "imagenet-v2": 10_000, "imagenet-sketch": 50_889, "imagenet-a": 7_500, "imagenet-r": 30_000,
}  # fmt: skip

DOMAINS = Protocol(
    "domain-generalisation",
    "domain generalisation",
    (Task("imagenet", "imagenet", 1_000, _IMAGES, ".", open_imagenet, LAYOUT, shots=16),),
    "images as DATASETS.md of github.com/KaiyangZhou/CoOp says",
    final_parts="train",
    epochs=100,
)
