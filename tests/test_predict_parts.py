"""`predict` in parts: killed, shared between shards and processes, or on a cluster, every image is answered once."""

# ruff: noqa: F401, F811  (fixtures are imported here, and then named as arguments)

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from predicting import adapters, content, make, pictures, refused, run

import visgraft

Rows = list[dict[str, Any]]


def rows_in(place: Path) -> Rows:
    """The rows of a table, or of all parts in their order."""
    import pyarrow.parquet

    files = sorted(place.glob("*.parquet")) if place.is_dir() else [place]
    return [row for file in files for row in pyarrow.parquet.ParquetFile(file).read().to_pylist()]


def same(parts: Rows, whole: Rows) -> None:
    """Parts hold the rows of a table in its order; probabilities may round as other batches do."""
    assert [row["image"] for row in parts] == [row["image"] for row in whole]
    for row, other in zip(parts, whole, strict=True):
        assert row.pop("error") is None
        assert row == pytest.approx(other, abs=1e-6)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, pictures: list[Path]) -> Path:
    """Forty pictures, of ten kinds, in two folders."""
    root = tmp_path_factory.mktemp("many")
    for number in range(40):
        folder = root / ("b" if number % 3 else "a")
        folder.mkdir(exist_ok=True)
        os.link(pictures[number % 10], folder / f"{number:03}.png")
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, adapters: dict[str, Path], many: Path) -> Path:
    out = tmp_path_factory.mktemp("whole") / "x.parquet"
    assert run(adapters["linear"], adapters["alore"], many, "--top", 2, "--out", out)[0] == 0
    return out


@pytest.fixture
def given(adapters: dict[str, Path], many: Path, tmp_path: Path) -> list[Any]:
    out = tmp_path / "answers"
    return [adapters["linear"], adapters["alore"], many, "--top", 2, "--part-size", 6, "--out", out]


def test_parts_hold_what_one_table_holds(given: list[Any], whole: Path) -> None:
    out = given[-1]
    code, printed, err = run(*given)
    assert code == 0 and err == ""
    assert printed.startswith(f"{out}: all 7 parts are there, 40 images × 2 adapters; 7 written now, ")
    assert sorted(content(out)) == ["_predict.json", *(f"part-{number:06}.parquet" for number in range(7))]
    same(rows_in(out), rows_in(whole))
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(out).num_rows == 80, "the folder is one table to whoever reads such folders"
    before = content(out)
    code, printed, _ = run(*given, "--json")
    assert code == 0 and content(out) == before
    told = json.loads(printed)
    assert (told["written"], told["missing"], told["parts"], told["images"], told["broken"]) == (0, 0, 7, 40, 0)


def test_what_a_killed_run_has_left_is_finished_by_the_next(given: list[Any], whole: Path) -> None:
    """The process is killed as soon as there is a part; some more may follow, but never half of one."""
    out = given[-1]
    given = [*given, "--part-size", 2]
    command = [sys.executable, "-m", "visgraft", "predict", *map(str, given), "--batch-size", "1"]
    process = subprocess.Popen(command)
    try:
        while not list(out.glob("part-*.parquet")) and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = {name: data for name, data in content(out).items() if name.startswith("part-")}
    assert process.returncode == -signal.SIGKILL and 0 < len(left) < 20
    (out / ".part-000019.parquet.killed").write_bytes(b"half of one")
    code, printed, _ = run(*given)
    assert code == 0 and f"all 20 parts are there, 40 images × 2 adapters; {20 - len(left)} written now" in printed
    assert left.items() <= content(out).items() and len(content(out)) == 21
    same(rows_in(out), rows_in(whole))


def test_shards_share_the_parts(given: list[Any], whole: Path) -> None:
    out = given[-1]
    for number, written, missing in ((3, [2, 5], 5), (2, [1, 4], 3), (1, [0, 3, 6], 0)):
        before = set(out.glob("part-*"))
        told = json.loads(run(*given, "--shard", f"{number}/3", "--json")[1])
        assert (told["written"], told["missing"]) == (len(written), missing)
        assert sorted(int(path.stem[5:]) for path in set(out.glob("part-*")) - before) == written
    same(rows_in(out), rows_in(whole))


@pytest.mark.long
def test_shards_run_at_once(given: list[Any], whole: Path) -> None:
    words = [sys.executable, "-m", "visgraft", "predict", *map(str, given), "--json", "--shard"]
    processes = [subprocess.Popen([*words, f"{number}/2"], stdout=subprocess.PIPE) for number in (1, 2)]
    told = [json.loads(process.communicate()[0]) for process in processes]
    assert [one["written"] for one in told] == [4, 3] and min(one["missing"] for one in told) == 0
    same(rows_in(given[-1]), rows_in(whole))


def test_processes_write_the_same(given: list[Any], whole: Path) -> None:
    code, printed, err = run(*given, "--workers", 2)
    assert code == 0 and "all 7 parts are there" in printed, err
    same(rows_in(given[-1]), rows_in(whole))


def test_a_cluster_writes_the_same(given: list[Any], whole: Path, cluster: Any) -> None:
    code, printed, err = run(*given, "--on", "ray")
    assert code == 0 and "all 7 parts are there" in printed, err
    same(rows_in(given[-1]), rows_in(whole))


def test_a_cluster_elsewhere_writes_the_same(given: list[Any], whole: Path, cluster: Any) -> None:
    words = [sys.executable, "-m", "visgraft", "predict", *map(str, given), "--on", cluster.client_address]
    env = {**os.environ, "PYTHONPATH": str(Path(visgraft.__file__).parents[1])}
    del env["RAY_ADDRESS"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "all 7 parts are there" in done.stdout, done.stderr
    same(rows_in(given[-1]), rows_in(whole))


def test_another_runs_folder_is_refused(
    given: list[Any], adapters: dict[str, Path], many: Path, tmp_path: Path
) -> None:
    linear, alore, _, *options = given
    out = given[-1]
    assert run(*given, "--shard", "1/7")[0] == 0
    before = content(out)
    names = sorted(map(str, many.rglob("*.png")))

    def says(words: str, *other: Any, stdin: str = "") -> None:
        line = refused(*other, stdin=stdin)
        assert f"{out} holds another run: {words}; give the options of that run, or another --out" in line
        assert content(out) == before

    says("its adapters are others", linear, many, *options)
    says("its adapters are others", linear, adapters["sct"], many, *options)
    says("--top was 2, and is 1 now", linear, alore, many, "--top", 1, *options[2:])
    says("--part-size was 6, and is 5 now", *given, "--part-size", 5)
    says("--background was not given, and is red now", *given, "--background", "red")
    says("it is of 40 images, and 39 are given now", linear, alore, "-", *options, stdin="\n".join(names[1:]))
    swapped = [names[1], names[0], *names[2:]]
    says("its images are others, or in another order", linear, alore, "-", *options, stdin="\n".join(swapped))
    shutil.copytree(alore, tmp_path / "alore")
    other = [linear, tmp_path / "alore", "-", *options[:-1], tmp_path / "other"]
    assert run(*other, "--shard", "1/7", stdin="\n".join(names))[0] == 0
    shutil.rmtree(tmp_path / "alore")
    make(tmp_path / "alore", "alore", seed=77)
    assert "alore has changed since; give the options" in refused(*other, stdin="\n".join(names))
    code, printed, _ = run(linear, alore, "-", *options, "--batch-size", 3, "--skip-broken", stdin="\n".join(names))
    assert code == 0 and "6 written now" in printed  # how it is computed makes no other run


def test_broken_images_are_told_of(adapters: dict[str, Path], pictures: list[Path], tmp_path: Path) -> None:
    names = [str(picture) for picture in pictures]
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    listed, out = tmp_path / "list.parquet", tmp_path / "answers"
    import pyarrow.parquet

    images = [*names[:5], str(bad), str(bad), names[5], str(tmp_path / "lost.png")]
    pyarrow.parquet.write_table(pyarrow.table({"image": images}), listed)
    given = [adapters["linear"], adapters["lora"], listed, "--out", out, "--part-size", 4]
    line = refused(*given)
    assert "part 1: " in line and "is not a readable image" in line and "with --skip-broken" in line
    assert "the parts that are written stay, and the same command goes on" in line
    assert sorted(content(out)) == ["_predict.json", "part-000000.parquet"]
    code, printed, err = run(*given, "--skip-broken")
    assert code == 0 and "all 3 parts are there, 9 images × 2 adapters; 2 written now" in printed
    assert "3 images are broken (their rows say why), the first of them:" in err and "lost.png" in err
    rows = rows_in(out)
    assert [row["image"] for row in rows] == [name for name in images for _ in range(2)]
    assert [row["adapter"] for row in rows] == [str(adapters["linear"]), str(adapters["lora"])] * 9
    broken = [row["error"] is not None for row in rows[::2]]
    assert broken == [False] * 5 + [True, True, False, True]
    assert all((row["class"] is None) is (row["error"] is not None) for row in rows)
    told = json.loads(run(*given, "--json")[1])
    assert told["broken"] == 3 and len(told["first_broken"]) == 2


def test_each_image_with_its_own_adapter(adapters: dict[str, Path], pictures: list[Path], tmp_path: Path) -> None:
    work, bad = tmp_path / "work.csv", tmp_path / "bad.png"
    bad.write_bytes(b"")
    lines = [f"{picture},{('lora', 'alore')[number % 2]}" for number, picture in enumerate(pictures)]
    work.write_text("\n".join(["image,adapter", *lines]) + "\n")
    zoo = adapters["lora"].parent
    assert run("--adapters", zoo, work, "--out", tmp_path / "x.parquet")[0] == 0
    code, printed, err = run("--adapters", zoo, work, "--out", tmp_path / "parts", "--part-size", 3)
    assert code == 0 and "10 images, each with its own of 2 adapters; 4 written now" in printed, err
    same(rows_in(tmp_path / "parts"), rows_in(tmp_path / "x.parquet"))
    work.write_text(f"image,adapter\n{bad},lora\n{pictures[0]},alore\n")
    code, _, err = run("--adapters", zoo, work, "--out", tmp_path / "broken", "--skip-broken")
    assert code == 0 and "1 images are broken" in err
    assert [row["adapter"] for row in rows_in(tmp_path / "broken")] == ["lora", "alore"]
    assert "there is no ensemble" in refused("--adapters", zoo, work, "--out", tmp_path / "e", "--ensemble")


def test_an_ensemble_in_parts(adapters: dict[str, Path], many: Path, tmp_path: Path) -> None:
    given = [adapters["linear"], adapters["alore"], many, "--ensemble", "--out"]
    assert run(*given, tmp_path / "x.parquet")[0] == run(*given, tmp_path / "parts", "--part-size", 9)[0] == 0
    same(rows_in(tmp_path / "parts"), rows_in(tmp_path / "x.parquet"))


# Images at URLs


@pytest.fixture(scope="module")
def elsewhere(pictures: list[Path]) -> str:
    """A folder in a file system of fsspec's in this process."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for place in ("b/2.png", "b/1.PNG", "a.png", ".hidden/x.png", "b/note.txt"):
        memory.pipe_file(f"/photos/{place}", pictures[0].read_bytes())
    memory.pipe_file("/photos/c d/broken.png", b"no image")
    return "memory://photos"


def test_images_at_urls(
    adapters: dict[str, Path],
    pictures: list[Path],
    elsewhere: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "visgraft")
    linear, out = adapters["linear"], tmp_path / "answers"
    expected = [f"{elsewhere}/{name}" for name in ("a.png", "b/1.PNG", "b/2.png", "c d/broken.png")]
    assert run(linear, elsewhere, "--out", out, "--skip-broken", "--part-size", 3)[0] == 0
    assert "memory://photos: passed over 1 file whose name is no image's: 1 .txt" in caplog.text
    assert [row["image"] for row in rows_in(out)] == expected
    (alone,) = [row for row in rows_in(out) if row["error"]]
    assert alone["image"] == expected[3] and "c d/broken.png is not a readable image" in alone["error"]
    folder = f"file://{pictures[0].parent}"
    work = tmp_path / "list.csv"
    work.write_text("\n".join(["image", expected[0], f"{folder}/00.png", str(pictures[0])]) + "\n")
    rows = json.loads(run(linear, work, "--json")[1])
    assert [row["image"] for row in rows] == [expected[0], f"{folder}/00.png", str(pictures[0])]
    assert rows[0]["classes"] == rows[1]["classes"] == rows[2]["classes"]
    found = json.loads(run(linear, folder, "--json")[1])
    assert [row["image"] for row in found] == [f"{folder}/{picture.name}" for picture in pictures]
    streamed = json.loads(run(linear, "-", "--json", stdin=f"{expected[0]}\n")[1])
    assert [row["image"] for row in streamed] == expected[:1]


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (
            "memory://photos/lost.png",
            "memory://photos/lost.png cannot be read (No such file or folder); check the addr",
        ),
        ("memory://photos/c d", "c d/broken.png is not a readable image (its content is of no known image format)"),
        (
            "memory://photos/list.csv",
            "list.csv is a table, which is read from a file of this machine only; download it",
        ),
        ("nonsense://x/a.png", "nonsense://x/a.png cannot be opened (Protocol not known: nonsense); check what stands"),
        ("s3://bucket/a.png", "s3://bucket/a.png needs one more package to be read; run pip install s3fs"),
    ],
)
def test_urls_that_cannot_be_read_are_one_line(
    place: str, says: str, adapters: dict[str, Path], elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert says in refused(adapters["linear"], place)


def test_a_missing_package_is_no_broken_image(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, with --skip-broken, a million images would be called broken."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    stdin = "s3://bucket/a.png\ns3://bucket/b.png\n"
    line = refused(adapters["linear"], "-", "--skip-broken", "--out", tmp_path / "answers", stdin=stdin)
    assert "run pip install s3fs" in line and sorted(content(tmp_path / "answers")) == ["_predict.json"]


# What a user may get wrong


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--shard", "0/3"], "--shard is '0/3', but must be NUMBER/ALL with a number from 1 to ALL, such as 3/16"),
        (["--shard", "4/3"], "--shard is '4/3', but must be NUMBER/ALL"),
        (["--shard", "x"], "--shard is 'x', but must be NUMBER/ALL"),
        (["--shard", "1/3", "--out", "{TMP}/t.csv"], "--shard is for answers in parts; give a folder: --out FOLDER"),
        (["--part-size", "3", "--out", "{TMP}/t.parquet"], "--part-size is for answers in parts"),
        (["--workers", "3", "--out", "{TMP}/t.parquet"], "--workers is for answers in parts"),
        (["--out", "{TMP}/file"], "file exists and is not an earlier result (_predict.json is missing)"),
        (["--out", "{TMP}/full"], "full exists and is not an earlier result (_predict.json is missing)"),
        (["--out", "{TMP}/damaged"], "_predict.json is damaged"),
        (["--out", "{TMP}/t.tsv"], "must be a file that ends in .csv or .parquet, or a folder for parts"),
        (["--out", "/proc/answers"], "/proc/answers cannot be written"),
        (["--on", "rya"], "--on is 'rya', but must be here, processes, ray or ray://HOST:PORT; did you mean ray?"),
        (["--on", "here", "--workers", "2"], "--workers 2 has no effect with --on here"),
        (["--gpus-per-worker", "0.5"], "--gpus-per-worker has an effect with --on ray only"),
        (["--on", "ray", "--cpus-per-worker", "0"], "--cpus-per-worker is 0, but must be 1 or more"),
        (["--background", "no-colour"], "no-colour"),
        (["--threshold", "0.3"], "threshold is for adapters of images with several classes, and none is"),
        (["--ensemble"], "an ensemble needs two adapters or more"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], says: str, adapters: dict[str, Path], pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for name in ("full", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    (tmp_path / "damaged" / "_predict.json").write_text("{")
    options = [option.format(TMP=tmp_path) for option in options]
    out = [] if "--out" in options else ["--out", tmp_path / "answers"]
    assert says in refused(adapters["linear"], pictures[0], *options, *out)
    assert not list((tmp_path / "answers").glob("part-*"))


def test_any_name_and_standard_input_with_shards(
    adapters: dict[str, Path], pictures: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "all kinds"
    folder.mkdir()
    named = [b"a b.png", b"a\nb.png", b"caf\xe9.png", b"it's.png", b"-x.png", "円.png".encode()]
    for name in named:
        (folder / os.fsdecode(name)).write_bytes(pictures[0].read_bytes())
    out = tmp_path / "answers"
    assert run(adapters["linear"], folder, "--out", out, "--part-size", 2)[0] == 0
    expected = [
        f"{folder}/{name.decode('utf-8', 'backslashreplace')}".replace("\\xe9", "\\udce9") for name in sorted(named)
    ]
    assert [row["image"] for row in rows_in(out)] == expected
    stdin = "\n".join(map(str, pictures))
    given = [adapters["linear"], "-", "--out", tmp_path / "streamed", "--part-size", 3]
    for number in (1, 2):
        assert run(*given, "--shard", f"{number}/2", stdin=stdin)[0] == 0
    assert [row["image"] for row in rows_in(tmp_path / "streamed")] == list(map(str, pictures))
    assert "standard input names no image" in refused(*given[:3], tmp_path / "none")


def test_a_process_that_runs_out_of_memory_is_told_of(given: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that is gone is written by the same command; here its process ends before it has begun."""
    monkeypatch.setattr("visgraft.serve.parts.answer_part", _leave)
    line = refused(*given, "--on", "processes")
    assert re.search(r"part 0: the process ended with code 9; if memory ran out, lower --workers or the batch", line)


def _leave(*_: Any) -> None:
    os._exit(9)
