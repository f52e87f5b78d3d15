"""Predictions in bulk: the same as of each adapter alone, streamed, in the precision of the training."""

# ruff: noqa: F401, F811  (fixtures are imported here, and then named as arguments)

import csv
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from predicting import BACKBONE, CLASSES, adapters, make, pictures, refused, rows_of, run
from safetensors.torch import save_file

from visgraft import Backbone, create_backbone, evaluate, load, load_images, model_data_config, predict
from visgraft.adapters.directory import CONFIG
from visgraft.bank.opening import load_bank
from visgraft.data.dataset import Example
from visgraft.errors import AdapterError, DataError, VisgraftError
from visgraft.measure.precision import make_compute
from visgraft.serve.prediction import Prediction, predict_rows, predict_stream


def test_together_they_answer_as_each_alone_in_any_order(adapters: dict[str, Path], pictures: list[Path]) -> None:
    many = pictures * 2  # enough for a forward of each adapter, which is then bit for bit its own
    alone = {name: list(predict_stream([path], many, top=3, batch_size=20)) for name, path in adapters.items()}
    assert all([row.image for row in rows] == many for rows in alone.values())
    expected = [alone[name][i] for i in range(len(many)) for name in adapters]
    assert list(predict_stream(list(adapters.values()), many, top=3, batch_size=20)) == expected
    backwards = list(reversed(adapters.values()))
    found = list(predict_stream(backwards, many, top=3, batch_size=20))
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert [row.adapter for row in found[:5]] == [str(path) for path in backwards]
    assert len({(row.image, *row.classes) for row in expected}) == len(expected) / 2, "the adapters differ"
    mixed = list(predict_stream(list(adapters.values()), many, top=3, batch_size=4))
    same(mixed, expected)


def same(found: list[Prediction], expected: list[Prediction]) -> None:
    """Hold predictions to others, their probabilities up to the rounding of another forward."""
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert dict(row.classes) == pytest.approx(dict(other.classes), abs=1e-6)


def test_a_bank_answers_all_and_rows_each_with_their_own(adapters: dict[str, Path], pictures: list[Path]) -> None:
    alone = {name: list(predict_stream([path], pictures, top=3)) for name, path in adapters.items()}
    bank = load_bank(adapters)
    assert bank.names == tuple(adapters)
    expected = [alone[name][i]._replace(adapter=name) for i in range(len(pictures)) for name in adapters]
    same(list(predict_stream(bank, pictures, top=3)), expected)
    names = [list(adapters)[number * 7 % len(adapters)] for number in range(len(pictures))]
    wanted = [alone[name][i]._replace(adapter=name) for i, name in enumerate(names)]
    same(list(predict_rows(bank, zip(pictures, names, strict=True), top=3, batch_size=4)), wanted)
    bad = pictures[0].with_name("missing.png")
    told: list[Path] = []
    rows = [(pictures[0], "sct"), (bad, "lora"), (pictures[1], "lora")]
    found = predict_rows(bank, rows, on_broken=lambda path, why: told.append(path))
    assert [row[:2] for row in found] == [(pictures[0], "sct"), (pictures[1], "lora")] and told == [bad]
    with pytest.raises(DataError, match=r"missing\.png"):
        list(predict_rows(bank, rows))
    with pytest.raises(VisgraftError, match="no adapter 'lore'; did you mean alore, lora"):
        list(predict_rows(bank, [(pictures[0], "lore")]))


def test_rows_are_prepared_as_their_own_adapters_were(tmp_path: Path, pictures: list[Path]) -> None:
    paths = {name: make(tmp_path / name, "lora", classes="xyz") for name in ("whole", "middle")}
    config = json.loads((paths["middle"] / CONFIG).read_text())
    config["data_config"]["crop_pct"] = 0.5
    (paths["middle"] / CONFIG).write_text(json.dumps(config))
    alone = {name: next(iter(predict_stream([path], pictures[:1], top=3))) for name, path in paths.items()}
    assert alone["whole"].classes != alone["middle"].classes
    found = list(predict_rows(load_bank(paths), [(pictures[0], name) for name in paths], top=3))
    same(found, [alone[name]._replace(adapter=name) for name in paths])
    with pytest.raises(AdapterError, match="whole and middle prepare images differently"):
        predict_stream(load_bank(paths), pictures)


def test_a_folder_of_adapters_is_found_at_any_depth(adapters: dict[str, Path], tmp_path: Path) -> None:
    for name in ("b/one", "a", "b/.hidden"):
        shutil.copytree(adapters["linear"], tmp_path / "zoo" / name)
    (tmp_path / "zoo" / "a" / "note.txt").write_text("no adapter")
    assert load_bank(tmp_path / "zoo").names == ("a", "b/one")
    (tmp_path / "zoo" / "b" / "back").symlink_to(tmp_path / "zoo")
    (tmp_path / "zoo" / "latest").symlink_to(tmp_path / "zoo" / "a")
    assert load_bank(tmp_path / "zoo").names == ("a", "b/one", "latest")
    (tmp_path / "zoo" / "latest").unlink()
    assert load_bank(str(tmp_path / "zoo" / "a")).names == ("a",)
    (tmp_path / "none").mkdir()
    with pytest.raises(AdapterError, match="none holds no adapters"):
        load_bank(tmp_path / "none")
    with pytest.raises(AdapterError, match="nowhere is no folder"):
        load_bank(tmp_path / "nowhere")
    with pytest.raises(VisgraftError, match="at least one"):
        load_bank([])
    (tmp_path / "zoo" / "a" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(AdapterError, match="missing or damaged"):
        load_bank(tmp_path / "zoo")


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
    module: Any = sys.modules["visgraft.serve.decoding"]
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
    make_compute("fp32")
    assert written == []


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


def test_predictions_are_plain_tuples(adapters: dict[str, Path], pictures: list[Path]) -> None:
    (row,) = predict_stream([adapters["linear"]], pictures[:1])
    assert row == Prediction(pictures[0], str(adapters["linear"]), row.classes)
    assert row.classes == [(row.classes[0][0], row.classes[0][1])]
