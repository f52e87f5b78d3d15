"""Command-line options generated from the configuration dataclasses, so that no flag is written twice."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import typer

import visgraft.methods  # noqa: F401  (registers them, also where `visgraft` itself imports nothing)
from visgraft.core.registry import get_method, method_names
from visgraft.errors import VisgraftError, nearest
from visgraft.options import MethodConfig, TrainConfig, method_fields

C = TypeVar("C", MethodConfig, TrainConfig)


@dataclasses.dataclass(frozen=True)
class Flag:
    """One generated option: its field, the type as typed on the command line, its help and its group."""

    field: dataclasses.Field[Any]
    kind: type
    help: str
    panel: str


def _kind(field: dataclasses.Field[Any]) -> type:
    """Type of the value as typed: tuples are written with commas."""
    text = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
    name = (str(field.type) if text in ("", "UnionType", "tuple") else text).split("|")[0].split("[")[0].strip()
    return {"int": int, "float": float, "bool": bool}.get(name, str)


def _help(field: dataclasses.Field[Any]) -> str:
    choices = field.metadata.get("choices")
    named = f" ({', '.join(choices)})" if choices else ""
    return f"{field.metadata['help']}{named}"


def flags() -> Iterator[Flag]:
    """Yield the options of training, then those of all methods; one that several methods share appears once."""
    for field in dataclasses.fields(TrainConfig):
        yield Flag(field, _kind(field), _help(field), "Training (default: the method's recipe)")
    owners: dict[str, list[tuple[str, dataclasses.Field[Any]]]] = {}
    for name in method_names():
        for field in method_fields(get_method(name).Config):
            owners.setdefault(field.name, []).append((name, field))
    common = {field.name for field in dataclasses.fields(MethodConfig)}
    for shared_name, uses in owners.items():
        kinds = {_kind(field) for _, field in uses}
        told = " | ".join(f"{name}: {_help(field)}; default {_shown(field.default)}" for name, field in uses)
        if shared_name in common:
            told = f"all methods with modules in blocks: {_help(uses[0][1])}"
        # Where methods mean different things by one name, only the method chosen says how to read what is typed.
        yield Flag(uses[0][1], kinds.pop() if len(kinds) == 1 else str, told, "Method")


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return ",".join(value) if isinstance(value, tuple) else str(value)


def with_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return the command with the generated options in place of its `**values`."""
    own = inspect.signature(command)
    parameters = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for flag in flags():
        name = flag.field.name
        written = f"--{name.replace('_', '-')}"
        if flag.kind is bool:
            written = f"{written}/--no-{name.replace('_', '-')}"
        default = typer.Option(None, written, help=flag.help, rich_help_panel=flag.panel, show_default=False)
        kind: Any = flag.kind | None
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))

    @functools.wraps(command)
    def flagged(**values: Any) -> Any:
        return command(**values)

    flagged.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    flagged.__annotations__ = {p.name: p.annotation for p in parameters}
    return flagged


def method_config(method: str, values: Mapping[str, Any]) -> MethodConfig:
    """Build a method's options from those given on the command line.

    Raises:
        VisgraftError: unknown method, or an option that this method does not have.
    """
    cls = get_method(method).Config
    own = {field.name: field for field in dataclasses.fields(cls)}
    training = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in values.items() if value is not None and name not in training}
    for name in given:
        if name not in own:
            has = ", ".join(f"--{f.name.replace('_', '-')}" for f in method_fields(cls)) or "none of its own"
            raise VisgraftError(f"{method} has no option --{name.replace('_', '-')}; it has {has}")
    parsed = {name: _parse(own[name], value) for name, value in given.items()}
    return cls(**parsed)


def _parse(field: dataclasses.Field[Any], value: Any) -> Any:
    """Return a typed value as the field wants it.

    Raises:
        VisgraftError: it is not of the field's type.
    """
    if value is None:
        return None
    if "tuple" in str(field.type):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    kind = _kind(field)
    if not isinstance(value, str) or kind is str:
        return value
    words = {"true": True, "false": False} if kind is bool else {}
    try:
        return words[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError) as error:
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise VisgraftError(f"--{field.name.replace('_', '-')} is {value!r}, but must be {wanted}") from error


def parse_option(method: str | None, name: str, text: str) -> Any:
    """Return an option's value from how it is typed: of a method, or of training (also a method's, by its name).

    Raises:
        VisgraftError: there is no such option, or the text is not of its type.
    """
    classes: list[type[MethodConfig] | type[TrainConfig]] = [get_method(method).Config] if method else []
    known = {field.name: field for kind in (TrainConfig, *classes) for field in dataclasses.fields(kind)}
    if name not in known:
        if method is None:
            end = "; an option of a method is METHOD.OPTION=VALUE"
            raise VisgraftError(f"training has no option {name!r}{nearest(name, known)}{end}")
        own = ", ".join(f.name for f in method_fields(get_method(method).Config)) or "none of its own"
        end = f"; it has {own}, and those of training (visgraft train --help)"
        raise VisgraftError(f"{method} has no option {name!r}{nearest(name, known) or end}")
    return _parse(known[name], None if text == "none" else text)


def train_config(method: str, values: Mapping[str, Any]) -> TrainConfig:
    """Return the method's recipe with the options given on the command line in place of its own."""
    own = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in values.items() if value is not None and name in own}
    recipe = get_method(method).recipe
    if "epochs" in given and "warmup_epochs" not in given:
        given["warmup_epochs"] = recipe.warmup_epochs * given["epochs"] / recipe.epochs
    return dataclasses.replace(recipe, **given)
