"""The least, the most and the oddest of everything: each runs, or says in one line why not."""

import pickle
import subprocess
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image
from test_cli import PROGRAM, SMALL, fail, run, succeed

from visgraft import DataError, load, predict
from visgraft.data.decode import open_image
from visgraft.errors import TrainingDiverged


def draw(folder: Path, classes: int = 2, count: int = 6, size: tuple[int, int] = (40, 40), mode: str = "RGB") -> Path:
    for number in range(classes):
        (folder / f"class {number}").mkdir(parents=True)
        for i in range(count):
            shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
            pixels = np.random.default_rng((number, i)).integers(0, 256, shape, dtype=np.uint8) // 2
            Image.fromarray(pixels + np.uint8(100 * (number % 2))).save(folder / f"class {number}" / f"{i}.png")
    return folder


def train(data: Path, out: Path, *options: object) -> dict[str, object]:
    return succeed("train", data, "--method", "sct", "--out", out, "--epochs", 1, "--batch-size", 8, *SMALL, *options)


def test_one_epoch_and_two_classes(tmp_path: Path) -> None:
    found = train(draw(tmp_path / "two"), tmp_path / "out")
    assert found["epochs"] == 1 and found["images"] > 0


def test_one_image_per_class(tmp_path: Path) -> None:
    data = draw(tmp_path / "single", 3, 1)
    line = fail("train", data, "--out", tmp_path / "out", "--epochs", 1, *SMALL)
    assert "too few images to divide: class 0 (1)" in line and "val_fraction" in line
    found = train(data, tmp_path / "out", "--val-fraction", 0, "--test-fraction", 0)
    assert found["split"] is None and found["top1"] is None
    assert succeed("eval", tmp_path / "out", data, "--split", "train")["images"] == 3
    assert "choose another part with --split: train with 3, or all" in fail("eval", tmp_path / "out", data)


def test_a_thousand_classes(tmp_path: Path) -> None:
    found = train(draw(tmp_path / "many", 1000, 3, (8, 8)), tmp_path / "out", "--batch-size", 64)
    assert found["params_head"] == 64 * 1000 + 1000 and found["images"] == 1000
    code, out, _ = run("eval", tmp_path / "out", tmp_path / "many")
    assert code == 0 and "1000" in out


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1), (4000, 20)])
def test_pictures_of_one_pixel_and_very_long_ones(size: tuple[int, int], crop_mode: str, tmp_path: Path) -> None:
    data = draw(tmp_path / "long", size=size)
    if size == (4000, 20) and crop_mode == "border":
        line = fail("train", data, "--out", tmp_path / "out", "--crop-mode", crop_mode, "--epochs", 1, *SMALL)
        assert "4,000 × 20 pixels, cannot be brought to the model's size" in line and "cut it into pieces" in line
        return
    assert train(data, tmp_path / "out", "--crop-mode", crop_mode)["images"] > 0


def test_a_picture_that_is_a_mere_line_is_refused_by_its_header(tmp_path: Path) -> None:
    data = draw(tmp_path / "lines")
    Image.new("L", (60_000, 1)).save(data / "class 0" / "line.png")
    assert "60,000 × 1 pixels, more than 500 times" in fail("train", data, "--out", tmp_path / "out", *SMALL)
    assert len(train(data, tmp_path / "out", "--skip-broken")["skipped"]) == 1
    assert "60,000 × 1" in run("check", data)[1]
    with pytest.raises(DataError, match="60,000 × 1"):
        predict(load(tmp_path / "out"), [data / "class 0" / "line.png"])
    Image.new("L", (60_000, 200)).save(tmp_path / "wide.png")
    assert open_image(tmp_path / "wide.png").size == (60_000, 200)


def test_grey_images_alone(tmp_path: Path) -> None:
    data = draw(tmp_path / "grey", mode="L")
    assert train(data, tmp_path / "out")["images"] > 0
    assert run("check", data)[0] == 0


def test_padding_keeps_all_of_a_picture(tmp_path: Path) -> None:
    """What tells the classes apart lies at the ends, which a square out of the middle does not show."""
    for number, colour in enumerate(((255, 0, 0), (0, 0, 255))):
        (tmp_path / "ends" / str(number)).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng((number, i)).integers(90, 160, (40, 100, 3), dtype=np.uint8)
            pixels[:, :20] = colour
            Image.fromarray(pixels).save(tmp_path / "ends" / str(number) / f"{i}.png")
    data = tmp_path / "ends"
    code, _, err = run("train", data, "--method", "full", "--epochs", 1, "--out", tmp_path / "a", *SMALL)
    assert code == 0 and "cuts off 60% of one of 2.5 to 1; train with --crop-mode border" in err
    assert "--crop-mode border" in run("check", data)[1]
    options = ("--method", "full", "--lr", 1e-3, "--epochs", 12, "--batch-size", 8, "--crop-mode", "border")
    code, _, err = run("train", data, *options, "--out", tmp_path / "border", *SMALL)
    assert code == 0 and "cuts off" not in err, "the choice was made"
    assert succeed("eval", tmp_path / "border", data, "--split", "all")["top1"] > 0.9
    adapted = load(tmp_path / "border")
    x = adapted.transform(open_image(data / "0" / "0.png"))
    assert adapted.record.data_config["crop_mode"] == "border" and x.shape == (3, 32, 32)
    assert x[0, 16, 0] > x[0, 16, 16] + 0.5 and x[0, 0].std() < 1e-6, "the red end is shown, and the padding is even"
    middle = load(tmp_path / "a").transform(open_image(data / "0" / "0.png"))
    assert abs(middle[0, 16, 0] - middle[0, 16, 16]) < 0.5, "it is cut off"
    assert predict(adapted, [data / "0" / "0.png"])[0][0][0] == "0"


@pytest.mark.parametrize("out", [".", "", "..", "x" * 240, "x" * 300, "\udcff"])
def test_a_target_that_cannot_be_used_is_one_line_before_any_work(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = draw(tmp_path / "photos")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with patch("visgraft.training.run.create_backbone", side_effect=AssertionError("work was done")):
        line = fail("train", data, "--out", out, "--method", "linear", *SMALL)
    assert "--out" in line or "another path" in line
    for option in ("--out", "--train-best"):
        line = fail("compare", data, option, out, "--methods", "linear", "--trials", 1, *SMALL)
        assert option in line or "another path" in line
    assert not any((tmp_path / "here").iterdir())


@pytest.mark.parametrize("verb", ["eval", "info", "predict", "merge", "report", "check", "train", "bench table"])
def test_a_name_that_no_file_can_have_is_one_line(verb: str, tmp_path: Path) -> None:
    name = "x" * 300
    rest = {"eval": [tmp_path], "predict": [tmp_path], "merge": ["--out", tmp_path / "m"],
            "report": ["--out", tmp_path / "r.html"], "train": ["--out", tmp_path / "t", *SMALL]}  # fmt: skip
    fail(*verb.split(), name, *rest.get(verb, []))


def test_what_cannot_be_printed_is_one_line(tmp_path: Path) -> None:
    train(draw(tmp_path / "photos"), tmp_path / "out")
    if not Path("/dev/full").exists():
        pytest.skip("no full device here")
    with open("/dev/full", "w") as full:
        command = [PROGRAM, "info", tmp_path / "out", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    read = subprocess.run(
        f"{PROGRAM} info {tmp_path / 'out'} | head -c 1", shell=True, capture_output=True, check=False
    )
    assert read.stderr == b"" and read.stdout


def test_folds_that_cannot_be_made_are_refused_before_training(tmp_path: Path) -> None:
    data = draw(tmp_path / "photos", count=4)
    for number, told in ((1, "are no cross-validation"), (-3, "are no cross-validation"), (9, "9 folds need 9 images")):
        line = fail("train", data, "--folds", number, "--method", "linear", "--out", tmp_path / "out", *SMALL)
        assert told in line and not (tmp_path / "out").exists()


def test_padding_is_not_advised_where_nothing_would_be_seen(tmp_path: Path) -> None:
    data = draw(tmp_path / "lines", size=(1400, 3))
    code, _, err = run("train", data, "--method", "linear", "--epochs", 1, "--out", tmp_path / "out", *SMALL)
    assert code == 0 and "--crop-mode" not in err


def test_errors_can_be_handed_to_other_processes() -> None:
    again = pickle.loads(pickle.dumps(TrainingDiverged("broken", 3)))
    assert str(again) == "broken" and again.last_good_epoch == 3
