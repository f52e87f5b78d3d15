"""Which settings of a method a benchmark tries: its default recipe, that and its neighbours, or a paper's."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from visgraft.bench.paper_recipes import PAPER_RECIPES
from visgraft.core.configure import AUTO_METHODS, configure, search_space
from visgraft.errors import VisgraftError, nearest
from visgraft.methods import get_method
from visgraft.options import AUTO, MethodConfig, TrainConfig
from visgraft.protocols.row import Protocol, Task

RECIPES = ("validated", "default", *PAPER_RECIPES)


@dataclass(frozen=True)
class Candidates:
    """What to try of a method on a task; the first is the one to take where nothing tells them apart.

    `varied` are the names of the options in which the candidates differ.
    """

    settings: tuple[tuple[MethodConfig, TrainConfig], ...]
    varied: tuple[str, ...]
    normalisation: str = "model"


@dataclass(frozen=True)
class Recipe:
    """How settings come about: a name out of `RECIPES`, how many a search may try, and options set by hand.

    `overrides` hold options of training for all methods, `method_overrides` options of a method by its name; what is
    set by hand is not searched.

    Raises:
        VisgraftError: an unknown recipe, or fewer than two settings to choose from.
    """

    name: str = "validated"
    trials: int = 4
    overrides: Mapping[str, Any] = field(default_factory=dict)
    method_overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in RECIPES:
            known = f"{', '.join(RECIPES)}{nearest(self.name, RECIPES)}"
            more = "; test images only ever measure" if "test" in self.name else ""
            raise VisgraftError(f"recipe is {self.name!r}, but must be one of {known}{more}")
        if self.trials < 2 and self.name == "validated":
            raise VisgraftError(f"trials is {self.trials}, which leaves no choice; pass 2 or more, or --recipe default")


def candidates(recipe: Recipe, protocol: Protocol, task: Task, method: str) -> Candidates:
    """Return what to try, the default or the paper's first value first.

    Raises:
        VisgraftError: the recipe is not for this method or protocol, or an option does not exist.
    """
    if method == AUTO:
        return _automatic(recipe, protocol)
    set_by_hand = {**recipe.overrides, **recipe.method_overrides.get(method, {})}
    if recipe.name in PAPER_RECIPES:
        common, grid, normalisation = _paper(recipe.name, protocol, task, method)
        grid = {name: values for name, values in grid.items() if name not in set_by_hand}
        combined = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    else:
        common, normalisation = {}, "model"
        grid = {n: values for n, values in search_space(method).items() if n not in set_by_hand}
        count = recipe.trials if recipe.name == "validated" else 1
        combined = neighbours(grid, _defaults(method, set_by_hand, tuple(grid)), count)
    settings = [configured(method, {**common, **values, **set_by_hand}, protocol.epochs) for values in combined]
    varied = tuple(name for name in grid if len({values[name] for values in combined}) > 1)
    return Candidates(tuple(settings), varied, normalisation)


def _automatic(recipe: Recipe, protocol: Protocol) -> Candidates:
    """Return the default recipe of several methods, as many as a search of one method's settings tries."""
    if recipe.name != "validated":
        raise VisgraftError(f"{AUTO} chooses on validation images; use --recipe validated")
    settings = [
        configured(method, {**recipe.overrides, **recipe.method_overrides.get(method, {})}, protocol.epochs)
        for method in AUTO_METHODS[: recipe.trials]
    ]
    return Candidates(tuple(settings), ("method",))


def _paper(
    name: str, protocol: Protocol, task: Task, method: str
) -> tuple[Mapping[str, Any], Mapping[str, tuple[Any, ...]], str]:
    """Return a paper's options for a task, its grid, and its normalisation."""
    paper = PAPER_RECIPES[name]
    if method != paper.method:
        raise VisgraftError(f"recipe {name} is for {paper.method}, not for {method}; leave one of them out")
    if protocol.name not in paper.tasks and protocol.name not in paper.grid:
        known = ", ".join(dict.fromkeys([*paper.tasks, *paper.grid]))
        raise VisgraftError(f"recipe {name} has no settings for {protocol.name}, only for {known}; use another recipe")
    own = paper.tasks.get(protocol.name, {})
    if own and task.name not in own:
        raise VisgraftError(f"recipe {name} has no settings for {task.name}; use another recipe")
    return {**paper.common, **own.get(task.name, {})}, paper.grid.get(protocol.name, {}), paper.normalisation


def _defaults(method: str, set_by_hand: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the values that the options `names` have by default."""
    cls = get_method(method)
    own = {f.name for f in fields(cls.Config)}
    config = cls.Config(**{name: value for name, value in set_by_hand.items() if name in own})
    return {name: getattr(config, name) if name in own else getattr(cls.recipe, name) for name in names}


def neighbours(grid: Mapping[str, tuple[Any, ...]], default: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return the default and its nearest neighbours, `count` in all or as many as there are.

    A neighbour differs from the default in one option, first by one step down and up in the values of the first
    option, then of the second, and so on; then by two steps. So every method gets the same small search.

    Raises:
        VisgraftError: a default is not among its values.
    """
    found = [dict(default)]
    for name, value in default.items():
        if value not in grid[name]:
            raise VisgraftError(f"{name} is {value!r}, which is not among {grid[name]}; set another with --set")
    for distance in range(1, max(map(len, grid.values()), default=0)):
        for name, values in grid.items():
            for step in (-distance, distance):
                index = values.index(default[name]) + step
                if 0 <= index < len(values):
                    found.append({**default, name: values[index]})
    return found[:count]


def configured(method: str, values: Mapping[str, Any], epochs: int | None) -> tuple[MethodConfig, TrainConfig]:
    """Return the options of the method and of its training, with `values` in place of the defaults.

    `epochs`, where given, holds for trainings of more than a head that `values` do not set; a warm-up that `values` do
    not set takes the recipe's share of the epochs.

    Raises:
        VisgraftError: an option that neither the method nor training has.
    """
    config, recipe = configure(method, values)
    if epochs is None or "epochs" in values or config.head_only:
        return config, recipe
    return configure(method, {**values, "epochs": epochs})
