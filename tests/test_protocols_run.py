"""Every published protocol trains and measures on a small root of its layout, from the plan to the line."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from protocol_tasks import task_of

from visgraft import Backbone
from visgraft.bench.ledger import read_file
from visgraft.bench.plan import Request, plan
from visgraft.bench.running import TrialSources
from visgraft.bench.settings import Recipe
from visgraft.bench.sweep import sweep
from visgraft.bench.trial import Result
from visgraft.executors.here import Here
from visgraft.protocols.domains import DOMAINS, FOLDERS, TRAIN_FOLDER, labels_of, wordnet_numbers
from visgraft.protocols.few_shot import FEW_SHOT
from visgraft.protocols.fgvc import FGVC
from visgraft.protocols.row import Protocol
from visgraft.protocols.vtab import VTAB


def draw(file: Path, label: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(label).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def results(protocol: Protocol, root: Path, out: Path) -> list[Result]:
    """Run a linear probe of one epoch on a tiny backbone, and return the lines."""
    recipe = Recipe("default", overrides={"epochs": 1, "warmup_epochs": 0.0})
    request = Request(
        protocol, root, ("linear",), Backbone("test_vit", "none", 32), recipe, precision="fp32", any_size=True
    )
    state = sweep(plan(request), TrialSources(protocol, root, cache="ram"), out / "lines.jsonl", Here())
    assert not state.failed and not state.left
    return read_file(out / "lines.jsonl")


def test_vtab_1k_trains_on_both_lists_and_is_measured_on_the_third(tmp_path: Path) -> None:
    for task in VTAB.tasks:
        for name, count in (("train800", 4), ("val200", 2), ("test", 3)):
            labels = [i % task.classes for i in range(count)]
            for i, label in enumerate(labels):
                draw(tmp_path / task.folder / f"images/{name}/{i}.png", label)
            lines = "".join(f"images/{name}/{i}.png {label}\n" for i, label in enumerate(labels))
            (tmp_path / task.folder / f"{name}.txt").write_text(lines)
    found = results(VTAB, tmp_path, tmp_path)
    assert [result.trial.task for result in found] == [task.name for task in VTAB.tasks]
    for result in found:
        assert result.images == {"learned": 6, "test": 3} and result.trial.reduced
        assert result.preprocessing["crop_mode"] == "squash"
        assert result.head_parameters == 65 * result.trial.classes


def test_fgvc_trains_on_the_training_list_alone(tmp_path: Path) -> None:
    tasks = tuple(replace(task, classes=3) for task in FGVC.tasks)
    for task, place in zip(tasks, ("images", "images", ".", "Images", "."), strict=True):
        for part, count in (("train", 6), ("val", 3), ("test", 3)):
            stored = {f"{part}/{i}.png": i % 3 + 1 for i in range(count)}
            for name, label in stored.items():
                draw(tmp_path / task.folder / place / name, label)
            (tmp_path / task.folder / f"{part}.json").write_text(json.dumps(stored))
    found = results(replace(FGVC, tasks=tasks), tmp_path, tmp_path)
    assert len(found) == 5 and all(result.images == {"learned": 6, "test": 3} for result in found)


def test_a_few_shot_set_trains_on_its_shots(tmp_path: Path) -> None:
    tasks = tuple(task_of(FEW_SHOT, f"oxford_pets-{shots}shot", classes=2) for shots in (1, 4))
    stored = {part: [[f"{part}{i}.png", i % 2, "ab"[i % 2]] for i in range(12)] for part in ("train", "val", "test")}
    for rows in stored.values():
        for name, label, _ in rows:
            draw(tmp_path / tasks[0].folder / "images" / str(name), int(str(label)))
    (tmp_path / tasks[0].folder / "split_zhou_OxfordPets.json").write_text(json.dumps(stored))
    found = results(replace(FEW_SHOT, tasks=tasks), tmp_path, tmp_path)
    assert [result.images for result in found] == [{"learned": 2, "test": 12}, {"learned": 8, "test": 12}]


def test_imagenet_is_measured_on_its_four_other_sets(tmp_path: Path) -> None:
    draw(tmp_path / "one.png", 0)
    folders = {TRAIN_FOLDER: wordnet_numbers(), **{folder: tuple(labels_of(t)) for t, folder in FOLDERS.items()}}
    for place, classes in folders.items():
        for name in classes:
            (tmp_path / place / name).mkdir(parents=True)
            for number in range(2 if place == TRAIN_FOLDER else 1):
                os.link(tmp_path / "one.png", tmp_path / place / name / f"{number}.png")
    (result,) = results(replace(DOMAINS, tasks=(task_of(DOMAINS, "imagenet", shots=1),)), tmp_path, tmp_path)
    assert result.images["learned"] == 1000
    assert {name: one.images for name, one in result.measured.items()} == {
        "test": 1000, "imagenet-v2": 1000, "imagenet-sketch": 1000, "imagenet-a": 200, "imagenet-r": 200
    }  # fmt: skip
    restricted = {name: one.restricted_to for name, one in result.measured.items()}
    assert restricted["imagenet-a"] == restricted["imagenet-r"] == 200 and restricted["imagenet-v2"] is None
