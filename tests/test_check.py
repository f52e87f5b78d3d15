"""What is wrong with the data: every kind of fault that is planted is found, and clean data raises no warning."""

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import typer
from PIL import Image, ImageEnhance
from typer.testing import CliRunner

from visgraft.check import Finding, Report, check_data, quick_check
from visgraft.check.facts import Facts, Unreadable, read_facts
from visgraft.check.findings import DatasetImage, varied
from visgraft.check.page import write_page
from visgraft.check.shortcuts import probe_shortcuts
from visgraft.cli.check import check
from visgraft.data.dataset import Dataset, Example
from visgraft.data.folders import read_folder
from visgraft.errors import VisgraftError

CLASSES = ("cat", "dog", "owl")
COUNTS = {"train": 30, "val": 50, "test": 50}


def picture(seed: int, size: tuple[int, int] = (128, 128)) -> Image.Image:
    """Return smooth random shapes, as unlike each other as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def draw(root: Path, counts: dict[str, int] | None = None, classes: tuple[str, ...] = CLASSES) -> Path:
    """Draw a clean data set in the split layout: nothing but chance tells the classes."""
    seed = 0
    for part, count in (counts or COUNTS).items():
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                picture(seed).save(root / part / name / f"{number:03}.png")
                seed += 1
    return root


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("clean") / "data")


@pytest.fixture
def data(drawn: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "data"))


@pytest.fixture(autouse=True)
def few_permutations() -> Iterator[None]:
    with patch("visgraft.check.shortcuts.PERMUTATIONS", 20):
        yield


def kinds(report: Report) -> dict[str, Finding]:
    return {finding.kind: finding for finding in report.findings}


def names(finding: Finding) -> list[list[str]]:
    """The paths of a finding's sets, without the data's folder."""
    return [["/".join(Path(one.path).parts[-3:]) for one in together] for together in finding.sets]


def test_clean_data_has_no_finding(drawn: Path) -> None:
    report = check_data(read_folder(drawn))
    assert [f.title for f in report.findings] == []
    assert report.closing == "0 errors, 0 warnings in 390 images"
    assert report.tables["classes"].to_dict()[0] == {"class": "cat", "train": 30, "val": 50, "test": 50, "all": 130}
    assert quick_check(read_folder(drawn)) == []


def test_every_unreadable_file_is_named_with_its_reason(data: Path) -> None:
    (data / "train/cat/bad.png").write_text("no image")
    whole = (data / "val/dog/000.png").read_bytes()
    (data / "val/dog/cut.png").write_bytes(whole[: len(whole) // 2])
    (data / "test/owl/empty.jpg").write_bytes(b"")
    dataset = read_folder(data)
    (data / "test/owl/049.png").unlink()
    found = kinds(check_data(dataset))["unreadable"]
    assert found.severity == "error"
    assert names(found) == [["train/cat/bad.png"], ["val/dog/cut.png"], ["test/owl/049.png"], ["test/owl/empty.jpg"]]
    reasons = [one.detail for (one,) in found.sets]
    assert reasons[2] == "No such file or directory"
    assert all(reasons) and not any("remove" in reason or str(data) in reason for reason in reasons)


def test_exact_copies_are_told_apart_as_leaks_conflicts_and_duplicates(data: Path) -> None:
    shutil.copy(data / "train/cat/000.png", data / "test/cat/copy.png")
    shutil.copy(data / "train/cat/001.png", data / "train/dog/copy.png")
    shutil.copy(data / "train/cat/002.png", data / "train/cat/copy.png")
    shutil.copy(data / "train/cat/003.png", data / "val/owl/both.png")
    found = kinds(check_data(read_folder(data)))
    assert found.keys() == {"leak", "conflict", "duplicates"}
    assert [found[kind].severity for kind in ("leak", "conflict", "duplicates")] == ["error", "error", "warning"]
    assert names(found["leak"]) == [
        ["train/cat/000.png", "test/cat/copy.png"],
        ["train/cat/003.png", "val/owl/both.png"],
    ]
    assert names(found["conflict"]) == [
        ["train/cat/001.png", "train/dog/copy.png"],
        ["train/cat/003.png", "val/owl/both.png"],
    ]
    assert names(found["duplicates"]) == [["train/cat/002.png", "train/cat/copy.png"]]
    assert quick_check(read_folder(data))[0].startswith("2 files in more than one part, such as ")
    with patch("visgraft.check.quick.MOST_READ", 3):
        assert quick_check(read_folder(data))[0].startswith("at least 1 file in more than one part")


def _jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=40)
    return Image.open(buffer)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half the size": lambda image: image.resize((64, 64)),
    "compressed": _jpeg,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "cropped": lambda image: image.resize((200, 200)).crop((2, 2, 198, 198)),
}


@pytest.mark.parametrize("change", COPIES)
def test_near_copies_are_found_across_parts_and_classes(data: Path, change: str) -> None:
    for source, target in (("003", "test/cat/copy.png"), ("004", "train/dog/copy.png"), ("005", "train/cat/copy.png")):
        COPIES[change](Image.open(data / f"train/cat/{source}.png")).save(data / target)
    found = kinds(check_data(read_folder(data)))
    assert names(found["near_leak"]) == [["train/cat/003.png", "test/cat/copy.png"]]
    assert names(found["near_conflict"]) == [["train/cat/004.png", "train/dog/copy.png"]]
    assert names(found["near_duplicates"]) == [["train/cat/005.png", "train/cat/copy.png"]]
    assert (found["near_leak"].severity, found["near_conflict"].severity) == ("error", "warning")


def test_the_same_shapes_in_another_colour_are_no_copies(data: Path) -> None:
    grey = Image.open(data / "train/cat/006.png").convert("L")
    for name, channels in (("red", (1.0, 0.1, 0.1)), ("blue", (0.1, 0.1, 1.0))):
        pixels = np.asarray(grey)[..., None] * np.array(channels)
        Image.fromarray(pixels.astype(np.uint8)).save(data / f"train/cat/{name}.png")
    near = kinds(check_data(read_folder(data))).get("near_duplicates")
    assert near is None or not any({"train/cat/red.png", "train/cat/blue.png"} <= set(s) for s in names(near))


def test_where_most_images_look_alike_no_leak_is_claimed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scene = np.asarray(picture(0)).astype(int)
    for part in ("train", "test"):
        for name in CLASSES:
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(12):
                pixels = (scene + rng.normal(0, 3, scene.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
    found = kinds(check_data(read_folder(tmp_path)))
    assert found["alike"].severity == "warning"
    assert sum(map(len, found["alike"].sets)) == 72
    assert not found.keys() & {"near_leak", "near_conflict", "near_duplicates"}


def test_imbalance_and_rare_classes(data: Path) -> None:
    for number in range(4, 30):
        (data / f"train/owl/{number:03}.png").unlink()
    shutil.rmtree(data / "val/owl")
    found = kinds(check_data(read_folder(data)))
    assert "cat has 8 times as many training images as owl (30 and 4)" in found["imbalance"].title
    assert "--class-weights balanced" in found["imbalance"].remedy
    assert "macro-F1" in found["imbalance"].remedy
    assert found["few_in_class"].title.endswith("owl (4)")
    assert found["class_not_measured"].title == "1 class without val images: owl"
    lines = quick_check(read_folder(data))
    assert len(lines) == 3
    assert all("\n" not in line and "; " in line for line in lines)


def test_a_small_validation_part_is_told_with_its_interval(tmp_path: Path) -> None:
    report = check_data(read_folder(draw(tmp_path / "d", {"train": 20, "val": 5, "test": 30})))
    small = [finding for finding in report.findings if finding.kind == "small_part"]
    assert [finding.severity for finding in small] == ["warning", "note"]
    low, high = (int(number) for number in re.findall(r"(\d+)%", small[0].title)[1:])
    assert small[0].title.startswith("15 val images: an accuracy of about 90%")
    assert (low, high) == (70, 99)  # Wilson's interval of 14 right of 15
    assert sum("15 val images" in line for line in quick_check(read_folder(tmp_path / "d"))) == 1


def _grouped(dataset: Dataset, group: Callable[[Example], str | None]) -> Dataset:
    parts = {
        part: tuple(e._replace(group=group(e)) for e in getattr(dataset, part)) for part in ("train", "val", "test")
    }
    return replace(dataset, **parts)


def test_groups_in_several_parts_and_groups_of_one_class(drawn: Path) -> None:
    def camera(example: Example) -> str:
        part, name = example.path.parts[-3:-1]
        if name == "owl":
            return f"{part} owls"
        return "shared" if example.path.stem == "000" else f"{part} {int(example.path.stem) % 5}"

    dataset = _grouped(read_folder(drawn), camera)
    report = check_data(dataset)
    found = kinds(report)
    assert found["group_leak"].severity == "error"
    assert found["group_leak"].title == "1 group with images in several parts: shared"
    assert {one.part for one in found["group_leak"].sets[0][:3]} == {"train", "val", "test"}
    assert found["one_class_group"].title == "3 of 19 groups hold one class only"
    assert sum(row["images"] for row in report.tables["groups"].to_dict()) == 390
    assert any("shared" in line for line in quick_check(dataset))
    lonely = _grouped(read_folder(drawn), lambda e: "barn" if "owl" in str(e.path) else e.path.stem)
    assert kinds(check_data(lonely))["class_in_one_group"].title == "1 class seen in one group only: owl (barn)"


def test_kinds_of_files_are_noted(data: Path) -> None:
    folder = data / "train/cat"
    exif = Image.Exif()
    exif[274] = 6
    picture(1000, (128, 150)).save(folder / "turned.jpg", exif=exif)
    clear = picture(1001)
    clear.putalpha(128)
    clear.save(folder / "clear.png")
    picture(1002).save(folder / "film.gif", save_all=True, append_images=[picture(1003)])
    Image.fromarray(np.asarray(picture(1004).convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    picture(1005, (300, 100)).save(folder / "long.png")
    Image.new("RGB", (128, 128), "navy").save(folder / "blank.png")
    picture(1006, (1200, 1300)).save(folder / "large.jpg")
    for number in range(40):
        picture(1100 + number, (400, 400)).save(folder / f"wide{number}.jpg")
    found = kinds(check_data(read_folder(data)))
    expected = {
        "turned": "turned.jpg", "alpha": "clear.png", "frames": "film.gif", "deep": "deep.png", "long": "long.png",
        "blank": "blank.png", "grey_and_colour": "deep.png",
    }  # fmt: skip
    for kind, name in expected.items():
        assert names(found[kind]) == [[f"train/cat/{name}"]], kind
    assert len(found["small"].sets) == 1  # the long one, 100 pixels high
    assert names(found["mixed_sizes"])[-1] == ["train/cat/large.jpg"]
    assert found["blank"].severity == found["long"].severity == "warning"
    assert {found[kind].severity for kind in ("turned", "alpha", "frames", "deep", "small")} == {"note"}


def _shapes(image: Image.Image) -> tuple[dict[str, Any], Image.Image]:
    return {}, image.resize((160, 128))


def _type(image: Image.Image) -> tuple[dict[str, Any], Image.Image]:
    return {"format": "jpeg", "quality": 50}, image


def _tint(image: Image.Image) -> tuple[dict[str, Any], Image.Image]:
    return {"format": "png"}, Image.blend(image, Image.new("RGB", image.size, "red"), 0.6)


@pytest.mark.parametrize(
    ("plant", "family", "severity"),
    [(_shapes, "image size", "warning"), (_type, "file type", "warning"), (_tint, "mean colour", "note")],
)
def test_planted_shortcuts_are_found(data: Path, plant: Any, family: str, severity: str) -> None:
    for path in data.glob("*/owl/*.png"):
        options, changed = plant(Image.open(path))
        changed.save(path, **options)
    report = check_data(read_folder(data))
    shortcuts = {f.title.split(" alone")[0]: f for f in report.findings if f.kind == "shortcut"}
    assert shortcuts[family].severity == severity
    match = re.search(r"balanced accuracy (\d\.\d+) \(chance 0\.33\)", shortcuts[family].title)
    assert match
    # One class of three is told for sure, the other two are guessed: (1 + 1/2 + 1/2) / 3.
    assert float(match[1]) == pytest.approx(2 / 3, abs=0.08)
    row = next(row for row in report.tables["shortcuts"].to_dict() if row["facts"] == family)
    assert row["found"] == "yes"


def _planted_groups(groups: int, seed: int) -> list[Any]:
    """Probe data where size depends on the group alone, and each group has one class, by chance."""
    rng = np.random.default_rng(seed)
    base = read_facts(Example(Path("x.png"), 0, content=lambda: _png(picture(0))))
    assert isinstance(base, Facts)
    labels, sides = rng.integers(0, 2, groups), rng.integers(100, 900, groups)
    pictures, facts, units = [], [], []
    for i in range(20 * groups):
        group = i % groups
        label = int(labels[group])
        pictures.append(DatasetImage(Example(Path(f"{i}.png"), label, str(group)), "train", "ab"[label]))
        facts.append(replace(base, width=int(sides[group])))
        units.append(group)
    return [pictures, facts, units]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def test_images_of_one_group_do_not_pass_for_evidence() -> None:
    pictures, facts, units = _planted_groups(40, seed=1)
    (apart,) = [p for p in probe_shortcuts(pictures, facts, range(len(pictures))) if p.family == "image size"]
    (together,) = [p for p in probe_shortcuts(pictures, facts, units) if p.family == "image size"]
    assert apart.found and apart.balanced_accuracy > 0.85  # what the images alone would make believe
    assert not together.found
    assert together.images == 40


def test_names_of_classes_in_file_names_are_no_shortcut(tmp_path: Path) -> None:
    seed = 0
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for number in np.random.default_rng(seed).permutation(900)[:40]:
            picture(seed).save(tmp_path / name / f"{name}_{number:03}.png")
            seed += 1
    report = check_data(read_folder(tmp_path))
    assert "shortcut" not in kinds(report)
    assert "file name" in [row["facts"] for row in report.tables["shortcuts"].to_dict()]


@pytest.mark.parametrize("seed", range(4))
def test_chance_raises_no_alarm(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = read_facts(Example(Path("x.png"), 0, content=lambda: _png(picture(0))))
    assert isinstance(base, Facts)
    pictures = [
        DatasetImage(Example(Path(f"{rng.integers(10**6)}.png"), i % 3), "train", "abc"[i % 3]) for i in range(60)
    ]
    facts = [
        replace(
            base, width=int(rng.integers(50, 900)), size=int(rng.integers(10**6)), colour=tuple(rng.uniform(0, 255, 4))
        )
        for _ in range(60)
    ]
    probes = probe_shortcuts(pictures, facts, range(60))
    assert len(probes) == 4
    assert not any(probe.found for probe in probes)


def test_one_image_per_class_and_no_other_part(tmp_path: Path) -> None:
    draw(tmp_path / "d", {"train": 1})
    dataset = read_folder(tmp_path / "d", val_fraction=0.0)
    report = check_data(dataset)
    assert {"few_images", "few_in_class", "no_part", "not_probed"} <= kinds(report).keys()
    assert report.count("error") == 0
    write_page(report, tmp_path / "page.html")
    assert quick_check(dataset)


def test_images_that_are_no_files_and_several_labels(drawn: Path) -> None:
    dataset = read_folder(drawn)
    content = {e.path: e.path.read_bytes() for e in dataset.all}
    parts = {
        part: tuple(
            Example(Path(f"row {i}"), (e.label,) if i % 2 else (0, 1), None, lambda path=e.path: content[path])
            for i, e in enumerate(getattr(dataset, part))
        )
        for part in ("train", "val", "test")
    }
    report = check_data(replace(dataset, root=Path("hf:pets"), multi_label=True, **parts))
    assert kinds(report).keys() == {"not_probed"}
    assert report.tables["classes"].rows[0][0] == "cat"
    assert quick_check(replace(dataset, multi_label=True, **parts)) == []


def test_an_unreadable_image_does_not_hide_what_it_is() -> None:
    def missing() -> bytes:
        raise OSError("the archive is gone")

    assert read_facts(Example(Path("x"), 0, content=missing)) == Unreadable("the archive is gone")


class Links(HTMLParser):
    """Collects what a page refers to, and the tags it has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_page_is_self_contained_and_escapes_names(tmp_path: Path) -> None:
    classes = ("<b>bold</b>", "{{ 7*7 }} & \"'", "[red]")
    root = draw(tmp_path / "<i>data", {"train": 12, "val": 12}, classes=("a", "b", "c"))
    shutil.copy(root / "train/a/000.png", root / "val/b/<script>alert(1)<script>.png")
    (root / "train/a/bad<u>.png").write_text("no image")
    dataset = replace(read_folder(root), classes=classes)
    out = tmp_path / "page.html"
    text = write_page(check_data(dataset), out).read_text()
    page = Links(text)
    assert not page.tags & {"b", "script", "i", "u", "link", "iframe"}
    assert "&lt;b&gt;bold&lt;/b&gt;" in text
    assert "{{ 7*7 }}" in text
    assert page.sources and all(source.startswith(("data:image/jpeg;base64,", "#")) for source in page.sources)
    assert sum(source.startswith("data:") for source in page.sources) >= 2
    assert "url(" not in text and "@import" not in text
    assert out.stat().st_size < 3_000_000
    with pytest.raises(VisgraftError, match="--html"):
        write_page(check_data(dataset), tmp_path / "absent" / "page.html")
    assert {path.name for path in tmp_path.iterdir()} == {"<i>data", "page.html"}


def test_pages_of_many_findings_stay_small(data: Path) -> None:
    for path in sorted((data / "train").rglob("*.png")):
        shutil.copy(path, path.with_name(f"copy_{path.name}"))
    out = data.parent / "page.html"
    write_page(check_data(read_folder(data)), out)
    assert Links(out.read_text()).sources
    assert sum(source.startswith("data:") for source in Links(out.read_text()).sources) <= 300
    assert "more sets not shown" in out.read_text()


def app() -> typer.Typer:
    found = typer.Typer(pretty_exceptions_enable=False)
    found.command()(check)
    return found


def test_the_command_line_says_the_same_in_words_json_and_exit_code(data: Path) -> None:
    shutil.copy(data / "train/cat/000.png", data / "test/cat/[red]copy.png")
    page = data.parent / "page.html"
    told = CliRunner().invoke(app(), [str(data), "--html", str(page)])
    assert told.exit_code == 1
    assert "1 file in more than one part" in told.stdout
    assert "test/cat/[red]copy.png" in told.stdout
    assert told.stdout.rstrip().endswith("1 error, 0 warnings in 391 images")
    assert page.is_file()
    machine = CliRunner().invoke(app(), [str(data), "--json"])
    document = json.loads(machine.stdout)
    assert (machine.exit_code, machine.stdout.count("\n")) == (1, 1)
    assert document.keys() == {"data", "images", "errors", "warnings", "notes", "findings", "tables"}
    assert (document["images"], document["errors"], document["warnings"]) == (391, 1, 0)
    (finding,) = document["findings"]
    assert finding.keys() == {"kind", "severity", "title", "remedy", "sets"}
    assert finding["sets"][0][0] == {"path": str(data / "train/cat/000.png"), "part": "train", "class": "cat"}
    assert document["tables"]["sizes"][0] == {"": "width (pixels)", "smallest": 128, "median": 128, "largest": 128}


def test_clean_data_exits_with_zero(drawn: Path) -> None:
    clean = CliRunner().invoke(app(), [str(drawn)])
    assert clean.exit_code == 0, clean.output
    assert clean.stdout.rstrip().endswith("0 errors, 0 warnings in 390 images")


def test_a_page_that_cannot_be_written_is_refused_first(data: Path) -> None:
    for target in (data, data / "absent/page.html"):
        failed = CliRunner().invoke(app(), [str(data), "--html", str(target)])
        assert isinstance(failed.exception, VisgraftError)
        assert "\n" not in str(failed.exception)


def test_progress_covers_every_image(drawn: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    check_data(read_folder(drawn), on_progress=lambda *call: calls.append(call))
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert stages == ["reading images", "comparing images", "looking for shortcuts"]
    for stage in stages:
        last = [call for call in calls if call[0] == stage][-1]
        assert last[1] == last[2]
    assert [done for stage, done, _ in calls if stage == "reading images"] == list(range(1, 391))


def test_names_that_are_not_utf8_are_told(drawn: Path, tmp_path: Path) -> None:
    root = draw(tmp_path / "d", {"train": 2, "val": 2})
    odd = root / "train/cat" / "\udcff.png"
    shutil.copy(root / "val/cat/000.png", odd)
    out = CliRunner().invoke(app(), [str(root), "--html", str(tmp_path / "p.html"), "--json"])
    assert out.exit_code == 1
    json.dumps(json.loads(out.stdout)).encode()
    assert "\ufffd.png" in (tmp_path / "p.html").read_text()


def test_varied_puts_one_of_each_ahead() -> None:
    several = [DatasetImage(Example(Path(str(i)), 0), part, "a") for i, part in enumerate(["train", "train", "test"])]
    assert [p.path for p in varied(several, lambda p: p.part)] == ["0", "2", "1"]
