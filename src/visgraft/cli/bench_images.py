"""Which protocol `visgraft bench` works with, and where its images are."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visgraft.cli.labels import Label, Number, OneClass, Several
from visgraft.errors import VisgraftError

if TYPE_CHECKING:
    from visgraft.data.label_columns import LabelColumns
    from visgraft.data.mirror import Mirror
    from visgraft.protocols.row import Protocol

FOLDER = "folder"

ProtocolName = Annotated[
    str, typer.Argument(help="a name that `visgraft bench list` shows, or folder", metavar="PROTOCOL")
]
Root = Annotated[
    str | None,
    typer.Option(help="folder of the images, or its URL, e.g. s3://; offline: a cache folder", show_default=False),
]
Tasks = Annotated[str | None, typer.Option(help="only these tasks, with commas")]
Shots = Annotated[str | None, typer.Option(help="PROTOCOL folder: training images per class, e.g. 1,2,4,8,16")]
ShiftedFolders = Annotated[
    list[str] | None,
    typer.Option(help="PROTOCOL folder: NAME=FOLDER, a further test set of the same classes; repeatable"),
]


def names(text: str) -> tuple[str, ...]:
    """Return names that were typed with commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


@dataclass(frozen=True)
class ProtocolImages:
    """The images of a protocol, as typed; only the protocol `folder` has more than the first two options."""

    root: Root = None
    tasks: Tasks = None
    label: Label = None
    number: Number = None
    several: Several = None
    one_class: OneClass = None
    shots: Shots = None
    shifted: ShiftedFolders = None

    @property
    def columns(self) -> "LabelColumns | None":
        """The columns of a table that hold the labels; None: the usual ones."""
        from visgraft.data.label_columns import LabelColumns

        return LabelColumns.parsed(self.label, self.number, self.several, self.one_class)

    @property
    def named(self) -> tuple[str, ...]:
        """The tasks that were named; none: all."""
        return names(self.tasks or "")

    def opened(self, protocol: str) -> tuple["Protocol", Path, "Mirror | None"]:
        """Return a protocol, the folder of its images, and what that is a copy of.

        Raises:
            VisgraftError: there is no such protocol, its images are not named, or an option does not go with it.
        """
        return self._folder() if protocol == FOLDER else self._published(protocol)

    def _published(self, protocol: str) -> tuple["Protocol", Path, "Mirror | None"]:
        from visgraft.data.mirror import mirrored
        from visgraft.data.urls import is_url
        from visgraft.files import cache_folder
        from visgraft.protocols import get_protocol

        if self.shots or self.shifted or self.columns:
            raise VisgraftError(
                f"{protocol} fixes its own images; use --label, --number, --several, --one-class, --shots, --shifted "
                "with the protocol folder only"
            )
        found = get_protocol(protocol)
        if self.root is None and found.prepare is None:
            raise VisgraftError(f"pass --root, the folder that holds the images of {protocol}")
        if not is_url(self.root):
            return found, cache_folder() / "offline-2" if self.root is None else Path(self.root), None
        if found.prepare is not None:
            raise VisgraftError(f"{protocol} makes its own images; --root can only be a folder on this machine")
        chosen = found.only(self.named) if self.named else found.tasks
        return found, *mirrored(self.root, list(dict.fromkeys(task.folder for task in chosen)))

    def _folder(self) -> tuple["Protocol", Path, "Mirror | None"]:
        from visgraft.data.mirror import mirrored
        from visgraft.data.urls import is_url
        from visgraft.protocols.folder import folder_protocol

        if self.root is None:
            raise VisgraftError("pass --root, the folder with your images")
        pairs = [pair.partition("=") for pair in self.shifted or ()]
        wrong = next((title for title, _, folder in pairs if not (title and folder)), None)
        if wrong is not None:
            raise VisgraftError(f"--shifted is {wrong!r}, but must be NAME=FOLDER")
        try:
            counts = [int(count) for count in names(self.shots or "")]
        except ValueError as error:
            raise VisgraftError(
                f"--shots is {self.shots!r}, but must be whole numbers with commas, e.g. 1,2,4"
            ) from error
        folder, mirror = mirrored(self.root) if is_url(self.root) else (Path(self.root), None)
        others = {title: Path(place) for title, _, place in pairs}
        return folder_protocol(folder, shots=counts, shifted=others, labels=self.columns), folder, mirror
