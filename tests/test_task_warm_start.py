"""A training that starts from an earlier adapter, where one of both or both have several tasks."""

import dataclasses
from pathlib import Path

import pytest
import torch
from predicting import BACKBONE, TASKS, make, make_tasks
from support import images
from torch import Tensor

from visgraft import ALoREConfig, attach, create_backbone, load, save
from visgraft.adapters.warm_start import start_from
from visgraft.data.tasks import LabelTask, outputs_of
from visgraft.errors import AdapterError

X = images(6, size=32)


def answers(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(X)


def started(adapter: Path, classes: tuple[str, ...], tasks: tuple[LabelTask, ...] = ()) -> tuple[Tensor, list[str]]:
    model = create_backbone(BACKBONE, len(classes))
    notes = start_from(model, adapter, load(adapter).record.method, classes, tasks)
    return answers(model), notes


def test_tasks_may_change_places_come_and_go_and_numbers_stay_the_same(tmp_path: Path) -> None:
    old = make_tasks(tmp_path / "old")
    size = dataclasses.replace(TASKS[1], mean=10.0, std=2.5, unit="")
    tasks = (size, LabelTask("colour", "one_class", ("blue", "red", "pink")))
    found, notes = started(old, outputs_of(tasks), tasks)
    before = answers(load(old).model)
    torch.testing.assert_close(found[:, 0] * 2.5 + 10, before[:, 3] * 10 + 40, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found[:, 1:3], before[:, [2, 0]], rtol=1e-5, atol=1e-5)
    assert "at random: colour=pink" in notes[0] and "gone: colour=green, tags=dot, tags=ring" in notes[1]


def test_a_number_in_another_unit_starts_anew(tmp_path: Path) -> None:
    tasks = (TASKS[0], dataclasses.replace(TASKS[1], unit="mm"))
    _, notes = started(make_tasks(tmp_path / "old"), outputs_of(tasks), tasks)
    assert "at random: size" in notes[0]


def test_one_label_becomes_the_task_that_has_its_classes_and_comes_back(tmp_path: Path) -> None:
    old = make(tmp_path / "old", "lora", classes=("red", "blue"))
    found, notes = started(old, outputs_of(TASKS), TASKS)
    torch.testing.assert_close(found[:, [0, 2]], answers(load(old).model))
    assert "at random: colour=green, size, tags=dot, tags=ring" in notes[0]
    several = make_tasks(tmp_path / "several")
    found, _ = started(several, ("dot", "ring"))
    torch.testing.assert_close(found, answers(load(several).model)[:, [5, 4]])


def test_a_number_is_no_class(tmp_path: Path) -> None:
    old = make(tmp_path / "old", "lora", classes=("size", "other"))
    with pytest.raises(AdapterError, match="knows none of the classes"):
        started(old, ("size",), (TASKS[1],))


def test_parts_of_each_task_go_on_with_these_tasks_only(tmp_path: Path) -> None:
    shared = ALoREConfig(share="experts").for_tasks(tuple(task.outputs for task in TASKS))
    model = create_backbone(BACKBONE, len(outputs_of(TASKS)))
    attach(model, shared)
    record = {"data": {"tasks": [task.to_json() for task in TASKS]}}
    old = save(model, tmp_path / "shared", classes=outputs_of(TASKS), record=record)
    fewer = TASKS[:2]
    with pytest.raises(AdapterError, match="of 3, 1, 2 outputs, but the tasks of these images have 3, 1;"):
        start_from(create_backbone(BACKBONE, 4), old, shared.for_tasks((3, 1)), outputs_of(fewer), fewer)
    renamed = (dataclasses.replace(TASKS[0], name="other"), *TASKS[1:])
    told = f"the tasks {', '.join(t.name for t in TASKS)}, but those of these images are other, "
    with pytest.raises(AdapterError, match=told):  # whose parts would be those of another task
        start_from(create_backbone(BACKBONE, 6), old, shared, outputs_of(renamed), renamed)
