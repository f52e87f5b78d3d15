"""What the type hint of an option allows: one conversion for Python, for stored files and for the command line."""

import dataclasses
import enum
import functools
import sys
import typing
from collections.abc import Iterator, Mapping
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from visgraft.errors import VisgraftError, nearest

WORDS: Mapping[Any, tuple[str, str]] = {
    bool: ("true or false", "values true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
}
"""What one value of a type, and several, are called."""
STORABLE = "use bool, int, float, str, Literal, an Enum of these, or a tuple of these such as tuple[int, ...]"


def types_of(cls: Any) -> Mapping[str, Any]:
    """Return the type hint of every field of a dataclass; where `option` lists choices, they stand for the free text.

    Raises:
        VisgraftError: a hint names what its module does not know, or a type that cannot be stored.
    """
    return _types_of(cls)


@functools.cache
def _types_of(cls: Any) -> Mapping[str, Any]:
    fields = dataclasses.fields(cls)
    try:
        hints = typing.get_type_hints(cls)
    except Exception as error:  # a hint that is a text is an expression, which raises anything
        unknown = getattr(error, "name", None) or str(error)
        at = next((f".{field.name}" for field in fields if unknown in str(field.type)), "")
        raise VisgraftError(
            f"{cls.__name__}{at}: the type hint cannot be read ({error}); define or import what it names at the top "
            f"level of {cls.__module__}"
        ) from error
    found = {}
    for field in fields:
        hint, names = hints[field.name], field.metadata.get("choices")
        _check_storable(hint, f"{cls.__name__}.{field.name}")
        found[field.name] = _narrowed(hint, tuple(names)) if names else hint
    return MappingProxyType(found)


def convert(value: Any, hint: Any, name: str, *, typed: bool = False) -> Any:
    """Return a value as an option of this type holds it.

    Args:
        value: what was given: from Python, from JSON, or the text typed on the command line.
        hint: the option's type, from `types_of`.
        name: what the option is called in errors.
        typed: whether `value` is such a text; tuples have commas in it, and None is `none`.

    Raises:
        VisgraftError: the value, or an item of a tuple, is not of that type.
    """
    value, wrong_item = _unwrapped(value), None
    for kind in _kinds(hint):
        try:
            if get_origin(kind) is tuple:
                return _as_tuple(value, kind, name, typed)
            return _read(value, kind) if typed else _checked(value, kind)
        except ValueError:
            continue
        except VisgraftError as error:
            wrong_item = error
    if wrong_item and len([kind for kind in _kinds(hint) if kind is not NoneType]) == 1:
        raise wrong_item
    told = " ".join(repr(value).split())
    close = nearest(value, names_in(hint)) if isinstance(value, str) else ""
    raise VisgraftError(f"{name} is {told}, but must be {_described(hint, typed)}{close}")


def plain(value: Any) -> Any:
    """Return an option's value as JSON has it: a member of an Enum as its value, a tuple as a list."""
    if isinstance(value, enum.Enum):
        return value.value
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def written(value: Any) -> str:
    """Return an option's value as it is typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(written(item) for item in value)
    value = plain(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def names_in(hint: Any) -> tuple[str, ...]:
    """Return the names that a type lists, as typed, also where other values are allowed beside them."""
    return tuple(dict.fromkeys(written(member) for leaf in _leaves(hint) for member in _members(leaf)))


def choices_of(hint: Any) -> tuple[str, ...]:
    """Return the names of which a value, or each item of a tuple, must be one; none where it may be something else."""
    return names_in(hint) if all(_members(leaf) for leaf in _leaves(hint)) else ()


def allowed(hint: Any) -> str:
    """Return a few words on the names that a type lists, for a help text; empty where it lists none."""
    return ", ".join(choices_of(hint)) or (_described(hint, typed=True) if names_in(hint) else "")


def _kinds(hint: Any) -> list[Any]:
    """The alternatives of a type in the order in which they are tried; None is `NoneType`."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    # The order in a union is not to be relied on: `int | float` equals `float | int`, and typing keeps one of the two.
    # So what nearly every text fits comes last.
    return sorted(kinds, key=lambda kind: {float: 1, str: 3}.get(kind, 2 if get_origin(kind) is tuple else 0))


def _members(kind: Any) -> tuple[Any, ...]:
    """The values that a Literal or an Enum lists."""
    if kind is NoneType:
        return (None,)
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(kind) if isinstance(kind, enum.EnumType) else ()


def _leaves(hint: Any) -> Iterator[Any]:
    """The kinds that a value or an item of a tuple may have, None left out."""
    for kind in _kinds(hint):
        if get_origin(kind) is tuple:
            yield from (leaf for item in get_args(kind) if item is not ... for leaf in _leaves(item))
        elif kind is not NoneType:
            yield kind


def _check_storable(hint: Any, name: str, inside: bool = False) -> None:
    """Raise a VisgraftError unless a file and a command line can hold every value of the type."""
    for kind in _kinds(hint):
        members = [plain(member) for member in _members(kind)]
        if get_origin(kind) is tuple and get_args(kind) and not inside:
            for item in get_args(kind):
                if item is not ...:
                    _check_storable(item, name, inside=True)
        elif kind not in WORDS and not (members and all(isinstance(m, (*WORDS, NoneType)) for m in members)):
            told = kind.__qualname__ if isinstance(kind, type) else str(kind)
            raise VisgraftError(f"{name} has the type {told}, which cannot be stored; {STORABLE}")


def _narrowed(hint: Any, names: tuple[Any, ...]) -> Any:
    """The type with the names in place of what may be any text or number."""
    kinds: list[Any] = []
    for kind in _kinds(hint):
        if get_origin(kind) is tuple:
            items = tuple(item if item is ... else _narrowed(item, names) for item in get_args(kind))
            kinds.append(tuple[items])  # type: ignore[valid-type]
        else:
            kinds.append(Literal[names] if kind in WORDS else kind)
    return Union[tuple(kinds)]  # noqa: UP007  (`|` takes no list)


def _unwrapped(value: Any) -> Any:
    """The plain value in a number of NumPy's, or in a member of an Enum."""
    numpy = sys.modules.get("numpy")  # whoever has a number of it has imported it
    if numpy and isinstance(value, numpy.generic):
        return value.item()
    return value.value if isinstance(value, enum.Enum) else value


def _checked(value: Any, kind: Any) -> Any:
    """The value of Python or JSON as this kind has it; a ValueError says that it is not of the kind."""
    if not isinstance(value, (*WORDS, NoneType)):
        raise ValueError
    is_bool = isinstance(value, bool)  # True is no number, although it equals 1
    if members := _members(kind):
        known = [plain(member) if isinstance(plain(member), bool) == is_bool else ... for member in members]
        return members[known.index(value)]
    # A whole number stays one where any number may stand: the keys of stored trials are digests of such values.
    if isinstance(value, (int, float) if kind is float else kind) and is_bool == (kind is bool):
        return value
    raise ValueError


def _read(text: str, kind: Any) -> Any:
    """The value that was typed as this kind has it; a ValueError says that it is not of the kind."""
    if members := (False, True) if kind is bool else _members(kind):
        return members[[written(member) for member in members].index(text.lower() if kind is bool else text)]
    return kind(text)


def _as_tuple(value: Any, kind: Any, name: str, typed: bool) -> tuple[Any, ...]:
    """The value as a tuple, each item converted; a ValueError says that it is none, or has another length."""
    items = [part.strip() for part in value.split(",") if part.strip()] if typed else value
    hints = get_args(kind)
    if isinstance(items, (list, tuple)) and hints[-1] is ...:
        if not items and choices_of(hints[0]):
            raise VisgraftError(f"{name} is empty; name at least one of {', '.join(choices_of(hints[0]))}")
        hints = hints[:1] * len(items)
    if not isinstance(items, (list, tuple)) or len(items) != len(hints):
        raise ValueError
    return tuple(
        convert(item, hint, f"an item of {name}", typed=typed) for item, hint in zip(items, hints, strict=True)
    )


def _described(hint: Any, typed: bool) -> str:
    """What a value must be, in words."""
    kinds, told = _kinds(hint), []
    for kind in kinds:
        if get_origin(kind) is tuple:
            items = _described_items(get_args(kind))
            told.append(f"{items}, separated by commas" if typed else f"a tuple of {items}")
        elif names := names_in(kind):
            told.append(f"one of {', '.join(names)}" if len(names) > 1 else names[0])
        elif kind is not NoneType and not (kind is int and float in kinds):
            told.append(WORDS[kind][0])
    return " or ".join([*told, "none"] if NoneType in kinds else told)


def _described_items(hints: tuple[Any, ...]) -> str:
    """What the items of a tuple must be, in words."""
    if hints[-1] is not ... and (len(hints) == 1 or len(set(hints)) > 1):
        return " and ".join(_described(hint, typed=False) for hint in hints)
    names = ", ".join(choices_of(hints[0]))
    several = f"names among {names}" if names else f"values, each {_described(hints[0], typed=False)}"
    several = WORDS.get(hints[0], ("", several))[1]
    return several if hints[-1] is ... else f"{len(hints)} {several}"
