"""Which adapter fits a few labelled images: the one trained for their question, found beside what cannot be read."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from algebra import CLASSES, SPEC, draw
from test_cli import fail, run, succeed

import visgraft
from visgraft import Backbone, nearest_adapters
from visgraft.algebra.probing import probe_features
from visgraft.data.images import Images
from visgraft.drawn.scenes import draw_scenes


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters, each trained for another question on such pictures, and new pictures for the first two."""
    root = tmp_path_factory.mktemp("tasks")
    for task in range(3):
        model = visgraft.create_backbone(SPEC, 3)
        data = visgraft.read_folder(draw(root / f"old-{task}", task, 90, task), val_fraction=0, test_fraction=0)
        images = visgraft.load_images(data.train, visgraft.model_data_config(model))
        torch.manual_seed(0)
        visgraft.attach(model, visgraft.LoRAConfig(rank=4))
        visgraft.train(model, images, visgraft.TrainConfig(epochs=20, warmup_epochs=1.0, lr=5e-3, precision="fp32"))
        visgraft.save(model, root / "zoo" / "by task" / str(task), classes=CLASSES)
    for task in range(2):
        draw(root / f"new-{task}", task, 48, 10 + task)
    return root


@pytest.mark.parametrize("task", [0, 1])
def test_the_adapter_trained_for_the_question_is_the_nearest(tasks: Path, task: int) -> None:
    found = nearest_adapters(tasks / f"new-{task}", tasks / "zoo", full=True)
    best, (plain,) = found.adapters[0], found.plain
    assert best.name == f"by task/{task}" and len(found.adapters) == 3 and not found.left_out
    assert best.clear and best.score > plain.score + 0.1 and found.lead is not None and found.lead.clear
    assert best.own is not None and best.own > max(one.own or 0 for one in found.adapters[1:])
    assert best.interval[0] < best.score < best.interval[1] and not best.learned


def test_adapters_that_cannot_be_looked_at_are_listed_with_the_reason(tasks: Path, tmp_path: Path) -> None:
    zoo, photos = tmp_path / "zoo", tasks / "new-1"
    for name in ("good", "torn"):
        (zoo / name).mkdir(parents=True)
        for file in (tasks / "zoo" / "by task" / "1").iterdir():
            (zoo / name / file.name).write_bytes(file.read_bytes())
    for name in ("good-too",):
        model = visgraft.attach(visgraft.create_backbone(SPEC, 4), visgraft.LinearConfig())
        visgraft.save(model, zoo / name, classes=["1", "2", "3", "4"])
    (zoo / "torn" / "adapter_model.safetensors").write_bytes(b"torn")
    other = visgraft.create_backbone(Backbone("test_vit2", "none", 32), 2)
    visgraft.save(visgraft.attach(other, visgraft.LinearConfig()), zoo / "other")
    (zoo / "empty").mkdir()
    (zoo / "empty" / "adapter_config.json").write_text("{")
    told = succeed("nearest", photos, "--among", zoo, "--full", "--top", 1)
    assert [one["name"] for one in told["adapters"]] == ["good"]
    reasons = {one["name"]: one["reason"] for one in told["left_out"]}
    assert set(reasons) == {"torn", "other", "empty"} and "most are of test_vit" in reasons["other"]
    code, text, err = run("nearest", photos, "--among", zoo, "--full")
    assert code == 0 and "good fits best" in text and "plain backbone" in text and "left out 3" in err
    assert "–" in next(line for line in text.splitlines() if "good-too" in line), "it answers other classes"
    assert "can be used" in fail("nearest", photos, "--among", zoo / "torn")


def test_what_nearest_cannot_read_is_refused_in_one_line(tasks: Path, tmp_path: Path) -> None:
    assert "--among" in fail("nearest", tasks / "new-0")
    assert "is no folder" in fail("nearest", tasks / "new-0", "--among", tmp_path / "nowhere")
    few = draw(tmp_path / "few", 0, 4, 0)
    assert "has one image" in fail("nearest", few, "--among", tasks / "zoo")


def test_a_table_of_several_labels_is_compared_by_the_one_that_is_named(tmp_path: Path) -> None:
    table = draw_scenes(tmp_path / "scenes", size=48, train=24, val=12, test=12, restyled=2) / "labels.csv"
    common = ("--backbone", "test_vit", "--weights", "none", "--image-size", 32, "--epochs", 1, "--method", "linear")
    succeed("train", table, "--label", "distance,count_number", *common, "--out", tmp_path / "zoo" / "several")
    succeed("train", table, "--number", "location_percent", *common, "--out", tmp_path / "zoo" / "number")
    succeed("train", table, "--label", "distance", *common, "--out", tmp_path / "zoo" / "one")
    text = table.read_text().splitlines()
    table.with_name("others.csv").write_text("\n".join([text[0], *text[1:40]]) + "\n")
    for label, photos, learned in (("distance", table, 3), ("count", table, 3), ("distance", "others.csv", 0)):
        told = succeed("nearest", table.parent / photos, "--label", label, "--among", tmp_path / "zoo", "--full")
        adapters = {one["name"]: one for one in told["adapters"]}
        assert sum(one["learned"] for one in adapters.values()) == learned
        own = {name: adapters[name]["own"] for name in adapters if adapters[name]["own"] is not None}
        assert set(own) == ({"one", "several"} if label == "distance" else set())
        with (table.parent / photos).open(newline="") as file:
            rows = list(csv.DictReader(file))
        paths = [table.parent / row["image_path"] for row in rows]
        for name, share in own.items():
            told = visgraft.predict(visgraft.load(tmp_path / "zoo" / name), paths)
            named = [(one["distance"] if isinstance(one, dict) else one)[0][0] for one in told]
            assert share == pytest.approx(np.mean([a == row["distance"] for a, row in zip(named, rows, strict=True)]))
    for options, message in (
        (("--label", "distance,count"), "name one of distance, count, with --label"),
        (("--number", "count_number"), "has the number count_number"),
        ((), "name what to learn with --label"),
    ):
        code, _, err = run("nearest", table, "--among", tmp_path / "zoo", *options)
        assert code == 1 and message in err.splitlines()[-1], "below the kinds that are found"


def test_images_of_a_group_are_never_on_both_sides() -> None:
    """Features that name the group, and nothing of the class, help nobody who has not seen the group."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 5)
    labels, features = torch.from_numpy(groups % 2), torch.from_numpy(generator.normal(size=(12, 40))[groups])
    pixels = torch.zeros(60, 3, 1, 1, dtype=torch.uint8)
    mean = (0.5, 0.5, 0.5)
    alone = probe_features(features, Images(pixels, labels, mean, mean), 5)
    grouped = probe_features(features, Images(pixels, labels, mean, mean, groups=tuple(map(str, groups))), 5)
    assert alone.right.mean() == 1 and grouped.right.mean() < 0.75
