"""Every option of every method can be typed, whatever other methods call by the same name."""

import dataclasses
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from visgraft import list_methods
from visgraft.cli.options import _kind, method_config, with_flags
from visgraft.errors import VisgraftError
from visgraft.options import method_fields

SEEN: list[dict[str, Any]] = []
APP = typer.Typer()


@APP.command()
@with_flags
def command(**values: Any) -> None:
    """Remember what was typed."""
    SEEN.append(values)


def typed(*words: str) -> dict[str, Any]:
    """Return the values that the command receives."""
    found = CliRunner().invoke(APP, list(words))
    assert found.exit_code == 0, found.output
    return SEEN[-1]


OPTIONS = [(name, field) for name, kind in list_methods().items() for field in method_fields(kind.Config)]


def example(field: dataclasses.Field[Any]) -> tuple[list[str], Any]:
    """Return an allowed value of an option, as typed and as the option holds it."""
    flag, choices = f"--{field.name.replace('_', '-')}", field.metadata["choices"]
    if choices:
        value: Any = tuple(choices) if "tuple" in str(field.type) else choices[-1]
        return [flag, ",".join(choices) if isinstance(value, tuple) else value], value
    if _kind(field) is bool:
        return [flag], True
    value = field.default if field.default else {int: 2, float: 0.5}[_kind(field)]
    return [flag, str(value)], value


@pytest.mark.parametrize(("method", "field"), OPTIONS, ids=[f"{name}-{field.name}" for name, field in OPTIONS])
def test_every_option_can_be_typed(method: str, field: dataclasses.Field[Any]) -> None:
    words, value = example(field)
    found = getattr(method_config(method, typed(*words)), field.name)
    assert found == value
    assert type(found) is type(value)


def test_one_name_means_what_the_chosen_method_means_by_it() -> None:
    assert method_config("partial", typed("--blocks", "3")).blocks == 3  # type: ignore[attr-defined]
    assert method_config("sct", typed("--blocks", "all")).blocks == "all"  # type: ignore[attr-defined]
    with pytest.raises(VisgraftError, match="--blocks is 'all', but must be a whole number"):
        method_config("partial", typed("--blocks", "all"))
    with pytest.raises(VisgraftError, match="blocks is '3', but must be one of late, all"):
        method_config("sct", typed("--blocks", "3"))
