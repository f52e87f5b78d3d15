"""Image folders: the two layouts, the seeded division, and the messages for common mistakes."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from visgraft.data.dataset import Dataset, Example, Split
from visgraft.data.folders import read_folder
from visgraft.errors import DataError


def write_image(path: Path, size: tuple[int, int] = (2, 2), colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def write_class(folder: Path, count: int) -> None:
    for number in range(count):
        write_image(folder / f"{number:02}.png")


def write_flat(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        write_class(root / name, count)
    return root


def names(folder: Dataset, part: str) -> list[str]:
    return [example.path.relative_to(folder.root).as_posix() for example in getattr(folder, part)]


def per_class(examples: tuple[Example, ...]) -> list[int]:
    labels = [example.label for example in examples]
    return [labels.count(label) for label in sorted(set(labels))]


def message(root: Path, **options: float) -> str:
    with pytest.raises(DataError) as caught:
        read_folder(root, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_says(text: str, *parts: object) -> None:
    for part in parts:
        assert str(part) in text, f"{part!r} is not in {text!r}"


# Layouts


def test_flat_folder_is_divided_class_by_class(tmp_path: Path) -> None:
    folder = read_folder(write_flat(tmp_path, dog=20, cat=40), val_fraction=0.25, test_fraction=0.1, seed=3)
    assert folder.root == tmp_path
    assert folder.layout == "flat"
    assert folder.classes == ("cat", "dog")
    assert folder.split == Split(0.25, 0.1, 3)
    assert per_class(folder.train) == [26, 13]
    assert per_class(folder.val) == [10, 5]
    assert per_class(folder.test) == [4, 2]
    everything = [*folder.train, *folder.val, *folder.test]
    assert len({example.path for example in everything}) == len(everything) == 60
    assert all(example.path.parent.name == folder.classes[example.label] for example in everything)
    assert names(folder, "train") == sorted(names(folder, "train"))


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_split_folder_is_taken_as_it_is(tmp_path: Path, val: str) -> None:
    for part, count in (("train", 3), (val, 2), ("test", 1)):
        write_flat(tmp_path / part, a=count, b=count)
    folder = read_folder(tmp_path)
    assert folder.layout == "split"
    assert folder.split is None
    assert [per_class(folder.part(part)) for part in ("train", "val", "test")] == [[3, 3], [2, 2], [1, 1]]
    assert names(folder, "val") == [f"{val}/a/00.png", f"{val}/a/01.png", f"{val}/b/00.png", f"{val}/b/01.png"]


def test_split_names_may_be_capitalised(tmp_path: Path) -> None:
    write_flat(tmp_path / "Train", a=2, b=2)
    write_flat(tmp_path / "Test", b=1)
    folder = read_folder(tmp_path)
    assert folder.layout == "split"
    assert [example.label for example in folder.test] == [1]


def test_split_folder_without_val_draws_it_from_train(tmp_path: Path) -> None:
    write_flat(tmp_path / "train", a=10, b=20)
    write_flat(tmp_path / "test", a=1, b=2)
    folder = read_folder(tmp_path, val_fraction=0.2, test_fraction=0.5)
    assert (per_class(folder.train), per_class(folder.val), per_class(folder.test)) == ([8, 16], [2, 4], [1, 2])
    assert set(names(folder, "train")).isdisjoint(names(folder, "val"))
    assert read_folder(tmp_path, val_fraction=0).val == ()


def test_split_folder_without_test_has_none(tmp_path: Path) -> None:
    write_flat(tmp_path / "train", a=4, b=4)
    folder = read_folder(tmp_path)
    assert folder.test == ()
    with pytest.raises(DataError) as caught:
        folder.part("test")
    assert_says(str(caught.value), tmp_path, "no test images", f"add {tmp_path / 'test'}/<class>")


def test_fractions_of_zero_leave_parts_empty(tmp_path: Path) -> None:
    folder = read_folder(write_flat(tmp_path, a=1, b=5), val_fraction=0, test_fraction=0)
    assert (per_class(folder.train), folder.val, folder.test) == ([1, 5], (), ())
    with pytest.raises(DataError) as caught:
        folder.part("val")
    assert_says(str(caught.value), tmp_path, "no val images", "set val_fraction above 0")


def test_unknown_part_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'vall' is not a part of .*did you mean val"):
        read_folder(write_flat(tmp_path, a=3, b=3)).part("vall")


def test_files_that_are_no_images_and_hidden_ones_are_skipped(tmp_path: Path) -> None:
    write_flat(tmp_path, a=3, b=3)
    write_image(tmp_path / "a" / "deep" / "er" / "LOUD.JPG")
    for hidden in (".git/x.png", "__MACOSX/a/x.png", "a/.thumbs/x.png", "a/__MACOSX/x.png", "b/.x.png", ".x.png"):
        write_image(tmp_path / hidden)
    for other in ("labels.csv", "a/notes.txt", "a/Thumbs.db", "a/.DS_Store", "b/features.h5", "b/film.mpg"):
        (tmp_path / other).write_text("no image")
    folder = read_folder(tmp_path, val_fraction=0, test_fraction=0)
    expected = ["a/00.png", "a/01.png", "a/02.png", "a/deep/er/LOUD.JPG", "b/00.png", "b/01.png", "b/02.png"]
    assert names(folder, "train") == expected


def test_unicode_class_names(tmp_path: Path) -> None:
    folder = read_folder(write_flat(tmp_path, Müll=3, 猫=4, a=3))
    assert folder.classes == ("Müll", "a", "猫") == tuple(sorted(folder.classes))
    assert per_class(folder.test) == [1, 1, 1]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_flat(tmp_path / "data", a=2)
    write_class(tmp_path / "elsewhere", 2)
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert per_class(read_folder(tmp_path / "data", test_fraction=0).train) == [1, 1]
    (tmp_path / "data" / "a" / "again").symlink_to(tmp_path / "data" / "a", target_is_directory=True)
    assert_says(message(tmp_path / "data"), tmp_path / "data" / "a" / "again", "remove the link")


def test_circles_of_links(tmp_path: Path) -> None:
    write_flat(tmp_path, a=3, b=3)
    (tmp_path / "a" / "self.png").symlink_to(tmp_path / "a" / "self.png")
    assert_says(message(tmp_path), tmp_path / "a" / "self.png", "cannot be read (", "repair or remove")
    (tmp_path / "a" / "self.png").unlink()
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert_says(message(tmp_path), f"{tmp_path / 'a' / 'up'} is a link to a folder above it")


def test_paths_are_those_that_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_flat(tmp_path / "flat", a=3, b=3)
    write_flat(tmp_path / "parts" / "train", a=3, b=3)
    for name, first in (("flat", "a/00.png"), ("parts", "train/a/00.png")):
        monkeypatch.chdir(tmp_path / name)
        inside = read_folder(".", val_fraction=0, test_fraction=0)
        assert inside.train[0].path == Path(first)
        assert inside.fingerprint == read_folder(tmp_path / name).fingerprint


# The draw


def test_draw_is_reproducible_and_follows_the_seed(tmp_path: Path) -> None:
    write_flat(tmp_path, a=20, b=20)
    assert read_folder(tmp_path, seed=1) == read_folder(tmp_path, seed=1)
    assert names(read_folder(tmp_path, seed=1), "test") != names(read_folder(tmp_path, seed=2), "test")


def test_draw_differs_between_classes(tmp_path: Path) -> None:
    folder = read_folder(write_flat(tmp_path, a=20, b=20))
    chosen = [{path.name for path, label, *_ in folder.test if label == wanted} for wanted in (0, 1)]
    assert chosen[0] != chosen[1]


def test_draw_does_not_depend_on_location_or_creation_order(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "x" / "second"
    write_flat(first, a=12, b=9)
    for path in sorted(first.rglob("*.png"), reverse=True):
        target = second / path.relative_to(first)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    one, two = read_folder(first), read_folder(second)
    assert one.fingerprint == two.fingerprint
    for part in ("train", "val", "test"):
        assert names(one, part) == names(two, part)


def test_draw_of_a_class_does_not_depend_on_the_sizes_of_others(tmp_path: Path) -> None:
    write_flat(tmp_path, a=12, b=9)
    before = [example for example in read_folder(tmp_path).test if example.label == 0]
    write_image(tmp_path / "b" / "new.png")
    assert before == [example for example in read_folder(tmp_path).test if example.label == 0]


@pytest.mark.parametrize("fractions", [(0.15, 0.2), (0.3, 0.6), (0.6, 0.3), (0.49, 0.5), (0.01, 0.01)])
def test_smallest_classes_are_in_every_part(tmp_path: Path, fractions: tuple[float, float]) -> None:
    folder = read_folder(write_flat(tmp_path, a=3, b=4), val_fraction=fractions[0], test_fraction=fractions[1])
    parts = [per_class(folder.part(part)) for part in ("train", "val", "test")]
    assert all(len(counts) == 2 for counts in parts)
    assert [sum(counts) for counts in zip(*parts, strict=True)] == [3, 4]


def test_fingerprint_follows_names_and_sizes_but_not_the_draw(tmp_path: Path) -> None:
    write_flat(tmp_path, a=3, b=3)
    before = read_folder(tmp_path).fingerprint
    assert len(before) == 64
    assert read_folder(tmp_path, seed=5, test_fraction=0).fingerprint == before
    (tmp_path / "a" / "notes.txt").write_text("no image")
    assert read_folder(tmp_path).fingerprint == before
    write_image(tmp_path / "a" / "00.png", size=(90, 90))
    larger = read_folder(tmp_path).fingerprint
    (tmp_path / "a" / "00.png").rename(tmp_path / "a" / "renamed.png")
    assert len({before, larger, read_folder(tmp_path).fingerprint}) == 3


# Common mistakes


def test_missing_path_and_file(tmp_path: Path) -> None:
    assert_says(message(tmp_path / "nowhere"), tmp_path / "nowhere", "does not exist", "one folder of images per class")
    file = write_image(tmp_path / "x.png")
    assert_says(message(file), file, "is a file", "one folder of images per class", ".csv table", "hf:NAME")
    (tmp_path / "photos").mkdir()
    assert_says(message(tmp_path / "fotos"), "does not exist", "did you mean photos?")


def test_no_images_at_all(tmp_path: Path) -> None:
    assert_says(message(tmp_path), f"{tmp_path} holds no images", f"put them in {tmp_path}/<class>/", ".jpg", ".png")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("no image")
    assert_says(message(tmp_path), f"{tmp_path} holds no images")


def test_single_class(tmp_path: Path) -> None:
    write_flat(tmp_path, only=3)
    assert_says(message(tmp_path), tmp_path, "only one class, only", "add a second class folder", "move them up")


def test_empty_class_folder(tmp_path: Path) -> None:
    write_flat(tmp_path, a=3, b=3)
    (tmp_path / "void").mkdir()
    assert_says(message(tmp_path), tmp_path, "class folders without images: void", "fill or remove")


def test_images_outside_of_class_folders(tmp_path: Path) -> None:
    for number in range(7):
        write_image(tmp_path / f"{number}.png")
    expected = "outside of class folders: 0.png, 1.png, 2.png, 3.png, 4.png and 2 more"
    assert_says(message(tmp_path), tmp_path, expected, f"put each in {tmp_path}/<class>/")
    write_flat(tmp_path, a=3, b=3)
    assert_says(message(tmp_path), expected)


def test_images_outside_of_class_folders_of_a_split(tmp_path: Path) -> None:
    write_flat(tmp_path / "train", a=3, b=3)
    loose = write_image(tmp_path / "loose.png")
    assert_says(message(tmp_path), tmp_path, "loose.png", f"put each in {tmp_path / 'train'}/<class>/")
    loose.unlink()
    write_image(tmp_path / "test" / "1.png")
    assert read_folder(tmp_path).unlabelled == (tmp_path / "test",)
    write_image(tmp_path / "test" / "a" / "2.png")
    assert_says(message(tmp_path), tmp_path / "test", "1.png", f"put each in {tmp_path / 'test'}/<class>/")


def test_class_too_small_to_divide(tmp_path: Path) -> None:
    write_flat(tmp_path, a=2, b=5, c=1)
    assert_says(message(tmp_path), tmp_path, "a (2), c (1)", "at least 3", "set val_fraction or test_fraction to 0")
    text = message(tmp_path, val_fraction=0)
    assert_says(text, "c (1)", "at least 2", "set test_fraction to 0")
    assert "a (2)" not in text


def test_class_too_small_to_draw_val_from_train(tmp_path: Path) -> None:
    write_flat(tmp_path / "train", a=1, b=5)
    assert_says(message(tmp_path), tmp_path / "train", "a (1)", "at least 2", "set val_fraction to 0")


@pytest.mark.parametrize("fractions", [(-0.1, 0.2), (0.1, -0.2), (0.5, 0.5), (1.0, 0.0), (float("nan"), 0.2)])
def test_fractions_out_of_range(tmp_path: Path, fractions: tuple[float, float]) -> None:
    text = message(write_flat(tmp_path, a=3, b=3), val_fraction=fractions[0], test_fraction=fractions[1])
    assert_says(text, f"val_fraction ({fractions[0]})", f"test_fraction ({fractions[1]})", "at least 0", "below 1")


def test_negative_seed(tmp_path: Path) -> None:
    assert_says(message(write_flat(tmp_path, a=3, b=3), seed=-1), "seed is -1", "must not be negative")


def test_mixture_of_train_and_classes(tmp_path: Path) -> None:
    write_flat(tmp_path / "train", a=3, b=3)
    write_flat(tmp_path, cat=3)
    assert_says(message(tmp_path), tmp_path, "mixes train with other folders (cat)", "keep only train, val and test")


def test_two_folders_for_one_part(tmp_path: Path) -> None:
    for part in ("train", "val", "valid"):
        write_flat(tmp_path / part, a=3, b=3)
    assert_says(message(tmp_path), tmp_path, "two folders for one part", "val, valid", "keep one")


@pytest.mark.parametrize("folders", [("Training", "Testing"), ("test", "val")])
def test_split_without_train_is_not_taken_for_classes(tmp_path: Path, folders: tuple[str, str]) -> None:
    for name in folders:
        write_flat(tmp_path / name, a=3, b=3)
    assert_says(message(tmp_path), tmp_path, *folders, "no train", "name the folders train, val and test")


@pytest.mark.parametrize("part", ["val", "test"])
def test_class_that_train_lacks(tmp_path: Path, part: str) -> None:
    write_flat(tmp_path / "train", a=3, b=3)
    write_flat(tmp_path / part, a=1, z=1)
    assert_says(message(tmp_path), tmp_path / part, f"that {tmp_path / 'train'} lacks: z", "add or remove")


def test_empty_part_folder(tmp_path: Path) -> None:
    write_flat(tmp_path / "train", a=3, b=3)
    (tmp_path / "val").mkdir()
    assert_says(message(tmp_path), f"{tmp_path / 'val'} holds no images", "put them in")


def test_broken_link(tmp_path: Path) -> None:
    link = write_flat(tmp_path, a=3, b=3) / "a" / "gone.png"
    link.symlink_to(tmp_path / "nowhere.png")
    assert_says(message(tmp_path), link, "cannot be read (No such file or directory)", "repair or remove")


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_flat(tmp_path, a=3, b=3)
    scandir = os.scandir

    def refuse(folder: str | Path) -> object:
        if Path(folder) == tmp_path / "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert_says(message(tmp_path), tmp_path / "b", "cannot be read (Permission denied)", "repair or remove")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipe_that_is_called_like_an_image(tmp_path: Path) -> None:
    os.mkfifo(write_flat(tmp_path, a=3, b=3) / "a" / "x.png")
    assert_says(message(tmp_path), tmp_path / "a" / "x.png", "neither a file nor a folder", "remove it")


@pytest.mark.parametrize(
    ("one", "other", "how"),
    [("Cat", "cat", "upper and lower case"), ("caf\u00e9", "cafe\u0301", "how an accent is stored")],
)
def test_classes_that_read_alike(tmp_path: Path, one: str, other: str, how: str) -> None:
    write_class(tmp_path / one, 3)
    write_class(tmp_path / other, 3)
    if len(os.listdir(tmp_path)) < 2:
        pytest.skip("the file system holds one of them only")
    assert_says(message(tmp_path), tmp_path, f"differ only by {how}", one, other, "merge or rename")


def test_class_of_another_case_in_test(tmp_path: Path) -> None:
    write_flat(tmp_path / "train", Cat=3, dog=3)
    write_flat(tmp_path / "test", cat=1, dog=1)
    assert_says(message(tmp_path), tmp_path / "test", "lacks: cat", "did you mean Cat?")


@pytest.mark.skipif(os.name == "nt", reason="names are always text here")
def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    write_flat(tmp_path, a=3, b=3)
    os.rename(tmp_path / "a" / "00.png", os.fsencode(tmp_path / "a") + b"/caf\xe9.png")
    folder = read_folder(tmp_path)
    assert len(folder.all) == 6
    assert len(folder.fingerprint) == 64
    os.rename(tmp_path / "b", os.fsencode(tmp_path) + b"/caf\xe9")
    assert_says(message(tmp_path), "not valid UTF-8, caf\\udce9", "rename it")
