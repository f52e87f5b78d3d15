"""Name -> format: what a way out of visgraft has to say of itself, and the registry that the verb `export` reads."""

import copy
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from visgraft.adapters.directory import Adapted
from visgraft.core.attach import detach
from visgraft.core.attached import get_attached
from visgraft.errors import MergeError, VisgraftError, nearest
from visgraft.export.merge import merge
from visgraft.export.samples import Samples
from visgraft.options import Options

FORMATS: dict[str, type["Format"]] = {}
AGREEMENT = 0.98
"""Least share of equal answers where weights have fewer bits, unless the user says otherwise."""

F = TypeVar("F", bound="type[Format]")


class ExportError(VisgraftError):
    """An adapter cannot be written in a format, or the file written answers otherwise than the model."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What is exported: the adapter as it was loaded, and where it came from, as the user named it.

    `samples` are the pictures that the file will be proven on; `calibration` reads others, training images,
    where the user gave any.
    """

    adapted: Adapted
    name: str
    samples: Samples
    calibration: Callable[[], Samples] | None = None

    @cached_property
    def _merged(self) -> tuple[nn.Module, str | None]:
        try:
            return merge(self.adapted.model)[0], None
        except MergeError as error:  # the adapter goes with the model, and the certificate says why
            return self.adapted.model, str(error)

    @property
    def why_not_merged(self) -> str | None:
        """Why the adapter does not fold into the backbone's weights; None where it does."""
        return self._merged[1]

    @property
    def model(self) -> nn.Module:
        """The model to write, in eval mode: the plain merged one where the adapter folds, otherwise the adapted one."""
        return self._merged[0]

    @cached_property
    def backbone(self) -> nn.Module:
        """The plain backbone in eval mode as it was before the adapter, its head with it."""
        model, digest = self.adapted.model, get_attached(self.adapted.model).plain
        return detach(copy.deepcopy(model, {id(digest): digest})).eval()

    def plain(self) -> nn.Module:
        """Return the merged model.

        Raises:
            ExportError: the adapter does not fold.
        """
        if self.why_not_merged is not None:
            raise ExportError(self.why_not_merged)
        return self.model


class Format:
    """Base of every format; a subclass is registered, says what it needs, writes, and asks the other runtime.

    Attributes:
        Options: a frozen dataclass of the options that this format takes; the command line's flags follow from it.
        summary: one line for the list.
        suffix: of the one file it writes, with its dot; empty where it writes a folder.
        packages: modules that have to be importable, with the name under which pip installs them.
        extra: the extra of visgraft that installs them.
        runtime: the package that computes the answers, for the certificate; empty: torch itself.
        cannot: values that other formats take and this one cannot, by option, with the reason and a remedy.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Options]] = Options
    summary: ClassVar[str] = ""
    suffix: ClassVar[str] = ""
    packages: ClassVar[Mapping[str, str]] = {}
    extra: ClassVar[str] = ""
    runtime: ClassVar[str] = ""
    cannot: ClassVar[Mapping[str, Mapping[str, str]]] = {}

    @classmethod
    def refusal(cls, adapted: Adapted, options: Any) -> str | None:
        """Return why this adapter cannot be written so, as `it ...`; None where nothing is known against it.

        Asked of a model without data (on the meta device) too, before anything is computed.
        """
        return None

    @classmethod
    def check_data(cls, options: Any, given: bool) -> None:
        """Raise an ExportError where these options need the user's pictures, and none are given: int8 does."""
        if getattr(options, "precision", None) == "int8" and not given:
            raise ExportError(
                "--precision int8 changes answers, and only your own pictures show how many; add --data DIR"
            )

    @classmethod
    def write(cls, subject: Subject, options: Any, target: Path) -> Mapping[str, Any]:
        """Write the file, or fill the empty folder, `target`; returns facts for the certificate."""
        raise TypeError(f"{cls.__name__} must define write(subject, options, target)")

    @classmethod
    def opened(cls, target: Path, options: Any) -> Callable[[Samples], Tensor]:
        """Open what was written in its own runtime; returns what computes the logits [N, classes] of samples there."""
        raise TypeError(f"{cls.__name__} must define opened(target, options)")

    @classmethod
    def opened_onto(cls, subject: Subject, target: Path, options: Any) -> Callable[[Samples], Tensor]:
        """Like `opened`, for a format that holds no backbone and is opened onto the subject's own; others need none."""
        return cls.opened(target, options)

    @classmethod
    def images_each(cls, options: Any) -> int:
        """Return how many images what `opened_onto` returns computes for a sample, by which its time is divided."""
        return 1

    @classmethod
    def least_agreement(cls, options: Any) -> float | None:
        """Return the share of answers that must agree; None: every logit must, up to the rounding of float32.

        It counts with a `precision` of less than fp32, and is the option `least_agreement` where that is given.
        """
        if getattr(options, "precision", "fp32") == "fp32":
            return None
        return AGREEMENT if options.least_agreement is None else float(options.least_agreement)

    @classmethod
    def prepares(cls, options: Any) -> bool:
        """Whether what is written takes pictures of any size, and resizes and crops them by itself."""
        return bool(getattr(options, "pixels", None) == "any-size")

    @classmethod
    def usage(cls, out: Path, options: Any) -> str:
        """Return a line that says how the result is opened."""
        return ""


def register_format(name: str) -> Callable[[F], F]:
    """Class decorator that enters a `Format` under `name`.

    Raises:
        VisgraftError: the name is taken.
    """

    def enter(cls: F) -> F:
        if name in FORMATS:
            raise VisgraftError(f"the format name {name!r} is taken by {FORMATS[name].__qualname__}; choose another")
        cls.name = name
        FORMATS[name] = cls
        return cls

    return enter


def missing_packages(form: type[Format]) -> list[str]:
    """Return the names under which pip installs what a format needs and is not here."""
    return [name for module, name in form.packages.items() if not _importable(module)]


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def find_format(name: str, known: Mapping[str, type[Format]]) -> type[Format]:
    """Return the format of that name.

    Raises:
        ExportError: there is none; the nearest names and all of them are told.
    """
    if name not in known:
        raise ExportError(f"unknown format {name!r}{nearest(str(name), known)} (formats: {', '.join(known)})")
    return known[name]
