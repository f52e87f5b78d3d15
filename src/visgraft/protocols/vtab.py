"""VTAB-1k: 19 tasks of 800 training and 200 validation images, in the lists that most programs of the field read.

Source: Zhai et al., "A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark", 2019.
The lists and folders are those of NOAH's program (ZhangYuanhan-AI/NOAH, data/vtab-source/get_vtab1k.py), which
RepAdapter, SSF, SCT and others share. It stores the images of each list anew, in images/<list>/.

The settings are chosen on the 200; the final run trains on all 1,000. 800 images cannot cover the 397 classes of
sun397, so a class without a training image is no fault here.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from visgraft.data.dataset import Example, listed
from visgraft.errors import DataError
from visgraft.protocols.layouts import place, read_text
from visgraft.protocols.row import TEST, Parts, Protocol, Task

LISTS = {"train": "train800.txt", "val": "val200.txt", TEST: "test.txt"}
UNION = "train800val200.txt"
LAYOUT = "ROOT/<task>/{train800,val200,train800val200,test}.txt with lines `path label`, the paths below ROOT/<task>"


def open_lists(folder: Path, task: Task, seed: int) -> Parts:
    """Find the images that the lists name; where there is a list of the 1,000, it must agree with the other two.

    Raises:
        DataError: a list is missing, a line is not a path and a label of the task, or the lists disagree.
    """
    found = {part: _read_list(folder / name, task) for part, name in LISTS.items()}
    if (folder / UNION).exists():
        _check_union(folder / UNION, _read_list(folder / UNION, task), (*found["train"], *found["val"]))
    classes = tuple(str(label) for label in range(task.classes))
    return Parts(classes, found["train"], found["val"], {TEST: found[TEST]})


def _read_list(file: Path, task: Task) -> tuple[Example, ...]:
    examples = []
    for number, line in enumerate(read_text(file, task.layout).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        name, *rest = line.rsplit(None, 1)
        if not rest or not rest[0].isdecimal():
            raise DataError(f"{where} is {line.strip()!r}, but must be `path label`, the label a whole number from 0")
        if int(rest[0]) >= task.classes:
            raise DataError(f"{where} has the label {rest[0]}, but those of {task.name} are 0 to {task.classes - 1}")
        examples.append(Example(place(file.parent, name.strip(), where), int(rest[0])))
    return tuple(examples)


def _check_union(file: Path, union: Sequence[Example], both: Sequence[Example]) -> None:
    """Refuse a list of the 1,000 that is not the other two together.

    Where each list has copies of its own, only the labels can be compared.
    """
    lists = f"{LISTS['train']} and {LISTS['val']}"
    remedy = "fetch all lists from one source"
    if {example.path for example in union} & {example.path for example in both}:
        differing = set(union) ^ set(both)
        if differing:
            names = listed(f"{e.path.relative_to(file.parent)} {e.label}" for e in differing)
            raise DataError(f"{file} is not {lists} together: {names} differ; {remedy}")
    there, here = Counter(int(e.label) for e in union), Counter(int(e.label) for e in both)  # type: ignore[arg-type]
    label = next((label for label in sorted(there | here) if there[label] != here[label]), None)
    if label is not None:
        counts = f"class {label} has {there[label]} images there and {here[label]} in the two"
        raise DataError(f"{file} is not {lists} together: {counts}; {remedy}")


def _row(name: str, group: str, classes: int, test: int, folder: str = "") -> Task:
    images = {"train": 800, "val": 200, TEST: test}
    return Task(name, group, classes, images, folder or name, open_lists, LAYOUT)


VTAB = Protocol(
    "vtab-1k",
    "VTAB-1k",
    (
        _row("cifar100", "natural", 100, 10_000, "cifar"),
        _row("caltech101", "natural", 102, 6_084),
        _row("dtd", "natural", 47, 1_880),
        _row("oxford_flowers102", "natural", 102, 6_149),
        _row("oxford_iiit_pet", "natural", 37, 3_669),
        _row("svhn", "natural", 10, 26_032),
        _row("sun397", "natural", 397, 21_750),
        _row("patch_camelyon", "specialized", 2, 32_768),
        _row("eurosat", "specialized", 10, 5_400),
        _row("resisc45", "specialized", 45, 6_300),
        _row("diabetic_retinopathy", "specialized", 5, 42_670),
        _row("clevr_count", "structured", 8, 15_000),
        _row("clevr_dist", "structured", 6, 15_000),
        _row("dmlab", "structured", 6, 22_735),
        _row("kitti", "structured", 4, 711),
        _row("dsprites_loc", "structured", 16, 73_728),
        _row("dsprites_ori", "structured", 16, 73_728),
        _row("smallnorb_azi", "structured", 18, 12_150),
        _row("smallnorb_ele", "structured", 9, 12_150),
    ),
    "lists and images as data/vtab-source/get_vtab1k.py of github.com/ZhangYuanhan-AI/NOAH makes them",
    epochs=100,
)
