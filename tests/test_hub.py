"""Data sets of the Hugging Face library, from disk alone: nothing here reaches for the network."""

import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from visgraft.data.dataset import Dataset, Split
from visgraft.data.decode import open_image
from visgraft.data.read import read_data
from visgraft.errors import DataError

ALL = Split(0, 0)
CLASSES = datasets.ClassLabel(names=["zebra", "ant", "moth"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's cache in a folder of its own, and no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def rows(labels: list[Any], feature: Any = CLASSES, column: str = "label", **more: Any) -> Any:
    """Pictures whose red level is 10 times their row, with labels."""
    pictures = [Image.new("RGB", (4, 4), (10 * number, 0, 0)) for number in range(len(labels))]
    features = datasets.Features(
        {"image": datasets.Image(), column: feature, **{n: datasets.Value("int64") for n in more}}
    )
    return datasets.Dataset.from_dict({"image": pictures, column: labels, **more}, features=features)


def save(path: Path, **splits: Any) -> str:
    """Save splits, or a data set without splits called `only`, and return how to name it."""
    (splits["only"] if "only" in splits else datasets.DatasetDict(splits)).save_to_disk(path)
    return f"hf:{path}"


def reds(data: Dataset, part: str) -> list[int]:
    return [open_image(example).getpixel((1, 1))[0] for example in getattr(data, part)]  # type: ignore[index]


def message(location: str, *parts: object, split: Split = ALL) -> None:
    with pytest.raises(DataError) as caught:
        read_data(location, split)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert str(part) in str(caught.value), f"{part!r} is not in {str(caught.value)!r}"


def test_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    name = save(
        tmp_path / "bugs", train=rows([1, 0, 1, 2]), validation=rows([0, 2]), test=rows([2]), unsupervised=rows([0])
    )
    data = read_data(name)
    assert (str(data.root), data.layout, data.split, data.multi_label) == (name, "split", None, False)
    assert data.classes == ("zebra", "ant", "moth")
    assert [example.label for example in data.train] == [0, 1, 1, 2]
    assert reds(data, "train") == [10, 0, 20, 30]
    assert (reds(data, "val"), reds(data, "test")) == ([0, 10], [0])
    assert data.train[0].path == tmp_path / "bugs" / "train" / "000001"


def test_one_split_is_drawn_from(tmp_path: Path) -> None:
    labels = [number % 3 for number in range(18)]
    one = read_data(save(tmp_path / "one", train=rows(labels)), Split(0.2, 0.3, 4))
    assert (one.layout, one.split) == ("flat", Split(0.2, 0.3, 4))
    assert [len(one.part(part)) for part in ("train", "val", "test")] == [9, 3, 6]
    assert sorted(reds(one, "all")) == [10 * number for number in range(18)]
    for again in (save(tmp_path / "moved", only=rows(labels)), save(tmp_path / "third", full=rows(labels))):
        other = read_data(again, Split(0.2, 0.3, 4))
        assert (other.fingerprint, reds(other, "test")) == (one.fingerprint, reds(one, "test"))


def test_missing_val_is_drawn_from_train(tmp_path: Path) -> None:
    data = read_data(save(tmp_path / "x", train=rows([0, 1] * 5), test=rows([1])), Split(0.2, 0.5))
    assert [len(part) for part in (data.train, data.val, data.test)] == [8, 2, 1]


def test_unlabelled_test_split_is_not_read(tmp_path: Path) -> None:
    data = read_data(save(tmp_path / "x", train=rows([0, 1] * 5), test=rows([-1, -1])))
    assert (data.layout, data.test) == ("split", ())


@pytest.mark.parametrize(
    ("labels", "feature", "column", "classes"),
    [
        (["moth", "ant", "bee"], datasets.Value("string"), "label", ("ant", "bee", "moth")),
        ([10, 9, 10], datasets.Value("int64"), "labels", ("9", "10")),
        ([2, 0, 2], CLASSES, "species", ("zebra", "moth")),
    ],
)
def test_label_columns(tmp_path: Path, labels: list[Any], feature: Any, column: str, classes: tuple[str, ...]) -> None:
    data = read_data(save(tmp_path / "x", only=rows(labels, feature, column)), ALL)
    assert data.classes == classes
    named = [CLASSES.names[label] if feature is CLASSES else str(label) for label in labels]
    assert {int(e.path.name): data.classes[e.label] for e in data.train} == dict(enumerate(named))  # type: ignore[index]


def test_several_labels_per_image(tmp_path: Path) -> None:
    feature = datasets.Sequence(CLASSES)
    data = read_data(save(tmp_path / "x", only=rows([[2, 0], [], [1]], feature, "labels")), ALL)
    assert data.multi_label
    assert {example.path.name: example.label for example in data.train} == {
        "000000": (0, 2),
        "000001": (),
        "000002": (1,),
    }


def write_class_folders(folder: Path) -> None:
    for name in ("ant", "bee"):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (4, 4), (10 * number, 0, 0)).save(folder / name / f"{number}.png")


def write_parquet(folder: Path) -> None:
    folder.mkdir()
    rows([0, 1, 0, 1, 0, 1]).to_parquet(folder / "train.parquet")


@pytest.mark.parametrize(
    ("write", "inside"), [(write_class_folders, ""), (write_parquet, ""), (write_parquet, "train.parquet")]
)
def test_folders_and_parquet_files(tmp_path: Path, write: Callable[[Path], None], inside: str) -> None:
    write(tmp_path / "x")
    data = read_data(f"hf:{tmp_path / 'x' / inside}", Split(0.3, 0.3))
    assert [len(part) for part in (data.train, data.val, data.test)] == [2, 2, 2]
    assert set(reds(data, "all")) <= {0, 10, 20, 30, 40, 50}


def test_content_is_picklable_and_read_by_threads(tmp_path: Path) -> None:
    data = read_data(save(tmp_path / "x", only=rows([0, 1] * 10)), ALL)
    again = pickle.loads(pickle.dumps(data))
    assert reds(again, "train") == reds(data, "train")
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(open_image, data.train * 10))
    assert [image.getpixel((0, 0))[0] for image in images] == reds(data, "train") * 10  # type: ignore[index]


def test_selected_rows_and_a_stored_format(tmp_path: Path) -> None:
    some = rows([0, 1, 0, 1]).select([3, 0]).with_format("numpy")
    assert sorted(reds(read_data(save(tmp_path / "x", only=some), ALL), "train")) == [0, 30]


def test_fingerprint_follows_labels_and_images(tmp_path: Path) -> None:
    larger = rows([0, 1, 0])
    larger = larger.map(lambda row: {"image": row["image"].resize((64, 64))})
    found = (rows([0, 1, 0]), rows([0, 1, 1]), larger, rows([0, 1, 0], other=[1, 2, 3]))
    marks = [read_data(save(tmp_path / str(i), only=one), ALL).fingerprint for i, one in enumerate(found)]
    assert (len(set(marks)), marks[0]) == (3, marks[3])


# Mistakes


def test_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message("hf:pets", "hf:pets needs the datasets library", "pip install 'visgraft[datasets]'")


def test_names_and_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    message("hf:", "names no data set", "use hf:NAME")
    message(f"hf:{tmp_path}/savd", f"{tmp_path}/savd does not exist", "did you mean saved?")
    message(f"hf:{tmp_path}/saved", "cannot be loaded (", "any data files", "a folder that datasets.load_dataset reads")
    (tmp_path / "x.parquet").write_text("nothing")
    message(f"hf:{tmp_path}/x.parquet", "cannot be loaded (")
    write_class_folders(tmp_path / "plain")
    message(f"hf:{tmp_path}/plain:other", "BuilderConfig 'other' not found. Available: ['default']")


def test_name_that_the_hub_does_not_answer_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ConnectionError("Couldn't reach 'no/such' on the Hub\n(LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    message(
        "hf:no/such", "hf:no/such cannot be loaded (Couldn't reach", "check the name, the configuration and the net"
    )


def test_columns_that_do_not_fit(tmp_path: Path) -> None:
    plain = rows([0, 1])
    twice = plain.add_column("photo", [None, None]).cast_column("photo", datasets.Image())
    message(save(tmp_path / "a", only=plain.remove_columns("image")), "no column of images among label", "cast_column")
    message(save(tmp_path / "b", only=twice), "several columns of images, image, photo", "keep one")
    message(save(tmp_path / "c", only=plain.remove_columns("label")), "no column of labels among image")
    fine = plain.add_column("fine", [0, 1]).cast_column("fine", CLASSES)
    message(save(tmp_path / "d", only=fine), "several columns of labels, fine, label", "keep one")


def test_rows_and_splits_that_do_not_fit(tmp_path: Path) -> None:
    message(save(tmp_path / "a", only=rows([0, 1, -1, -1])), "has 2 rows without a label, the first being 2")
    message(save(tmp_path / "b", only=rows([1, 1])), "only one class, ant, in its column label")
    message(save(tmp_path / "c", validation=rows([1]), test=rows([0])), "has the splits test, validation but no train")
    message(save(tmp_path / "d", train=rows([0, 1]), valid=rows([0]), val=rows([0])), "two splits for val", "keep one")
    message(save(tmp_path / "e", train=rows([0, 1]), test=rows([2])), "without a train image: moth")
    message(save(tmp_path / "f", only=rows([0, 1, 1])), "too few images to divide", split=Split())


def test_an_image_that_is_missing(tmp_path: Path) -> None:
    holes = rows([0, 1]).map(lambda row, i: {"image": None if i else row["image"]}, with_indices=True)
    data = read_data(save(tmp_path / "x", only=holes), ALL)
    with pytest.raises(DataError, match="row 1 of the data set has no image"):
        open_image(data.train[1])
