"""Folders of images at an address: copied once, verified, and read as any folder."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from test_bench import PROTOCOL, draw_colours, request
from test_cli import SMALL, run

from visgraft.bench.plan import plan
from visgraft.bench.running import TrialSources, run_trial
from visgraft.bench.share import gpu_share
from visgraft.data import mirror as mirror_module
from visgraft.data.mirror import mirrored
from visgraft.data.read import read_data
from visgraft.errors import DataError, VisgraftError
from visgraft.executors.job import Job, Note, outcome


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task of small images, and an empty cache folder."""
    monkeypatch.setenv("VISGRAFT_CACHE", str(tmp_path / "cache"))
    return draw_colours(tmp_path / "some images")


def test_a_folder_is_copied_once_and_verified(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched, fetch = list[str](), mirror_module._fetch
    monkeypatch.setattr(mirror_module, "_fetch", lambda url, *rest: (fetched.append(url), fetch(url, *rest)))
    root, copy = mirrored(there.as_uri().replace("%20", " "), ["colours"])
    assert root.name == "some images" and sorted(p.name for p in (root / "colours").iterdir()) == [
        "dark", "test", "train", "val"
    ]  # fmt: skip
    assert copy.local("colours") == root and len(fetched) == 1
    mirrored(there.as_uri().replace("%20", " "), ["colours"])
    assert len(fetched) == 1, "nothing has changed"
    (there / "colours" / "train" / "0_0.png").write_bytes(b"another")
    assert copy.local("colours") == root and len(fetched) == 1, "what is here stays as it was while a command runs"
    shutil.rmtree(root.parent)
    with pytest.raises(DataError, match="holds other files in colours than when the command began; start it again"):
        copy.local("colours")


def test_a_copy_that_is_another_is_made_anew(there: Path) -> None:
    root, copy = mirrored(f"file://{there}")
    facts = next(root.parent.glob("*.json"))
    facts.write_text(facts.read_text().replace(next(iter(copy.digests.values())), "0" * 64))
    (root / "colours" / "train" / "0_0.png").unlink()
    assert copy.local() == root and (root / "colours" / "train" / "0_0.png").is_file()


def test_a_changed_folder_is_copied_anew_and_leftovers_and_damage_do_no_harm(there: Path) -> None:
    root, copy = mirrored(f"file://{there}")
    left = root.parent / ".copy.killed"
    left.mkdir()
    facts = next(root.parent.glob("*.json"))
    facts.write_text("{")
    assert mirrored(f"file://{there}") == (root, copy) and not left.exists()
    (there / "colours" / "train" / "0_0.png").unlink()
    (there / "colours" / "train" / "0 [a].png").write_bytes(b"12")
    again, changed = mirrored(f"file://{there}/")
    assert again == root and changed.digests != copy.digests
    assert (root / "colours" / "train" / "0 [a].png").read_bytes() == b"12"
    assert not (root / "colours" / "train" / "0_0.png").exists()


@pytest.mark.parametrize("end", ["/..", "/.", "/../..", ":///"])
def test_an_address_without_a_folders_name_removes_nothing(end: str, there: Path) -> None:
    root, _ = mirrored(f"file://{there}")
    with pytest.raises(DataError, match="has no folder's name at its end"):
        mirrored("file" + end if end.startswith(":") else f"file://{there}{end}")
    assert (root / "colours").is_dir()


def test_trials_read_their_own_copy(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, copy = mirrored(f"file://{there}", ["colours"])
    trial = replace(plan(request(root, methods=("linear",)))[0].tuning[0])
    found = run_trial(trial, TrialSources(PROTOCOL, root, mirror=copy))
    monkeypatch.setenv("VISGRAFT_CACHE", str(tmp_path / "another machine"))
    other = run_trial(trial, TrialSources(PROTOCOL, root, mirror=copy))
    assert (tmp_path / "another machine" / "copies").is_dir()
    assert other.measured == found.measured


def test_a_data_set_at_an_address_is_read_as_a_folder(there: Path) -> None:
    system = fsspec.filesystem("memory")
    for name in ("blue", "red"):
        for number in range(8):
            system.pipe(f"/pics/{name}/{number}.png", (there / "colours" / "train" / "0_0.png").read_bytes())
    data = read_data("memory://pics")
    assert data.classes == ("blue", "red") and len(data.all) == 16 and data.mirror is not None
    assert data.root.is_relative_to(mirror_module.cache_folder()) and data.root.name == "pics"


def test_what_stands_before_the_colon_means_the_same_in_capitals(there: Path) -> None:
    root, copy = mirrored(f"FILE://{there}", ["colours"])
    assert (root / "colours" / "train" / "0_0.png").is_file() and copy.local("colours") == root


def test_messages_name_what_was_given_and_not_its_copy(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, pictures = f"file://{tmp_path}/my pets", sorted((there / "colours" / "train").iterdir())
    for number, picture in enumerate(pictures):
        target = tmp_path / "my pets" / "ab"[number % 2] / picture.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
    target.write_bytes(b"no picture")
    line = f"{url}/{target.parent.name}/{target.name} is not a readable image"
    words = "train", url, "--out", tmp_path / "a", "--epochs", 1, *SMALL
    for more, code, begin in (((), 1, "error: "), (("--skip-broken",), 0, "  ")):
        found, _, err = run(*words, *more)
        assert found == code and f"\n{begin}{line}" in err and "/copies/" not in err.split(" is read\n")[-1], err
    _, copy = mirrored(url)
    monkeypatch.setenv("VISGRAFT_CACHE", str(tmp_path / "another machine"))

    def work(note: Note) -> None:
        raise DataError(f"{copy.local()}/a/0.png cannot be read; mend it")

    assert outcome(Job("a", "job", work), print).value == f"job: {url}/a/0.png cannot be read; mend it"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://nothing", "memory://nothing is no folder; check the address"),
        ("https://host/pics", "https://host/pics cannot be copied, as nobody can list what is below it"),
        ("s3://bucket/pics", "s3://bucket/pics needs one more package to be read; run pip install s3fs"),
        ("box://pics", "box://pics needs one more package to be read (Please install boxfs"),
        ("nosuch://pics", "nosuch://pics cannot be opened"),
    ],
)
def test_what_cannot_be_copied_is_one_line_and_leaves_nothing(url: str, said: str, there: Path) -> None:
    with pytest.raises(VisgraftError) as error:
        mirrored(url)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
    assert not [path for path in mirror_module.cache_folder().rglob("*") if path.is_file()]


def test_a_trial_asks_for_what_earlier_ones_of_its_method_took(there: Path) -> None:
    trial, other = plan(request(there, methods=("linear",)))[0].tuning[:2]
    found = run_trial(trial, TrialSources(PROTOCOL, there))

    def share(peak: float, memory: float | None, of: Any = other) -> float | None:
        facts = {"peak_memory_bytes": int(peak * 2**30), "device_memory_bytes": memory and int(memory * 2**30)}
        return gpu_share(of, [replace(found, **facts)])

    assert share(5, 24) == 1 / 3, "1.2 times 5 GiB and 1 GiB are 7"
    assert share(5, 139) == 1 / 19
    assert share(15, 24) is None, "a second one does not fit"
    assert share(5, None) is None, "it was measured on the CPU"
    assert share(5, 24, replace(other, train={**other.train, "batch_size": 8})) is None
