"""Errors whose message is one line that names the cause and the remedy; the command line prints them as they are."""

import difflib
import warnings
from collections.abc import Iterable


class VisgraftError(Exception):
    """Base of every error that visgraft raises on purpose."""


class SiteError(VisgraftError):
    """A backbone lacks a place that a method needs, or a hook would not sit where its row says."""


class MergeError(VisgraftError):
    """An adapted model cannot be folded exactly into a plain one."""


class AdapterError(VisgraftError):
    """An adapter directory is damaged, foreign, or does not fit the backbone."""


class WeightsError(VisgraftError):
    """Backbone weights are missing or do not fit the architecture."""


class DataError(VisgraftError):
    """A data folder, file or label cannot be used."""


class CannotDivide(DataError):
    """There are too few images, or groups, for all parts that are to be drawn."""


class UnknownClasses(DataError):
    """Images have classes that a model does not know, `found`; `multi_label`: they may have several each."""

    def __init__(self, message: str, multi_label: bool, found: str) -> None:
        super().__init__(message)
        self.multi_label, self.found = multi_label, found

    def __reduce__(self) -> tuple[type["UnknownClasses"], tuple[str, bool, str]]:
        return type(self), (str(self), self.multi_label, self.found)


class Interrupted(VisgraftError):
    """The user stopped a run; its message says what was kept and how to go on."""


class TrainingDiverged(VisgraftError):
    """The loss stopped being finite; the model holds its last good state."""

    def __init__(self, message: str, last_good_epoch: int) -> None:
        super().__init__(message)
        self.last_good_epoch = last_good_epoch

    def __reduce__(self) -> tuple[type["TrainingDiverged"], tuple[str, int]]:
        return type(self), (str(self), self.last_good_epoch)


class VisgraftWarning(UserWarning):
    """What a user should know and may act on; the command line shows these, and no library's."""


def warn_user(text: str) -> None:
    """Warn where nobody asked to be told otherwise."""
    warnings.warn(text, VisgraftWarning, stacklevel=3)


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return `"; did you mean a, b?"` for the known names closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {', '.join(matches)}?" if matches else ""
