"""Which trials a benchmark consists of, and which of them can run now: a pure function of the results so far."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from visgraft.backbones.creation import Backbone
from visgraft.bench.settings import Candidates, Recipe, candidates
from visgraft.bench.trial import Result, Trial, split_digest
from visgraft.core.configure import with_values
from visgraft.measure.precision import resolve_precision
from visgraft.options import AUTO
from visgraft.protocols.opening import open_task
from visgraft.protocols.row import Protocol, Task

Done = Mapping[str, Result]
"""Finished trials by their keys."""


@dataclass(frozen=True)
class Request:
    """What is asked for: methods on the tasks of a protocol, seed by seed.

    `tasks` None means all. `any_size` accepts images in other numbers than the published ones, and the results say so.
    Settings are chosen with the first seed and kept for the others.
    """

    protocol: Protocol
    root: Path
    methods: tuple[str, ...]
    backbone: Backbone
    recipe: Recipe
    seeds: tuple[int, ...] = (0,)
    tasks: tuple[str, ...] | None = None
    normalisation: str | None = None
    precision: str = "auto"
    any_size: bool = False

    @cached_property
    def chosen_tasks(self) -> tuple[Task, ...]:
        """The tasks asked for, in the protocol's order.

        Raises:
            VisgraftError: the protocol has no such task.
        """
        return self.protocol.tasks if self.tasks is None else self.protocol.only(self.tasks)


@dataclass(frozen=True)
class Cell:
    """One method on one task: the trials that choose its setting, and the final one of each seed."""

    task: str
    method: str
    tuning: tuple[Trial, ...]
    finals: tuple[Trial, ...]
    """With the first candidate's setting; the chosen one is put in once it is known."""
    candidates: Candidates

    def chosen(self, done: Done) -> int | None:
        """Return the number of the candidate that is best on the validation images; None: not all are measured."""
        if not self.tuning:
            return 0
        if any(trial.key not in done for trial in self.tuning):
            return None
        figures = [done[trial.key].measured["val"].figure for trial in self.tuning]
        return figures.index(max(figures))

    def final_trials(self, done: Done) -> tuple[Trial, ...]:
        """Return the final trials with the chosen setting; none before it is chosen."""
        number = self.chosen(done)
        if number is None:
            return ()
        method, config = self.candidates.settings[number]
        keys = tuple(trial.key for trial in self.tuning)
        return tuple(
            replace(
                trial,
                method=method.method,
                method_options=method.to_dict(),
                train=replace(config, seed=trial.seed, precision=trial.train["precision"]).to_dict(),
                chosen_from=keys,
            )
            for trial in self.finals
        )

    def ready(self, done: Done) -> list[Trial]:
        """Return the trials that can run now and are not done."""
        trials = self.final_trials(done) or self.tuning
        return [trial for trial in trials if trial.key not in done]

    def left(self, done: Done) -> int:
        """Return how many trials are not done yet."""
        tuning = sum(trial.key not in done for trial in self.tuning)
        finals = self.final_trials(done)
        return tuning + (sum(trial.key not in done for trial in finals) if finals else len(self.finals))

    @property
    def total(self) -> int:
        """How many trials there are in all."""
        return len(self.tuning) + len(self.finals)

    def selection(self, done: Done) -> dict[str, Any]:
        """Say how the setting was chosen, for the result of a final trial."""
        if not self.tuning:
            return {"rule": "none", "tried": [], "seconds": 0.0}
        number = self.chosen(done)
        assert number is not None
        tried = [
            {"setting": self._varied(trial), "figure": done[trial.key].measured["val"].figure, "key": trial.key}
            for trial in self.tuning
        ]
        return {
            "rule": "validation",
            "measured_on": "val",
            "measure": done[self.tuning[0].key].measured["val"].measure,
            "epochs": self.tuning[0].train["epochs"],
            "seed": self.tuning[0].seed,
            "tried": tried,
            "chosen": self._varied(self.tuning[number]),
            "seconds": sum(done[trial.key].seconds for trial in self.tuning),
        }

    def _varied(self, trial: Trial) -> dict[str, Any]:
        return {name: trial.setting.get(name) for name in self.candidates.varied}


def settings_of(request: Request) -> dict[tuple[str, str], Candidates]:
    """Return what to try, by task and method; no image is looked for, so that a typing error is answered at once.

    Raises:
        VisgraftError: a task, method, recipe or option does not exist.
    """
    return {
        (task.name, method): candidates(request.recipe, request.protocol, task, method)
        for task in request.chosen_tasks
        for method in request.methods
    }


def plan(request: Request) -> list[Cell]:
    """Return what there is to do: one cell per task and method.

    Raises:
        DataError: a task's images are missing, or not those of the protocol.
        VisgraftError: a method, recipe or option does not exist.
    """
    precision, offered = resolve_precision(request.precision), settings_of(request)
    cells = []
    for task in request.chosen_tasks:
        splits = {seed: _split(request, task, seed) for seed in (request.seeds if task.shots else request.seeds[:1])}
        cells += [
            _cell(request, task, method, offered[task.name, method], splits, precision) for method in request.methods
        ]
    return cells


def _split(request: Request, task: Task, seed: int) -> str:
    return split_digest(open_task(request.protocol, task, request.root, seed, any_size=request.any_size), request.root)


def _cell(
    request: Request, task: Task, method: str, found: Candidates, splits: Mapping[int, str], precision: str
) -> Cell:
    first = request.seeds[0]

    def trial(kind: str, number: int, seed: int) -> Trial:
        config, recipe = found.settings[number]
        recipe = replace(recipe, seed=seed, precision=precision)
        if kind == "tune" and not config.head_only:
            share = max(1, math.ceil(recipe.epochs * request.protocol.tune_share))
            recipe = with_values(recipe, {"epochs": share})
        split_seed = seed if task.shots else first
        return Trial(
            protocol=request.protocol.name,
            task=task.name,
            group=task.group,
            classes=task.classes,
            shots=task.shots,
            kind=kind,
            method=config.method,
            method_options=config.to_dict(),
            train=recipe.to_dict(),
            recipe=AUTO if kind == "final" and method == AUTO else request.recipe.name,
            backbone=replace(request.backbone, seed=seed).to_dict(),
            seed=seed,
            split=splits[split_seed],
            split_seed=split_seed,
            final_parts=request.protocol.final_parts,
            normalisation=request.normalisation or found.normalisation,
            squash=request.protocol.squash,
            reduced=request.any_size,
        )

    tuning = tuple(trial("tune", n, first) for n in range(len(found.settings))) if len(found.settings) > 1 else ()
    finals = tuple(trial("final", 0, seed) for seed in request.seeds)
    return Cell(task.name, method, tuning, finals, found)


def schedule(cells: Sequence[Cell], done: Done) -> list[Trial]:
    """Return all trials that can run now, in the order of the cells."""
    return [trial for cell in cells for trial in cell.ready(done)]
