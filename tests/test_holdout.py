"""Images that a model is measured on match its classes by name; what is passed over is said."""

import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import SMALL, fail, run, succeed

from visgraft import Adapted, Split, load, read_data, read_folder, save
from visgraft.data.table import read_table

NAMES = ("1", "2", "10")


def draw(folder: Path, classes: tuple[str, ...] = NAMES, count: int = 8, suffix: str = ".png") -> Path:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng((number, i)).normal(80 * number, 20, (40, 40, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}{suffix}", "png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("holdout") / "photos")


@pytest.fixture(scope="module")
def numbered(photos: Path) -> Path:
    """An adapter whose outputs are in another order than the names'."""
    first = photos.parent / "first"
    succeed(
        "train", photos, "--method", "full", "--lr", 5e-4, "--epochs", 30, "--batch-size", 4, "--out", first, *SMALL
    )
    adapted = load(first)
    head = adapted.model.get_classifier()
    order = [adapted.classes.index(name) for name in NAMES]
    head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]
    return save(adapted.model, photos.parent / "numbered", classes=NAMES)


def test_classes_match_by_name_in_any_order(photos: Path, numbered: Path) -> None:
    assert isinstance(load(numbered), Adapted) and load(numbered).classes == NAMES
    found = succeed("eval", numbered, photos, "--split", "all")
    first = succeed("eval", photos.parent / "first", photos, "--split", "all")
    assert found["top1"] == first["top1"] > 0.9 and found["classes_missing"] == []
    merged = succeed("merge", numbered, "--data", photos, "--out", photos.parent / "merged")
    assert merged["images"] > 0
    page = succeed("report", numbered, "--data", photos, "--split", "all", "--out", photos.parent / "page.html")
    assert page["runs"][0]["figure"] == first["top1"]


def test_a_holdout_may_lack_classes_and_may_hold_one(photos: Path, numbered: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "10", tmp_path / "one" / "10")
    code, _, err = run("eval", numbered, tmp_path / "one", "--split", "all")
    assert code == 0 and "no images of 1, 2" in err and "Traceback" not in err
    found = succeed("eval", numbered, tmp_path / "one", "--split", "all")
    assert found["images"] == 8 and found["top1"] > 0.9 and found["classes_missing"] == ["1", "2"]
    assert found["macro_f1"] == pytest.approx(2 * found["top1"] / (1 + found["top1"]))
    shutil.copytree(photos / "2", tmp_path / "test alone" / "test" / "2")
    assert succeed("eval", numbered, tmp_path / "test alone")["classes_missing"] == ["1", "10"]
    rows = [("image_path,label,split"), *(f"{photos}/2/{i}.png,2,test" for i in range(3))]
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    assert succeed("eval", numbered, tmp_path / "rows.csv")["images"] == 3
    page = tmp_path / "page.html"
    assert succeed("report", numbered, "--data", tmp_path / "one", "--split", "all", "--out", page)["runs"]
    assert "no images of 1, 2" in page.read_text(encoding="utf-8")
    assert succeed("merge", numbered, "--data", tmp_path / "one", "--out", tmp_path / "plain")["images"] == 8


def test_unknown_classes_are_named(photos: Path, numbered: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "more")
    (tmp_path / "more" / "10").rename(tmp_path / "more" / "ten")
    for verb in (
        ["eval", "--split", "all"],
        ["merge", "--out", tmp_path / "x"],
        ["report", "--out", tmp_path / "x.html"],
    ):
        data = [tmp_path / "more"] if verb[0] == "eval" else ["--data", tmp_path / "more"]
        code, _, err = run(verb[0], numbered, *data, *verb[1:])
        assert code == 1 and "does not know: ten (it knows 1, 10, 2)" in err.splitlines()[-1]


def test_a_test_folder_without_classes_does_not_block_training(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "cup" / "train")
    shutil.copytree(photos / "1", tmp_path / "cup" / "test")
    dataset = read_folder(tmp_path / "cup")
    assert dataset.unlabelled == (tmp_path / "cup" / "test",) and dataset.test == () and len(dataset.val) > 0
    out = tmp_path / "my adapter"
    code, text, err = run("train", tmp_path / "cup", "--method", "linear", "--epochs", 1, "--out", out, *SMALL)
    assert code == 0 and "has no class folders" in err
    assert f"visgraft predict '{out}' {tmp_path / 'cup' / 'test'}" in text
    assert len(succeed("predict", out, tmp_path / "cup" / "test")) == 8
    assert "has no class folders" in run("check", tmp_path / "cup")[1]


def test_what_is_passed_over_is_counted_and_names_without_extension_are_looked_into(tmp_path: Path) -> None:
    folder = draw(tmp_path / "mixed", ("a", "b"), 6)
    draw(tmp_path / "bare", ("a", "b"), 4, "")
    for name in ("a", "b"):
        for file in (tmp_path / "bare" / name).iterdir():
            file.rename(folder / name / f"bare{file.name}")
        for i in range(5):
            (folder / name / f"{i}.dat").write_bytes(b"no image")
    (folder / "a" / "README").write_text("no image")
    (folder / "a" / "Thumbs.db").write_text("left by Windows")
    dataset = read_folder(folder)
    assert len(dataset.all) == 20
    assert dataset.notes == ("passed over 11 files whose names are no images': 10 .dat, 1 no extension",)
    code, _, err = run("train", folder, "--method", "linear", "--epochs", 1, "--out", tmp_path / "x", *SMALL)
    assert code == 0 and "10 .dat" in err
    assert "10 .dat" in run("check", folder)[1]
    assert len(succeed("predict", tmp_path / "x", folder)) == 20
    for name in ("a", "b"):
        for file in (folder / name).glob("*.png"):
            file.rename(file.with_suffix(".jpg_large"))
        for file in (folder / name).glob("bare*"):
            file.unlink()
    assert "12 .jpg_large" in fail("train", folder, "--out", tmp_path / "y", *SMALL)


@pytest.mark.parametrize(("on_disk", "written"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_in_a_table_find_their_file(on_disk: str, written: str, tmp_path: Path) -> None:
    folder, cells = tmp_path / unicodedata.normalize(on_disk, "Äpfel"), ["image_path,label"]
    folder.mkdir()
    for i, name in enumerate(("élan", "über", "naïve", "plain")):
        file = folder / unicodedata.normalize(on_disk, f"{name}.png")
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(file)
        cells.append(f"{unicodedata.normalize(written, f'Äpfel/{name}')}.png,{'ab'[i % 2]}")
    (tmp_path / "t.csv").write_text("\n".join(cells), encoding="utf-8")
    dataset = read_table(tmp_path / "t.csv", split=Split(0.0, 0.0))
    assert len(dataset.train) == 4 and all(example.path.is_file() for example in dataset.train)


def test_two_labels_in_a_column_for_one_are_asked_about(tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [f"{i}.png,{label}" for i, label in enumerate(("a", "b", "a|b", "b"))]
    (tmp_path / "t.csv").write_text("\n".join(("image_path,label", *rows)))
    line = fail("check", tmp_path / "t.csv")
    assert "line 4 has the label a|b, and a is one by itself" in line and "labels" in line
    (tmp_path / "t.csv").write_text("\n".join(("image_path,labels", *rows)))
    dataset = read_data(tmp_path / "t.csv", Split(0.0, 0.0))
    assert dataset.classes == ("a", "b") and dataset.multi_label
    assert {example.path.name: example.label for example in dataset.all}["2.png"] == (0, 1)
    (tmp_path / "t.csv").write_text("\n".join(("image_path,label", "0.png,x|y", "1.png,z")))
    assert read_table(tmp_path / "t.csv", split=Split(0.0, 0.0)).classes == ("x|y", "z")


def test_two_folders_without_classes_and_nothing_else(photos: Path, numbered: Path, tmp_path: Path) -> None:
    cup = tmp_path / "cup"
    shutil.copytree(photos, cup / "train")
    for part in ("val", "test"):
        shutil.copytree(photos / "1", cup / part)
    out = tmp_path / "out"
    code, text, err = run("train", cup, "--method", "linear", "--epochs", 1, "--out", out, *SMALL)
    assert code == 0 and f"visgraft predict {out} {cup / 'test'} {cup / 'val'}" in text, err
    shutil.rmtree(cup / "train")
    line = fail("eval", numbered, cup)
    assert "has no labelled images; put those of test, val into folders by class" in line


def test_other_parts_of_a_hub_data_set_are_measured(numbered: Path, tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["10", "2", "1"])})
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(4)]

    def write(name: str, part: str, labels: list[int]) -> str:
        rows = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
        datasets.DatasetDict({part: rows}).save_to_disk(tmp_path / name)
        return f"hf:{tmp_path / name}"

    found = succeed("eval", numbered, write("tested", "test", [0, 1, 0, 1]))
    assert found["images"] == 4 and found["classes_missing"] == ["1"]
    assert succeed("eval", numbered, write("held", "validation", [2, 2, 2, 2]), "--split", "val")["images"] == 4
    assert "has no image with a label" in fail("eval", numbered, write("none", "test", [-1] * 4))
    line = fail("eval", numbered, f"hf:{tmp_path / 'tested'}", "--split", "val")
    assert "has no val images; choose another part with --split: test with 4, or all" in line


def test_accents_of_class_names_match_however_they_are_stored(tmp_path: Path) -> None:
    names = ("café", "thé")
    draw(tmp_path / "train", names)
    succeed("train", tmp_path / "train", "--method", "linear", "--epochs", 1, "--out", tmp_path / "out", *SMALL)
    draw(tmp_path / "held", tuple(unicodedata.normalize("NFD", name) for name in names))
    assert succeed("eval", tmp_path / "out", tmp_path / "held", "--split", "all")["classes_missing"] == []
    decomposed = unicodedata.normalize("NFD", "thé")
    (tmp_path / "t.csv").write_text(f"image_path,label\n{tmp_path}/held/{decomposed}/0.png,{decomposed}", "utf-8")
    found = succeed("eval", tmp_path / "out", tmp_path / "t.csv", "--split", "all")
    assert (found["images"], found["classes_missing"]) == (1, ["café"])


def test_every_verb_that_reads_images_says_what_it_passed_over(photos: Path, numbered: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "some")
    (tmp_path / "some" / "1" / "0.png").rename(tmp_path / "some" / "1" / "0.JPGX")
    data, told = tmp_path / "some", f"{tmp_path / 'some'}: passed over 1 file whose name is no image's: 1 .jpgx"
    for words in (
        ["check", data], ["eval", numbered, data, "--split", "all"], ["predict", numbered, data],
        ["merge", numbered, "--data", data, "--out", tmp_path / "plain"],
        ["report", numbered, "--data", data, "--split", "all", "--out", tmp_path / "page.html"],
        ["compare", data, "--methods", "linear", "--trials", 1, *SMALL],
    ):  # fmt: skip
        _, _, err = run(*words)
        assert err.count(told) == 1, (words[0], err)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "x.JPGX").write_bytes(b"")
    assert "holds no images (passed over 1 file" in fail("predict", numbered, tmp_path / "odd")


def test_check_looks_at_what_cannot_be_divided(tmp_path: Path) -> None:
    code, out, err = run("check", draw(tmp_path / "single", count=1))
    assert code == 0 and "with fewer than 10 training images" in out, err
