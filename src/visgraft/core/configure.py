"""From what a user sets to the options of a method and of its training, in one place for all who train."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from visgraft.core.registry import get_method
from visgraft.errors import VisgraftError, nearest
from visgraft.options import MethodConfig, TrainConfig


def configure(method: str, values: Mapping[str, Any]) -> tuple[MethodConfig, TrainConfig]:
    """Return a method's options and its recipe, with `values` in place of the defaults.

    A name that both have is the method's.

    Raises:
        VisgraftError: an option that neither the method nor training has, or a value that does not fit.
    """
    cls = get_method(method)
    own, training = ({field.name for field in fields(kind)} for kind in (cls.Config, TrainConfig))
    for name in values:
        if name not in own | training:
            raise VisgraftError(f"{method} has no option {name!r}{nearest(name, own | training)}; correct --set")
    config = cls.Config(**{name: value for name, value in values.items() if name in own})
    return config, with_values(cls.recipe, {name: value for name, value in values.items() if name not in own})


def with_values(recipe: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """Return a recipe with options replaced; the warm-up keeps its share of the epochs unless it is set itself."""
    given = dict(values)
    if isinstance(given.get("epochs"), int | float):  # of another type it is refused below
        given.setdefault("warmup_epochs", recipe.warmup_epochs * given["epochs"] / recipe.epochs)
    return replace(recipe, **given)
