"""Interruption: a resumed run reaches the very same weights, and whatever cuts a run short leaves it usable."""

import json
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import CONFIGS
from test_cli import PROGRAM, SMALL, draw, run, succeed
from test_train import DEFAULTS, RECIPE, fit, held, ready, same, task

from visgraft import Epoch, TrainConfig, TrainState, VisgraftError, load
from visgraft.adapters.directory import TENSORS
from visgraft.training.resume import read_state, state_file, write_state

LONG = replace(RECIPE, epochs=4)
VARIANTS = {
    "plain": LONG,
    "augmented": replace(LONG, flip=True, rand_augment="rand-m5", crop_scale=0.5),
    "mixed": replace(LONG, mixup=0.4, cutmix=1.0, head_first=3),
    "select": replace(LONG, select="val"),
    "balanced": replace(LONG, sampler="balanced", class_weights="sqrt"),
}


def through_a_file(state: TrainState, path: Path) -> TrainState:
    write_state(path, state, {"lr": 1})
    return read_state(path, {"lr": 1})


@pytest.mark.parametrize("name", [*DEFAULTS, "alore-1", "lora-1"])
def test_a_resumed_run_ends_with_the_very_same_weights(name: str, tmp_path: Path) -> None:
    config = CONFIGS.get(name) or DEFAULTS[name]
    whole = ready(config)
    states: list[TrainState] = []
    first = fit(whole, LONG, val=task(10, 1), on_state=states.append)
    assert [state.epoch for state in states] == [1, 2, 3, 4]
    resumed = ready(config)
    second = fit(resumed, LONG, val=task(10, 1), resume=through_a_file(states[1], tmp_path / "state"))
    assert same(held(resumed), held(whole))
    timing = {"images_per_second": 0.0, "seconds_left": 0.0}
    plain = [[replace(epoch, **timing) for epoch in found.history] for found in (first, second)]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_does_so_with_augmentation_selection_and_sampling(variant: str, tmp_path: Path) -> None:
    whole, states = ready(DEFAULTS["alore"]), list[TrainState]()
    kept = fit(whole, VARIANTS[variant], val=task(10, 1), on_state=states.append).kept_epoch
    for state in states[:-1]:
        resumed = ready(DEFAULTS["alore"])
        again = fit(resumed, VARIANTS[variant], val=task(10, 1), resume=through_a_file(state, tmp_path / "state"))
        assert again.kept_epoch == kept
        assert same(held(resumed), held(whole)), f"resumed after epoch {state.epoch}"


def test_the_optimizers_moments_matter(tmp_path: Path) -> None:
    whole, states = ready(DEFAULTS["lora"]), list[TrainState]()
    fit(whole, LONG, on_state=states.append)
    forgetful = ready(DEFAULTS["lora"])
    fit(forgetful, LONG, resume=replace(states[1], optimizer={}))
    assert not same(held(forgetful), held(whole))


def test_a_state_of_another_run_or_a_damaged_one_is_refused_with_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "state"
    write_state(file, TrainState(1, {"a": torch.ones(2)}), {"train": {"lr": 0.1, "seed": 0}})
    with pytest.raises(VisgraftError, match=r"train\.lr 0\.1, now it is 0\.2.*leave out --resume"):
        read_state(file, {"train": {"lr": 0.2, "seed": 0}})
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(VisgraftError, match="is damaged"):
        read_state(file, {"train": {"lr": 0.1, "seed": 0}})


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("colours") / "images", 12)


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let Ctrl-C come in the first step after the given number of complete epochs, once."""

    def at(epochs: int) -> None:
        real = importlib_train().train
        left = [1]

        def interrupted(*arguments: Any, **options: Any) -> Any:
            def press(epoch: Epoch) -> None:
                if epoch.epoch == epochs + 1 and left:
                    left.pop()
                    raise KeyboardInterrupt

            return real(*arguments, **{**options, "on_progress": press})

        monkeypatch.setattr("visgraft.training.fit.train", interrupted)

    return at


def importlib_train() -> Any:
    import importlib

    return importlib.import_module("visgraft.training.loop")


def arguments(data: Path, out: Path, method: str = "sct") -> list[Any]:
    return ["train", data, "--out", out, "--method", method, "--epochs", 3, *SMALL]


def test_ctrl_c_leaves_a_usable_adapter_and_a_state_that_ends_in_the_same_weights(
    colours: Path, tmp_path: Path, stop: Callable[[int], None]
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    succeed(*arguments(colours, whole))
    stop(2)
    code, out, err = run(*arguments(colours, part))
    last = err.splitlines()[-1]
    assert (code, out) == (130, "")
    assert f"interrupted after epoch 2 of 3; the adapter so far is in {part}; give the same command" in last
    assert load(part).classes == ("blue", "green", "red")
    written, state = load_file(part / TENSORS), load_file(state_file(part))
    assert written and all(torch.equal(tensor, state[f"tensors/{name}"]) for name, tensor in written.items())
    assert json.loads((part / "adapter_config.json").read_text())["record"]["interrupted_after_epoch"] == 2
    resumed = succeed(*arguments(colours, part), "--resume")
    assert (resumed["epochs"], resumed["kept_epoch"]) == (3, 3)
    assert (part / TENSORS).read_bytes() == (whole / TENSORS).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part", "whole"], "nothing is left beside the adapters"
    code, _, err = run(*arguments(colours, part), "--resume")
    assert code == 1 and "nothing to resume" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_told_to_end_says_how_to_go_on(number: signal.Signals, colours: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    command = [PROGRAM, *arguments(colours, out, "lora"), "--epochs", "3000"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and theirs, ignore it
    with subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert any(line.startswith("epoch") for line in process.stderr)
            process.send_signal(number)
            rest = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 130, rest
    assert "interrupted after epoch" in rest and "Traceback" not in rest
    assert load(out).classes == ("blue", "green", "red") and state_file(out).is_file()


def test_ctrl_c_never_replaces_a_finished_adapter(colours: Path, tmp_path: Path, stop: Callable[[int], None]) -> None:
    out = tmp_path / "adapter"
    succeed(*arguments(colours, out))
    before = (out / TENSORS).read_bytes()
    stop(1)
    code, _, err = run(*arguments(colours, out), "--seed", 5)
    assert code == 130 and "the adapter so far" not in err
    assert (out / TENSORS).read_bytes() == before
    assert state_file(out).is_file()
    code, _, err = run(*arguments(colours, out), "--resume")
    assert code == 1 and "seed 5, now it is 0" in err
    assert (out / TENSORS).read_bytes() == before


def test_ctrl_c_in_the_first_epoch_writes_nothing(colours: Path, tmp_path: Path, stop: Callable[[int], None]) -> None:
    stop(0)
    code, _, err = run(*arguments(colours, tmp_path / "adapter"))
    assert code == 130 and "nothing was written" in err
    assert list(tmp_path.iterdir()) == []


def test_a_state_on_a_full_or_read_only_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(VisgraftError, match="cannot be written"):
        write_state(tmp_path / "file" / "state", TrainState(1, {"a": torch.ones(1)}), {})


def test_resume_without_a_state_says_that_it_starts_from_the_beginning(colours: Path, tmp_path: Path) -> None:
    code, _, err = run(*arguments(colours, tmp_path / "adapter", "linear"), "--resume")
    assert code == 0 and "starts from the beginning" in " ".join(err.split())


def test_options_of_the_run_are_those_that_decide_its_weights() -> None:
    assert TrainConfig().to_dict().keys() >= {"epochs", "lr", "seed", "class_weights", "sampler", "rand_augment"}


def test_curves_go_to_tensorboard_on_request(colours: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained = succeed(*arguments(colours, tmp_path / "adapter", "linear"), "--log", "tensorboard")
    events = EventAccumulator(str(tmp_path / "adapter.tensorboard"))
    events.Reload()
    assert {"train/loss", "train/top1", "train/lr", "val/loss", "val/top1"} <= set(events.Tags()["scalars"])
    points = events.Scalars("val/top1")
    assert [point.step for point in points] == [1, 2, 3]
    assert points[-1].value == pytest.approx(trained["top1"])
    assert "must be tensorboard" in run(*arguments(colours, tmp_path / "x"), "--log", "wandb")[2]


def test_quiet_prints_the_result_and_nothing_else(colours: Path, tmp_path: Path) -> None:
    code, out, err = run(*arguments(colours, tmp_path / "adapter", "linear"), "--quiet")
    assert (code, err) == (0, "") and "top-1" in out
    assert "epoch" in run(*arguments(colours, tmp_path / "adapter", "linear"))[2], "quiet holds for one run only"


def test_few_images_are_cross_validated_on_request(colours: Path, tmp_path: Path) -> None:
    trained = succeed(*arguments(colours, tmp_path / "adapter", "linear"), "--folds", 3, "--repeats", 2)
    crossed = trained["cross_validation"]
    assert (crossed["images"], crossed["folds"], crossed["repeats"]) == (30, 3, 2)
    assert crossed["interval"][0] <= crossed["figure"] <= crossed["interval"][1]
    code, out, _ = run(*arguments(colours, tmp_path / "adapter", "linear"), "--folds", 3)
    assert code == 0 and "cross-validated top-1" in out
