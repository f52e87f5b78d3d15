"""A training that takes long says what would make it faster, and what it says can be typed."""

from pathlib import Path
from typing import Any

import pytest
from test_cli import SMALL, draw, run

from visgraft import ALoREConfig, Backbone, BitFitConfig, Epoch, TrainConfig, attach, create_backbone
from visgraft.options import MethodConfig
from visgraft.training import slow
from visgraft.training.slow import LongRun, faster_options


def options(name: str, method: MethodConfig, config: TrainConfig, **how: Any) -> dict[str, float]:
    backbone = Backbone(name, "none")
    return dict(faster_options(attach(create_backbone(backbone, 3), method), backbone, method, config, **how))


def test_the_options_that_help_most_come_first() -> None:
    found = options("vit_tiny_patch16_224", ALoREConfig(), TrainConfig(epochs=30))
    assert list(found) == ["--last-blocks 3", "--image-size 128", "--epochs 15"]
    assert found["--last-blocks 3"] == pytest.approx(0.25 + 0.75 / 90)
    assert found["--image-size 128"] == pytest.approx((128 / 224) ** 2) and found["--epochs 15"] == 0.5


def test_what_has_no_effect_or_is_not_possible_is_not_advised() -> None:
    plain = TrainConfig(epochs=1)
    augmented, cached = TrainConfig(epochs=1, flip=True), TrainConfig(epochs=1, flip=True, cached_views=2)
    assert list(options("vit_tiny_patch16_224", BitFitConfig(), plain)) == ["--image-size 128"]
    assert list(options("vit_tiny_patch16_224", ALoREConfig(last_blocks=3), plain)) == ["--image-size 128"]
    assert list(options("vit_tiny_patch16_224", ALoREConfig(), augmented)) == ["--image-size 128"]
    assert "--last-blocks 3" in options("vit_tiny_patch16_224", ALoREConfig(), cached)
    assert list(options("vit_tiny_patch16_224", ALoREConfig(), plain, free=False)) == ["--image-size 128"]
    backbone, method = Backbone("mixer_s32_224", "none"), ALoREConfig()
    model = attach(create_backbone(backbone, 3), method)
    bound = Backbone("mixer_s32_224", "weights.pth")  # weights that fit one size only
    assert list(dict(faster_options(model, bound, method, plain))) == ["--last-blocks 2"]


def epoch(left: float) -> Epoch:
    return Epoch(1, 1.0, 0.5, 1e-3, 10.0, left)


def test_it_is_said_once_and_only_of_long_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(slow.time, "monotonic", lambda: clock[0])
    told: list[str] = []
    watch = LongRun(told.append, lambda: [("--a 1", 0.25), ("--b 2", 0.5), ("--c 3", 0.9)])
    for now, left in ((0.0, 9e9), (slow.WATCHED - 1, 9e9), (slow.WATCHED, 5400.0), (slow.WATCHED + 9, 9e9)):
        clock[0] = now
        watch(epoch(left))
    (line,) = told
    assert "about 1h30m on this machine" in line
    assert line.endswith("train with --a 1 (about 25% of the time) or --b 2 (about 50% of the time)")
    clock[0] = 0.0
    short = LongRun(told.append, list)
    for now in (0.0, slow.WATCHED, 2 * slow.WATCHED):
        clock[0] = now
        short(epoch(slow.LONG - 1))
    assert len(told) == 1


@pytest.fixture
def everything_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow, "LONG", -1.0)
    monkeypatch.setattr(slow, "WATCHED", 0.0)


def test_what_is_advised_can_be_typed(everything_is_long: None, tmp_path: Path) -> None:
    data = draw(tmp_path / "photos", 8)
    command: list[object] = ["train", data, "--method", "alore", "--out", tmp_path / "out", *SMALL[:4]]
    code, _, err = run(*command, "--epochs", 2)
    (line,) = [line for line in err.splitlines() if "will take about" in line]
    assert code == 0 and line.startswith("warning: ")
    advised = [part.split(" (")[0] for part in line.split("train with ")[1].split(" or ")]
    assert len(advised) == 2
    for option in advised:
        assert run(*command, *(() if "epochs" in option else ("--epochs", 1)), *option.split())[0] == 0, option


def test_python_users_are_told_through_their_watch(everything_is_long: None, tmp_path: Path) -> None:
    from visgraft import train_folder
    from visgraft.training.run import Watch

    told: list[str] = []
    train_folder(
        draw(tmp_path / "photos", 4), tmp_path / "out", backbone=Backbone("test_vit", "none", 32),
        method_config=ALoREConfig(), train_config=TrainConfig(epochs=1, warmup_epochs=0.0),
        watch=Watch(warning=told.append),
    )  # fmt: skip
    assert sum("will take about" in line for line in told) == 1
