"""The forecast: what it says of sizes is what training then writes, it reads a few images and writes nothing."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_cli import SMALL, content, draw, fail, run, succeed
from test_train import DEFAULTS, RECIPE, ready, task, training

from visgraft import Backbone, DataError, TrainConfig, TrainState, VisgraftError, list_methods
from visgraft.adapters.directory import TENSORS
from visgraft.data.images import Loading
from visgraft.measure.evaluation import peak_memory_bytes
from visgraft.training import forecast as forecasting
from visgraft.training import pace as pace_module
from visgraft.training import prefix
from visgraft.training.forecast import forecast_folder
from visgraft.training.pace import MEASURED_STEPS, Pace, measure_pace
from visgraft.training.prefix import TRACED, enter, run_prefix

BACKBONE = Backbone("test_vit", "none", 32)
PIXELS = 3 * 32 * 32
RAM = Loading("ram")


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images, of which 39 are for training, 9 for validation and 12 for testing."""
    return draw(tmp_path_factory.mktemp("forecast") / "colours", 20)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Of each part so few images are read."""
    monkeypatch.setattr(forecasting, "SAMPLE", 6)
    return 6


def forecast(data: Path, method: str = "lora", loading: Loading = RAM, **changes: Any) -> dict[str, Any]:
    config = replace(TrainConfig(epochs=3, warmup_epochs=1.0, batch_size=8, precision="fp32"), **changes)
    kind = list_methods()[method]
    return forecast_folder(data, backbone=BACKBONE, method_config=kind.Config(), train_config=config, loading=loading)


@pytest.mark.parametrize("method", ["sct", "alore", "linear", "full"])
def test_sizes_and_counts_are_those_of_the_training_and_nothing_is_written(
    method: str, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISGRAFT_CACHE", str(tmp_path / "cache"))
    words = ["train", colours, "--out", tmp_path / "out", "--method", method, "--epochs", 2, *SMALL]
    said = succeed(*words, "--cache", "disk", "--dry-run")
    assert content(tmp_path) == {}
    was = succeed(*words)
    assert {name: said[name] for name in said.keys() & was.keys() - {"images", "seconds", "peak_memory_bytes"}} == {
        name: was[name] for name in said.keys() & was.keys() - {"images", "seconds", "peak_memory_bytes"}
    }
    assert {"params_adapter", "params_head", "params_backbone", "precision", "epochs"} <= said.keys() & was.keys()
    assert said["adapter_file_bytes"] == (tmp_path / "out" / TENSORS).stat().st_size
    assert (said["images"], said["images_val"]) == (39, was["images"]) == (39, 9)
    assert said["features_once"] == (method == "linear")


def test_a_few_images_are_read_and_no_test_image(few: int, colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, told = [], []
    read = forecasting.load_images

    def watched(examples: Any, *arguments: Any, **options: Any) -> Any:
        opened.extend(example.path for example in examples)
        return read(examples, *arguments, **options)

    monkeypatch.setattr(forecasting, "load_images", watched)
    found = forecast_folder(
        colours, backbone=BACKBONE, method_config=list_methods()["sct"].Config(), train_config=RECIPE,
        watch=forecasting.Watch(None, lambda *done: told.append(done)),
    )  # fmt: skip
    assert found["images_read"] == len(opened) == len(set(opened)) == 2 * few
    assert {path.parent.name for path in opened[:few]} == {"blue", "green", "red"}
    assert told == [(n + 1, 2 * few) for n in range(2 * few)]
    dataset = forecasting.read_and_check(colours, forecasting.Split(), forecasting.Watch())
    assert not set(opened) & {example.path for example in dataset.test}
    assert (found["images"], found["steps_per_epoch"]) == (39, 39 / 8)


@pytest.mark.parametrize(("cache", "missing"), [("ram", 39 + 9 - 12), ("none", 0)])
def test_memory_counts_the_images_that_are_not_read_yet(
    cache: str, missing: int, few: int, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecasting, "peak_memory_bytes", lambda to_come: to_come)
    assert forecast(colours, loading=Loading(cache))["peak_memory_bytes"] == missing * PIXELS
    if not torch.cuda.is_available():
        assert peak_memory_bytes(10**15) > 10**15


LARGE = 1_500_000_000
STARTED = "from visgraft.measure.evaluation import peak_memory_bytes as peak; print(peak())"
STARTING = f"""
import subprocess, sys
held = bytearray(b"1") * {LARGE}
subprocess.run([sys.executable, "-c", {STARTED!r}], check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process does not begin with its parent's peak")
def test_the_memory_of_a_process_is_not_that_of_the_one_which_started_it() -> None:
    done = subprocess.run([sys.executable, "-c", STARTING], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < LARGE


def test_images_that_an_earlier_run_left_decoded_take_no_time(
    few: int, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISGRAFT_CACHE", str(tmp_path / "cache"))
    words = [
        "train",
        colours,
        "--out",
        tmp_path / "out",
        "--method",
        "linear",
        "--epochs",
        1,
        *SMALL,
        "--cache",
        "disk",
    ]
    assert succeed(*words, "--dry-run")["seconds_by_part"]["reading_images"] > 0
    succeed(*words)
    assert succeed(*words, "--dry-run")["seconds_by_part"]["reading_images"] == 0


@pytest.mark.parametrize("changes", [{}, {"flip": True}, {"rand_augment": "rand-m5"}, {"drop_last": True}])
def test_a_head_that_sees_features_is_told_from_one_that_sees_changing_images(
    changes: dict[str, Any], few: int, colours: Path
) -> None:
    found = forecast(colours, "linear", **changes)
    once = changes in ({}, {"drop_last": True})
    assert found["features_once"] == once == (found["seconds_by_part"]["features"] > 0)
    assert found["steps_per_epoch"] == (4 if "drop_last" in changes else 39 / 8)


def test_what_was_measured_is_multiplied_by_what_there_is(
    few: int, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = Pace(step=2.0, start=1.0, keeping=0.5, validation=4.0, warmup=7.0, steps=5.0, preparing=3.0)
    assert pace.epoch == 11.5
    given: dict[str, Any] = {}

    def measured(model: Any, images: Any, config: Any, val: Any, *, features: Any, then: Any, **told: Any) -> Pace:
        given.update(images=len(images), val=len(val), features=features)
        return pace

    monkeypatch.setattr(forecasting, "measure_pace", measured)
    found = forecast(colours, "lora")
    assert given == {"images": 39, "val": few, "features": None}
    assert found["seconds_per_epoch"] == pytest.approx(11.5 + 4.0 * 9 / few)
    assert found["seconds_by_part"]["training"] == pytest.approx(3 + 7 + 3 * (11.5 + 4.0 * 9 / few))
    assert found["seconds"] == pytest.approx(sum(found["seconds_by_part"].values()))
    found = forecast(colours, "linear")
    assert {name: len(rows) for name, rows in given["features"].items()} == {"train": 39, "val": 9}
    assert (given["val"], found["seconds_per_epoch"]) == (9, 11.5 + 4.0), "with features all figures are computed"


@pytest.mark.parametrize("views", [None, 3])
def test_a_few_images_go_through_the_frozen_prefix_and_stand_for_all(
    views: int | None, few: int, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, found = [0.0], []

    def entered(*arguments: Any) -> torch.Tensor:
        seconds[0] += len(arguments[2])
        return enter(*arguments)

    def kept(*arguments: Any, **more: Any) -> Any:
        found.append(run_prefix(*arguments, **more))
        return found[0]

    monkeypatch.setattr(prefix, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))

    monkeypatch.setattr(prefix, "enter", entered)
    monkeypatch.setattr("visgraft.training.objective.run_prefix", kept)
    augmented = {"flip": True, "cached_views": views} if views else {}
    config = TrainConfig(epochs=3, warmup_epochs=1.0, batch_size=8, precision="fp32", **augmented)  # type: ignore[arg-type]
    lora = list_methods()["lora"].Config(last_blocks=1)
    shown = forecast_folder(colours, backbone=BACKBONE, method_config=lora, train_config=config, loading=RAM)
    [entering], turns = [one.entering for one in found], views or 1
    assert [len(rows) for rows in entering] == [39] * turns + [few]
    assert seconds[0] == TRACED + few * (turns + 1) + few, "the few of each view and of the others; a batch is timed"
    assert shown["seconds_by_part"]["training"] > (39 - few) * turns, "a second per image that was not run"
    for rows in entering[:-1]:
        for start in range(few, 39, few):
            assert torch.equal(rows[start : start + few], rows[: min(few, 39 - start)])


@pytest.mark.parametrize(("epochs", "writes"), [(3, 0), (4, 1), (11, 2), (12, 3)])
def test_a_state_is_written_every_ten_seconds_at_most(
    epochs: int, writes: int, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[TrainState] = []
    pace = Pace(step=0.5, start=0.0, keeping=0.0, validation=0.0, warmup=0.0, steps=5.0)  # 2.5 s per epoch

    def measured(*_: Any, then: Any, **__: Any) -> Pace:
        then(pace, TrainState(2, {"a": torch.ones(2)}, best={"a": torch.ones(2)}, best_epoch=2))
        return pace

    clock = [0.0]

    def pack(state: Any, run: Any) -> bytes:
        clock[0] += 100.0
        packed.append(state)
        return b""

    monkeypatch.setattr(forecasting, "measure_pace", measured)
    monkeypatch.setattr(forecasting, "pack_state", pack)
    monkeypatch.setattr(forecasting, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert forecast(colours, epochs=epochs)["seconds_by_part"]["states"] == 100.0 * writes
    assert len(packed) == bool(writes), "one is packed, not all"
    assert all(state.best_epoch == 1 and state.best["a"] is not state.tensors["a"] for state in packed), "the largest"


@pytest.mark.parametrize(
    ("count", "steps"), [(90, [8.0, 11.25]), (11, [8.0, 11 / 8]), (5, [5.0, 1.0]), (16, [8.0, 2.0])]
)
def test_a_step_is_one_on_a_full_batch(count: int, steps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    clock, passes = [0.0], []
    model = ready(DEFAULTS["lora"])

    def compute(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        clock[0] += len(inputs[0]) * (1.0 if module.training else 0.1)
        clock[0] += 50.0 if module.training and not any(passes) else 0.0
        passes.append(module.training)

    model.register_forward_pre_hook(compute)
    for module in (training, pace_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    told: list[Any] = []
    found = measure_pace(model, task(count), RECIPE, task(10, 1), then=lambda *all_: told.extend(all_))
    assert [found.step, found.steps] == pytest.approx(steps)
    assert [found.validation, found.warmup] == pytest.approx([1.0, 50.0])
    assert found.preparing == pytest.approx(TRACED * 0.1), "a look for a frozen prefix"
    assert (found.start, found.keeping) == pytest.approx((0.0, 0.0), abs=1e-9)
    assert sum(passes) == 1 + min(MEASURED_STEPS, -(-count // 8)), "one to warm up, then a few"
    assert told[0] is found and told[1].epoch == 2 and told[1].optimizer


def test_few_steps_are_measured_again_until_some_time_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, model = [0.0], ready(DEFAULTS["lora"])
    durations: Iterator[float] = iter(
        [9.0, *[0.1, 0.1, 0.1, 0.1], *[0.3, 0.3, 0.3, 0.3], *[0.2, 0.2, 0.2, 0.2]] + [9.0] * 99
    )
    model.register_forward_pre_hook(lambda module, inputs: clock.__setitem__(0, clock[0] + next(durations)))
    for module in (training, pace_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    found = measure_pace(model, task(64), RECIPE, at_least=2.3)
    assert found.step == pytest.approx(0.2), "the median of three epochs, of which the last one passes 2.3 s"


def test_a_method_that_looks_at_all_images_takes_longer_the_more_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(forecasting, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def seconds(take: int | None, count: int) -> float:
        read = task(min(count, 64))

        def look(batches: Iterator[Any]) -> None:
            clock[0] += 0.5
            if take:
                for number, _ in enumerate(batches):
                    clock[0] += 2.0 if number else 9.0
                    if number + 1 == take:
                        break

        labels = torch.zeros(count, dtype=torch.long)
        everything = replace(read, pixels=forecasting._Repeated(read.pixels, count), labels=labels)
        return forecasting._attaching_seconds(forecasting._Part(read, everything), look)

    assert seconds(None, 320) == 0.5
    assert seconds(2, 320) == 0.5 + 9 + 2, "it never asked for more"
    assert seconds(99, 320) == 0.5 + 9 + 9 * 2
    assert seconds(99, 128) == 0.5 + 9 + 3 * 2
    assert seconds(99, 40) == 0.5 + 9 + 2


@pytest.mark.parametrize("option", [["--resume"], ["--folds", "3"], ["--log", "tensorboard"]])
def test_options_without_effect_are_refused_by_name(option: list[str], colours: Path, tmp_path: Path) -> None:
    line = fail("train", colours, "--out", tmp_path / "out", *SMALL, "--dry-run", *option)
    assert f"{option[0]} does not go with --dry-run" in line and "leave one out" in line
    assert content(tmp_path) == {}


def test_people_are_told_in_words(colours: Path, tmp_path: Path) -> None:
    code, out, err = run("train", colours, "--out", tmp_path / "out", "--method", "linear", *SMALL, "--dry-run")
    assert code == 0
    assert "linear on test_vit" in out and "39 and 9 for validation" in out and "on features computed once" in out
    assert "100 epochs" in out and "nothing was written" in err
    assert content(tmp_path) == {}


def test_what_training_would_refuse_is_refused(colours: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "note.txt").write_text("mine")
    line = fail("train", colours, "--out", tmp_path / "taken", *SMALL, "--dry-run")
    assert "is not an earlier result" in line
    with pytest.raises(VisgraftError, match="drop_last leaves none of 39 images"):
        forecast(colours, drop_last=True, batch_size=64)
    broken = draw(tmp_path / "broken", 8)
    for file in broken.rglob("*.png"):
        file.write_text("no image")
    with pytest.raises(DataError, match="is not a readable image"):
        forecast(broken)


def test_images_without_any_class_do_not_hinder_it(few: int, colours: Path, tmp_path: Path) -> None:
    files = sorted(colours.rglob("*.png"))
    having = {16: "red", 18: "red;blue", 17: "blue", 19: "red"}
    rows = [f"{file},{having.get(i, '')},{'val' if i % 2 else 'train'}" for i, file in enumerate(files)]
    (tmp_path / "labels.csv").write_text("\n".join(["image_path,labels,split", *rows]))
    for method in ("sct", "linear"):
        found = forecast(tmp_path / "labels.csv", method)
        assert (found["images"], found["images_val"]) == (30, 30)
