"""`visgraft bench` from the command line: run, go on, check, read; one line for a mistake."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_cli import run, succeed

COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (210, 40, 50)}
SMALL = ["--backbone", "test_vit", "--weights", "none", "--image-size", "32", "--precision", "fp32"]


def draw(root: Path, part: str, count: int, factor: float = 1.0) -> None:
    """Draw noisy pictures of three colours into ROOT/PART/CLASS."""
    noise = np.random.default_rng(len(part))
    for name, colour in COLOURS.items():
        folder = root / part / name
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = noise.normal(np.array(colour) * factor, 60, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in three parts, and beside it a darker one of two of its classes."""
    root = tmp_path_factory.mktemp("data")
    for part, count in (("train", 6), ("val", 3), ("test", 4)):
        draw(root / "photos", part, count)
    draw(root, "dark", 3, 0.4)
    for file in (root / "dark" / "green").iterdir():
        file.unlink()
    (root / "dark" / "green").rmdir()
    return root / "photos"


def command(photos: Path, out: Path, *more: object) -> list[object]:
    """The arguments of a small benchmark."""
    shared: list[object] = ["bench", "run", "folder", "--root", photos, "--out", out, "--methods", "linear,sct"]
    return [*shared, "--set", "epochs=2", "--workers", 0, *SMALL, *more]


@pytest.fixture(scope="module")
def results(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two methods with a shifted test set."""
    out = tmp_path_factory.mktemp("results")
    shifted = f"dark={photos.parent / 'dark'}"
    found = succeed(*command(photos, out, "--recipe", "default", "--seeds", 2, "--shifted", shifted))
    assert found["left"] == 0 and found["trials"] == 4 and not found["failed"]
    return out


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in out.glob("*.jsonl") for line in file.read_text().splitlines()]


def test_every_training_is_a_line_and_none_is_run_twice(photos: Path, results: Path) -> None:
    before = lines(results)
    assert [line["trial"]["method"] for line in before] == ["linear", "linear", "sct", "sct"]
    assert {line["trial"]["train"]["epochs"] for line in before} == {2}
    dark = before[0]["measured"]["dark"]
    assert dark["images"] == 6 and dark["restricted_to"] == 2 and dark["per_class"][1] is None
    shifted = f"dark={photos.parent / 'dark'}"
    again = succeed(*command(photos, results, "--recipe", "default", "--seeds", 2, "--shifted", shifted))
    assert again["left"] == 0 and lines(results) == before


def test_shots_make_one_task_each(photos: Path, tmp_path: Path) -> None:
    succeed(*command(photos, tmp_path, "--recipe", "default", "--shots", "1,2", "--methods", "linear"))
    found = lines(tmp_path)
    assert [line["trial"]["shots"] for line in found] == [1, 2]
    assert [line["images"]["learned"] for line in found] == [3, 6]


def test_people_are_told_of_every_result_and_of_what_is_left(photos: Path, tmp_path: Path) -> None:
    code, out, err = run(*command(photos, tmp_path, "--methods", "linear", "--trials", 2))
    assert code == 0
    told = [line for line in err.splitlines() if " seed 0 " in line]
    assert [line.split("; ")[1].split(",")[0] for line in told] == ["2 left", "1 left", "0 left"]
    assert "3 of 3 trials are done" in out and "visgraft bench table" in out


def test_a_dry_run_says_what_there_is_to_do_and_does_nothing(photos: Path, tmp_path: Path) -> None:
    found = succeed(*command(photos, tmp_path / "out", "--dry-run", "--seeds", 3))
    assert [(row["method"], row["tune"], row["final"]) for row in found] == [("linear", 4, 3), ("sct", 4, 3)]
    assert not (tmp_path / "out").exists()


def test_table_and_plot_read_what_run_wrote(results: Path, tmp_path: Path) -> None:
    code, out, err = run("bench", "table", results)
    assert code == 0, err
    assert "| linear" in out and "| sct" in out and "dark" in out
    code, out, err = run("bench", "table", results, "--format", "csv", "--out", tmp_path / "table.csv")
    assert code == 0 and (tmp_path / "table.csv").read_text().count("\n") > 4
    files = succeed("bench", "plot", results, "--out", tmp_path / "plots")
    assert files and all(Path(file).is_file() for file in files)


def test_check_names_what_is_wrong(tmp_path: Path) -> None:
    code, out, err = run("bench", "check", "vtab-1k", "--root", tmp_path, "--tasks", "svhn,dtd")
    assert code == 1 and "2 of 2 tasks of vtab-1k" in err and len(err.splitlines()) == 1
    assert "svhn" in out and "train800val200" in out


def test_protocols_are_listed() -> None:
    names = {row["protocol"] for row in succeed("bench", "list")}
    assert names == {"offline", "offline-few-shot", "vtab-1k", "fgvc", "few-shot", "domain-generalisation"}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--recipe", "test"], "recipe is 'test', but must be one of validated, default"),
        (["--recipe", "sct-paper", "--methods", "sct"], "recipe sct-paper has no settings for folder"),
        (["--set", "lr"], "--set is 'lr', but must be OPTION=VALUE"),
        (["--set", "sct.lr=fast"], "--lr is 'fast', but must be a number"),
        (["--set", "lora.rank=4"], "names 'lora', which is not among the methods"),
        (["--set", "rank=4"], "training has no option 'rank'"),
        (["--set", "linear.rank=4"], "linear has no option 'rank'; it has none of its own, and those of training"),
        (["--set", "select=val"], "keeps the epoch that is best on the images it is measured on"),
        (["--normalisation", "imagenett"], "--normalisation is 'imagenett', but must be one of model, imagenet, half"),
        (["--tasks", "photo"], "has no task 'photo'"),
        (["--methods", "linaer"], "linaer"),
        (["--shots", "one"], "--shots is 'one', but must be whole numbers"),
        (["--shifted", "dark"], "--shifted is 'dark', but must be NAME=FOLDER"),
        (["--trials", "1"], "trials is 1, which leaves no choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_before_anything_is_trained(
    more: list[str], says: str, photos: Path, tmp_path: Path
) -> None:
    code, _, err = run(*command(photos, tmp_path / "out", *more))
    assert code in (1, 2) and says in err and err.count("\n") == 1 + err.count("warning:"), err
    assert not (tmp_path / "out").exists()


def test_a_protocol_that_needs_a_folder_says_so(tmp_path: Path) -> None:
    for name, says in (("vtab-1k", "pass --root"), ("vtab1k", "did you mean vtab-1k"), ("folder", "pass --root")):
        code, _, err = run("bench", "run", name, "--out", tmp_path / "out")
        assert code == 1 and says in err


def test_what_no_trial_could_use_is_said_once_before_any_starts(photos: Path, tmp_path: Path) -> None:
    code, _, err = run(*command(photos, tmp_path / "out", "--image-size", "33", "--backbone", "test_vit"))
    assert code == 1 and "image size 33 is not a multiple of the patch size 16" in err and "trial" not in err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_sweep_says_how_to_go_on(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("visgraft.bench.sweep.run_trial", stop)
    code, _, err = run(*command(photos, tmp_path / "out"))
    assert code == 130 and "give the same command to go on" in err


def test_table_and_plot_can_be_of_some_methods_and_tasks(results: Path, tmp_path: Path) -> None:
    code, out, _ = run("bench", "table", results, "--methods", "sct", "--tasks", "photos")
    assert code == 0 and "| sct" in out and "| linear" not in out
    for more, says in ((("--methods", "alroe"), "no results of 'alroe' (--methods)"), (("--tasks", "x"), "--tasks")):
        code, _, err = run("bench", "plot", results, *more, "--out", tmp_path / "plots")
        assert code == 1 and says in err and not (tmp_path / "plots").exists()


def test_a_wrong_name_does_not_wait_for_images_to_be_drawn(tmp_path: Path) -> None:
    for more in (("--methods", "alroe"), ("--tasks", "locaton"), ("--recipe", "sct-paper", "--methods", "sct")):
        code, _, err = run("bench", "run", "offline", "--root", tmp_path / "images", *more)
        assert code == 1 and not (tmp_path / "images").exists(), err
