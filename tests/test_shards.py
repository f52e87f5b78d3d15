"""WebDataset shards: written with tarfile, read from their places, from disk and from a server of this process."""

import contextlib
import functools
import http.server
import io
import json
import pickle
import tarfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

import pytest
from PIL import Image
from test_cli import SMALL, run

from visgraft import Dataset, Split, load_images, read_data
from visgraft.data.decode import open_image
from visgraft.data.identity import content_digests
from visgraft.errors import DataError

CONFIG = {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop_pct": 1.0}
ALL = Split(0, 0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISGRAFT_CACHE", str(tmp_path / "cache"))


def picture(red: int, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def pack(path: Path, members: Mapping[str, bytes], kind: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, kind) as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def samples(first: int, count: int, label: str = "cls") -> dict[str, bytes]:
    """Pictures whose red level is 10 times their number, of classes 10 and 9 in turn."""
    found: dict[str, bytes] = {}
    for number in range(first, first + count):
        name = 9 + (number + 1) % 2
        found[f"{number:04}.png"] = picture(10 * number)
        found[f"{number:04}.{label}"] = str(name).encode() if label == "cls" else json.dumps({"kind": name}).encode()
    return found


def reds(data: Dataset, part: str = "train") -> list[int]:
    return [open_image(example).getpixel((1, 1))[0] for example in getattr(data, part)]  # type: ignore[index]


def test_shards_are_read_in_any_order_and_by_other_processes(tmp_path: Path) -> None:
    for shard in range(2):
        pack(tmp_path / f"pets-{shard:02}.tar", samples(4 * shard, 4))
    data = read_data(f"wds:{tmp_path}/pets-{{00..01}}.tar", ALL)
    assert (data.classes, data.layout) == (("9", "10"), "flat")  # numbers, not texts
    assert reds(data) == [10, 30, 50, 70, 0, 20, 40, 60]
    assert data.train[5].path == tmp_path / "pets-00.tar" / "0002.png"
    assert pickle.loads(pickle.dumps(data.train))[2].content() == data.train[2].content()  # type: ignore[misc]
    images = load_images(data.train, CONFIG, cache="none")
    assert images.pixels[[7, 0]][:, 0, 0, 0].tolist() == [60, 10]
    assert len(set(content_digests(data.train))) == 8
    drawn = read_data(f"wds:{tmp_path}/pets-{{00..01}}.tar", Split(0.25, 0.25))
    assert [len(part) for part in (drawn.train, drawn.val, drawn.test)] == [4, 2, 2]
    assert drawn.fingerprint == data.fingerprint


def test_parts_follow_from_the_shards_names_and_labels_from_a_field_of_json(tmp_path: Path) -> None:
    for place, first in (("train-0", 0), ("train-1", 4), ("valid-0", 8), ("test-0", 10)):
        pack(tmp_path / f"{place}.tar", samples(first, 4 if "train" in place else 2, "json"))
    name = f"wds:{tmp_path}/{{train-{{0..1}},valid-0}}.tar::{tmp_path}/test-0.tar#kind"
    data = read_data(name, ALL)
    assert (data.layout, len(data.train), reds(data, "val"), reds(data, "test")) == ("split", 8, [90, 80], [110, 100])
    alone = read_data(f"wds:{tmp_path}/test-0.tar#kind", ALL, known=["10", "9"])
    assert [example.label for example in alone.test] == [0, 1]


def test_an_index_is_made_once_and_anew_for_a_changed_shard(tmp_path: Path) -> None:
    shard = pack(tmp_path / "a.tar", samples(0, 4))
    with patch("visgraft.data.shards.SETTLED", -1.0):
        first = read_data(f"wds:{shard}", ALL)
        with patch("visgraft.data.shards.index_shard", side_effect=AssertionError("indexed again")):
            again = read_data(f"wds:{shard}", ALL)
        assert (again.fingerprint, reds(again)) == (first.fingerprint, reds(first))
        pack(shard, samples(2, 4))
        assert reds(read_data(f"wds:{shard}", ALL)) == [30, 50, 20, 40]


def test_odd_names_are_read_and_hidden_ones_passed_over(tmp_path: Path) -> None:
    members = {
        "./日本 é.JPG": picture(10, "jpeg"), "./日本 é.cls": "猫\n".encode(), "._x.png": b"no", "__meta.json": b"no",
        f"{'long' * 60}/b.webp": picture(20, "webp"), f"{'long' * 60}/b.cls": b" dog ",
    }  # fmt: skip
    data = read_data(f"wds:{pack(tmp_path / 'odd.tar', members)}", ALL)
    assert (data.classes, len(data.train)) == (("dog", "猫"), 2)
    assert [abs(red - wanted) < 5 for red, wanted in zip(reds(data), (20, 10), strict=True)] == [True, True]


GOOD = {"0.png": picture(1), "0.cls": b"a", "1.png": picture(2), "1.cls": b"b"}


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"2.png": picture(3)}, ["sample 2 has no .cls and no .json among png", "add its label"]),
        ({"2.cls": b"a"}, ["sample 2 has no image among cls"]),
        ({"2.png": picture(3), "2.jpg": b"", "2.cls": b"a"}, ["sample 2 has 2 images (png, jpg); keep one"]),
        ({"2.png": picture(3), "2.cls": b""}, ["sample 2 has a .cls that is not one line of text"]),
        ({"2.png": picture(3), "2.json": b"{"}, ["sample 2 has a .json that is no JSON"]),
        ({"2.png": picture(3), "2.json": b'{"kind": 1}'}, ["field label of its .json (it has kind)", "behind #"]),
        ({"0.jpg": picture(3), "0.json": b'{"label": 1}'}, ["sample 0 is there twice", "side by side"]),
    ],
)
def test_samples_that_cannot_be_used_are_one_line(tmp_path: Path, more: dict[str, bytes], parts: list[str]) -> None:
    message(f"wds:{pack(tmp_path / 'a.tar', {**GOOD, **more})}", tmp_path / "a.tar", *parts)


def message(location: str, *parts: object, known: list[str] | None = None) -> None:
    with pytest.raises(DataError) as caught:
        read_data(location, ALL, known)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert str(part) in str(caught.value), f"{part!r} is not in {str(caught.value)!r}"


def test_shards_that_cannot_be_used_are_one_line(tmp_path: Path) -> None:
    shard = pack(tmp_path / "pets-0.tar", GOOD)
    content = shard.read_bytes()
    for length in (700, 1324, 2048):  # in a picture, in a header, and between two samples
        (tmp_path / "short.tar").write_bytes(content[:length])
        message(f"wds:{tmp_path}/short.tar", "short.tar is no whole tar file", "download or pack it anew")
    message(f"wds:{pack(tmp_path / 'zip.tar.gz', GOOD, 'w:gz')}", "no whole tar file", "without compression")
    message(f"wds:{pack(tmp_path / 'none.tar', {})}", "holds no samples")
    message(f"wds:{tmp_path}/pets-{{0..1}}.tar", "pets-1.tar does not exist", "did you mean pets-0.tar")
    message("wds:", "names no shards")
    message(f"wds:{shard}::{shard}", "names a shard twice")
    message("wds:pipe:cat a.tar", "of the kind pipe:, which is not read")
    message(f"wds:{shard}", "has classes that the adapter does not know: b", known=["a", "c"])
    message(f"wds:{pack(tmp_path / 'train-0.tar', GOOD)}::{shard}", "mixes shards of train with", "call all of them")
    message(f"wds:{pack(tmp_path / 'test-0.tar', GOOD)}", "has shards of test but none of train")


def test_a_shard_that_shrank_is_told_when_it_is_read(tmp_path: Path) -> None:
    shard = pack(tmp_path / "a.tar", GOOD)
    example = read_data(f"wds:{shard}", ALL).train[1]
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(DataError, match="has changed since it was read"):
        open_image(example)


class Quiet(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012  (of the server that the test starts)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_remote_shards_are_downloaded_once(tmp_path: Path) -> None:
    pack(tmp_path / "there" / "a.tar", samples(0, 4))
    with served(tmp_path / "there") as address:
        data = read_data(f"wds:{address}/a.tar", ALL)
        Quiet.asked.clear()
        assert reds(read_data(f"wds:{address}/a.tar", ALL)) == reds(data) == [10, 30, 0, 20]
        assert Quiet.asked == []
        message(f"wds:{address}/b.tar", "b.tar cannot be downloaded", "check the URL and the network")
        copy = next((tmp_path / "cache" / "downloads").rglob("a.tar"))
        copy.write_bytes(copy.read_bytes()[:512])
        assert reds(read_data(f"wds:{address}/a.tar", ALL)) == reds(data), "a damaged copy is made anew"
        assert Quiet.asked


def test_the_command_line_trains_on_shards(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", samples(0, 24))
    out = tmp_path / "out"
    code, _, err = run("train", f"wds:{tmp_path}/a.tar", "--out", out, "--method", "lora", "--epochs", 1, *SMALL)
    assert code == 0, err
    code, text, err = run("eval", out, f"wds:{tmp_path}/a.tar", "--json")
    assert code == 0, err
    assert json.loads(text)["images"] == 4
