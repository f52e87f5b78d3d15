"""Which method for my data: the whole comparison, what it never reads, and its command."""

import importlib
import itertools
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from test_search import answers, pretend, reach
from typer.testing import CliRunner

from visgraft import Backbone, VisgraftError, list_methods, load
from visgraft.adapters.directory import read_record
from visgraft.cli.app import build
from visgraft.cli.compare import compare as verb
from visgraft.cli.compare import describe
from visgraft.data import images as images_module
from visgraft.data.dataset import Dataset, Example
from visgraft.data.read import read_data
from visgraft.errors import DataError, Interrupted
from visgraft.executors.here import Here
from visgraft.search import Comparison, Progress, compare
from visgraft.search import race as race_module
from visgraft.search.budget import Cost, OutOfTime

BACKBONE = Backbone("test_vit", "none", 32)
SMALL = ["--backbone", "test_vit", "--weights", "none", "--image-size", "32"]
COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (210, 40, 50)}


def draw(folder: Path, count: int) -> Path:
    """Noise in the colour that its class folder is named after."""
    for seed, (name, colour) in enumerate(COLOURS.items()):
        (folder / name).mkdir(parents=True)
        noise = np.random.default_rng(seed).normal(colour, 40, (count, 40, 40, 3)).clip(0, 255).astype(np.uint8)
        for number, pixels in enumerate(noise):
            Image.fromarray(pixels).save(folder / name / f"{number:02}.png")
    return folder


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("compare") / "colours", 12)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The linear probe's 100 epochs say no more here than 20."""
    kind = list_methods()["linear"]
    monkeypatch.setattr(kind, "recipe", replace(kind.recipe, epochs=20, warmup_epochs=2.0))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths of all images that are opened."""
    paths, open_image = list[Path](), images_module.open_image

    def watch(example: Any, *rest: Any) -> Image.Image:
        paths.append(example.path)
        return open_image(example, *rest)

    monkeypatch.setattr(images_module, "open_image", watch)
    return paths


def run(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(verb)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# ---- all of it ----


def compared(data: Any, **options: Any) -> Comparison:
    return compare(data, options.pop("names", ("linear", "alore")), backbone=BACKBONE, precision="fp32", **options)


def test_a_comparison_reads_no_test_image_and_is_the_same_again(colours: Path, opened: list[Path]) -> None:
    told = list[Progress]()
    found = compared(colours, trials=2, epochs=3, on_progress=told.append)
    data = read_data(colours)
    assert len(data.test) > 3 and set(opened) == {e.path for e in (*data.train, *data.val)}
    assert len(opened) == len(set(opened)), "images are read once for all methods"
    assert (found.measured_on, found.images, found.folds, found.repeats) == ("cross-validation", 30, 5, 2)
    assert [row.method for row in found.results] == ["linear", "alore"]
    assert [row.trials for row in found.results] == [2, 2] and [row.epochs for row in found.results] == [20, 3]
    assert found.results[0].gain is None and found.results[1].gain is not None
    assert found.results[0].figure > 0.9, "colours are easy"
    assert "test images were not read" in found.notes[0] and "alore trained for 3 epochs" in found.notes[1]
    assert {progress.stage for progress in told} == {"search", "cross-validation"}
    assert len([progress for progress in told if progress.outcome]) == 4
    again = compared(colours, trials=2, epochs=3)
    steady = [replace(row, epoch_seconds=0) for row in found.results]
    assert [replace(row, epoch_seconds=0) for row in again.results] == steady and again.sentence == found.sentence


def test_methods_side_by_side_find_what_they_find_in_turns(colours: Path) -> None:
    told = list[Progress]()
    found = compared(colours, trials=2, epochs=3)
    spread = compared(colours, trials=2, epochs=3, executor=Here(), on_progress=told.append)
    assert [replace(row, epoch_seconds=0) for row in spread.results] == [
        replace(row, epoch_seconds=0) for row in found.results
    ]
    assert spread.sentence == found.sentence and spread.notes == found.notes
    assert {progress.stage for progress in told} == {"search", "cross-validation"}
    assert len([progress for progress in told if progress.outcome]) == 4


def test_with_many_images_the_validation_part_decides(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visgraft.search.run.FEW_IMAGES", 20)
    found = compared(colours, names=("linear",), trials=1)
    assert (found.measured_on, found.images, found.folds) == ("validation", len(read_data(colours).val), 0)
    assert "on these same validation images" in found.notes[0] and len(found.notes) == 1
    assert found.recommended == "linear" and found.sentence.startswith("only a linear probe was compared")


def test_a_better_method_is_recommended_with_its_setting(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    reach(lambda method, setting: {"linear": 1, "sct": 12, "alore": 30}[method] if setting.get("lr") != 5e-3 else 3)
    monkey_costs = {name: Cost(0.0, 1e-4, 1e-4, name == "linear") for name in ("linear", "alore")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visgraft.search.run.measure_cost", lambda task, name: monkey_costs[name])
        patch.setattr("visgraft.search.race.fit_fold", lambda bench, method, config, images, fold, *rest: (
            SimpleNamespace(probabilities=answers(images.labels, {"linear": 5, "alore": 28}[method.method])[fold[1]])
        ))  # fmt: skip
        found = compared(colours, trials=3)
    assert found.recommended == "alore" and found.reference == "linear"
    assert re.match(
        r"alore gains 76\.7 ± \d\d?\.\d points over a linear probe; use --method alore --lr", found.sentence
    )
    method, recipe = found.best_config()
    assert method.method == "alore" and recipe.epochs == list_methods()["alore"].recipe.epochs
    assert recipe.precision == found.precision in ("fp32", "bf16"), "as all was computed"


def shortened(monkeypatch: pytest.MonkeyPatch, right: dict[str, int]) -> None:
    """Let an automatic choice be among methods that get so many of 36 images right, in no time."""
    pretend(monkeypatch)
    reach(lambda method, setting: right[method])
    monkeypatch.setattr("visgraft.search.run.AUTO_METHODS", tuple(right))
    monkeypatch.setattr("visgraft.search.run.measure_cost", lambda task, name: Cost(0.0, 1e-4, 1e-4, name == "linear"))
    monkeypatch.setattr("visgraft.search.race.fit_fold", lambda bench, method, config, images, fold, *rest: (
        SimpleNamespace(probabilities=answers(images.labels, right[method.method])[fold[1]])
    ))  # fmt: skip


def test_an_automatic_choice_is_the_most_accurate_and_says_how_sure_that_is(
    colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shortened(monkeypatch, {"linear": 20, "ssf": 26, "lora": 25, "full": 9})
    found = compared(colours, names=("auto",), trials=1)
    assert [row.method for row in found.results] == ["linear", "ssf", "lora"], "the last does not reach the folds"
    assert found.recommended == "ssf" and "full fell behind on the validation images" in found.notes[1]
    assert re.fullmatch(
        r"ssf is the best of 3 on 30 images, 3\.3 ± \d\.\d points above the next, lora, which 30 images cannot tell "
        r"from 0; use --method ssf --lr .*",
        found.sentence,
    )


def test_without_time_for_the_folds_no_method_is_left_out(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shortened(monkeypatch, {"linear": 4, "ssf": 6, "lora": 5, "full": 3})
    monkeypatch.setattr("visgraft.search.run.possible_folds", lambda examples: 5)
    monkeypatch.setattr("visgraft.search.race.Race.cross_validate", lambda self, examples: {})
    found = compared(colours, names=("auto",), trials=1)
    assert [row.method for row in found.results] == ["linear", "ssf", "lora", "full"] and found.recommended == "ssf"
    assert not any("fell behind" in note for note in found.notes)


def train(*arguments: object) -> Any:
    words = ["train", *(str(argument) for argument in arguments)]
    return CliRunner().invoke(build(words), words)


def test_train_with_method_auto_chooses_trains_and_keeps_why(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visgraft.search.run.AUTO_METHODS", ("linear", "bitfit"))
    words = [colours, *SMALL, "--method", "auto", "--trials", 1, "--epochs", 2, "--seed", 3, "--precision", "fp32",
             "--background", "black"]  # fmt: skip
    done = train(*words, "--out", tmp_path / "a", "--json")
    assert done.exit_code == 0, done.exception
    figures, record = json.loads(done.stdout), read_record(tmp_path / "a")
    chosen = record.facts["chosen"]
    assert [row["method"] for row in chosen["methods"]] == ["linear", "bitfit"]
    assert figures["method"] == record.method.method and f"--method {record.method.method}" in chosen["sentence"]
    assert record.facts["train"]["seed"] == 3 and "the best of 2 on 30 images" in chosen["sentence"]
    assert {**figures["chosen"], "seconds": 0} == {**chosen, "seconds": 0}
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "validation images, by which the method with its setting was chosen, so that they are slightly" in card

    def interrupted(*arguments: Any, watch: Any, **options: Any) -> None:
        raise Interrupted(watch.again)

    with monkeypatch.context() as patch:
        patch.setattr("visgraft.training.run.train_folder", interrupted)
        again = str(train(*words, "--out", tmp_path / "b").exception)
    assert again.startswith("to train on: visgraft train ") and again.endswith(" --resume")
    repeated = train(*shlex.split(again.removeprefix("to train on: visgraft train ").removesuffix(" --resume")))
    assert repeated.exit_code == 0, repeated.exception
    elsewhere = train(*words, "--out", tmp_path / "c", "--json", "--on", "here")  # each search a job, each fold too
    assert elsewhere.exit_code == 0, elsewhere.exception
    assert {**json.loads(elsewhere.stdout)["chosen"], "seconds": 0} == {**chosen, "seconds": 0}
    first, *others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc")
    for other in others:
        assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "auto", "--lr", "0.1"], "--lr is among what --method auto chooses"),
        (["--method", "auto", "--rank", "2"], "--rank is among what --method auto chooses"),
        (["--method", "auto", "--resume"], "--resume needs a method that is known already"),
        (["--method", "auto", "--dry-run"], "--dry-run needs a method that is known already"),
        (["--method", "sct", "--budget", "3m"], "--budget is for --method auto"),
        (["--trials", "3"], "--trials is for --method auto"),
        (["--on", "ray"], "--on says where the trainings of --folds and of --method auto run; leave it out, or add"),
        (["--method", "auto", "--on", "Ray"], "--on is 'Ray', but must be here, processes, ray or ray://HOST:PORT"),
        (["--method", "auto", "--budget", "x"], "budget 'x' is no length of time"),
        (["--method", "auto", "--budget", "2s"], "a budget of 2s is too short"),
    ],
)
def test_what_does_not_go_with_an_automatic_choice_is_one_line(
    words: list[str], said: str, colours: Path, tmp_path: Path
) -> None:
    done = train(colours, *SMALL, *words, "--out", tmp_path / "a")
    assert isinstance(done.exception, VisgraftError) and said in str(done.exception), done.exception
    assert not (tmp_path / "a").exists()


def test_images_with_several_classes_are_compared_by_average_precision(tmp_path: Path) -> None:
    draw(tmp_path / "colours", 8)
    chosen = [Example(path, ((0,), (1,), (0, 1))[k]) for k, name in enumerate(COLOURS)
              for path in sorted((tmp_path / "colours" / name).iterdir())]  # fmt: skip
    data = Dataset(tmp_path, ("x", "y"), tuple(chosen[::2]), tuple(chosen[1::2]), (), "split", "", None, True)
    found = compared(data, trials=1, epochs=2)
    assert found.measure == "mean_average_precision" and found.images == 24
    assert all(0 <= row.interval[0] <= row.figure <= 1 for row in found.results)
    assert "mean average precision" in found.sentence or "guessing" in found.sentence
    assert json.loads(json.dumps(found.to_dict()))["measure"] == "mean_average_precision"


def test_images_of_a_group_count_together(colours: Path) -> None:
    data = read_data(colours)
    parts = {
        part: tuple(e._replace(group=f"{e.label}{int(e.path.stem) % 4}") for e in data.part(part))
        for part in ("train", "val")
    }
    found = compared(replace(data, **parts), names=("linear",), trials=1)
    assert found.folds == 4 and len(set(found.predictions["linear"].members)) == 12


class StepTime:
    """A clock that only steps of training move, so that what is measured does not depend on the machine."""

    def __init__(self, seconds_per_step: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, step = 0.0, torch.optim.AdamW.step

        def timed(*arguments: Any, **options: Any) -> Any:
            self.now += seconds_per_step
            return step(*arguments, **options)

        monkeypatch.setattr(torch.optim.AdamW, "step", timed)
        for module in ("search.budget", "search.pilot", "search.settings", "training.crossval", "training.fit"):
            monkeypatch.setattr(importlib.import_module(f"visgraft.{module}"), "time", self)

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@pytest.mark.parametrize("budget", [60.0, pytest.param(120.0, marks=pytest.mark.long)])
def test_a_budget_is_kept_and_used(budget: float, colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StepTime(0.2, monkeypatch)
    found = compared(colours, names=("sct", "lora"), budget_seconds=budget)
    assert budget / 2 < found.seconds <= budget + 1 and found.seconds == clock.now
    assert all(row.trials >= 1 for row in found.results) and found.budget_seconds == budget


@pytest.mark.parametrize(
    ("folds", "images", "said"),
    [
        (0, 4, "So few images call for cross-validation, but there was no time left for it; the intervals are wide."),
        (3, 18, "The time sufficed for the folds of 18 of 30 images; a longer --budget does more."),
        (7, 30, "so the figures are somewhat optimistic"),
    ],
)
def test_when_the_time_runs_out_what_is_held_out_so_far_is_compared_and_said(
    colours: Path, monkeypatch: pytest.MonkeyPatch, folds: int, images: int, said: str
) -> None:
    fit_fold, fitted = race_module.fit_fold, itertools.count()

    def late(*rest: Any) -> Any:
        if next(fitted) >= folds:
            raise OutOfTime
        return fit_fold(*rest)

    monkeypatch.setattr(race_module, "fit_fold", late)
    found = compared(colours, names=("linear",), trials=1)
    assert found.images == (len(read_data(colours).val) if not folds else images)
    assert found.measured_on == ("cross-validation" if folds else "validation") and said in found.notes[-1]
    assert found.repeats == bool(folds), "a second repeat that was not done is left out"
    held = found.predictions["linear"].probabilities
    assert held.shape == (1, found.images, 3) and torch.allclose(held.sum(-1), torch.ones(found.images))


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (("linaer",), {"trials": 1}, "unknown method 'linaer'; did you mean linear"),
        ((), {"trials": 1}, "no method is named"),
        (("auto", "sct"), {"trials": 1}, "auto stands for several methods and is compared with no other"),
        (("linear",), {}, "needs a budget or a number of trials"),
        (("linear",), {"trials": 0}, "trials is 0"),
        (("linear", "alore"), {"budget_seconds": 0.2}, "too short: 2 trainings"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    colours: Path, names: tuple[str, ...], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(VisgraftError, match=re.escape(said)) as error:
        compared(colours, names=names, **options)
    assert "\n" not in str(error.value)


def test_without_validation_images_nothing_is_compared(colours: Path) -> None:
    with pytest.raises(DataError, match="has no val images; set val_fraction above 0"):
        compared(replace(read_data(colours), val=()), trials=1)


# ---- the command line ----


def test_the_verb_writes_one_document_and_trains_the_best(colours: Path, tmp_path: Path) -> None:
    out, adapter = tmp_path / "out", tmp_path / "best"
    done = run(colours, *SMALL, "--methods", "linear", "--trials", 1, "--seed", 3, "--json", "--out", out,
               "--precision", "bf16", "--train-best", adapter)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    document, written = json.loads(done.stdout), json.loads((out / "compare.json").read_text())
    assert {k: v for k, v in document.items() if k != "adapter"} == written
    assert document["adapter"]["method"] == "linear" and document["adapter"]["epochs"] == 20
    assert load(adapter).classes == tuple(COLOURS)
    stored = json.loads((adapter / "adapter_config.json").read_text())["record"]
    assert stored["data"]["seed"] == 3, "so that the same images stay out"
    assert stored["precision"] == "bf16", "as asked for"
    assert written["command"].startswith(f"visgraft train {colours} --method linear --lr 0.01 --weight-decay 0.0001")
    assert written["command"].endswith(f"--image-size 32 --seed 3 --precision bf16 --out {adapter}")
    assert "linear trial 1 (--lr 0.01 --weight-decay 0.0001): finished, validation" in done.stderr


def test_the_verb_prints_a_table_the_sentence_and_the_command(colours: Path) -> None:
    done = run(colours, *SMALL, "--methods", "linear,sct", "--trials", 1, "--epochs", 2)
    assert done.exit_code == 0, done.stderr
    for text in ("30 training and validation images, 5-fold cross-validation × 2; gain over linear", "best settings",
                 "use --method", "train it:\n  visgraft train", "--epochs 2", "1 (0)"):  # fmt: skip
        assert text in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if "(0)" in line) <= 80


def test_a_place_that_is_taken_is_refused_before_anything_is_trained(colours: Path, opened: list[Path]) -> None:
    for option in ("--out", "--train-best"):
        done = run(colours, *SMALL, option, colours)
        assert isinstance(done.exception, VisgraftError) and "is not an earlier result" in str(done.exception)
    assert not opened


def test_progress_says_what_is_tried_how_good_it_is_and_how_long_it_takes() -> None:
    facts = SimpleNamespace(
        stage="search", method="sct", number=2, setting={"lr": 0.01, "scale": 0.5}, epoch=3, epochs=8,
        figure=None, best=0.75, seconds_left=125.0, outcome=None,
    )  # fmt: skip
    line: Any = facts
    assert describe(line) == "sct trial 2 (--lr 0.01 --scale 0.5): epoch 3/8, best 75.0 %, 3m left"
    line = SimpleNamespace(**vars(facts) | {"outcome": "pruned", "figure": 0.5, "seconds_left": float("inf")})
    assert describe(line) == "sct trial 2 (--lr 0.01 --scale 0.5): pruned, validation 50.0 %, best 75.0 %"
