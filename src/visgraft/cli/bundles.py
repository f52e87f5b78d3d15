"""Options that belong together: one argument of a verb, a frozen dataclass, for several options of the command."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints


def with_bundles(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a verb that is typed, in place of each parameter that is a dataclass, as the fields of that dataclass.

    A field's type hint is the option, as typer reads it, and its default that of the option.
    """
    own = inspect.signature(command)
    bundles: dict[str, Any] = {
        p.name: p.annotation for p in own.parameters.values() if dataclasses.is_dataclass(p.annotation)
    }
    parameters = [
        typed for p in own.parameters.values() for typed in (_options(p) if p.name in bundles else iter((p,)))
    ]

    @functools.wraps(command)
    def bundled(*given: Any, **values: Any) -> Any:
        values |= dict(zip((p.name for p in parameters), given, strict=False))
        for name, bundle in bundles.items():
            own_values = [field.name for field in dataclasses.fields(bundle) if field.name in values]
            values[name] = bundle(**{field: values.pop(field) for field in own_values})
        return command(**values)

    bundled.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    bundled.__annotations__ = {p.name: p.annotation for p in parameters}
    return bundled


def _options(bundle: inspect.Parameter) -> Iterator[inspect.Parameter]:
    """Yield a parameter for each field."""
    hints = get_type_hints(bundle.annotation, include_extras=True)
    for field in dataclasses.fields(bundle.annotation):
        yield inspect.Parameter(field.name, bundle.kind, default=field.default, annotation=hints[field.name])
