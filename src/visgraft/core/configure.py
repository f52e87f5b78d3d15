"""From what a user sets to the options of a method and of its training, in one place for all who train."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from visgraft.core.registry import get_method
from visgraft.errors import VisgraftError, nearest
from visgraft.options import MethodConfig, TrainConfig

COLOURS = "rand-m9-mstd0.5-n1-t3a"
"""RandAugment with one change of colour, contrast or sharpness per picture, and none of its shape."""
AUGMENTATION: Mapping[str, tuple[Any, ...]] = {
    "rand_augment": (None, COLOURS, "rand-m9-mstd0.5-inc1"),
    "flip": (False, True),
}
"""What searches vary for every method alike, beside its own knobs; a flip may turn one class into another."""

AUTO_METHODS = ("affine_alore", "linear", "ssf", "lora", "full")
"""What an automatic choice is among; a short one tries the first."""


def search_space(method: str) -> dict[str, tuple[Any, ...]]:
    """Return the options that a search varies, with their values: the method's knobs, and augmentation.

    Augmentation stands after the first knob, so that a search of a few neighbours tries it. A head that trains on
    features computed once has none.
    """
    cls = get_method(method)
    if cls.Config.head_only:
        return dict(cls.knobs)
    first = next(iter(cls.knobs))
    return {first: cls.knobs[first], **AUGMENTATION, **cls.knobs}


def default_setting(method: str) -> dict[str, Any]:
    """Return the values of what a search varies in the method's default recipe.

    Raises:
        VisgraftError: a knob is no option of the method or of training, or its default is not among its values.
    """
    cls = get_method(method)
    known = {**vars(cls.recipe), **vars(cls.Config())}
    space = search_space(method)
    for name, values in space.items():
        if name not in known:
            raise VisgraftError(f"{method} has no option {name!r}; correct its knobs")
        if known[name] not in values:
            raise VisgraftError(f"{method}: the default {name} of {known[name]} is not among its knobs; add it")
    return {name: known[name] for name in space}


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
