"""The search of each method's settings, and the time it may take, with a trainer whose results are known."""

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from visgraft import Backbone, Epoch, VisgraftError, list_methods
from visgraft.core.configure import COLOURS, configure, default_setting, search_space
from visgraft.data.images import Images
from visgraft.errors import TrainingDiverged
from visgraft.search import parse_budget
from visgraft.search.budget import MIN_TRIALS, Clock, Cost, OutOfTime, Plan, Size, make_plan
from visgraft.search.race import Race
from visgraft.search.settings import Search, TuningTask
from visgraft.training.crossval import Bench, Fit
from visgraft.training.pace import duration

BACKBONE = Backbone("test_vit", "none", 32)


def answers(labels: Tensor, right: int) -> Tensor:
    """Probabilities [N, 3] with so many of the first images answered right, and all others wrong."""
    chosen = torch.where(torch.arange(len(labels)) < right, labels, (labels + 1) % 3)
    return 0.9 * torch.eye(3)[chosen] + 0.1 / 3


def pretend(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], int]]:
    """Replace training: `REACHED` says how many images of 100 a setting gets right; returns (method, setting, epochs).

    Half of it is reached in the first half of the epochs.
    """
    seen = list[tuple[str, dict[str, Any], int]]()
    reach(lambda method, setting: 50)

    def fit(self: Bench, method: Any, config: Any, images: Images, val: Images, **options: Any) -> Fit:
        names = search_space(method.method)
        setting = {name: getattr(method, name, getattr(config, name, None)) for name in names}
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


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], int]]:
    return pretend(monkeypatch)


REACHED: list[Callable[[str, Mapping[str, Any]], int | None]] = [lambda method, setting: 50]


def reach(function: Callable[[str, Mapping[str, Any]], int | None]) -> None:
    REACHED[0] = function


def task(count: int = 100, seed: int = 0) -> TuningTask:
    """A task whose images are never looked at."""
    blank = Images(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), torch.arange(count) % 3, (0.5,) * 3, (0.5,) * 3)
    return TuningTask(Bench(BACKBONE, 3), blank, blank, seed, "fp32")


def search(method: str, *, epochs: int = 8, seed: int = 0) -> Search:
    return Search(method, task(seed=seed), Cost(0.0, 1e-4, 1e-4, method == "linear"), epochs)


def go(searches: Search, times: int) -> list[str]:
    return [searches.run(lambda epoch, setting: None)[0] for _ in range(times)]


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


@pytest.mark.parametrize("name", list_methods())
def test_every_value_of_a_methods_knobs_is_an_option_and_the_default_is_among_them(name: str) -> None:
    kind = list_methods()[name]
    assert configure(name, default_setting(name)) == (kind.Config(), kind.recipe)
    assert kind.knobs, "a comparison would try the default alone"
    space = search_space(name)
    for values in itertools.product(*space.values()):
        method, recipe = configure(name, {"epochs": 6, **dict(zip(space, values, strict=True))})
        assert recipe.epochs == 6 and recipe.warmup_epochs == pytest.approx(
            kind.recipe.warmup_epochs * 6 / kind.recipe.epochs
        )
        for option, value in zip(space, values, strict=True):
            assert value in (getattr(method, option, None), getattr(recipe, option, None))


@pytest.mark.parametrize(("knobs", "said"), [({"speed": (1,)}, "no option 'speed'"), ({"lr": (7.0,)}, "is not among")])
def test_wrong_knobs_are_named(knobs: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_methods()["alore"], "knobs", knobs)
    with pytest.raises(VisgraftError, match=said):
        default_setting("alore")


def test_the_search_starts_with_the_default_and_finds_what_is_better(trained: list[Any]) -> None:
    best = {"lr": 5e-4, "rand_augment": COLOURS, "flip": True}
    reach(lambda method, setting: 90 if setting == best else 40)
    found = search("bitfit")
    go(found, 30)
    assert trained[0][1] == default_setting("bitfit") and found.best is not None
    assert found.best[:2] == (0.9, best)
    assert found.trials == 30 and not found.untried
    assert len({tuple(setting.values()) for _, setting, _ in trained}) == 30, "no setting is trained twice"


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
