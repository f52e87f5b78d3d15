"""Whether results are evidence: that images which a method was tested on chose neither a setting nor an epoch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from visgraft.errors import VisgraftError

if TYPE_CHECKING:
    from visgraft.bench.trial import Result

RULES = ("none", "validation")


def check_evidence(results: Sequence["Result"]) -> None:
    """Check that every setting was fixed beforehand or is the best on the validation images, and the epoch the last.

    The figures that a final result names are held against the results of kind "tune" among `results`, where these are.

    Raises:
        VisgraftError: a result does not hold up; the message names its trial and what is wrong.
    """
    by_key = {result.trial.key: result for result in results}
    for result in results:
        wrong = next(_wrong_tune(result) if result.trial.kind == "tune" else _wrong_final(result, by_key), None)
        if wrong:
            raise VisgraftError(f"the result of {result.trial.name} is no evidence: {wrong}; run it again")


def _wrong_tune(result: "Result") -> Iterator[str]:
    others = ", ".join(sorted(result.measured.keys() - {"val"}))
    if others:
        yield f"it chooses settings, but was measured on {others}"


def _wrong_final(result: "Result", by_key: Mapping[str, "Result"]) -> Iterator[str]:
    trial, selection = result.trial, result.selection
    if result.epochs != trial.train["epochs"]:
        yield f"it was measured after {result.epochs} epochs of {trial.train['epochs']}, not after the last"
    rule, tried = selection.get("rule"), selection.get("tried", [])
    if rule not in RULES:
        yield f"its setting was chosen by {rule!r}, and only {' or '.join(map(repr, RULES))} is allowed"
    if [one["key"] for one in tried] != list(trial.chosen_from):
        yield "the settings tried are not those of its trial"
    if rule == "validation":
        yield from _wrong_choice(result, by_key)
    elif tried:
        yield "it says that nothing was tried, but settings were"


def _wrong_choice(result: "Result", by_key: Mapping[str, "Result"]) -> Iterator[str]:
    selection, tried = result.selection, result.selection.get("tried", [])
    if selection.get("measured_on") != "val":
        yield f"its setting was chosen on {selection.get('measured_on')!r}, not on 'val'"
    if not tried:
        yield "it does not say which settings were tried"
        return
    best = max(tried, key=lambda one: one["figure"])["setting"]
    if selection.get("chosen") != best:
        yield f"the setting chosen is {selection.get('chosen')}, but {best} was the best on the validation images"
    if any(result.trial.setting.get(name) != value for name, value in best.items()):
        yield f"it did not train with the setting chosen, {best}"
    for one in tried:
        tune = by_key.get(one["key"])
        if tune and ("val" not in tune.measured or tune.measured["val"].figure != one["figure"]):
            yield f"the figure {one['figure']} of {one['setting']} is not the one that was measured on 'val'"
