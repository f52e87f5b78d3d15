"""Name -> method. Registering is all it takes: flags, counts, storage, docs and the conformance tests follow."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from visgraft.errors import VisgraftError, nearest
from visgraft.option_types import types_of

if TYPE_CHECKING:
    from visgraft.core.method import Method

M = TypeVar("M", bound="Method")
METHODS: dict[str, type["Method"]] = {}


def register(name: str, *, paper: str) -> "Callable[[type[M]], type[M]]":
    """Class decorator that enters a `Method` under `name`; `paper` is its source, e.g. `"arXiv:2309.08513"`.

    Raises:
        VisgraftError: the name is taken, the class shares its config with another method, or an option's type cannot be
            stored.
    """

    def enter(cls: type[M]) -> type[M]:
        if name in METHODS:
            raise VisgraftError(f"the method name {name!r} is taken by {METHODS[name].__qualname__}; choose another")
        if "method" in cls.Config.__dict__:
            raise VisgraftError(f"{cls.Config.__name__} belongs to {cls.Config.method!r}; give {name!r} its own")
        types_of(cls.Config)  # an option that no file could hold should show here, not when a training is saved
        cls.name, cls.paper, cls.Config.method = name, paper, name
        METHODS[name] = cls
        return cls

    return enter


def list_methods() -> dict[str, type["Method"]]:
    """Return all methods by name, in order of registration; `.Config`, `.recipe` and `.paper` tell about each.

    Those of visgraft are there once `visgraft.methods` is imported, from where others than `core` take this function.
    """
    return dict(METHODS)


def get_method(name: str) -> type["Method"]:
    """Return the method class registered under `name`.

    Raises:
        VisgraftError: no such method; the message lists the nearest names and all of them.
    """
    known = list_methods()
    if name not in known:
        raise VisgraftError(f"unknown method {name!r}{nearest(name, known)} (methods: {', '.join(known)})")
    return known[name]


def method_names() -> list[str]:
    """Return the registered names in order of registration."""
    return list(list_methods())
