"""A million images: names and labels as columns, and parts drawn as ever."""

import hashlib
import pickle
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from visgraft import Backbone, Dataset, Example, Loading, LoRAConfig, Split, TrainConfig, read_data
from visgraft.check.quick import quick_check
from visgraft.data.examples import Examples, Texts, joined
from visgraft.data.images import make_labels
from visgraft.errors import DataError, VisgraftError
from visgraft.training import run
from visgraft.training.resume import FILES, check_same_run

ODD = ("a", "a-b", "a b", "Müll", "猫", "b.c", "z")


def write(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)


def flat(root: Path) -> Path:
    """Class folders whose names sort in one way alone and in another with what they hold."""
    for number in range(210):
        name = ODD[number % 7]
        inner = ("", "deep/", "deep-er/", "ä/")[number % 4]
        write(root / name / f"{inner}{number * 7919 % 211:03}{('.jpg', '.PNG', '.jpeg')[number % 3]}", number % 13 + 1)
    write(root / "a" / "notes.txt", 3)
    return root


def parts(root: Path) -> Path:
    for number in range(120):
        part = ("train", "train", "train", "Test")[number % 4]
        write(root / part / ODD[number // 4 % 5] / f"{number:03}.jpg", number % 11 + 1)
    return root


def three_parts(root: Path) -> Path:
    for number in range(120):
        write(root / ("train", "valid", "test")[number % 3] / ODD[number % 4] / f"{number}.webp", number % 5 + 1)
    return root


def table(header: str, row: Callable[[int], str]) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        for number in range(150):
            write(root / "images" / f"{number:03} é.jpg", number % 17 + 1)
        lines = [f"images/{number * 37 % 150:03} é.jpg,{row(number * 37 % 150)}" for number in range(150)]
        (root / "table.csv").write_text("\n".join([f"image_path,{header}", *lines]), encoding="utf-8")
        return root / "table.csv"

    return make


LAYOUTS: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "flat": (
        flat,
        "59c77caf4284df88e0c6d6f55c8e0e5cc48d138b7adc5b4800627af609e0f55d",
        "82688e8cff207130111a7736006e0a94c4af9465eba2017935a433971d8b9f85",
    ),
    "parts": (
        parts,
        "6201d3c6d2ff8d93b764bda0102922e9c58d1f628494fcea8be4a1df7bef40b2",
        "2bb219420e8b322d0f589eebc44ac134369d174cc0095a48a79b8afdfbae9b19",
    ),
    "three parts": (
        three_parts,
        "6b93549380b71b89c4635dac0fcdfd46e6a8bdb3c09c59eb8e7e1a5983dfddc0",
        "5eb0bf68e5fe6da9fb1bab8432216162b68e8c2a185322f75b9b5f8d642b37ee",
    ),
    "table": (
        table("label", lambda i: ODD[i % 7]),
        "9c86a39a574b60180860e91200d8b1bff055b676d3c796f1d00b138335a1d9e0",
        "df0399c65c953d204029b963772179c6f4b0d3d64fd5dee3d354a10d48d0cb0a",
    ),
    "grouped": (
        table("label,group", lambda i: f"{ODD[i % 3]},g{i % 31}"),
        "fd058749923c7b46cbdfdf736b7f85a5dda3c92d3be2908e45a4a17c2ff24ce4",
        "24967bf2504e8e82420d686ba9771399094b0d9b0f2c755a8048686f4a0f45a3",
    ),
    "labels": (
        table("labels", lambda i: ";".join(ODD[j] for j in range(4) if i >> j & 1)),
        "2beba15cc56fa63311348ff2212aa2f8add512ed702a5d5684ab95db96ece1e2",
        "2833d5d251925fb2a2d9556aacf3db449267026438749ec31a660d0e79bc5db2",
    ),
    "marked": (
        table("label,split", lambda i: f"{ODD[i % 5]},{('train', 'test', 'train')[i % 3]}"),
        "8753b6c871f3cbc144534e2b24f0be5ee5478c36bd1ad80abf0080d26a66344f",
        "f8e1f0cb1bf7f6842fc468e3867ce5ed8e4c52c3322f40c8728c0f03237cd45e",
    ),
}
"""How each is made, then its fingerprint and the SHA-256 of its draw, as the code before columns gave them."""


def draw_of(data: Dataset, start: Path) -> str:
    """Return the SHA-256 of every image's part, name, label and group, in order."""
    lines = [
        f"{part} {example.path.relative_to(start).as_posix()} {example.label!r} {example.group}"
        for part in ("train", "val", "test")
        for example in getattr(data, part)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fingerprints_and_draws_are_those_of_the_earlier_code(layout: str, tmp_path: Path) -> None:
    make, fingerprint, draw = LAYOUTS[layout]
    data = read_data(make(tmp_path / "data"), Split(seed=3))
    assert (data.fingerprint, draw_of(data, tmp_path / "data")) == (fingerprint, draw)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many") / "images"
    for number in range(2000):
        write(root / f"class_{number % 20:03}" / f"image_{number:07}.jpg", 1 + number % 3)
    return root


def test_an_image_in_columns_takes_its_name_and_little_more(many: Path) -> None:
    read_data(many)  # imports and caches are not counted
    tracemalloc.start()
    data = read_data(many)
    held = tracemalloc.get_traced_memory()[0] / 2000
    tracemalloc.stop()
    assert held < len(str(data.train[0].path)) + 60
    assert all(isinstance(part, Examples) for part in (data.train, data.val, data.test, data.all))


def test_examples_are_a_sequence_like_the_tuple_that_they_were(many: Path) -> None:
    data = read_data(many)
    plain: Sequence[Example] = tuple(data.train)
    assert isinstance(plain[3], Example) and plain[3].path.is_file() and type(plain[3].label) is int
    assert data.train == plain and plain == data.train and data.train != plain[1:] and data.train != data.val
    assert data.train[5] == plain[5] and data.train[-1] == plain[-1] and data.train[3:90:7] == plain[3:90:7]
    assert plain[7] in data.train and data.train.index(plain[7]) == 7 and next(reversed(data.train)) == plain[-1]
    assert pickle.loads(pickle.dumps(data.train)) == plain
    assert data.all == (*data.train, *data.val, *data.test) == joined(plain, data.val, data.test)
    assert np.array_equal(make_labels(data.train, 20), make_labels(plain, 20))
    tuples = replace(data, **{part: tuple(getattr(data, part)) for part in ("train", "val", "test")})
    assert quick_check(data) == quick_check(tuples) != []
    with pytest.raises(IndexError):
        data.train[len(plain)]


def test_texts_keep_every_file_name() -> None:
    names = ["a", "", "Müll 猫", b"\xff\xfe.jpg".decode("utf-8", "surrogateescape"), *map(str, range(20_000))]
    texts = Texts(names)
    assert list(texts) == names == texts[:] and texts[3] == names[3] and texts[-1] == "19999"
    assert list(Texts.joined([texts, Texts(), Texts(["b"])])) == [*names, "b"]


def test_a_parquet_table_reads_as_the_csv_of_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    plain = LAYOUTS["grouped"][0](tmp_path)
    rows = [line.split(",") for line in plain.read_text(encoding="utf-8").splitlines()]
    columns: dict[str, list[object]] = {name: [row[i] for row in rows[1:]] for i, name in enumerate(rows[0])}
    file = tmp_path / "table.parquet"

    def store(**more: list[object]) -> Path:
        parquet.write_table(pyarrow.table({**columns, "seen": [1.5] * 150, **more}), file)
        return file

    one, other = read_data(plain), read_data(store())
    assert (one.fingerprint, one.train, one.test) == (other.fingerprint, other.train, other.test)
    assert read_data(store(label=[i % 3 for i in range(150)])).classes == ("0", "1", "2")
    for values, words in (
        ({"label": [None, *columns["label"][1:]]}, "row 1 has no label"),
        ({"image_path": ["no.jpg", *columns["image_path"][1:]]}, "row 1: there is no"),
        ({"image_path": [columns["image_path"][1], *columns["image_path"][1:]]}, "in rows 1 and 2; remove one"),
        ({"label": [[1]] * 150}, "column label is of type list"),
    ):
        with pytest.raises(DataError, match=words):
            read_data(store(**values))
    file.write_text("no table")
    with pytest.raises(DataError, match=r"is no readable \.parquet file"):
        read_data(file)


def test_a_parquet_table_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.parquet does not exist; give the path of a \.parquet file"):
        read_data(tmp_path / "nothing.parquet")


def test_a_state_keeps_digests_of_folders_where_there_are_very_many_images(many: Path) -> None:
    def facts() -> dict[str, object]:
        some = (Backbone("vit_tiny_patch16_224"), LoRAConfig(), TrainConfig(), Split(), Loading())
        return run._facts(read_data(many), *some)

    with patch.object(run, "MOST_NAMED", 1999):
        before = facts()
        assert len(before["data"][FILES]) == 20  # type: ignore[index]
        check_same_run(Path("state"), before, facts())
        file = many / "class_007" / "image_0000007.jpg"
        content = file.read_bytes()
        file.write_bytes(b"y" * len(content))
        with pytest.raises(VisgraftError, match="the folder of images class_007/ had another content"):
            check_same_run(Path("state"), before, facts())
        file.write_bytes(content)
    assert len(facts()["data"][FILES]) == 2000  # type: ignore[index]
