"""Which method for my data: the search, the time it may take, the sentence, and what is never read."""

import itertools
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from visgraft import Backbone, Epoch, VisgraftError, load, methods
from visgraft.cli.compare import compare as verb
from visgraft.cli.compare import describe
from visgraft.compare import Comparison, Progress, compare, parse_budget
from visgraft.compare.budget import MIN_TRIALS, Clock, Cost, OutOfTime, Plan, Size, duration, make_plan
from visgraft.compare.race import Race
from visgraft.compare.search import Search, Task, configure, default_setting
from visgraft.compare.verdict import Candidate, confused_pairs, decide, difference, is_guessing
from visgraft.crossval import Bench, Fit, Predictions
from visgraft.data import images as images_module
from visgraft.data.dataset import Dataset, Example
from visgraft.data.images import Images
from visgraft.data.read import read_data
from visgraft.errors import DataError, TrainingDiverged
from visgraft.intervals import Difference

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
    kind = methods()["linear"]
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


# ---- a made-up trainer: what a setting reaches is known ----


def answers(labels: Tensor, right: int) -> Tensor:
    """Probabilities [N, 3] with so many of the first images answered right, and all others wrong."""
    chosen = torch.where(torch.arange(len(labels)) < right, labels, (labels + 1) % 3)
    return 0.9 * torch.eye(3)[chosen] + 0.1 / 3


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], int]]:
    """Replace training: `REACHED` says how many images of 100 a setting gets right; returns (method, setting, epochs).

    Half of it is reached in the first half of the epochs.
    """
    seen = list[tuple[str, dict[str, Any], int]]()
    reach(lambda method, setting: 50)

    def fit(self: Bench, method: Any, config: Any, images: Images, val: Images, **options: Any) -> Fit:
        knobs = methods()[method.method].knobs
        setting = {name: getattr(method, name, getattr(config, name, None)) for name in knobs}
        seen.append((method.method, setting, 0))
        right = REACHED[0](method.method, setting)
        if right is None:
            raise TrainingDiverged("the loss is no longer finite", 1)
        for number in range(1, config.epochs + 1):
            val_top1 = right / 100 * (0.5 if number <= config.epochs // 2 else 1.0)
            epoch = Epoch(number, 1.0, 0.5, config.lr, 1.0, 1.0, complete=True, val_top1=val_top1)
            seen[-1] = (*seen[-1][:2], number)
            if options.get("on_progress"):
                options["on_progress"](epoch)
        return Fit(answers(val.labels, right), val.labels, None, {"linear": 0, "sct": 10}.get(method.method, 20),
                   method.method == "linear", 0.0, 1.0)  # fmt: skip

    monkeypatch.setattr(Bench, "fit", fit)
    return seen


REACHED: list[Callable[[str, Mapping[str, Any]], int | None]] = [lambda method, setting: 50]


def reach(function: Callable[[str, Mapping[str, Any]], int | None]) -> None:
    REACHED[0] = function


def task(count: int = 100, seed: int = 0) -> Task:
    """A task whose images are never looked at."""
    blank = Images(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), torch.arange(count) % 3, (0.5,) * 3, (0.5,) * 3)
    return Task(Bench(BACKBONE, 3), blank, blank, seed, "fp32")


def search(method: str, *, epochs: int = 8, seed: int = 0) -> Search:
    return Search(method, task(seed=seed), Cost(0.0, 1e-4, 1e-4, method == "linear"), epochs)


def go(searches: Search, times: int) -> list[str]:
    return [searches.run(lambda epoch, setting: None)[0] for _ in range(times)]


# ---- time ----


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30m", 1800), ("2h", 7200), ("90s", 90), ("1h30m", 5400), ("1H30M5s", 5405), (" 1.5h ", 5400), ("0.5m", 30)],
)
def test_a_budget_is_written_in_hours_minutes_and_seconds(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "0m", "30min", "1m2h", "-5m", "5 m", "half an hour"])
def test_anything_else_is_no_budget(text: str) -> None:
    with pytest.raises(VisgraftError, match="is no length of time; write it like 30m, 2h, 90s or 1h30m"):
        parse_budget(text)


def test_a_length_of_time_is_written_as_it_is_read() -> None:
    for seconds in (1, 59.2, 99, 100, 3000, 3600, 5460, 36_000):
        assert seconds <= parse_budget(duration(seconds)) < seconds + 60
    assert (duration(42), duration(1790), duration(5400), duration(7200)) == ("42s", "30m", "1h30m", "2h")


COSTS = {"linear": Cost(0.0, 1e-5, 0.01, True), "alore": Cost(0.001, 0.03, 0.01, False)}
RECIPES = {"linear": 100, "alore": 30}


def test_with_time_enough_every_training_has_all_epochs() -> None:
    assert make_plan(COSTS, RECIPES, Size(150, 50, 5), 1e5, 1e5) == Plan(RECIPES, 5, 2)
    assert make_plan(COSTS, RECIPES, Size(1000, 200, 0), 1e5, 1e5) == Plan(RECIPES, 0, 0)


def test_epochs_are_shortened_alike_but_not_those_of_a_head_on_computed_features() -> None:
    costs = COSTS | {"full": Cost(0.001, 0.05, 0.01, False)}
    plan = make_plan(costs, RECIPES | {"full": 30}, Size(150, 50, 5), 3000, 3000)
    assert plan.epochs["linear"] == 100 and 5 <= plan.epochs["alore"] == plan.epochs["full"] < 30


def test_less_time_never_gives_a_longer_plan() -> None:
    sizes, before = Size(150, 50, 4), (10**9, 10**9, 10**9)
    for seconds in (3000, 2000, 1000, 700, 500, 350):
        plan = make_plan(COSTS, RECIPES, sizes, seconds, seconds)
        work = (plan.folds * plan.repeats, plan.epochs["alore"], plan.folds)
        assert work[0] <= before[0] or work[1] < before[1]
        assert plan.folds in (3, 4) and plan.epochs["alore"] >= 5
        before = work


def test_a_budget_too_short_is_refused_with_one_that_is_not() -> None:
    with pytest.raises(
        VisgraftError, match=r"a budget of 30s is too short: 2 trainings of 5 epochs per method"
    ) as error:
        make_plan(COSTS, RECIPES, Size(150, 50, 5), 20, 30)
    found = re.search(r"pass --budget (\w+), a smaller --image-size, or fewer --methods", str(error.value))
    assert found and "\n" not in str(error.value)
    enough = parse_budget(found[1])
    assert make_plan(COSTS, RECIPES, Size(150, 50, 5), enough - 10, enough).epochs["alore"] >= 5
    assert MIN_TRIALS == 2


def test_a_clock_without_a_budget_always_has_time() -> None:
    assert Clock(None).left == float("inf")
    assert 5 < Clock(10, spent=4).left <= 6


# ---- the search of one method ----


@pytest.mark.parametrize("name", methods())
def test_every_value_of_a_methods_knobs_is_an_option_and_the_default_is_among_them(name: str) -> None:
    kind = methods()[name]
    assert configure(name, default_setting(name)) == (kind.Config(), kind.recipe)
    assert kind.knobs, "a comparison would try the default alone"
    for values in itertools.product(*kind.knobs.values()):
        method, recipe = configure(name, dict(zip(kind.knobs, values, strict=True)), epochs=6)
        assert recipe.epochs == 6 and recipe.warmup_epochs == pytest.approx(
            kind.recipe.warmup_epochs * 6 / kind.recipe.epochs
        )
        for option, value in zip(kind.knobs, values, strict=True):
            assert value in (getattr(method, option, None), getattr(recipe, option, None))


@pytest.mark.parametrize(("knobs", "said"), [({"speed": (1,)}, "no option 'speed'"), ({"lr": (7.0,)}, "is not among")])
def test_wrong_knobs_are_named(knobs: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods()["alore"], "knobs", knobs)
    with pytest.raises(VisgraftError, match=said):
        default_setting("alore")


def test_the_search_starts_with_the_default_and_finds_what_is_better(trained: list[Any]) -> None:
    reach(lambda method, setting: 90 if setting == {"lr": 5e-4, "scale": 10.0} else 40)
    found = search("alore")
    go(found, 20)
    assert trained[0][1] == default_setting("alore") and found.best is not None
    assert found.best[:2] == (0.9, {"lr": 5e-4, "scale": 10.0})
    assert found.trials == 20 and not found.untried
    assert len({tuple(setting.values()) for _, setting, _ in trained}) == 20, "no setting is trained twice"


def test_poor_trials_are_pruned_and_the_default_is_not(trained: list[Any]) -> None:
    reach(lambda method, setting: 80 if setting == default_setting("alore") else 30)
    found = search("alore")
    outcomes = go(found, 10)
    assert outcomes[0] == "finished" and found.pruned == outcomes.count("pruned") >= 7
    assert trained[0][2] == 8 and all(
        epochs < 8 for (_, _, epochs), end in zip(trained, outcomes, strict=True) if end == "pruned"
    )


def test_the_same_seed_tries_the_same_settings(trained: list[Any]) -> None:
    reach(lambda method, setting: round(60 + 5 * setting["scale"]))
    for seed in (0, 0, 1):
        go(search("sct", seed=seed), 8)
    first, again, other = ([setting for _, setting, _ in trained[i : i + 8]] for i in (0, 8, 16))
    assert first == again and first != other


def test_a_trial_that_diverges_is_counted_and_the_search_goes_on(trained: list[Any]) -> None:
    reach(lambda method, setting: None if setting["lr"] > 2e-3 else 50)
    found = search("lora")
    outcomes = go(found, 32)
    assert found.diverged == outcomes.count("diverged") == 8 and found.best is not None and found.best[0] == 0.5


def test_a_trial_out_of_time_is_neither_pruned_nor_best(trained: list[Any]) -> None:
    found = search("sct")

    def late(epoch: Epoch, setting: Any) -> None:
        raise OutOfTime

    assert found.run(late)[0] == "out of time"
    assert (found.best, found.pruned, found.diverged, found.trials) == (None, 0, 0, 1)


def race(names: list[str], budget: float | None = None) -> Race:
    searches = [search(name) for name in names]
    return Race(searches[0].task, searches, Plan({}, 0, 0), Clock(budget), lambda progress: None)


def test_every_method_has_its_trials_and_those_that_took_least_time_go_on(trained: list[Any]) -> None:
    reach(lambda method, setting: 50)
    found = race(["alore", "sct", "linear"])
    found.search(5)
    assert [one.trials for one in found.searches] == [5, 5, 5]
    assert [method for method, _, _ in trained[:3]] == ["alore", "sct", "linear"], "all defaults come first"
    slow = race(["alore", "sct"])
    slow.searches[0].run(lambda epoch, setting: None)
    slow.searches[0].spent = 1e3
    trained.clear()
    slow.search(4)
    assert [method for method, _, _ in trained[:4]] == ["sct"] * 4


def test_no_trial_begins_that_the_time_does_not_allow(trained: list[Any]) -> None:
    found = race(["alore"], budget=5.0)
    found.searches[0].cost = Cost(0.0, 1.0, 1.0, False)  # the default recipe would take 1,700 s, and takes none
    monkey = found.searches[0]
    found.search(None)
    assert monkey.trials == 1 or monkey.seconds < 5
    late = race(["alore", "sct"], budget=1e-9)
    with pytest.raises(VisgraftError, match="no training ran to its end"):
        late.search(None)


def test_when_all_trainings_diverge_one_line_says_so(trained: list[Any]) -> None:
    reach(lambda method, setting: None)
    found = race(["alore", "sct"])
    with pytest.raises(VisgraftError, match=r"no training ran to its end \(6 of 6 diverged\)"):
        found.search(3)


# ---- the sentence ----

LINEAR = Candidate("linear", {"lr": 0.01}, 0.80, 0, True)
SCT = Candidate("sct", {"lr": 5e-3, "scale": 1.0}, 0.80, 28_224, True)
ALORE = Candidate("alore", {"lr": 2e-3, "scale": 5.0}, 0.80, 73_792, True)
LORA = Candidate("lora", {"lr": 2e-3, "rank": 8}, 0.80, 147_456, True)
UNSURE = "which 240 images cannot tell from 0"


def gains(half: float, **points: float) -> tuple[list[Candidate], Callable[[str, str], Difference]]:
    """Candidates by name with their figures, and differences that all have one half-width."""
    known = {one.method: one for one in (LINEAR, SCT, ALORE, LORA)}
    candidates = [replace(known[name], figure=figure / 100) for name, figure in points.items()]
    return candidates, lambda a, b: Difference((points[a] - points[b]) / 100, half / 100)


@pytest.mark.parametrize(
    ("half", "points", "recommended", "sentence"),
    [
        (1.3, {"linear": 80, "alore": 84.1}, "alore",
         "alore gains 4.1 ± 1.3 points over a linear probe; use --method alore --lr 0.002 --scale 5"),
        (1.1, {"linear": 80, "alore": 79, "lora": 80.4}, "linear",
         f"a linear probe is enough: the best other method, lora, differs by 0.4 ± 1.1 points, {UNSURE}; "
         "use --method linear --lr 0.01"),
        (1.1, {"linear": 80, "sct": 79.5}, "linear",
         f"a linear probe is enough: the best other method, sct, differs by −0.5 ± 1.1 points, {UNSURE}; "
         "use --method linear --lr 0.01"),
        (1.1, {"linear": 80, "sct": 75, "lora": 76}, "linear",
         "a linear probe is enough: the best other method, lora, is 4.0 ± 1.1 points worse; "
         "use --method linear --lr 0.01"),
        (1.5, {"linear": 80, "sct": 84, "alore": 84.6}, "sct",
         "sct gains 4.0 ± 1.5 points over a linear probe, and the best, alore, differs from it by 0.6 ± 1.5 points, "
         f"{UNSURE}, but trains more parameters; use --method sct --lr 0.005 --scale 1"),
        (2.0, {"linear": 80, "sct": 81.5, "alore": 83}, "alore",
         "alore gains 3.0 ± 2.0 points over a linear probe; use --method alore --lr 0.002 --scale 5"),
        (1.0, {"sct": 80, "lora": 85}, "lora",
         "lora gains 5.0 ± 1.0 points over sct, which trains the fewest parameters here; "
         "use --method lora --lr 0.002 --rank 8"),
        (6.0, {"sct": 80, "lora": 85}, "sct",
         "sct, which trains the fewest parameters here, is enough: the best other method, lora, differs by "
         f"5.0 ± 6.0 points, {UNSURE}; use --method sct --lr 0.005 --scale 1"),
        (1.0, {"alore": 80}, "alore",
         "only alore was compared; use --method alore --lr 0.002 --scale 5, or name more methods"),
    ],
)  # fmt: skip
def test_one_sentence_says_which_method_and_why(
    half: float, points: dict[str, float], recommended: str, sentence: str
) -> None:
    candidates, gain = gains(half, **points)
    for order in (candidates, candidates[::-1]):
        verdict = decide(order, gain, 240)
        assert (verdict.recommended, verdict.sentence) == (recommended, sentence)
        assert verdict.reference == ("linear" if "linear" in points else candidates[0].method)


def test_where_all_methods_guess_the_sentence_looks_elsewhere() -> None:
    candidates, gain = gains(9, linear=34, alore=36)
    verdict = decide(candidates, gain, 90, guessing=True)
    assert verdict.sentence.startswith("none of the methods does better than guessing on these 90 images: look at the")
    assert verdict.recommended == "linear"


def test_average_precision_is_counted_in_its_own_points() -> None:
    candidates, gain = gains(1, linear=80, alore=90)
    assert "gains 10.0 ± 1.0 points of mAP over" in decide(candidates, gain, 9, points="points of mAP").sentence


def predicted(labels: Tensor, answered: Tensor, classes: int = 3) -> Predictions:
    return Predictions((0.8 * torch.eye(classes)[answered] + 0.2 / classes)[None], labels)


def test_guessing_is_known_whatever_the_classes_shares() -> None:
    labels = torch.tensor([0] * 95 + [1] * 5)
    always, good = torch.zeros(100, dtype=torch.long), labels.clone()
    good[[0, 1, 2]] = 1
    assert is_guessing(predicted(labels, always)), "95 % right, by always saying the same"
    assert not is_guessing(predicted(labels, good))
    coin = torch.from_numpy(np.random.default_rng(0).integers(0, 3, 300))
    assert is_guessing(predicted(torch.arange(300) % 3, coin))


def test_guessing_is_known_where_images_have_several_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(100, 3, generator=generator) < 0.3).float()
    assert is_guessing(Predictions(torch.rand(1, 100, 3, generator=generator), labels))
    assert not is_guessing(Predictions((0.5 * labels + 0.2)[None], labels))


def test_two_classes_that_no_method_tells_apart_are_found() -> None:
    labels = torch.arange(120) % 3
    flip = torch.from_numpy(np.random.default_rng(0).integers(0, 2, 120))
    blind = predicted(labels, torch.where(labels == 2, labels, flip))  # tells 2 from the others and guesses between
    sharp = predicted(labels, labels)
    assert confused_pairs([blind, blind]) == [(0, 1)]
    assert confused_pairs([blind, sharp]) == [], "one of them can"
    assert confused_pairs([predicted(labels[:12], flip[:12])]) == [], "too few images to say so"


def test_a_gain_is_measured_on_the_same_images() -> None:
    labels = torch.arange(200) % 3
    first, second = labels.clone(), labels.clone()
    second[:20], first[:4] = (labels[:20] + 1) % 3, (labels[:4] + 1) % 3
    paired = difference(predicted(labels, first), predicted(labels, second))
    assert paired.mean == pytest.approx(0.08) and paired.clear
    assert paired.half_width < 0.05, "narrower than of two samples that differ in everything"


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


def test_with_many_images_the_validation_part_decides(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visgraft.compare.run.FEW_IMAGES", 20)
    found = compared(colours, names=("linear",), trials=1)
    assert (found.measured_on, found.images, found.folds) == ("validation", len(read_data(colours).val), 0)
    assert "on these same validation images" in found.notes[0] and len(found.notes) == 1
    assert found.recommended == "linear" and found.sentence.startswith("only a linear probe was compared")


def test_a_better_method_is_recommended_with_its_setting(colours: Path, trained: list[Any]) -> None:
    reach(lambda method, setting: {"linear": 1, "sct": 12, "alore": 30}[method] if setting.get("lr") != 5e-3 else 3)
    monkey_costs = {name: Cost(0.0, 1e-4, 1e-4, name == "linear") for name in ("linear", "alore")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visgraft.compare.run.measure_cost", lambda task, name: monkey_costs[name])
        patch.setattr("visgraft.compare.race.join", lambda images, val: task(30).images)
        patch.setattr("visgraft.compare.race.out_of_fold", lambda bench, method, *rest: (
            answers(task(30).images.labels, {"linear": 5, "alore": 28}[method.method]), []))  # fmt: skip
        found = compared(colours, trials=3)
    assert found.recommended == "alore" and found.reference == "linear"
    assert re.match(
        r"alore gains 76\.7 ± \d\d?\.\d points over a linear probe; use --method alore --lr", found.sentence
    )
    method, recipe = found.best_config()
    assert method.method == "alore" and recipe.epochs == methods()["alore"].recipe.epochs


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


def test_a_budget_is_kept(colours: Path) -> None:
    begin = time.monotonic()
    found = compared(colours, names=("linear", "sct"), budget_seconds=25)
    assert time.monotonic() - begin < 30 and found.seconds < 30
    assert all(row.trials >= 1 for row in found.results) and found.budget_seconds == 25


def test_when_cross_validation_finds_no_time_the_figures_say_so(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*rest: Any) -> Any:
        raise OutOfTime

    monkeypatch.setattr("visgraft.compare.race.out_of_fold", late)
    found = compared(colours, names=("linear",), trials=1)
    assert (found.measured_on, found.folds) == ("validation", 0)
    assert "there was no time left for it" in found.notes[-1]


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (("linaer",), {"trials": 1}, "unknown method 'linaer'; did you mean linear"),
        ((), {"trials": 1}, "no method is named"),
        (("linear",), {}, "needs a budget or a number of trials"),
        (("linear",), {"trials": 0}, "trials is 0"),
        (("linear", "alore"), {"budget_seconds": 2.0}, "too short: 2 trainings"),
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
               "--train-best", adapter)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    document, written = json.loads(done.stdout), json.loads((out / "compare.json").read_text())
    assert {k: v for k, v in document.items() if k != "adapter"} == written
    assert document["adapter"]["method"] == "linear" and document["adapter"]["epochs"] == 20
    assert load(adapter).classes == tuple(COLOURS)
    stored = json.loads((adapter / "adapter_config.json").read_text())["record"]
    assert stored["data"]["seed"] == 3, "so that the same images stay out"
    assert written["command"].startswith(f"visgraft train {colours} --method linear --lr 0.01 --weight-decay 0.0001")
    assert written["command"].endswith(f"--image-size 32 --seed 3 --out {adapter}")
    assert "linear trial 1 (--lr 0.01 --weight-decay 0.0001): finished, validation" in done.stderr


def test_the_verb_prints_a_table_the_sentence_and_the_command(colours: Path) -> None:
    done = run(colours, *SMALL, "--methods", "linear,sct", "--trials", 1, "--epochs", 2)
    assert done.exit_code == 0, done.stderr
    for text in ("30 training and validation images, 5-fold cross-validation × 2; gain over linear", "best settings",
                 "use --method", "train it:\n  visgraft train", "--epochs 2", "1 (0 pruned)"):  # fmt: skip
        assert text in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if "(0 pruned)" in line) <= 80


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
