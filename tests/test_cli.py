"""The command line: one JSON document on standard output, one line for a mistake, and nothing half-written."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from visgraft import Epoch, list_methods, load, read_folder
from visgraft.adapters.directory import TENSORS
from visgraft.cli import main, show
from visgraft.cli.show import describe
from visgraft.data.decode import open_image

PROGRAM = Path(sys.executable).parent / "visgraft"
SMALL = ["--backbone", "test_vit", "--weights", "none", "--image-size", "32"]
COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (210, 40, 50)}
FIGURES = {
    "method", "backbone", "top1", "top1_ci95", "macro_f1", "params_adapter", "params_head", "adapter_bytes", "seconds",
    "images_per_second", "peak_memory_bytes",
}  # fmt: skip


def run(*arguments: object) -> tuple[int, str, str]:
    """Call the command line in this process; returns exit code, standard output and standard error."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", ["visgraft", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def succeed(*arguments: object) -> Any:
    """Run a verb with --json and return its document, the only line on standard output."""
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


def fail(*arguments: object) -> str:
    """Run a verb that must fail with one line; returns the line."""
    code, out, err = run(*arguments)
    lines = [line for line in err.splitlines() if not line.startswith(("warning:", "epoch "))]
    assert (code, out, len(lines)) == (1, "", 1), err
    assert lines[0].startswith("error: ")
    return lines[0]


def start(*arguments: object) -> Any:
    """Run a verb in a process of its own with --json and return its document, the only thing on standard output."""
    done = subprocess.run([PROGRAM, *map(str, arguments), "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def draw(folder: Path, count: int) -> Path:
    """Draw noise in the colour that its class folder is named after."""
    for seed, (name, colour) in enumerate(COLOURS.items()):
        (folder / name).mkdir(parents=True)
        noise = np.random.default_rng(seed).normal(colour, 40, (count, 40, 40, 3)).clip(0, 255).astype(np.uint8)
        for number, pixels in enumerate(noise):
            Image.fromarray(pixels).save(folder / name / f"{number:02}.png")
    return folder


def content(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def garble(folder: Path) -> None:
    for file in folder.iterdir():
        file.write_text("no image")


def placed(arguments: list[str], **paths: Path) -> list[str]:
    """Put paths in the place of names in braces."""
    return [text.format(**paths) for text in arguments]


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("flat") / "colours", 12)


@pytest.fixture(scope="session")
def adapter(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapters") / "lora"
    succeed("train", flat, "--out", out, "--method", "lora", "--epochs", 1, *SMALL)
    return out


def test_the_verbs_follow_each_other_and_print_one_json_document_each(flat: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "alore", tmp_path / "plain"
    trained = start("train", flat, "--out", out, "--method", "alore", "--epochs", 8, "--batch-size", 8, *SMALL)
    measured = succeed("eval", out, flat)
    for figures in (trained, measured):
        assert figures.keys() >= FIGURES
        assert (figures["method"], figures["backbone"]) == ("alore", "test_vit")
        assert figures["top1_ci95"][0] <= figures["top1"] <= figures["top1_ci95"][1]
        assert min(figures["seconds"], figures["images_per_second"], figures["peak_memory_bytes"]) > 0
        assert figures["adapter_bytes"] == sum(file.stat().st_size for file in out.iterdir())
        assert figures["params_head"] == 64 * 3 + 3
    assert trained["params_adapter"] == measured["params_adapter"]
    assert trained["precision"] == measured["precision"] in ("fp32", "bf16")
    assert (trained["split"], measured["split"], measured["images"]) == ("val", "test", 6)
    assert measured["top1"] > 0.6

    pictures = [flat / name / "00.png" for name in COLOURS]
    rows = succeed("predict", out, *pictures, "--top", 3)
    assert [row["image"] for row in rows] == [str(path) for path in pictures]
    for row in rows:
        rates = [best["probability"] for best in row["classes"]]
        assert rates == sorted(rates, reverse=True)
        assert {best["class"] for best in row["classes"]} == set(COLOURS)

    merged = succeed("merge", out, "--out", plain, "--data", flat)
    assert merged["merged_error"] <= merged["error_tolerance"]
    assert (merged["source"], merged["top1_agreement"]) == ("images", 1.0)
    config = succeed("info", out)
    assert (config["method"], config["classes"]) == ("alore", list(COLOURS))
    assert str(flat.parent) not in json.dumps(config)
    assert_timm_alone_answers_alike(out, plain, tmp_path / "expected.pt")


def assert_timm_alone_answers_alike(adapter: Path, plain: Path, file: Path) -> None:
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.save((x, load(adapter).model(x)), file)
    code = (
        "import sys, timm, torch\n"
        "model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval()\n"
        "x, expected = torch.load(sys.argv[2])\n"
        "assert 'visgraft' not in sys.modules\n"
        "print(float((model(x) - expected).abs().max()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, plain, file], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-4


def test_methods_lists_the_published_counts() -> None:
    rows = {row["name"]: row for row in succeed("methods", "--backbone", "vit_base_patch16_224")}
    assert rows.keys() == list_methods().keys()
    assert all(
        row.keys() == {"name", "paper", "places", "mergeable", "why_not_merged", "params_adapter"}
        for row in rows.values()
    )
    counts = {name: rows[name]["params_adapter"] for name in ("sct", "alore", "lora", "linear")}
    assert counts == {"sct": 111744, "alore": 147520, "lora": 294912, "linear": 0}
    assert [rows[name]["mergeable"] for name in ("sct", "alore", "lora", "linear")] == [False, True, True, True]


def test_a_mistake_is_one_line_in_a_process_of_its_own(tmp_path: Path) -> None:
    command: list[Any] = [PROGRAM, "train", tmp_path / "nowhere", "--out", tmp_path / "out", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {tmp_path}/nowhere does not exist; give a folder that holds one folder of")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", list_methods())
def test_15_every_method_trains_from_the_command_line(method: str, flat: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    trained = succeed("train", flat, "--out", out, "--method", method, "--epochs", 2, *SMALL)
    assert trained.keys() >= FIGURES
    assert (trained["method"], trained["epochs"], trained["params_head"]) == (method, 2, 195)
    measured = succeed("eval", out, flat, "--split", "val")
    assert (measured["top1"], measured["macro_f1"]) == (trained["top1"], trained["macro_f1"])
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(out / TENSORS).values())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_seed_is_that_of_the_new_head_too(flat: Path, tmp_path: Path) -> None:
    heads = []
    for seed in (0, 1):
        options = ["--method", "linear", "--epochs", 1, "--lr", "1e-9", "--seed", seed]
        succeed("train", flat, "--out", tmp_path / "a", *options, *SMALL)
        heads.append(load_file(tmp_path / "a" / TENSORS)["head.weight"])
    assert (heads[0] - heads[1]).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_adapter_is_measured_in_the_precision_it_was_trained_in(precision: str, flat: Path, tmp_path: Path) -> None:
    options = ["--method", "linear", "--epochs", 1, "--precision", precision]
    assert succeed("train", flat, "--out", tmp_path / "a", *options, *SMALL)["precision"] == precision
    assert succeed("eval", tmp_path / "a", flat)["precision"] == precision


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["methods"], ["alore", "arXiv:2412.08341", "147,520"]),
        (["info", "{ADAPTER}"], ["lora on test_vit", "blue, green, red", "--rank 8", "validation: top-1 "]),
        (["eval", "{ADAPTER}", "{DATA}"], ["top-1, test", "95 % interval", "macro-F1"]),
        (["predict", "{ADAPTER}", "{DATA}/red/00.png"], ["red/00.png: "]),
        (["merge", "{ADAPTER}", "--out", "{OUT}"], ["largest logit difference", "open it with timm.create_model"]),
        (["train", "{DATA}", "--out", "{OUT}", "--epochs", "1", *SMALL], ["alore on test_vit", "top-1, val"]),
    ],
)  # fmt: skip
def test_without_json_people_are_told(
    arguments: list[str], says: list[str], flat: Path, adapter: Path, tmp_path: Path
) -> None:
    code, out, err = run(*placed(arguments, DATA=flat, ADAPTER=adapter, OUT=tmp_path / "out"))
    assert (code, [text for text in says if text not in out]) == (0, [])
    assert not err or arguments[0] == "train"


def test_on_a_terminal_the_last_validation_accuracy_stays_in_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(show, "progress_console", Console(file=written, force_terminal=True, width=80))
    during = Epoch(8, 2.5, 0.25, 1e-3, images_per_second=52.0, seconds_left=95.0)
    with show.training_progress(30) as tell:
        tell(replace(during, epoch=7, complete=True, val_top1=0.125))
        tell(during)
    last = written.getvalue().splitlines()[-2]  # the last line only shows the cursor again
    assert "epoch  8/30 loss  2.500 train  25.0% val  12.5%   52 images/s 2 min left" in last
    assert not describe(during, 30).count("val")


def test_sct_in_mode_mlp_merges_and_in_mode_attn_names_that_remedy(flat: Path, tmp_path: Path) -> None:
    for mode in ("mlp", "attn"):
        options = ["--method", "sct", "--mode", mode, "--epochs", 1, *SMALL]
        succeed("train", flat, "--out", tmp_path / mode, *options)
    merged = succeed("merge", tmp_path / "mlp", "--out", tmp_path / "plain")
    assert merged["merged_error"] <= merged["error_tolerance"]
    assert (merged["method"], merged["source"]) == ("sct", "noise")
    before = content(tmp_path)
    line = fail("merge", tmp_path / "attn", "--out", tmp_path / "other")
    assert "sct changes stream.mid" in line
    assert "mode=mlp" in line
    assert content(tmp_path) == before


def test_training_never_opens_a_test_image(flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[Path]()
    monkeypatch.setattr(
        "visgraft.data.images.open_image", lambda e, colour: (opened.append(e.path), open_image(e, colour))[1]
    )
    succeed("train", flat, "--out", tmp_path / "adapter", "--method", "sct", "--epochs", 1, *SMALL)
    folder = read_folder(flat)
    assert set(opened) == {example.path for example in (*folder.train, *folder.val)}
    assert not set(opened) & {example.path for example in folder.test}


def test_unreadable_test_images_do_not_hinder_training_but_are_named_when_measured(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "adapter"
    for part, count in (("train", 6), ("val", 2), ("test", 2)):
        draw(data / part, count)
    for name in COLOURS:
        garble(data / "test" / name)
    trained = succeed("train", data, "--out", out, "--method", "linear", "--select", "val", "--epochs", 3, *SMALL)
    assert (trained["split"], trained["images"]) == ("val", 6)
    line = fail("eval", out, data)
    assert f"{data}/test/blue/00.png is not a readable image" in line
    assert "remove it or replace it" in line


def test_an_earlier_adapter_is_replaced(flat: Path, tmp_path: Path) -> None:
    for method in ("sct", "linear"):
        succeed("train", flat, "--out", tmp_path / "adapter", "--method", method, "--epochs", 1, *SMALL)
    assert succeed("eval", tmp_path / "adapter", flat)["method"] == "linear"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_flat_folder_that_changed_is_not_measured_as_if_its_images_were_new(
    flat: Path, adapter: Path, tmp_path: Path
) -> None:
    """One image more and the draw is another: what was trained on would count as a test image."""
    grown = shutil.copytree(flat, tmp_path / "grown")
    assert succeed("eval", adapter, grown)["images"] == 6, "where the folder lies does not matter"
    shutil.copy(flat / "red" / "00.png", grown / "red" / "99.png")
    for data in (grown, draw(tmp_path / "other", 3)):
        assert "pass --split all if it learned none of them" in fail("eval", adapter, data)
    measured = succeed("eval", adapter, tmp_path / "other", "--split", "all")
    assert (measured["images"], measured["split"]) == (9, "all")
    merged = succeed("merge", adapter, "--out", tmp_path / "plain", "--data", tmp_path / "other")
    assert merged["source"] == "images"


@pytest.mark.parametrize(("batch_size", "completed"), [(64, True), (4, False)])
def test_a_run_that_diverges_keeps_the_last_good_epoch(
    batch_size: int, completed: bool, flat: Path, tmp_path: Path
) -> None:
    options = ["--method", "lora", "--lr", "1e30", "--precision", "fp32", "--batch-size", batch_size]
    line = fail("train", flat, "--out", tmp_path / "adapter", *options, *SMALL)
    assert "lower --lr (it was 1e+30)" in line
    if completed:
        assert str(tmp_path / "adapter") in line
        assert all(bool(tensor.isfinite().all()) for tensor in load(tmp_path / "adapter").model.state_dict().values())
        assert succeed("info", tmp_path / "adapter")["record"]["diverged_after_epoch"] >= 1
    else:
        assert "nothing was written" in line
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("folders", "spoil", "says"),
    [
        ([""], shutil.rmtree, ["data does not exist", "one folder of images per class"]),
        (list(COLOURS), empty, ["data holds no images", "put them in", "/<class>/"]),
        (["green"], empty, ["class folders without images: green", "fill or remove"]),
        (["blue", "green"], shutil.rmtree, ["only one class, red", "add a second class folder"]),
        (["green"], garble, ["green/", ".png is not a readable image", "remove it or replace it"]),
    ],
)
def test_data_that_cannot_be_used(
    folders: list[str], spoil: Callable[[Path], None], says: list[str], flat: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(flat, tmp_path / "data")
    for name in folders:
        spoil(data / name)
    before = content(tmp_path)
    line = fail("train", data, "--out", tmp_path / "out", "--method", "linear", *SMALL)
    assert [text for text in says if text not in line] == []
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "alorre"], ["unknown method 'alorre'", "did you mean alore"]),
        (["--backbone", "test_vitt"], ["unknown backbone 'test_vitt'", "did you mean test_vit"]),
        (["--weights", "lost.safetensors"], ["lost.safetensors does not exist", "--weights"]),
        (["--weights", "{DATA}/red/00.png"], ["00.png cannot be read as weights of test_vit", "pass another file"]),
        (["--image-size", "40"], ["40 is not a multiple of the patch size 16", "use 32 or 48"]),
        (["--backbone", "test_resnet"], ["ResNet has blocks of class", "known: vision_transformer.Block"]),
        (["--method", "linear", "--rank", "4"], ["linear has no option --rank", "none of its own"]),
        (["--method", "sct", "--experts", "2"], ["sct has no option --experts", "--channels", "--mode"]),
        (["--method", "alore", "--places", "attn.on"], ["places is 'attn.on'", "did you mean attn.in"]),
        (["--method", "alore", "--experts", "5"], ["64 channels", "5 experts", "change experts"]),
        (["--precision", "fp33"], ["precision is 'fp33'", "auto, fp32, bf16"]),
        (["--select", "best"], ["select is 'best'", "last, val"]),
        (["--select", "val", "--val-fraction", "0"], ["needs validation images", "val-fraction"]),
        (["--val-fraction", "0.6", "--test-fraction", "0.5"], ["val_fraction (0.6)", "below 1"]),
        (["--rand-augment", "wild"], ["'wild'", "use e.g. rand-m9"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)  # fmt: skip
def test_train_options_that_cannot_be_used(arguments: list[str], says: list[str], flat: Path, tmp_path: Path) -> None:
    line = fail("train", flat, "--out", tmp_path / "out", *SMALL, *placed(arguments, DATA=flat))
    assert [text for text in says if text not in line] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval", "{DATA}", "{DATA}"], ["colours is not an adapter", "pass a folder that `train`"]),
        (["info", "nowhere"], ["nowhere is not an adapter"]),
        (["info", "{HERE}/damaged"], ["adapter_config.json is damaged", "restore it or train again"]),
        (["eval", "{ADAPTER}", "{HERE}/shapes"], ["does not know: disc (it knows blue, green, red)", "leave them out"]),
        (["eval", "{ADAPTER}", "{DATA}", "--split", "tests"], ["'tests'", "test, val, train or all"]),
        (["predict", "{ADAPTER}", "{HERE}/lost.png"], ["lost.png", "No such file"]),
        (["predict", "{ADAPTER}", "{DATA}/red/00.png", "{HERE}/note.txt"], ["note.txt is not a readable image"]),
        (["merge", "{ADAPTER}", "--out", "{HERE}/shapes"], ["shapes exists", "choose another --out"]),
        (["train", "{DATA}", "--out", "{HERE}/shapes", *SMALL], ["shapes exists", "choose another --out"]),
        (["train", "{DATA}", "--out", "{HERE}/note.txt", *SMALL], ["note.txt exists", "choose another --out"]),
        (["methods", "--backbone", "vit_base_patch16_225"], ["unknown backbone", "vit_base_patch16_224"]),
    ],
    ids=lambda value: " ".join(value) if value[0].islower() else "",
)  # fmt: skip
def test_paths_that_cannot_be_used(
    arguments: list[str], says: list[str], flat: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "note.txt").write_text("no image")
    shapes = shutil.copytree(flat, tmp_path / "shapes")
    shutil.rmtree(shapes / "blue")
    (shapes / "green").rename(shapes / "disc")
    (shutil.copytree(adapter, tmp_path / "damaged") / "adapter_config.json").write_text("{")
    before = content(tmp_path)
    line = fail(*placed(arguments, DATA=flat, ADAPTER=adapter, HERE=tmp_path))
    assert [text for text in says if text not in line] == []
    assert content(tmp_path) == before
