"""What a protocol is: rows of data that say which images a task trains and tests on. No row does anything by itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from visgraft.data.dataset import Example
from visgraft.errors import VisgraftError, nearest

TEST = "test"


class Parts(NamedTuple):
    """The images of a task, found but not read.

    `tests` are test sets by name: "test" and, where a protocol asks what a change of domain does, the shifted ones.
    A label is an index into `classes`, or, where images have several classes, several labels or numbers, what
    `visgraft.data.examples.Example` says; with several labels `classes` are the names of all outputs.
    """

    classes: tuple[str, ...]
    train: Sequence[Example]
    val: Sequence[Example]
    tests: Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class Task:
    """One row of a protocol.

    `classes` is the number of classes, or, with several labels, of outputs: one for each class, one for a number.
    `images` are how many images the published set has: of "train", "val" and of each test set by its name.
    `open` finds them: (the task's folder, this task, seed of what is drawn) -> parts; it raises a DataError that names
    the missing folder or file and the layout expected.
    """

    name: str
    group: str
    classes: int
    images: Mapping[str, int]
    folder: str
    open: Callable[[Path, "Task", int], Parts] = field(repr=False, compare=False)
    layout: str = ""
    """The layout expected below the folder, in a few words for people."""
    shots: int = 0
    """Training images per class, drawn with the seed; 0: all."""


@dataclass(frozen=True)
class Protocol:
    """Tasks that are reported together, and how their images are used.

    `final_parts` is what the one run that reads the test images trains on. `image_size` None is the backbone's own;
    `squash` resizes straight to it, without a crop.
    """

    name: str
    title: str
    tasks: tuple[Task, ...]
    source: str
    final_parts: str = "train+val"
    """"train+val" or "train"."""
    backbone: str = "vit_base_patch16_224.augreg_in21k"
    weights: str = "hub"
    image_size: int | None = None
    squash: bool = True
    epochs: int | None = None
    """Of each training where more than a head trains; None: the recipe's. Most programs of the field train for 100."""
    tune_share: float = 1.0
    """The share of those epochs that a training gets when settings are compared on the validation images."""
    cache: str = "auto"
    """Where decoded images are kept (see `visgraft.data.cache`)."""
    prepare: Callable[[Path, Sequence[str]], None] | None = field(default=None, repr=False, compare=False)
    """Makes the images of some tasks below a root, where the protocol can: drawn ones, and those from packages."""

    def task(self, name: str) -> Task | None:
        """Return the task of this name."""
        return next((task for task in self.tasks if task.name == name), None)

    def only(self, names: Sequence[str]) -> tuple[Task, ...]:
        """Return the tasks of these names, in the protocol's order.

        Raises:
            VisgraftError: there is no such task.
        """
        known = [task.name for task in self.tasks]
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None:
            raise VisgraftError(
                f"{self.name} has no task {unknown!r}{nearest(unknown, known)}; it has {', '.join(known)}"
            )
        return tuple(task for task in self.tasks if task.name in names)

    @property
    def groups(self) -> tuple[str, ...]:
        """The tasks' groups in the order of their first task."""
        return tuple(dict.fromkeys(task.group for task in self.tasks))
