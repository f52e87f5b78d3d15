"""Predictions in bulk: the same as of each adapter alone, streamed, written whole or not at all."""

import contextlib
import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from support import enliven, images

from visgraft import Backbone, create_backbone, evaluate, load, load_images, model_data_config, predict, save
from visgraft.adapter import CONFIG, TENSORS
from visgraft.attach import attach, get_attached
from visgraft.cli import predict as verb
from visgraft.cli.show import progress_console
from visgraft.data.dataset import Example
from visgraft.errors import AdapterError, DataError, VisgraftError
from visgraft.evaluate import make_accelerator
from visgraft.predict import Prediction, load_together, predict_stream
from visgraft.registry import get_method

BACKBONE = Backbone("test_vit", "none", image_size=32)
CLASSES = {"linear": "abc", "sct": "abc", "alore": "abc", "lora": "xyz", "full": "abc"}


def make(
    folder: Path, method: str, backbone: Backbone = BACKBONE, seed: int = 1, classes: str = "", **record: Any
) -> Path:
    """Write an adapter that has been moved off its start."""
    classes = classes or CLASSES[method]
    model = create_backbone(backbone, len(classes))
    size = backbone.image_size or 160
    task = [(images(8, size=size), torch.arange(8) % len(classes))]
    enliven(attach(model, get_method(method).Config(), task), seed)
    return save(model, folder, classes=tuple(classes), record=record)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {method: make(root / method, method, seed=number) for number, method in enumerate(CLASSES)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(10):
        name = f"{number:02}.png"
        Image.fromarray(generator.integers(0, 255, (36, 40, 3), dtype=np.uint8)).save(folder / name)
    return sorted(folder.iterdir())


def run(*arguments: object, stdin: Any = "") -> tuple[int, str, str]:
    """Call the verb in this process; returns exit code, standard output and standard error."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    app = typer.Typer()
    app.command()(verb.predict)
    with (
        patch.object(sys, "argv", ["predict", *map(str, arguments)]),
        patch.object(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            app(standalone_mode=False)
        except VisgraftError as error:
            code = 1
            print(f"error: {error}", file=sys.stderr)
        finally:
            progress_console.quiet = False
    return code, out.getvalue(), err.getvalue()


def rows_of(*arguments: object, stdin: str = "") -> list[dict[str, Any]]:
    status, out, err = run(*arguments, "--json", stdin=stdin)
    assert (status, err) == (0, "")
    assert out.count("\n") == 1
    return json.loads(out)


def refused(*arguments: object, stdin: str = "") -> str:
    status, out, err = run(*arguments, stdin=stdin)
    assert (status, out, err.count("\n")) == (1, "", 1), err
    return err


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_together_they_answer_as_each_alone_in_any_order(adapters: dict[str, Path], pictures: list[Path]) -> None:
    alone = {name: list(predict_stream([path], pictures, top=3, batch_size=4)) for name, path in adapters.items()}
    assert all([row.image for row in rows] == pictures for rows in alone.values())
    expected = [alone[name][i] for i in range(len(pictures)) for name in adapters]
    assert list(predict_stream(list(adapters.values()), pictures, top=3, batch_size=4)) == expected
    backwards = list(reversed(adapters.values()))
    found = list(predict_stream(backwards, pictures, top=3, batch_size=4))
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert [row.adapter for row in found[:5]] == [str(path) for path in backwards]
    assert len({tuple(row.classes) for row in expected}) == len(expected), "the adapters differ"


@pytest.mark.parametrize("first", CLASSES)
def test_what_is_frozen_is_held_once_and_what_is_trained_is_not_shared(first: str, adapters: dict[str, Path]) -> None:
    names = [first, *(name for name in adapters if name != first)]
    loaded = dict(zip(names, load_together([adapters[name] for name in names]), strict=True))
    addresses = {n: {k: t.data_ptr() for k, t in one.model.state_dict().items()} for n, one in loaded.items()}
    for name, one in loaded.items():
        own = {key for key in addresses[name] if key.startswith("visgraft.")} | set(get_attached(one.model).originals)
        for key, address in addresses[name].items():
            others = {addresses[other].get(key) for other in loaded if other not in (name, "full")}
            assert others != {address} if key in own else others == {address}, (name, key)
            assert key not in own or address not in others


def test_heads_of_different_size_on_weights_from_a_file(tmp_path: Path, pictures: list[Path]) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(create_backbone(BACKBONE).state_dict(), file)
    backbone = Backbone("test_vit", str(file), image_size=32)
    few, many = make(tmp_path / "few", "linear", backbone), make(tmp_path / "many", "lora", backbone, classes="vwxyz")
    assert f"--weights PATH/{file.name}" in refused(few, many, *pictures)
    given = [*pictures, "--weights", file, "--top", 4]
    alone = [rows_of(adapter, *given) for adapter in (few, many)]
    assert rows_of(few, many, *given) == [row for pair in zip(*alone, strict=True) for row in pair]
    assert run(few, many, *given, "--out", tmp_path / "t.csv")[0] == 0
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert [(row["class_4"] == "", row["probability_4"] == "") for row in rows[:2]] == [(True, True), (False, False)]


def test_the_probabilities_are_those_of_evaluate_bit_for_bit(adapters: dict[str, Path], pictures: list[Path]) -> None:
    adapted = load(adapters["alore"])
    loaded = load_images([Example(path, 0) for path in pictures], model_data_config(adapted.model))
    expected = evaluate(adapted.model, loaded, "fp32").probabilities
    for row, probabilities in zip(predict_stream([adapters["alore"]], pictures, top=3), expected, strict=True):
        assert dict(row.classes) == dict(zip("abc", probabilities.tolist(), strict=True))


def test_a_loaded_adapter_is_numbered_and_left_in_its_mode(adapters: dict[str, Path], pictures: list[Path]) -> None:
    adapted = load(adapters["lora"])
    adapted.model.train()
    rows = list(predict_stream([adapters["lora"], adapted], pictures[:3]))
    assert [row.adapter for row in rows] == [str(adapters["lora"]), "2"] * 3
    assert [row.classes for row in rows[::2]] == [row.classes for row in rows[1::2]] == predict(adapted, pictures[:3])
    assert adapted.model.training


def test_each_runs_in_the_precision_it_was_trained_in(tmp_path: Path, pictures: list[Path]) -> None:
    paths = [make(tmp_path / "fp32", "alore", precision="fp32"), tmp_path / "bf16"]
    shutil.copytree(*paths)
    config = json.loads((paths[1] / CONFIG).read_text())
    config["record"]["precision"] = "bf16"
    (paths[1] / CONFIG).write_text(json.dumps(config))
    full, half = list(predict_stream(paths, pictures[:1], top=3))
    adapted = load(paths[0])
    x = adapted.transform(Image.open(pictures[0]))[None]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = adapted.model(x).float().softmax(-1)[0]
    assert dict(half.classes) == pytest.approx(dict(zip("abc", expected.tolist(), strict=True)), abs=1e-6)
    assert half.classes != full.classes


def test_images_are_streamed_and_decoded_once(
    adapters: dict[str, Path], pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = sys.modules["visgraft.predict"]
    opened, asked, real = [], [], module.open_image
    monkeypatch.setattr(module, "open_image", lambda path, *how: (opened.append(path), real(path, *how))[1])

    def endless() -> Iterator[Path]:
        for number in count():
            asked.append(number)
            yield pictures[number % len(pictures)]

    found = predict_stream([adapters["linear"], adapters["sct"]], endless(), batch_size=4)
    assert not asked
    rows = list(islice(found, 40))
    assert len(rows) == 40 and 20 <= len(asked) <= 20 + 3 * 4
    found.close()  # type: ignore[attr-defined]
    assert len(opened) <= len(asked)


def test_the_environment_is_left_alone_while_images_are_decoded(
    adapters: dict[str, Path], pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoders look up environment variables in their threads, which crashes if one is being set at that moment."""
    written: list[str] = []
    found = predict_stream([adapters["linear"], adapters["sct"]], pictures * 2, batch_size=4)
    for name in ("putenv", "unsetenv"):
        monkeypatch.setattr(os, name, lambda *what: written.append(what[0]))
    assert len(list(found)) == 40 and written == []
    make_accelerator("fp32")
    assert written, "if accelerate no longer does this, predict_stream need not avoid it"


def test_the_first_broken_file_is_named_or_all_are_reported(
    adapters: dict[str, Path], pictures: list[Path], tmp_path: Path
) -> None:
    bad = [tmp_path / "1.png", tmp_path / "2.png"]
    bad[0].write_text("no image")
    paths = [pictures[0], *bad, pictures[1]]
    with pytest.raises(DataError, match=r"1\.png"):
        list(predict_stream([adapters["linear"]], paths))
    told: list[tuple[Path, str]] = []
    rows = list(predict_stream([adapters["linear"]], paths, batch_size=2, on_broken=lambda *why: told.append(why)))
    assert [row.image for row in rows] == [pictures[0], pictures[1]]
    assert [path for path, _ in told] == bad and "No such file" in told[1][1]


def test_images_with_several_classes(tmp_path: Path, adapters: dict[str, Path], pictures: list[Path]) -> None:
    several = make(tmp_path / "several", "sct", data={"multi_label": True})
    adapted = load(several)
    with torch.inference_mode():
        x = torch.stack([adapted.transform(Image.open(path)) for path in pictures])
        p = adapted.model(x).sigmoid()
    middle = float(p.median())
    for threshold in (None, middle):
        least = 0.5 if threshold is None else threshold
        for row, values in zip(predict_stream([several], pictures, threshold=threshold), p, strict=True):
            assert {name for name, _ in row.classes} == {"abc"[i] for i in (values >= least).nonzero()[:, 0]}
            assert [q for _, q in row.classes] == sorted((q for _, q in row.classes), reverse=True)
    counts = {len(row.classes) for row in predict_stream([several], pictures, threshold=middle)}
    assert len(counts) > 1, "a threshold that always names as many classes tests nothing"
    assert {len(row.classes) for row in predict_stream([several], pictures, threshold=0, top=2)} == {2}
    both = list(predict_stream([several, adapters["linear"]], pictures, threshold=0.0))
    assert {len(row.classes) for row in both[::2]} == {3} and {len(row.classes) for row in both[1::2]} == {1}
    with pytest.raises(VisgraftError, match="threshold is for adapters of images with several classes"):
        predict_stream([adapters["linear"]], pictures, threshold=0.5)
    assert run(several, pictures[0], "--threshold", 1)[1].endswith(": –\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": []}, "at least one adapter"),
        ({"top": 0}, "top is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"threshold": 1.5}, "threshold is 1.5"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str, adapters: dict[str, Path]) -> None:
    with pytest.raises(VisgraftError, match=message):
        predict_stream(**{"adapters": [adapters["linear"]], "images": [], **options})


def other_digest(config: dict[str, Any]) -> None:
    config["backbone"]["digest"] = "0" * 64


def other_crop(config: dict[str, Any]) -> None:
    config["data_config"]["crop_pct"] = 0.5


def other_name(config: dict[str, Any]) -> None:
    config["backbone"]["name"] = "test_vit2"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_digest, "000000000000…; run"),
        (other_crop, "preprocessing {"),
        (other_name, "name test_vit and test_vit2"),
    ],
)
def test_adapters_of_different_backbones_are_both_named(
    change: Callable[[dict[str, Any]], None], says: str, adapters: dict[str, Path], pictures: list[Path], tmp_path: Path
) -> None:
    other = make(tmp_path / "other", "linear")
    config = json.loads((other / CONFIG).read_text())
    change(config)
    (other / CONFIG).write_text(json.dumps(config))
    line = refused(adapters["sct"], other, *pictures)
    assert str(adapters["sct"]) in line and str(other) in line and "run each apart" in line
    assert says in line


def test_models_that_prepare_images_differently_are_refused(adapters: dict[str, Path], tmp_path: Path) -> None:
    small, large = load(adapters["linear"]), load(make(tmp_path / "a", "linear", Backbone("test_vit", "none", 64)))
    with pytest.raises(AdapterError, match="1 and 2 prepare images differently"):
        predict_stream([small, large], [])


def test_lines_for_people(adapters: dict[str, Path], pictures: list[Path]) -> None:
    code, out, err = run(adapters["linear"], *pictures[:2], "--top", 2)
    (first, second), expected = out.splitlines(), predict(load(adapters["linear"]), pictures[:2], top=2)
    assert (code, err) == (0, "")
    assert first == f"{pictures[0]}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in expected[0])
    assert second.startswith(f"{pictures[1]}: ")
    lines = run(adapters["linear"], adapters["sct"], *pictures[:2])[1].splitlines()
    starts = [f"{adapters[name]}: {path}: " for path in pictures[:2] for name in ("linear", "sct")]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_tables_hold_what_json_says(
    ending: str, adapters: dict[str, Path], pictures: list[Path], tmp_path: Path
) -> None:
    given = [adapters["linear"], adapters["lora"], *pictures, "--top", 4]
    out = tmp_path / "new" / f"table.{ending}"
    out.parent.mkdir()
    out.write_text("an earlier table")
    expected = rows_of(*given)
    code, printed, _ = run(*given, "--out", out)
    assert code == 0 and printed.startswith(f"{out}: 10 images × 2 adapters, ")
    assert list(content(out.parent)) == [out.name]
    if ending == "csv":
        with out.open(newline="", encoding="utf-8") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        rows = parquet.read_table(out).to_pylist()
    columns = ["class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
    assert list(rows[0]) == ["image", "adapter", *columns]
    for row, other in zip(rows, expected, strict=True):
        assert [row["image"], row["adapter"]] == [other["image"], other["adapter"]]
        for number, best in enumerate(other["classes"], 1):
            mark = "" if number == 1 else f"_{number}"
            assert (row[f"class{mark}"], float(row[f"probability{mark}"])) == (best["class"], best["probability"])
    summary = json.loads(run(*given, "--out", out, "--json")[1])
    assert (summary["images"], summary["skipped"], summary["out"]) == (10, [], str(out))


def test_a_large_parquet_file_is_written_in_parts(
    adapters: dict[str, Path], pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(verb, "ROWS_AT_ONCE", 4)
    assert run(adapters["linear"], *pictures, "--out", tmp_path / "t.parquet")[0] == 0
    file = parquet.ParquetFile(tmp_path / "t.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4, 4, 2]


def test_without_pyarrow_the_extra_is_named(
    adapters: dict[str, Path], pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    line = refused(adapters["linear"], *pictures, "--out", tmp_path / "t.parquet")
    assert "visgraft[parquet]" in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ["csv", "parquet", None])
def test_a_broken_file_leaves_everything_as_it_was(
    ending: str | None, adapters: dict[str, Path], pictures: list[Path], tmp_path: Path
) -> None:
    bad, out = tmp_path / "bad.png", tmp_path / f"t.{ending}"
    bad.write_text("no image")
    out.write_text("an earlier table")
    before = content(tmp_path)
    given = [adapters["linear"], *pictures, bad, "--batch-size", 2, *(["--out", out] if ending else [])]
    assert "bad.png is not a readable image" in refused(*given)
    assert content(tmp_path) == before
    code, printed, err = run(*given, "--skip-broken")
    assert code == 0 and "left out 1 images" in err and "bad.png is not a readable image" in err
    assert (out.read_bytes() != b"an earlier table") is bool(ending)
    assert len(printed.splitlines()) == (1 if ending else 10)
    assert "none of the 1 images decodes, e.g. " in refused(adapters["linear"], bad, "--skip-broken")


def test_with_skip_broken_lines_come_at_once(adapters: dict[str, Path], pictures: list[Path]) -> None:
    """Nothing can stop such a run any more, so its lines need not wait for the last image."""
    shown: list[int] = []

    class Watched:
        def __iter__(self) -> Iterator[str]:
            for number in range(12):
                shown.append(len(sys.stdout.getvalue().splitlines()))  # type: ignore[attr-defined]
                yield f"{pictures[number % 10]}\n"

    assert run(adapters["linear"], "-", "--batch-size", 1, "--skip-broken", stdin=Watched())[0] == 0
    assert shown[-1] >= 8
    assert run(adapters["linear"], "-", "--batch-size", 1, stdin=Watched())[0] == 0
    assert shown[-12:] == [0] * 12


@pytest.fixture
def tree(tmp_path: Path, pictures: list[Path]) -> Path:
    root = tmp_path / "tree"
    for name in ("b/2.png", "b/1.PNG", "a.png", "c/d/e.png", ".hidden/x.png", "b/.y.png", "[1].png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(pictures[0].read_bytes())
    (root / "b" / "note.txt").write_text("no image")
    return root


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["{TREE}"], ["[1].png", "a.png", "b/1.PNG", "b/2.png", "c/d/e.png"]),
        (["{TREE}/c", "{TREE}/a.png"], ["c/d/e.png", "a.png"]),
        (["{TREE}/b/*"], ["b/1.PNG", "b/2.png"]),
        (["{TREE}/**/*.png"], ["[1].png", "a.png", "b/2.png", "c/d/e.png"]),
        (["{TREE}/[1].png"], ["[1].png"]),
        (["{TREE}/a.png", "-", "{TREE}/a.png"], ["a.png", "b/2.png", "c/d/e.png", "a.png"]),
    ],
)
def test_images_are_found(given: list[str], expected: list[str], tree: Path, adapters: dict[str, Path]) -> None:
    stdin = f"{tree}/b/2.png\r\n\n{tree}/c/d/e.png"
    rows = rows_of(adapters["linear"], *(text.format(TREE=tree) for text in given), stdin=stdin)
    assert [row["image"] for row in rows] == [f"{tree}/{name}" for name in expected]
    folder_last = rows_of(adapters["linear"], tree, adapters["sct"])
    assert {row["adapter"] for row in folder_last} == {str(adapters["linear"]), str(adapters["sct"])}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["{TREE}", "{SCT}"], "tree is not an adapter"),
        (["{SCT}"], "no images are given"),
        (["{SCT}", "{TREE}/*.jpg"], "no images match {TREE}/*.jpg; check"),
        (["{SCT}", "{TREE}/b/*.txt"], "no images match {TREE}/b/*.txt (1 others do)"),
        (["{SCT}", "{TREE}/lost.png"], "lost.png: No such file"),
        (["{SCT}", "{TREE}/empty"], "empty holds no images, and no adapter_config.json"),
        (["{SCT}", "{TREE}/loop"], "is a link to a folder above it"),
        (["{SCT}", "-"], "standard input names no image"),
        (["{SCT}", "{TREE}/a.png", "--out", "{TREE}/x.txt"], "ends in .csv or .parquet"),
        (["{SCT}", "{TREE}/a.png", "--out", "{TREE}/a.png/x.csv"], "x.csv cannot be written"),
        (["{SCT}", "{DAMAGED}", "{TREE}/a.png"], "damaged/adapter_model.safetensors is missing or damaged"),
        (["{DAMAGED}", "{SCT}", "{TREE}/a.png"], "damaged/adapter_model.safetensors is missing or damaged"),
        (["{SCT}", "{TREE}/a.png", "--background", "no-colour"], "no-colour"),
    ],
)
def test_mistakes_are_one_line(
    given: list[str], says: str, tree: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    (tree / "empty").mkdir()
    (tree / "loop").mkdir()
    (tree / "loop" / "up").symlink_to(tree / "loop", target_is_directory=True)
    damaged = make(tmp_path / "damaged", "linear")
    (damaged / TENSORS).write_bytes(b"nothing")
    names = {"TREE": tree, "SCT": adapters["sct"], "DAMAGED": damaged}
    assert says.format(**names) in refused(*(text.format(**names) for text in given))
    assert not list(tree.rglob("*.csv"))


@pytest.mark.parametrize("known", [True, False])
def test_progress_tells_the_rate_and_the_time_left(
    known: bool, adapters: dict[str, Path], pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "SECONDS_BETWEEN_LINES", 0)
    given = [adapters["linear"], *(pictures if known else ["-"]), "--batch-size", 4]
    lines = run(*given, stdin="\n".join(map(str, pictures)))[2].splitlines()
    assert lines[0].startswith("4 of 10 images " if known else "4 images ")
    assert all(" images/s" in line and line.endswith(" left") is known for line in lines)
    assert run(*given, "--quiet", stdin="\n".join(map(str, pictures)))[2] == ""


def test_file_names_that_are_no_text_are_written_all_the_same(adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    (folder / "a.png").rename(folder / b"caf\xe9.png".decode("utf-8", "surrogateescape"))
    (row,) = rows_of(adapters["linear"], folder)
    assert row["image"].endswith("caf\\udce9.png")
    assert run(adapters["linear"], folder, "--out", tmp_path / "t.csv")[0] == 0


def test_predictions_are_plain_tuples(adapters: dict[str, Path], pictures: list[Path]) -> None:
    (row,) = predict_stream([adapters["linear"]], pictures[:1])
    assert row == Prediction(pictures[0], str(adapters["linear"]), row.classes)
    assert row.classes == [(row.classes[0][0], row.classes[0][1])]
