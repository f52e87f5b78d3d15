"""Open the images of a protocol's task, and check them before anything is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visgraft.data.dataset import Example, listed
from visgraft.errors import DataError
from visgraft.protocols.row import Parts, Protocol, Task


@dataclass(frozen=True)
class Finding:
    """What is wrong with a task's images, or that nothing is."""

    task: str
    ok: bool
    text: str


def open_task(protocol: Protocol, task: Task, root: Path, seed: int = 0, *, any_size: bool = False) -> Parts:
    """Find the images of a task below `root` and check them; nothing is decoded.

    Args:
        protocol: whose task it is.
        task: one of its rows.
        root: the folder of the protocol's images.
        seed: of what is drawn, for a task with `shots`.
        any_size: accept other numbers of images than the task's.

    Raises:
        DataError: the folder is missing or laid out otherwise, a part is empty, the numbers of images are not the
            task's, a label is no class, a class has no training image, or an image is in two parts.
    """
    parts = task.open(root / task.folder, task, seed)
    wrong = list(problems(parts, task, any_size=any_size))
    if wrong:
        raise DataError(f"{protocol.name}, {task.name}, in {root / task.folder}: {wrong[0]}")
    return parts


def problems(parts: Parts, task: Task, *, any_size: bool = False) -> list[str]:
    """Return what is wrong with a task's images, in a line each with the remedy."""
    by_name = {"train": parts.train, "val": parts.val, **parts.tests}
    found = [
        f"there are no {name} images; the layout expected is {task.layout}" for name, e in by_name.items() if not e
    ]
    if len(parts.classes) != task.classes:
        found.append(f"there are {len(parts.classes)} classes instead of {task.classes}")
    if not any_size:
        found += [
            f"there are {len(by_name.get(name, ())):,} {name} images instead of {count:,}; complete them, or pass "
            "--any-size, and the results will say so"
            for name, count in task.images.items()
            if len(by_name.get(name, ())) != count
        ]
    for name, examples in by_name.items():
        outside = next((e for e in examples if not 0 <= int(e.label) < len(parts.classes)), None)  # type: ignore[arg-type]
        if outside is not None:
            found.append(
                f"{outside.path} in {name} has the label {outside.label}, but labels are 0 to {task.classes - 1}"
            )
    absent = set(range(len(parts.classes))) - {e.label for e in parts.train}
    if absent:
        found.append(f"classes without a training image: {listed(parts.classes[i] for i in absent)}")
    return [*found, *leaks(by_name)]


def leaks(by_name: Mapping[str, Sequence[Example]]) -> list[str]:
    """Name the first image that is in two parts: what is chosen or learned on it would be measured on it again."""
    seen: dict[Path, str] = {}
    for name, examples in by_name.items():
        for example in examples:
            other = seen.setdefault(example.path, name)
            if other != name:
                return [f"{example.path} is in {other} and in {name}, so the split leaks; leave it in one of them"]
    return []


def check_root(protocol: Protocol, root: Path) -> list[Finding]:
    """Look at every task's images, and say what is wrong; a problem of the data raises nothing."""
    findings = []
    for task in protocol.tasks:
        try:
            parts = task.open(root / task.folder, task, 0)
        except DataError as error:
            findings.append(Finding(task.name, False, str(error)))
            continue
        wrong = problems(parts, task) + _missing(parts)
        counts = ", ".join(
            f"{len(examples):,} {name}"
            for name, examples in {"train": parts.train, "val": parts.val, **parts.tests}.items()
        )
        findings.append(Finding(task.name, not wrong, "; ".join(wrong) or f"{task.classes} classes, {counts}"))
    return findings


def _missing(parts: Parts) -> list[str]:
    """Name the first image files that a list names and that are not there."""
    everything = (*parts.train, *parts.val, *(e for examples in parts.tests.values() for e in examples))
    absent = [str(example.path) for example in everything if not example.path.is_file()]
    return [f"{len(absent):,} image files are missing: {listed(absent, 3)}"] if absent else []
