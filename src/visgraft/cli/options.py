"""Command-line options generated from the configuration dataclasses, so that no flag is written twice."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer

from visgraft.core.configure import with_values
from visgraft.errors import VisgraftError, nearest
from visgraft.export.formats import FORMATS
from visgraft.methods import get_method, method_names
from visgraft.option_types import allowed, convert, types_of, written
from visgraft.options import MethodConfig, TrainConfig, flag_of, method_fields


@dataclasses.dataclass(frozen=True)
class Flag:
    """One generated option: its field, the type as typed on the command line, its help and its group.

    One of type `bool` is a switch; all others are read as text by the option's type hint, which only the method chosen
    tells where methods mean different things by one name.
    """

    field: dataclasses.Field[Any]
    kind: type
    help: str
    panel: str


def _kind(hint: Any) -> type:
    """What a value is shown as: a number where nothing but a number or none may stand."""
    if hint is bool:
        return bool
    return next((kind for kind in (int, float) if hint in (kind, kind | None)), str)


def _help(field: dataclasses.Field[Any], hint: Any) -> str:
    named = allowed(hint)
    return f"{field.metadata['help']} ({named})" if named else field.metadata["help"]


def train_flags() -> Iterator[Flag]:
    """Yield the options of training, then those of all methods; one that several methods share appears once."""
    hints = types_of(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        hint = hints[field.name]
        yield Flag(field, _kind(hint), _help(field, hint), "Training (default: the method's recipe)")
    owners: dict[str, list[tuple[str, dataclasses.Field[Any], Any]]] = {}
    for name in method_names():
        config = get_method(name).Config
        for field in method_fields(config):
            owners.setdefault(field.name, []).append((name, field, types_of(config)[field.name]))
    common = {field.name for field in dataclasses.fields(MethodConfig)}
    for shared_name, uses in owners.items():
        kinds = {_kind(hint) for _, _, hint in uses}
        told = " | ".join(
            f"{name}: {_help(field, hint)}; default {written(field.default)}" for name, field, hint in uses
        )
        if shared_name in common:
            told = f"all methods with modules in blocks: {_help(*uses[0][1:])}"
        yield Flag(uses[0][1], kinds.pop() if len(kinds) == 1 else str, told, "Method")


def format_flags() -> Iterator[Flag]:
    """Yield the options of all export formats; one that several formats share appears once."""
    owners: dict[str, list[tuple[str, dataclasses.Field[Any], Any]]] = {}
    for name, form in FORMATS.items():
        for field in dataclasses.fields(form.Options):
            owners.setdefault(field.name, []).append((name, field, types_of(form.Options)[field.name]))
    for uses in owners.values():
        takers: dict[str, list[str]] = {}
        for name, field, hint in uses:
            takers.setdefault(f"{_help(field, hint)}; default {written(field.default)}", []).append(name)
        told = " | ".join(f"{', '.join(names)}: {text}" for text, names in takers.items())
        yield Flag(uses[0][1], _kind(uses[0][2]), told, "Format")


def with_flags(command: Callable[..., Any], flags: Callable[[], Iterator[Flag]] = train_flags) -> Callable[..., Any]:
    """Return the command with the generated options in place of its `**values`."""
    own = inspect.signature(command)
    parameters = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for flag in flags():
        name = flag.field.name
        words, shown = flag_of(name), f"<{flag.kind.__name__}>"
        kind: Any = bool | None if flag.kind is bool else str | None
        if flag.kind is bool:
            words = f"{words}/--no-{words.removeprefix('--')}"
        default = typer.Option(
            None, words, metavar=shown, help=flag.help, rich_help_panel=flag.panel, show_default=False
        )
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
        VisgraftError: unknown method, an option that this method does not have, or a value that is not of its type.
    """
    cls = get_method(method).Config
    own, training = types_of(cls), types_of(TrainConfig)
    given = {name: value for name, value in values.items() if value is not None and name not in training}
    for name in given:
        if name not in own:
            has = ", ".join(flag_of(field.name) for field in method_fields(cls)) or "none of its own"
            raise VisgraftError(f"{method} has no option {flag_of(name)}; it has {has}")
    return cls(**{name: _parse(own[name], name, value) for name, value in given.items()})


def _parse(hint: Any, name: str, value: Any) -> Any:
    """Return a value as the option wants it: what a switch says, or a text as it was typed.

    Raises:
        VisgraftError: it is not of the option's type; the flag is named.
    """
    return convert(value, hint, flag_of(name), typed=isinstance(value, str))


def parse_option(method: str | None, name: str, text: str) -> Any:
    """Return an option's value from how it is typed: of a method, or of training (also a method's, by its name).

    Raises:
        VisgraftError: there is no such option, or the text is not of its type.
    """
    known = {**types_of(TrainConfig), **(types_of(get_method(method).Config) if method else {})}
    if name not in known:
        if method is None:
            end = "; an option of a method is METHOD.OPTION=VALUE"
            raise VisgraftError(f"training has no option {name!r}{nearest(name, known)}{end}")
        own = ", ".join(f.name for f in method_fields(get_method(method).Config)) or "none of its own"
        end = f"; it has {own}, and those of training (visgraft train --help)"
        raise VisgraftError(f"{method} has no option {name!r}{nearest(name, known) or end}")
    return _parse(known[name], name, text)


def train_config(method: str, values: Mapping[str, Any]) -> TrainConfig:
    """Return the method's recipe with the options given on the command line in place of its own.

    Raises:
        VisgraftError: a value is not of its option's type.
    """
    own = types_of(TrainConfig)
    given = {name: _parse(own[name], name, v) for name, v in values.items() if v is not None and name in own}
    return with_values(get_method(method).recipe, given)
