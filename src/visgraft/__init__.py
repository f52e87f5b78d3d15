"""visgraft adapts a frozen, pretrained vision backbone by training well under 1 % extra parameters.

`visgraft.public` lists what is offered here; docs/architecture.md says how the parts fit together. Nothing is imported
before it is asked for, so that what needs no torch, such as the command line's help, does not wait for it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from visgraft.version import __version__ as __version__

if TYPE_CHECKING:
    from visgraft.public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Gather the public names on the first question for one."""
    if name == "__all__":
        return [name for name in __dir__() if not name.startswith("_")]
    if not name.startswith("__"):
        _gather()
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module 'visgraft' has no attribute {name!r}")


def __dir__() -> list[str]:
    _gather()
    return sorted(globals().keys() - {"TYPE_CHECKING", "Any", "importlib"})


def _gather() -> None:
    """Take over the public names, but for those that somebody has put in their place."""
    public = importlib.import_module("visgraft.public")  # other threads wait here until it is whole
    own = globals()
    own.update({name: value for name, value in vars(public).items() if not name.startswith("_") and name not in own})
