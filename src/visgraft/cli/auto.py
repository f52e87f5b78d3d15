"""`visgraft train --method auto`: method and setting chosen on the validation images, within a time."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from visgraft.cli.labels import TypedImages
from visgraft.cli.launched import refuse_launched
from visgraft.errors import VisgraftError
from visgraft.options import AUTO, MethodConfig, TrainConfig, flag_of

if TYPE_CHECKING:
    from visgraft.executors.job import Executor
    from visgraft.search import Comparison

GIVEN = ("epochs", "precision", "seed")
"""The options of training that a user still sets."""
BUDGET = "30m"


def check_asked(values: Mapping[str, Any], begun: Mapping[str, Any]) -> None:
    """Refuse what does not go with an automatic choice.

    Args:
        values: the options of methods and of training, None where not given.
        begun: further options that begin or continue a training of a method that is known already.

    Raises:
        VisgraftError: one is given, or several processes were started.
    """
    refuse_launched("--method auto", "chooses within a time")
    for name, value in values.items():
        if value is not None and name not in GIVEN:
            raise VisgraftError(
                f"{flag_of(name)} is among what --method auto chooses; leave it out, or name the method that it is for"
            )
    for flag in (flag for flag, value in begun.items() if value):
        raise VisgraftError(f"{flag} needs a method that is known already; name it in place of --method auto")


@dataclass(frozen=True)
class Asked:
    """What was given on the command line: options of training, and how long the choice may take.

    `budget` is e.g. `30m`, for the choice alone; None: 30 minutes, or no limit with `trials` per method. `begin` is
    when the command began, by `time.monotonic`; `executor` where the trainings run that are compared, None: in turns in
    this process.
    """

    values: Mapping[str, Any]
    budget: str | None
    trials: int | None
    begin: float
    executor: "Executor | None" = None


class Chosen(NamedTuple):
    """A method's options, its recipe, what the adapter keeps of the choice, and the command that trains it."""

    method: MethodConfig
    recipe: TrainConfig
    record: dict[str, Any]
    command: str


def choose(images: TypedImages, out: Path, whole: Mapping[str, Any], asked: Asked, json: bool) -> Chosen:
    """Compare methods and return the most accurate one as it is to be trained.

    Args:
        images: as typed.
        out: where the adapter will lie.
        whole: the backbone, and how images are divided and loaded, as `train_folder` takes them.
        asked: what else was given.
        json: print nothing but one document at the end.

    Raises:
        VisgraftError: the comparison cannot be made, or no method is shown to do better than guessing.
    """
    from visgraft.cli.compare import comparison_progress, print_comparison, train_command
    from visgraft.cli.options import train_config
    from visgraft.cli.show import loading_progress, progress_console
    from visgraft.core.configure import AUTO_METHODS, with_values
    from visgraft.search import compare, parse_budget

    options = {name: whole[name] for name in ("split", "loading")}
    given = train_config(AUTO_METHODS[0], asked.values)  # of `GIVEN` only, which mean the same for all
    epochs = None if asked.values.get("epochs") is None else given.epochs
    limited = asked.budget or asked.trials is None
    with loading_progress() as show_loading, comparison_progress() as show:
        found = compare(
            images.source(), (AUTO,), backbone=whole["backbone"],
            budget_seconds=parse_budget(asked.budget or BUDGET) if limited else None,
            spent_seconds=time.monotonic() - asked.begin, trials=asked.trials,
            epochs=epochs, seed=given.seed, precision=given.precision, executor=asked.executor,
            on_progress=show, on_loading=show_loading, **options,
        )  # fmt: skip
    if not json:
        print_comparison(found, None)
    if found.guessing:
        raise VisgraftError(f"nothing is worth training: {found.sentence}")
    method, recipe = found.best_config()
    if epochs is not None and not method.head_only:
        recipe = with_values(recipe, {"epochs": epochs})
    recipe = replace(recipe, precision=given.precision)
    progress_console.print(f"training {found.recommended} for {recipe.epochs} epochs into {out}")
    more = {"epochs": None if method.head_only else epochs, "precision": asked.values.get("precision")}
    command = train_command(found, images, whole["backbone"].weights, **options, out=out, **more)
    return Chosen(method, recipe, {"chosen": _kept(found)}, command)


def _kept(found: "Comparison") -> dict[str, Any]:
    """Return what the adapter keeps of the comparison that chose its method."""
    all_of_it = found.to_dict()
    names = ("method", "setting", "figure", "interval", "trials")
    return {
        **{name: all_of_it[name] for name in ("sentence", "measure", "measured_on", "images", "seconds")},
        "methods": [{name: row[name] for name in names} for row in all_of_it["results"]],
    }
