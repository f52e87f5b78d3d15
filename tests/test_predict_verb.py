"""The verb `predict`: which images it finds, and results that are written whole or not at all."""

# ruff: noqa: F401, F811  (fixtures are imported here, and then named as arguments)

import csv
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from predicting import adapters, content, make, pictures, refused, rows_of, run

from visgraft import load, predict
from visgraft.adapters.directory import TENSORS
from visgraft.cli import predict_output as verb
from visgraft.serve.layout import TableLayout
from visgraft.serve.prediction import Prediction
from visgraft.serve.tables import csv_table


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
        from pyarrow import parquet

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


def test_a_csv_gives_every_name_back_whatever_it_holds(tmp_path: Path) -> None:
    picture, first, second = tmp_path / 'a, "b".png', 'rust, "deep"', "two\nlines; a\\b"
    with csv_table(tmp_path / "t.csv", TableLayout(2)) as write:
        write(Prediction(picture, "shop, north", [(first, 0.75), (second, 0.25)]))
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        _, row = csv.reader(file)
    assert row == [str(picture), "shop, north", first, "0.75", second, "0.25"]


def test_a_large_parquet_file_is_written_in_parts(
    adapters: dict[str, Path], pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow import parquet

    monkeypatch.setattr("visgraft.serve.tables.ROWS_AT_ONCE", 4)
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


# Folders of adapters, and tables that say which adapter answers which image


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def zoo(tmp_path: Path, adapters: dict[str, Path]) -> Path:
    for name in ("alore", "lora", "full"):
        shutil.copytree(adapters[name], tmp_path / "zoo" / ("sub/lora" if name == "lora" else name))
    return tmp_path / "zoo"


def test_a_folder_of_adapters_answers_every_image(zoo: Path, adapters: dict[str, Path], pictures: list[Path]) -> None:
    found = rows_of("--adapters", zoo, *pictures[:2], "--top", 3)
    assert [row["adapter"] for row in found] == ["alore", "full", "sub/lora"] * 2
    for row in found:
        (alone,) = rows_of(adapters[row["adapter"].split("/")[-1]], row["image"], "--top", 3)
        expected = {one["class"]: one["probability"] for one in alone["classes"]}
        assert {one["class"]: one["probability"] for one in row["classes"]} == pytest.approx(expected, abs=1e-6)
    both = rows_of(adapters["sct"], pictures[0], "--adapters", zoo)
    assert [row["adapter"] for row in both] == [str(adapters["sct"]), "alore", "full", "sub/lora"]
    assert "nowhere is no folder" in refused("--adapters", zoo / "nowhere", pictures[0])
    assert "no images are given" in refused("--adapters", zoo, adapters["sct"])


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_a_table_names_an_adapter_for_each_image(
    ending: str, zoo: Path, adapters: dict[str, Path], pictures: list[Path], tmp_path: Path
) -> None:
    work = tmp_path / f"work.{ending}"
    named = [(str(pictures[0]), "sub/lora"), ("near.png", "alore"), (str(pictures[1]), "sub/lora")]
    (tmp_path / "near.png").write_bytes(pictures[2].read_bytes())
    if ending == "parquet":
        import pyarrow
        from pyarrow import parquet

        columns = {"adapter": [b for _, b in named], "more": [1, 2, 3], "Image": [a for a, _ in named]}
        parquet.write_table(pyarrow.table(columns), work)
    else:
        comma = "," if ending == "csv" else "\t"
        table(work, comma.join(["adapter", "more", "Image"]), *(comma.join([b, "1", a]) for a, b in named))
    found = rows_of("--adapters", zoo, work, "--top", 3)
    assert [row["adapter"] for row in found] == [name for _, name in named]
    assert [Path(row["image"]) for row in found] == [pictures[0], tmp_path / "near.png", pictures[1]]
    for row in found:
        (alone,) = rows_of(adapters[row["adapter"].split("/")[-1]], row["image"], "--top", 3)
        expected = {one["class"]: one["probability"] for one in alone["classes"]}
        assert {one["class"]: one["probability"] for one in row["classes"]} == pytest.approx(expected, abs=1e-6)
    code, out, _ = run("--adapters", zoo, work, "--out", tmp_path / "t.csv")
    assert code == 0 and "t.csv: 3 images, each with its own of 2 adapters, " in out
    (tmp_path / "near.png").write_bytes(b"")
    assert "near.png" in refused("--adapters", zoo, work)
    code, out, err = run("--adapters", zoo, work, "--skip-broken")
    assert code == 0 and len(out.splitlines()) == 2 and "left out 1 images" in err


def test_a_table_may_give_the_adapters_paths_or_none(zoo: Path, pictures: list[Path], tmp_path: Path) -> None:
    work = table(tmp_path / "work.csv", "image_path;adapter", f"{pictures[0]};zoo/full")
    assert [row["adapter"] for row in rows_of(work)] == ["zoo/full"]
    work = table(tmp_path / "list.csv", "image", *map(str, pictures[:3]))
    found = rows_of(zoo / "full", work)
    assert [Path(row["image"]) for row in found] == pictures[:3]
    assert len(rows_of(zoo / "full", work, pictures[5])) == 4
    assert "no adapter is given; name one, or add a column adapter to" in refused(work)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("image,adapter", "a.png,alor"), "line 2: adapter alor is none of the 3 given; did you mean alore"),
        (("image,adapter", "a.png,alore", "b.png,"), "line 3 names no adapter"),
        (("image,adapter", ",alore"), "line 2 names no image"),
        (("image,adapter", "a.png"), "line 2 has 1 fields, but the header 2"),
        (("picture,adapter", "a.png,alore"), "has no column image (or image_path); its columns are picture, adapter"),
        (("image,image_path", "a.png,b.png"), "has two columns for image"),
        (("image,adapter",), "has no rows below its header"),
        (("",), "its columns are none"),
        (("image,adapter", 'a.png,"alore'), "repair the quotes"),
        (("image,adapter", "a.png,full"), "a.png is not a readable image (No such file"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(lines: tuple[str, ...], words: str, zoo: Path, tmp_path: Path) -> None:
    assert words in refused("--adapters", zoo, table(tmp_path / "work.csv", *lines))


def test_what_does_not_go_with_a_table_is_refused(zoo: Path, pictures: list[Path], tmp_path: Path) -> None:
    work = table(tmp_path / "work.csv", "image,adapter", f"{pictures[0]},full")
    assert "there is no ensemble" in refused("--adapters", zoo, work, "--ensemble")
    assert "no other images can be given beside it" in refused("--adapters", zoo, work, pictures[0])
    assert "is not an adapter" in refused(table(tmp_path / "w.csv", "image,adapter", f"{pictures[0]},zoo"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    assert "bad.parquet" in refused("--adapters", zoo, tmp_path / "bad.parquet")


def test_parquet_files_whose_columns_are_no_text_or_damaged(
    adapters: dict[str, Path], pictures: list[Path], tmp_path: Path
) -> None:
    import pyarrow
    from pyarrow import parquet

    work, names = tmp_path / "work.parquet", pyarrow.array([str(picture) for picture in pictures[:2]])
    for column in (names, names.cast(pyarrow.binary()), names.dictionary_encode()):
        parquet.write_table(pyarrow.table({"image": column}), work)
        assert [row["image"] for row in rows_of(adapters["linear"], work)] == names.to_pylist()
    nested = pyarrow.array([{"bytes": b"\x89PNG\r\n", "path": "a.png"}])
    parquet.write_table(pyarrow.table({"image": nested}), work)
    assert "column image is of type struct<bytes: binary, path: string>, which is no text" in refused(
        adapters["linear"], work
    )
    many = pyarrow.table({"image": [f"{number}.png" for number in range(5000)]})
    parquet.write_table(many, work, use_dictionary=False, compression="snappy")
    content = bytearray(work.read_bytes())
    content[200:400] = b"\xff" * 200
    work.write_bytes(content)
    assert "work.parquet is no readable .parquet file (Corrupt" in refused(adapters["linear"], work)


def test_a_table_that_is_read_is_not_written_over(
    adapters: dict[str, Path], pictures: list[Path], tmp_path: Path
) -> None:
    work = tmp_path / "work.csv"
    work.write_text(f"image,adapter\n{pictures[0]},{adapters['linear']}\n")
    (tmp_path / "link.csv").symlink_to(work)
    before = work.read_text()
    for out in (work, tmp_path / "link.csv"):
        assert "would be overwritten; give the answers another name" in refused(work, "--out", out)
    assert work.read_text() == before
    assert run(work, "--out", tmp_path / "answers.csv")[0] == 0
