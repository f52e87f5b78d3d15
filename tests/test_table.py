"""Tables: what they may hold, how their images are divided, and a line for every mistake."""

from pathlib import Path

import pytest
from PIL import Image

from visgraft.data.dataset import Dataset, Split
from visgraft.data.read import Source, read_data
from visgraft.data.table import read_table
from visgraft.errors import DataError

ALL = Split(0, 0)


def write_images(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:02}.png" for number in range(count)]
    for name in names:
        Image.new("RGB", (2, 2)).save(folder / name)
    return names


def write_table(folder: Path, *lines: str, images: int = 12, name: str = "labels.csv", encoding: str = "utf-8") -> Path:
    write_images(folder, images)
    (folder / name).write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return folder / name


def rows(count: int, *columns: str) -> list[str]:
    """`count` lines for images 00.png, 01.png, ..., with the given further fields in turn."""
    return [f"{number:02}.png,{columns[number % len(columns)]}" for number in range(count)]


def names(data: Dataset, part: str) -> list[str]:
    return [example.path.name for example in getattr(data, part)]


def message(table: Path, *parts: object, split: Split = ALL, folder: Path | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read_table(table, folder, split)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert str(part) in text, f"{part!r} is not in {text!r}"
    return text


# What a table may hold


def test_images_and_labels(tmp_path: Path) -> None:
    table = write_table(tmp_path, "image_path,label", *rows(12, "dog", "cat", "dog"))
    data = read_table(table, split=Split(0.25, 0.25, 1))
    assert (data.root, data.classes, data.layout, data.multi_label) == (table, ("cat", "dog"), "flat", False)
    assert data.split == Split(0.25, 0.25, 1)
    assert [len(data.part(part)) for part in ("train", "val", "test")] == [6, 3, 3]
    assert {example.path for example in data.all} == {tmp_path / f"{number:02}.png" for number in range(12)}
    assert all(data.classes[example.label] == ("dog", "cat", "dog")[int(example.path.stem) % 3] for example in data.all)
    assert names(read_table(table, split=ALL), "train")[:4] == ["01.png", "04.png", "07.png", "10.png"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_delimiters_byte_order_marks_and_line_ends(tmp_path: Path, delimiter: str, encoding: str, end: str) -> None:
    lines = [line.replace(",", delimiter) for line in ("Image_Path, LABEL ,note", *rows(4, "Käse,x", "猫 1,y"), "")]
    table = write_table(tmp_path, end.join(lines), encoding=encoding)
    assert read_table(table, split=ALL).classes == ("Käse", "猫 1")


def test_quoted_fields_and_empty_lines(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    (tmp_path / "00.png").rename(tmp_path / "a, b.png")
    table = write_table(tmp_path, "image_path,label", '"a, b.png","x, y"', "", '01.png,"say ""z"""', ",", images=0)
    data = read_table(table, split=ALL)
    assert data.classes == ('say "z"', "x, y")
    assert names(data, "train") == ["01.png", "a, b.png"]


def test_split_column(tmp_path: Path) -> None:
    parts = ("train", "VAL", "Test", "train", "validation", "test", "train", "valid", "TEST")
    lines = [f"{number:02}.png,{'ab'[number % 2]},{part}" for number, part in enumerate(parts)]
    data = read_table(write_table(tmp_path, "image_path,label,split", *lines))
    assert (data.layout, data.split) == ("split", None)
    assert sorted(names(data, "train")) == ["00.png", "03.png", "06.png"]
    assert sorted(names(data, "val")) == ["01.png", "04.png", "07.png"]
    assert sorted(names(data, "test")) == ["02.png", "05.png", "08.png"]


def test_missing_val_is_drawn_from_train_and_missing_test_stays_empty(tmp_path: Path) -> None:
    table = write_table(tmp_path, "image_path,label,split", *rows(12, "a,train", "b,train"))
    data = read_table(table, split=Split(0.3, 0.5))
    assert [len(part) for part in (data.train, data.val, data.test)] == [8, 4, 0]
    with pytest.raises(DataError, match=r"labels.csv has no test images; mark images as test"):
        data.part("test")
    assert names(read_table(table, split=ALL), "val") == []


def test_an_empty_split_column_is_none(tmp_path: Path) -> None:
    assert read_table(write_table(tmp_path, "image_path,label,split", *rows(12, "a,", "b,"))).layout == "flat"


def test_groups_stay_in_one_part(tmp_path: Path) -> None:
    lines = [f"{number:02}.png,{'ab'[number % 2]},patient {number // 4}" for number in range(40)]
    table = write_table(tmp_path, "image_path,label,group", *lines, images=40)
    data = read_table(table, split=Split(0.2, 0.2))
    groups = [{example.group for example in part} for part in (data.train, data.val, data.test)]
    assert [len(found) for found in groups] == [6, 2, 2]
    assert len(set.union(*groups)) == 10
    with_parts = write_table(tmp_path, "image_path,label,group,split", *(f"{line},train" for line in lines), images=40)
    drawn = read_table(with_parts, split=Split(0.2, 0.2))
    assert {e.group for e in drawn.train}.isdisjoint({e.group for e in drawn.val})
    assert len(drawn.val) == 8


def test_the_draw_of_groups_is_reproducible_and_follows_the_seed(tmp_path: Path) -> None:
    lines = [f"{number:02}.png,{'ab'[number % 2]},patient {number // 4}" for number in range(40)]
    table = write_table(tmp_path, "image_path,label,group", *lines, images=40)

    def drawn(seed: int) -> list[str]:
        return [example.path.name for example in read_table(table, split=Split(0.2, 0.2, seed)).test]

    assert drawn(3) == drawn(3) and any(drawn(seed) != drawn(3) for seed in range(3))


def test_multi_label(tmp_path: Path) -> None:
    lines = rows(12, "rust;scratch", "", "scratch", "scratch; dent ;scratch")
    data = read_table(write_table(tmp_path, "image_path,labels", *lines), split=ALL)
    assert (data.multi_label, data.classes) == (True, ("dent", "rust", "scratch"))
    found = {example.path.name: example.label for example in data.train}
    assert [found[f"{number:02}.png"] for number in range(4)] == [(1, 2), (), (2,), (0, 2)]


def test_paths_relative_to_a_folder_or_absolute(tmp_path: Path) -> None:
    write_images(tmp_path / "photos" / "in", 1)
    write_images(tmp_path / "other", 1)
    lines = ("image_path,label", "in/00.png,a", f"{tmp_path}/other/00.png,b")
    table = write_table(tmp_path / "tables", *lines, images=0)
    data = read_table(table, tmp_path / "photos", ALL)
    assert [e.path for e in data.train] == [tmp_path / "photos/in/00.png", tmp_path / "other/00.png"]
    assert read_data(Source(tmp_path / "photos", table), ALL) == data
    message(table, "line 2", f"there is no {tmp_path / 'tables/in/00.png'}")


def test_paths_are_those_that_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path, "image_path,label", *rows(2, "a", "b"))
    monkeypatch.chdir(tmp_path)
    assert [str(example.path) for example in read_table("labels.csv", split=ALL).train] == ["00.png", "01.png"]
    (tmp_path / "01.png").unlink()
    message(Path("labels.csv"), "there is no 01.png")


def test_order_of_lines_does_not_matter_but_content_does(tmp_path: Path) -> None:
    lines = rows(12, "a", "b")
    one = read_table(write_table(tmp_path, "image_path,label", *lines))
    assert read_table(write_table(tmp_path, "image_path,label", *lines[::-1])) == one
    marks = {one.fingerprint}
    marks.add(read_table(write_table(tmp_path, "image_path,label", *lines[:-1], "11.png,a")).fingerprint)
    grouped = [f"{line},g{number // 2}" for number, line in enumerate(lines)]
    marks.add(read_table(write_table(tmp_path, "image_path,label,group", *grouped)).fingerprint)
    table = write_table(tmp_path, "image_path,label", *lines)
    Image.new("RGB", (90, 90)).save(tmp_path / "00.png")
    marks.add(read_table(table).fingerprint)
    assert len(marks) == 4


def test_read_data_knows_tables_by_extension(tmp_path: Path) -> None:
    lines = [line.replace(",", "\t") for line in ("image_path,label", *rows(4, "a", "b"))]
    table = write_table(tmp_path, *lines, name="labels.TSV")
    assert read_data(str(table), ALL).root == table
    with pytest.raises(DataError, match=r"no data was given; give a folder of class folders, a .csv table or hf:NAME"):
        read_data(Source())
    with pytest.raises(DataError, match=r"hf:pets and the table .* were both given; give one of them"):
        read_data(Source("hf:pets", table))


# Mistakes


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ((), ["labels.csv is empty", "image_path and label"]),
        (("image_path,label",), ["labels.csv has no rows"]),
        (("image,label", "00.png,a"), ["no column image_path", "names image, label", "did you mean image?"]),
        (("image_path,Lable", "00.png,a"), ["no column label (or labels)", "did you mean lable?"]),
        (("00.png,a", "01.png,b"), ["no column image_path; its first line names 00.png, a"]),
        (("image_path,label,Label", "00.png,a,a"), ["two columns label", "remove one"]),
        (("image_path,label,labels", "00.png,a,a"), ["both columns label and labels"]),
        (("image_path,label,splits", "00.png,a,val"), ["column splits, which is not read", "call it split if"]),
        (
            ("image_path,label", "00.png,a", "01.png,"),
            ["line 3 has no label", "fill it in", "or leave out all such lines by --label label"],
        ),
        (("image_path,label", ",a", "01.png,b"), ["line 2 has no image_path"]),
        (("image_path,label", "00.png,a", "01.png,b,c"), ["line 3 has 3 fields, but the header 2"]),
        (("image_path,label", '00.png,"a', "01.png,b"), ["line 3: unexpected end of data", "repair the quotes"]),
        (("image_path,label", "00.png,a", "gone.png,b"), ["line 3: there is no", "gone.png; repair the paths"]),
        (("image_path,label", "00.png,a", "x.png,b", "y.png,b"), ["line 3: 2 of 3 images do not exist", "x.png"]),
        (("image_path,label", "00.png,a", "in\\01.png,b"), ["in\\01.png", "written with / between folders"]),
        (("image_path,label", "00.png,a", ".,b"), ["line 3", "is no file; give the path of an image"]),
        (("image_path,label", "00.png,a", "01.png/x,b"), ["line 3", "cannot be read (Not a directory)"]),
        (("image_path,label", "00.png,a", "01.png,b", "./00.png,b"), ["names ./00.png twice, in lines 2 and 4"]),
        (("image_path,label", "00.png,a", "01.png,b", "00.png,a"), ["names 00.png twice, in lines 2 and 4"]),
        (("image_path,label,split", "00.png,a,train", "01.png,b,tran"), ["line 3: split is 'tran'", "mean train?"]),
        (("image_path,label,split", "00.png,a,train", "01.png,b,"), ["line 3 has no split, but others have"]),
        (("image_path,label,split", "00.png,a,val", "01.png,b,test"), ["no row whose split is train"]),
        (("image_path,label,split", "00.png,a,train", "01.png,b,test"), ["without a train image: b"]),
        (("image_path,label", "00.png,a", "01.png,a"), ["only one class, a; at least two"]),
        (("image_path,labels", "00.png,", "01.png,"), ["no class at all"]),
        (("image_path,labels", "00.png,a", "01.png,"), ["only one class, a", "name both classes in a column label"]),
        (("image_path,label", "00.png,Cat", "01.png,cat"), ["differ only by upper and lower case: Cat, cat"]),
        (
            ("image_path,label,split,group", "00.png,a,train,p", "01.png,b,test,p"),
            ["group p is in train (line 2) and test (line 3)", "keep each group in one part"],
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, lines: tuple[str, ...], parts: list[str]) -> None:
    table = write_table(tmp_path, *lines)
    message(table, table, *parts)


def test_too_few_images_to_draw(tmp_path: Path) -> None:
    table = write_table(tmp_path, "image_path,label", "00.png,a", "01.png,b", "02.png,b")
    message(table, table, "too few images to divide: a (1), b (2)", split=Split())


def test_multi_label_class_that_the_draw_leaves_out_of_train(tmp_path: Path) -> None:
    lines = [f"{number:02}.png,{number}" for number in range(12)]
    message(write_table(tmp_path, "image_path,labels", *lines), "without a train image", "seed", split=Split(0.2, 0.2))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings(tmp_path: Path, encoding: str) -> None:
    table = write_table(tmp_path, "image_path,label", "00.png,Käse", encoding=encoding)
    message(table, table, "is not UTF-8 text; save it as CSV UTF-8")


def test_missing_tables_and_folders(tmp_path: Path) -> None:
    table = write_table(tmp_path, "image_path,label", "00.png,a", "01.png,b")
    message(tmp_path / "label.csv", "does not exist", "did you mean labels.csv?")
    message(tmp_path, tmp_path, "cannot be read (Is a directory)")
    message(table, tmp_path / "photos", "does not exist", "a folder that holds the images", folder=tmp_path / "photos")
