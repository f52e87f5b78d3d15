"""An image is what its file holds, whatever size and time say."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import SMALL, draw, run

from visgraft import Split, load_images, read_data
from visgraft.data.identity import content_digests
from visgraft.training.resume import state_file

CONFIG = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop_pct": 1.0}


def swap(file: Path, colour: tuple[int, int, int]) -> None:
    """Replace an image by another one of the very same size and time, as unpacking an archive does."""
    before = file.stat()
    Image.new("RGB", Image.open(file).size, colour).save(file)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    for name in "ab":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), (10 * i, 200, 30)).save(tmp_path / "photos" / name / f"{i}.bmp")
    return tmp_path / "photos"


def test_the_disk_cache_sees_a_file_replaced_by_one_of_equal_size_and_time(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISGRAFT_CACHE", str(tmp_path / "cache"))
    dataset = read_data(plain, Split(0.0, 0.0))
    first = load_images(dataset.train, CONFIG, cache="disk").pixels[:].clone()
    with patch("visgraft.data.images.open_image", side_effect=AssertionError("decoded again")):
        again = load_images(dataset.train, CONFIG, cache="disk").pixels[:]
    assert torch.equal(first, again)
    swap(dataset.train[2].path, (1, 2, 3))
    new = load_images(dataset.train, CONFIG, cache="disk").pixels[:]
    assert torch.equal(new[2], torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1).expand(3, 16, 16))
    assert torch.equal(new[:2], first[:2]) and torch.equal(new[3:], first[3:])


def test_digests_are_of_the_content_and_unreadable_files_have_none(plain: Path) -> None:
    dataset = read_data(plain, Split(0.0, 0.0))
    found = content_digests(dataset.train)
    assert found[:4] == found[4:] and len(set(found)) == 4
    dataset.train[0].path.unlink()
    assert content_digests(dataset.train)[:2] == ["", found[1]]


def interrupted(data: Path, out: Path, backbone: Sequence[object] = SMALL) -> list[object]:
    """Begin a run and stop it after an epoch; returns the command."""
    options = ["--method", "lora", "--epochs", 200, "--precision", "fp32"]
    command: list[object] = ["train", data, "--out", out, *options, *backbone]

    def stop() -> None:
        while not state_file(out).exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)  # SIGINT may be ignored, as in jobs of a script

    with patch("visgraft.training.keeping.STATE_SECONDS", 0.0):
        threading.Thread(target=stop, daemon=True).start()
        code, _, err = run(*command)
    assert code == 130 and "give the same command with --resume to go on" in err, err
    return command


def test_resume_names_the_first_image_that_differs(tmp_path: Path) -> None:
    data, out = draw(tmp_path / "photos", 8), tmp_path / "out"
    command = interrupted(data, out)
    file = data / "green" / "03.png"
    before, facts = file.read_bytes(), file.stat()
    edited = bytearray(before)
    edited[-20] ^= 1  # a checksum at the end: the size stays
    file.write_bytes(bytes(edited))
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    code, _, err = run(*command, "--resume")
    assert code == 1 and f"the image {os.path.join('green', '03.png')} had another content" in err, err
    file.unlink()
    code, _, err = run(*command, "--resume")
    assert code == 1 and "the image green/03.png was there" in err, err
    file.write_bytes(before)
    shutil.copy(file, data / "green" / "99.png")
    code, _, err = run(*command, "--resume")
    assert code == 1 and "the image green/99.png was not there" in err, err
    (data / "green" / "99.png").unlink()
    moved = data.rename(tmp_path / "moved")
    command[1] = moved
    state = state_file(out).read_bytes()
    with patch("visgraft.training.run.read_state", side_effect=RuntimeError("reached")) as reached:
        with pytest.raises(RuntimeError, match="reached"):
            run(*command, "--resume")
        assert reached.called
    assert state_file(out).read_bytes() == state
    from visgraft.training.resume import check_same_run

    run_before = reached.call_args.args[1]
    old = {**run_before, "data": {name: value for name, value in run_before["data"].items() if name != "files"}}
    check_same_run(out, old, run_before)  # of a version that did not look into files


def test_an_image_that_is_not_there_is_left_out_where_that_was_asked_for(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rng = np.random.default_rng(0)
    pictures: list[object] = [Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(16)]
    pictures[5] = None
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 8}, features=features)
    rows.save_to_disk(tmp_path / "rows")
    for cache in ("ram", "disk"):
        options = ["--skip-broken", "--cache", cache, "--method", "linear", "--out", tmp_path / cache, *SMALL]
        assert run("train", f"hf:{tmp_path / 'rows'}", *options)[0] == 0
    assert "1 image cannot be read" in run("check", f"hf:{tmp_path / 'rows'}")[1]


def test_resume_sees_other_weights_and_any_spelling_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    from visgraft import Backbone, create_backbone

    def write(seed: int) -> Path:
        save_file(create_backbone(Backbone("test_vit", "none", 32, seed), 0).state_dict(), tmp_path / "w.safetensors")
        return tmp_path / "w.safetensors"

    data = draw(tmp_path / "photos", 8)
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in sorted(data.rglob("*.png"))]
    (tmp_path / "t.csv").write_text("\n".join(("image_path,label", *rows)))
    monkeypatch.chdir(tmp_path)
    command = interrupted(
        Path("t.csv"), tmp_path / "out", ["--backbone", "test_vit", "--image-size", 32, "--weights", write(0)]
    )
    command[1] = tmp_path / "t.csv"
    reached = patch("visgraft.training.run.create_backbone", side_effect=RuntimeError("went on"))
    with reached, pytest.raises(RuntimeError, match="went on"):
        run(*command, "--resume")
    write(1)
    code, _, err = run(*command, "--resume")
    assert code == 1 and "is of a run with weights_digest" in err
