"""`visgraft train --method auto`: method and setting chosen on the validation images, within a time."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visgraft.errors import VisgraftError
from visgraft.options import AUTO, MethodConfig, TrainConfig, flag_of

GIVEN = ("epochs", "precision", "seed")
"""The options of training that a user still sets."""
BUDGET = "30m"


def check_asked(values: Mapping[str, Any], begun: Mapping[str, Any]) -> None:
    """Refuse what does not go with an automatic choice.

    Args:
        values: the options of methods and of training, None where not given.
        begun: further options that begin or continue a training of a method that is known already.

    Raises:
        VisgraftError: one is given.
    """
    for name, value in values.items():
        if value is not None and name not in GIVEN:
            raise VisgraftError(
                f"{flag_of(name)} is among what --method auto chooses; leave it out, or name the method that it is for"
            )
    for flag in (flag for flag, value in begun.items() if value):
        raise VisgraftError(f"{flag} needs a method that is known already; name it in place of --method auto")


def choose(
    images: Any, out: Path, origin: Any, options: Mapping[str, Any], values: Mapping[str, Any], budget: str | None,
    trials: int | None, begin: float, json: bool,
) -> tuple[MethodConfig, TrainConfig, dict[str, Any]]:  # fmt: skip
    """Compare methods and return the chosen one's options, its recipe, and what the adapter is to keep of the choice.

    Args:
        images: what `read_data` reads.
        out: where the adapter will lie.
        origin: the backbone.
        options: how images are divided and loaded, as `compare` takes them.
        values: what was given on the command line.
        budget: time for the choice, e.g. `30m`; the training that follows comes on top. None: 30 minutes, or no limit
            with `trials`.
        trials: settings per method.
        begin: when the command began, by `time.monotonic`.
        json: print nothing but one document at the end.
    """
    from visgraft.cli.compare import comparison_progress, print_comparison
    from visgraft.cli.options import train_config
    from visgraft.cli.show import loading_progress, progress_console
    from visgraft.core.configure import AUTO_METHODS, with_values
    from visgraft.search import compare, parse_budget

    # Read by any method's types: those three are no method's own.
    given = train_config(AUTO_METHODS[0], values)
    with loading_progress() as show_loading, comparison_progress() as show:
        found = compare(
            images, (AUTO,), backbone=origin,
            budget_seconds=parse_budget(budget or BUDGET) if budget or trials is None else None,
            spent_seconds=time.monotonic() - begin, trials=trials,
            epochs=None if values["epochs"] is None else given.epochs, seed=given.seed, precision=given.precision,
            on_progress=show, on_loading=show_loading, **options,
        )  # fmt: skip
    if not json:
        print_comparison(found, None)
    if found.guessing:
        raise VisgraftError(f"nothing is worth training: {found.sentence}")
    method, recipe = found.best_config()
    if values["epochs"] is not None and not method.head_only:
        recipe = with_values(recipe, {"epochs": given.epochs})
    recipe = dataclasses.replace(recipe, precision=given.precision)
    progress_console.print(f"training {found.recommended} for {recipe.epochs} epochs into {out}")
    kept = {name: found.to_dict()[name] for name in ("sentence", "measure", "measured_on", "images", "seconds")}
    tried = [
        {n: row.to_dict()[n] for n in ("method", "setting", "figure", "interval", "trials")} for row in found.results
    ]
    return method, recipe, {"chosen": {**kept, "methods": tried}}
