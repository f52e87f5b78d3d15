"""The benchmark of one adapter against four: budgets are equal as it says, lines resume, and the page shows them."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from visgraft import load
from visgraft.measure.evaluation import Evaluation

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("several_tasks"), importlib.import_module("several_tasks_page")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_the_page_shows_what_the_lines_say(modules: tuple[ModuleType, ModuleType]) -> None:
    _, page = modules
    lines = page.read_lines(page.RESULTS)
    assert page.page(page.blocks(lines)) == page.PAGE.read_text(encoding="utf-8"), (
        "run: python benchmarks/several_tasks_page.py"
    )
    machines = {line["pictures"] for line in lines if "pictures" in line}
    assert len(machines) <= 2, "all trainings saw the same scenes and the same gauges"


def line(form: str, seed: int, labels: list[str], value: float) -> dict[str, object]:
    figures = {part: {label: {"top1": value} for label in labels} for part in ("test", "restyled")}
    return {"method": "alore", "form": form, "share": None, "seed": seed, "parameters": 4, "seconds": 60.0,
            "figures": figures, "labels": labels}  # fmt: skip


def test_the_criteria_are_those_that_were_written_down(modules: tuple[ModuleType, ModuleType]) -> None:
    benchmark, page = modules
    tasks = list(benchmark.SCENE_TASKS)
    lines = [line("joint", seed, tasks, 0.5 + seed / 1000) for seed in range(3)]
    lines += [line("quarter_parameters", seed, [task], 0.51) for seed in range(3) for task in tasks]
    lines += [line("quarter_time", seed, [task], 0.4) for seed in range(3) for task in tasks]
    lines += [line("separate", 0, [task], 0.7) for task in tasks[:3]]  # not all of them, so there is no row
    told = page.difference_table(page.rows_of(lines)).splitlines()
    assert next(text for text in told if "equal parameters | test" in text).endswith("| 3 | as good |")
    assert next(text for text in told if "equal time | test" in text).endswith("| 3 | better |")
    assert not any("separate" in text for text in told)
    cases = [("quarter_parameters", (-3, -2.9, -3.1), "worse"), ("quarter_parameters", (-9, 9, 0), "not shown"),
             ("quarter_time", (-1, -1.1, -0.9), "worse"), ("separate", (5, 5, 5), "none"),
             ("quarter_time", (5.0, 5.0), "needs 3 seeds")]  # fmt: skip
    for form, differences, says in cases:
        assert page.verdict("joint", form, differences) == says
    assert page.verdict("own_factors", "quarter_parameters", (5, 5, 5)) == "none"
    assert page.verdict("own_factors", "joint_long", (5, 5, 5)) == "better"
    low, high = page.interval([1.0, 2.0, 3.0])[1:]
    assert (low, high) == pytest.approx((2 - 2.484, 2 + 2.484), abs=0.001)  # 4.303 / sqrt(3)


def test_the_tiny_mode_runs_and_goes_on(
    modules: tuple[ModuleType, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    benchmark, page = modules
    kept = tmp_path / "adapters"
    words = ["several_tasks.py", "--quick", "--out", str(tmp_path), "--adapters", str(kept), "--methods", "alore"]
    forms = "joint,quarter_parameters,quarter_time,numbers,gauge_classes,gauge_number"
    monkeypatch.setattr(sys, "argv", [*words, "--forms", "joint"])
    benchmark.main()
    with (tmp_path / benchmark.LINES).open("a") as file:
        file.write('{"form": "quarter_ti')  # as a killed run leaves it
    monkeypatch.setattr(sys, "argv", [*words, "--forms", forms])
    benchmark.main()
    assert "1 trainings to do" in (told := capsys.readouterr().out) and "11 trainings to do" in told
    benchmark.main()
    assert capsys.readouterr().out == "0 trainings to do\n"
    monkeypatch.setattr(sys, "argv", [*words, "--answers"])
    benchmark.main()
    lines = benchmark.read_lines(tmp_path)
    assert len(lines) == 13
    of = {form: [one for one in lines if one["form"] == form] for form in (*forms.split(","), "answers")}
    (joint,), quarters, short = of["joint"], of["quarter_parameters"], of["quarter_time"]
    assert sum(one["parameters"] for one in quarters) == pytest.approx(joint["parameters"], rel=0.05)
    assert sum(one["epochs"] for one in short) == joint["epochs"]
    assert {one["parameters"] for one in short} == {joint["parameters"]}
    heads = sum(one["head_parameters"] for one in quarters)
    assert heads == joint["head_parameters"]
    assert len({one["pictures"] for one in lines if "pictures" in one}) == 2
    adapted = load(next(kept.glob("joint-*")))
    assert [task.name for task in adapted.record.tasks] == list(benchmark.SCENE_TASKS)
    assert load(next(kept.glob("quarter_time-alore-count-*"))).classes[0] == "count_03"
    tables = page.blocks(lines)
    assert "needs 3 seeds" in tables["differences"] and "of 1 |" in tables["gauges"]
    assert tables["answers"].count("alore") == 1
    figures = of["gauge_number"][0]["figures"]
    assert "covered" not in figures["test"]["reading"], "16 validation images cannot promise 0.95"
    assert page.NOTHING in tables["coverage"]
    assert json.loads((tmp_path / benchmark.LINES).read_text().splitlines()[0])["form"] == "joint"


def test_what_answers_cover_is_measured_and_shown(modules: tuple[ModuleType, ModuleType]) -> None:
    benchmark, page = modules
    random = torch.Generator().manual_seed(0)
    answers = torch.rand(60, 3, generator=random).softmax(1)
    val, test = (
        Evaluation(0.5, None, 0.5, 0.5, None, 30, 1.0, answers[i : i + 30], torch.arange(30) % 3) for i in (0, 30)
    )
    covered = benchmark.coverages(val, test)[""]
    assert 0.5 < covered["covered"] <= 1 and 1 <= covered["size"] <= 3
    one = line("joint", 0, ["location"], 0.5)
    one["figures"]["test"] = {task: {"top1": 0.5} | covered for task in benchmark.SCENE_TASKS}  # type: ignore[index]
    told = page.coverage_table(page.rows_of([one])).splitlines()
    assert len(told) == 2 + 4 and f"| {100 * covered['covered']:.1f} | {covered['size']:.2f} classes | 1 |" in told[2]


def test_what_classes_say_as_numbers(modules: tuple[ModuleType, ModuleType]) -> None:
    benchmark, _ = modules
    assert benchmark.MIDDLES["count"].tolist() == [3, 4, 5, 6, 7, 8, 9, 10]
    assert np.allclose(np.diff(benchmark.MIDDLES["position"]), 15 / 16)
    assert benchmark.MIDDLES["location"][[0, -1]] == pytest.approx([100 * (0.15 + 0.7 / 32), 100 * (0.85 - 0.7 / 32)])
