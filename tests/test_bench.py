"""Benchmarks: what is chosen on what, killed sweeps, stale lines, and the recipes of the papers."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from visgraft import Backbone, TrainConfig, list_methods
from visgraft.bench.caption import caption
from visgraft.bench.evidence import check_evidence
from visgraft.bench.ledger import append, read_file, read_results
from visgraft.bench.paper_recipes import ALORE_PAPER, SCT_PAPER
from visgraft.bench.plan import Cell, Request, plan
from visgraft.bench.running import TrialSources, measure, run_trial
from visgraft.bench.settings import Recipe, candidates
from visgraft.bench.statistics import tables
from visgraft.bench.sweep import State, sweep
from visgraft.bench.trial import Result, Trial
from visgraft.data.dataset import Example
from visgraft.data.images import Images
from visgraft.errors import DataError, VisgraftError
from visgraft.executors.here import Here
from visgraft.executors.processes import Processes
from visgraft.protocols import PROTOCOLS
from visgraft.protocols.row import Parts, Protocol, Task
from visgraft.training.fit import answer

COLOURS = ((40, 60, 200), (50, 190, 60), (210, 40, 50))
CLASSES = ("blue", "green", "red")
COUNTS = {"train": 9, "val": 6, "test": 12, "dark": 6}


def open_colours(folder: Path, task: Task, seed: int) -> Parts:
    """Find images of three colours: PART/CLASS_NUMBER.png, with a further test set of dark ones."""
    parts = {part: tuple(Example(f, int(f.name[0])) for f in sorted((folder / part).iterdir())) for part in COUNTS}
    return Parts(CLASSES, parts["train"], parts["val"], {"test": parts["test"], "dark": parts["dark"]})


def open_leaking(folder: Path, task: Task, seed: int) -> Parts:
    """Validate on test images."""
    found = open_colours(folder, task, seed)
    return found._replace(val=found.tests["test"])


TASK = Task("colours", "natural", 3, COUNTS, "colours", open_colours)
PROTOCOL = Protocol("tiny", "tiny", (TASK,), "this test", epochs=3, tune_share=1 / 3, cache="ram")
BACKBONE = Backbone("test_vit", "none", 32)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy pictures of three colours."""
    return draw_colours(tmp_path_factory.mktemp("tiny"))


def draw_colours(root: Path) -> Path:
    """Draw them, and return their folder."""
    noise = np.random.default_rng(0)
    for part, count in COUNTS.items():
        folder = root / "colours" / part
        folder.mkdir(parents=True)
        for i in range(count):
            mean = np.array(COLOURS[i % 3]) / (3 if part == "dark" else 1)
            pixels = noise.normal(mean, 60, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i % 3}_{i}.png")
    return root


def request(root: Path, **changes: Any) -> Request:
    """Ask for two methods on the tiny task."""
    values: dict[str, Any] = {"methods": ("linear", "sct"), "backbone": BACKBONE, "recipe": Recipe(trials=2)}
    values |= {"precision": "fp32"} | changes
    return Request(values.pop("protocol", PROTOCOL), root, **values)


def sct_cell(root: Path, **changes: Any) -> Cell:
    """The cell of SCT."""
    return plan(request(root, methods=("sct",), **changes))[0]


@pytest.fixture(scope="module")
def swept(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[State, Path]:
    """A sweep that ran to its end."""
    file = tmp_path_factory.mktemp("results") / "tiny.jsonl"
    return sweep(plan(request(root)), TrialSources(PROTOCOL, root), file, Here()), file


def test_a_sweep_tunes_on_validation_and_measures_each_test_set_once(swept: tuple[State, Path]) -> None:
    state, file = swept
    assert not state.failed and not state.left and state.total == 6
    found = read_file(file)
    assert [r.trial.kind for r in found] == ["tune", "tune", "final"] * 2
    for result in found:
        assert set(result.measured) == ({"val"} if result.trial.kind == "tune" else {"test", "dark"})
        assert result.images["learned"] == (9 if result.trial.kind == "tune" else 15)
    final = next(r for r in found if r.trial.method == "sct" and r.trial.kind == "final")
    tried = final.selection["tried"]
    assert [t["key"] for t in tried] == list(final.trial.chosen_from)
    assert final.selection["chosen"] == max(tried, key=lambda one: one["figure"])["setting"]
    assert final.trial.setting["lr"] == final.selection["chosen"]["lr"]
    assert final.epochs == 3 and final.selection["epochs"] == 1
    assert final.measured["test"].images == 12 and len(final.measured["test"].per_class) == 3
    assert (
        final.channels.keys() == {"stream.mid"} and final.parameters > 0 and final.adapter_bytes > 4 * final.parameters
    )
    assert final.preprocessing["crop_mode"] == "squash" and torch.__version__.startswith(final.versions["torch"])
    assert len(final.backbone_digest) == 64 and final.revision
    assert final.learned_top1 is not None and 15 * final.learned_top1 == pytest.approx(round(15 * final.learned_top1))


def test_what_is_tuned_never_opens_a_test_image(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    loaded = Image.open

    def note(file: Any, *more: Any, **options: Any) -> Any:
        opened.append(str(getattr(file, "name", file)))
        return loaded(file, *more, **options)

    monkeypatch.setattr(Image, "open", note)
    cell = sct_cell(root)
    run_trial(cell.tuning[0], TrialSources(PROTOCOL, root))
    assert opened and not any("/test/" in name or "/dark/" in name for name in opened)
    opened.clear()
    run_trial(cell.finals[0], TrialSources(PROTOCOL, root))
    assert sum("/test/" in name for name in opened) == COUNTS["test"]


def test_choosing_on_what_is_measured_is_refused(root: Path) -> None:
    """A validation part of test images, the best epoch of a final run, a recipe that asks for test images."""
    leaking = replace(PROTOCOL, tasks=(replace(TASK, images={**COUNTS, "val": 12}, open=open_leaking),))
    with pytest.raises(DataError, match=r"val.*test|test.*val"):
        plan(request(root, protocol=leaking))
    final = sct_cell(root).finals[0]
    with pytest.raises(VisgraftError, match="keeps the epoch that is best on the images it is measured on"):
        replace(final, train={**final.train, "select": "val"})
    with pytest.raises(VisgraftError, match="test images only ever measure"):
        Recipe("best-on-test")
    with pytest.raises(VisgraftError, match="keeps the epoch"):
        plan(request(root, recipe=Recipe("default", overrides={"select": "val"})))


def test_a_killed_sweep_goes_on_where_it_stopped(root: Path, tmp_path: Path, swept: tuple[State, Path]) -> None:
    file, cells, place = tmp_path / "tiny.jsonl", plan(request(root)), TrialSources(PROTOCOL, root)

    def kill(result: Result) -> None:
        if len(read_file(file)) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(cells, place, file, Here(), on_result=kill)
    with file.open("a") as torn:
        torn.write(read_file(file)[0].to_line()[:300])  # what a write that was cut short leaves
    assert len(read_file(file)) == 4
    seen: list[Result] = []
    state = sweep(cells, place, file, Here(), on_result=seen.append)
    assert state.before == 4 and len(seen) == 2 and not state.left
    whole = {r.trial.key: r for r in read_file(swept[1])}
    assert len(read_file(file)) == 6
    for result in read_file(file):
        assert whole[result.trial.key].measured == result.measured


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": Recipe(trials=2, overrides={"epochs": 2})},
        {"recipe": Recipe(trials=2, method_overrides={"sct": {"channels": 4}})},
        {"backbone": replace(BACKBONE, image_size=16)},
        {"normalisation": "half"},
        {"seeds": (1,)},
        {"protocol": replace(PROTOCOL, final_parts="train")},
    ],
    ids=["epochs", "channels", "image size", "normalisation", "seed", "parts"],
)
def test_a_changed_configuration_uses_no_earlier_line(
    changes: dict[str, Any], root: Path, swept: tuple[State, Path]
) -> None:
    cell = sct_cell(root, **changes)
    assert not any(trial.key in swept[0].done for trial in cell.final_trials({}) or cell.finals)
    done = swept[0].done
    assert cell.left(done) >= 1


def test_changed_labels_use_no_earlier_line(root: Path, tmp_path: Path, swept: tuple[State, Path]) -> None:
    shutil.copytree(root, tmp_path / "moved")
    assert sct_cell(tmp_path / "moved").left(swept[0].done) == 0  # where the images lie does not matter
    file = next((tmp_path / "moved" / "colours" / "train").glob("0_*"))
    file.rename(file.with_name(f"1{file.name[1:]}"))
    cell = sct_cell(tmp_path / "moved")
    assert cell.left(swept[0].done) == cell.total == 3
    with pytest.raises(VisgraftError, match="no longer those"):
        run_trial(sct_cell(root).tuning[0], TrialSources(PROTOCOL, tmp_path / "moved"))


def test_a_line_that_somebody_edited_is_refused(swept: tuple[State, Path], tmp_path: Path) -> None:
    values = json.loads(read_file(swept[1])[0].to_line())
    assert Result.from_dict(values).to_line() == read_file(swept[1])[0].to_line()
    values["trial"]["seed"] = 7
    file = tmp_path / "edited.jsonl"
    file.write_text(json.dumps(values) + "\n")
    with pytest.raises(VisgraftError, match=r"edited.jsonl, line 1 is no result"):
        read_results([file])
    (tmp_path / "empty").mkdir()
    with pytest.raises(VisgraftError, match="holds no results"):
        read_results([tmp_path / "empty"])
    with pytest.raises(VisgraftError, match="does not exist"):
        read_results([tmp_path / "absent"])


def test_processes_run_side_by_side_and_one_that_fails_takes_no_other_with_it(root: Path, tmp_path: Path) -> None:
    cells = plan(request(root, methods=("linear", "sct"), recipe=Recipe("default")))
    broken = replace(cells[0].finals[0], split="0" * 64)
    cells[0] = replace(cells[0], finals=(broken,))
    state = sweep(cells, TrialSources(PROTOCOL, root), tmp_path / "tiny.jsonl", Processes(2, ["visgraft.bench.sweep"]))
    assert list(state.failed) == [broken.key] and "no longer those" in state.failed[broken.key]
    assert [r.trial.method for r in read_file(tmp_path / "tiny.jsonl")] == ["sct"]


def test_seeds_share_the_setting_that_the_first_one_chose(root: Path, swept: tuple[State, Path]) -> None:
    one, three = sct_cell(root), sct_cell(root, seeds=(0, 1, 2))
    assert three.tuning == one.tuning
    assert three.left(swept[0].done) == 2
    finals = three.final_trials(swept[0].done)
    assert len({trial.setting["lr"] for trial in finals}) == 1 and [t.seed for t in finals] == [0, 1, 2]
    assert [t.backbone["seed"] for t in finals] == [0, 1, 2]


@pytest.mark.parametrize("method", list_methods())
def test_every_method_gets_the_same_small_search_around_its_default(method: str) -> None:
    found = candidates(Recipe(trials=4), PROTOCOL, TASK, method)
    default = candidates(Recipe("default"), PROTOCOL, TASK, method)
    assert found.settings[0] == default.settings[0] and len(default.settings) == 1
    assert len({str(setting) for setting in found.settings}) == len(found.settings) == 4
    first = {**vars(found.settings[0][0]), **vars(found.settings[0][1])}
    for config, recipe in found.settings[1:]:
        other = {**vars(config), **vars(recipe)}
        assert sum(first[name] != other[name] for name in first) == 1


def test_what_is_set_by_hand_is_not_searched() -> None:
    recipe = Recipe(trials=4, overrides={"lr": 0.1}, method_overrides={"sct": {"channels": 8}})
    found = candidates(recipe, PROTOCOL, TASK, "sct")
    assert {config.lr for _, config in found.settings} == {0.1} and found.varied == ("rand_augment", "flip", "scale")
    assert all(method.channels == 8 for method, _ in found.settings)  # type: ignore[attr-defined]
    with pytest.raises(VisgraftError, match="sct has no option 'channel'"):
        candidates(Recipe(method_overrides={"sct": {"channel": 8}}), PROTOCOL, TASK, "sct")


def test_an_automatic_choice_is_among_methods_and_has_a_row_of_its_own(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visgraft.bench.settings.AUTO_METHODS", ("linear", "bitfit", "ssf"))
    wanted = request(root, methods=("linear", "auto"), recipe=Recipe(trials=2), seeds=(0, 1))
    file = tmp_path / "tiny.jsonl"
    state = sweep(plan(wanted), TrialSources(PROTOCOL, root), file, Here())
    assert not state.failed and not state.left
    found = read_file(file)
    tuned = [r.trial.method for r in found if r.trial.kind == "tune"]
    assert tuned == ["linear", "linear", "bitfit"], "the default of linear, which both try, is trained once"
    chosen = [r for r in found if r.trial.row == "auto"]
    assert [r.trial.seed for r in chosen] == [0, 1] and {r.trial.recipe for r in chosen} == {"auto"}
    for result in chosen:
        tried = result.selection["tried"]
        assert [one["setting"]["method"] for one in tried] == ["linear", "bitfit"]
        assert result.trial.method == max(tried, key=lambda one: one["figure"])["setting"]["method"]
    check_evidence(found)
    rows = tables(found)[0].rows
    assert [row.label for row in rows] == ["linear", "auto"] and len(rows[1].results) == 2
    assert "for as many epochs as the method chosen takes, and measured once" in caption(tables(chosen)[0])
    with pytest.raises(VisgraftError, match="auto chooses on validation images; use --recipe validated"):
        plan(request(root, methods=("auto",), recipe=Recipe("default")))


def test_scts_paper_recipe_is_the_authors_table() -> None:
    vtab = PROTOCOLS["vtab-1k"]
    assert set(SCT_PAPER.tasks["vtab-1k"]) == {task.name for task in vtab.tasks}
    found = {task.name: candidates(Recipe("sct-paper"), vtab, task, "sct") for task in vtab.tasks}
    assert all(len(one.settings) == 1 and one.normalisation == "imagenet" for one in found.values())
    method, train = found["svhn"].settings[0]
    assert (train.lr, train.weight_decay, method.scale, method.form) == (0.075, 0.03, 0.15, "A")  # type: ignore[attr-defined]
    assert (train.flip, train.label_smoothing, train.rand_augment) == (True, 0.1, "rand-m9-mstd0.5-inc1")
    method, train = found["dsprites_loc"].settings[0]
    assert (train.lr, train.weight_decay, method.scale, method.form) == (0.003, 0.001, 0.3, "B")  # type: ignore[attr-defined]
    assert (train.flip, train.label_smoothing, train.rand_augment) == (False, 0.0, None)
    assert (train.epochs, train.warmup_epochs, train.batch_size, train.drop_path) == (100, 10.0, 64, 0.1)
    assert (train.min_lr, train.warmup_lr, train.schedule, train.drop_last) == (1e-5, 1e-6, "epoch", True)
    augmented = {name for name, one in found.items() if one.settings[0][1].flip}
    assert augmented == {
        "dtd", "oxford_iiit_pet", "svhn", "patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy",
        "clevr_count", "clevr_dist", "dmlab", "kitti",
    }  # fmt: skip


def test_alores_paper_recipe_chooses_its_scale_on_validation() -> None:
    vtab = PROTOCOLS["vtab-1k"]
    found = candidates(Recipe("alore-paper"), vtab, vtab.tasks[0], "alore")
    scales = {method.scale for method, _ in found.settings}  # type: ignore[attr-defined]
    assert scales == {0.1, 0.5, 1.0, 5.0, 10.0} and found.varied == ("scale",)
    assert ALORE_PAPER.tasks.keys() == {"fgvc"}
    fgvc = PROTOCOLS["fgvc"]
    assert set(ALORE_PAPER.tasks["fgvc"]) == {task.name for task in fgvc.tasks}
    with pytest.raises(VisgraftError, match="recipe alore-paper is for alore, not for sct"):
        candidates(Recipe("alore-paper"), vtab, vtab.tasks[0], "sct")
    with pytest.raises(VisgraftError, match="has no settings for tiny"):
        candidates(Recipe("sct-paper"), PROTOCOL, TASK, "sct")


def test_answers_are_taken_among_the_classes_that_a_test_set_has() -> None:
    """A shifted set of 2 of 4 classes: a model that always likes an absent class best is not wrong for that."""

    class Always(nn.Module):
        num_classes = 4

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bright = x.mean((1, 2, 3))
            return torch.stack([bright * 0 + 9, bright, -bright, bright * 0 + 8], -1)

    pixels = torch.tensor([255, 0, 255, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8).contiguous()
    images = Images(pixels, torch.tensor([1, 2, 1, 2]), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    found = measure(answer(Always(), images, "fp32"), 4)
    assert found.top1 == 0.75 and found.restricted_to == 2
    assert found.per_class == (None, 1.0, 0.5, None)
    everything = replace(images, labels=torch.tensor([0, 1, 2, 3]))
    assert measure(answer(Always(), everything, "fp32"), 4).restricted_to is None


def test_a_training_that_diverges_is_measured_in_its_last_good_state(root: Path) -> None:
    recipe = Recipe("default", overrides={"lr": 1e30, "warmup_epochs": 0.0, "epochs": 2})
    result = run_trial(sct_cell(root, recipe=recipe).finals[0], TrialSources(PROTOCOL, root))
    assert result.outcome == "diverged" and 0 <= result.measured["test"].top1 <= 1


def test_a_trial_is_told_apart_by_every_value(root: Path) -> None:
    trial = sct_cell(root).finals[0]
    others: Iterator[Trial] = iter(
        [replace(trial, seed=5), replace(trial, chosen_from=("a",)), replace(trial, reduced=True)]
    )
    assert len({trial.key, *(other.key for other in others)}) == 4
    assert Trial(**json.loads(json.dumps(trial.to_dict()))).key == trial.key
    with pytest.raises(VisgraftError, match="kind is 'test'"):
        replace(trial, kind="test")


def test_lines_are_appended_whole(tmp_path: Path, swept: tuple[State, Path]) -> None:
    first, second = read_file(swept[1])[:2]
    file = tmp_path / "a" / "b.jsonl"
    append(file, first)
    with file.open("a") as torn:
        torn.write('{"key": "cut')
    append(file, second)
    assert [r.trial.key for r in read_file(file)] == [first.trial.key, second.trial.key]
    assert read_results([tmp_path]) == [first, second]


def test_a_final_line_stores_its_config_as_the_library_takes_it(swept: tuple[State, Path]) -> None:
    for result in read_file(swept[1]):
        config = TrainConfig.from_dict(result.trial.train)
        assert config.to_dict() == dict(result.trial.train)
