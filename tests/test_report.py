"""The report: its sections, what its numbers mean, text that is escaped, and pictures that say what they claim."""

import base64
import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import CLASSES, enliven, vit

from visgraft import ALoREConfig, Backbone, MethodConfig, TrainConfig, attach, list_methods, load, save
from visgraft.adapters.directory import CONFIG, TENSORS, read_record
from visgraft.cli.report import report as report_verb
from visgraft.errors import AdapterError, DataError, VisgraftError
from visgraft.measure.measuring import measure_adapter
from visgraft.report import channels
from visgraft.report.page import MARKER, ReportPage, build_report, gather, render, write_page
from visgraft.training.run import train_folder

BACKBONE = Backbone("test_vit", "none", 32)
NAMES = ("<b>x</b>", 'a & "b"', "c$2^x$ c")
COLOURS = ((200, 40, 40), (40, 190, 60), (40, 60, 200))
GROUPS = ("cam <1>", "cam 2")
SECTIONS = ("curves", "confusion", "calibration", "coverage", "mistakes", "classes", "costs", "configuration")


class Page(HTMLParser):
    """The tags, ids, visible text and addresses of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.alts: list[str] = []
        self.words: list[str] = []
        self.hidden = 0
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = dict(attrs)
        self.tags.append(tag)
        self.ids += [facts["id"] or ""] if "id" in facts else []
        self.addresses += [facts[name] or "" for name in ("src", "srcset", "href") if name in facts]
        self.alts += [facts["alt"] or ""] if tag == "img" else []
        self.hidden += tag in ("style", "title")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("style", "title")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.words.append(data)


def draw(folder: Path, rows: list[dict[str, str]], colours: list[tuple[int, int, int]]) -> Path:
    """Write noisy pictures and a table that names them."""
    folder.mkdir()
    for number, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        noise = np.random.default_rng(number).normal(colour, 60, (36, 36, 3)).clip(0, 255).astype(np.uint8)
        row["image_path"] = f"{number:03}.png"
        Image.fromarray(noise).save(folder / row["image_path"])
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "table.csv"


def learn(data: Path, out: Path, config: MethodConfig, epochs: int = 2) -> Path:
    recipe = TrainConfig(epochs=epochs, warmup_epochs=0, batch_size=8, precision="fp32")
    train_folder(data, out, backbone=BACKBONE, method_config=config, train_config=recipe)
    return out


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes whose names need escaping, two groups, a train and a val part."""
    rows = [
        {
            "label": NAMES[i % 3],
            "split": "val" if i >= 18 else "train",
            "group": GROUPS[i // 3 % 2] if i >= 18 else f"t{i}",
        }
        for i in range(42)
    ]
    return draw(tmp_path_factory.mktemp("table") / "data", rows, [COLOURS[i % 3] for i in range(42)])


@pytest.fixture(scope="module")
def runs(table: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: learn(table, folder / name, list_methods()[name].Config()) for name in ("linear", "sct", "alore")}


@pytest.fixture(scope="module")
def report(runs: dict[str, Path], table: Path) -> ReportPage:
    return gather(list(runs.values()), table)


@pytest.fixture(scope="module")
def page(report: ReportPage) -> str:
    return render(report)


def test_every_run_has_every_section(page: str, report: ReportPage, runs: dict[str, Path]) -> None:
    order = [section.row.name for section in report.sections]
    ids = Page(page).ids
    for number, name in enumerate(runs, 1):
        extra = {"sct": ["channels"], "alore": ["parts"]}.get(name, [])
        found = {one.removeprefix(f"run-{number}-") for one in ids if one.startswith(f"run-{number}-")}
        assert found == {*SECTIONS, "groups", *extra}
    assert len(ids) == len(set(ids))
    places = [page.index(f"<h2>{name}</h2>") for name in order]
    assert places == sorted(places)


def test_the_page_stands_alone(page: str) -> None:
    found = Page(page)
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert {address.split(":")[0].split("run-")[0] for address in found.addresses} == {"data", "#"}
    assert not re.search(r"https?://|@import|url\(", page)
    assert all(found.alts)
    assert MARKER in page[:1000]


def test_pictures_in_the_page_decode(page: str) -> None:
    kinds = set()
    for address in Page(page).addresses:
        if address.startswith("data:"):
            head, body = address.split(",")
            kinds.add(head)
            content = base64.b64decode(body, validate=True)
            if "svg" in head:
                assert content.startswith(b"<?xml") and b"<script" not in content
            else:
                Image.open(io.BytesIO(content)).load()
    assert kinds == {f"data:image/{kind};base64" for kind in ("svg+xml", "png", "jpeg")}


def test_names_are_text_and_never_tags(page: str) -> None:
    text = Page(page).text
    for name in (*NAMES, *GROUPS):
        assert name in text
    for raw in ("<b>x</b>", "<1>", '& "b"'):
        assert raw not in page


def test_the_table_holds_the_measured_figures_best_first(
    page: str, report: ReportPage, runs: dict[str, Path], table: Path
) -> None:
    figures = [row["figure"] for row in report.rows]
    assert figures == sorted(figures, reverse=True)
    for row in report.rows:
        found = measure_adapter(runs[row["name"]], table, part="val")[0]
        assert (row["figure"], row["macro_f1"]) == (found["top1"], found["macro_f1"])
        assert (row["params_adapter"], row["adapter_bytes"]) == (found["params_adapter"], found["adapter_bytes"])
        assert row["interval"][0] <= row["figure"] <= row["interval"][1]
        assert f"{100 * row['figure']:.1f}" in Page(page).text
    assert report.verdict.startswith(
        f"{report.rows[0]['name']} reaches a top-1 of {100 * figures[0]:.1f} % on 24 validation"
    )
    assert "Images of one group are alike" in " ".join(report.notes)


def test_the_stored_choice_is_the_attached_ones_without_any_weights(runs: dict[str, Path]) -> None:
    stored = channels.stored_choices(runs["sct"], read_record(runs["sct"]))
    attached = channels.choices(load(runs["sct"]).model)
    assert [choice.site for choice in stored] == [choice.site for choice in attached] == ["stream.mid"]
    assert (stored[0].marks == attached[0].marks).all() and stored[0].marks.sum() == 8 * len(stored[0].blocks)
    assert channels.stored_choices(runs["alore"], read_record(runs["alore"])) == []


@pytest.mark.parametrize("count", [2, 30])
def test_few_classes_are_named_in_the_matrix_and_many_are_not(count: int, tmp_path: Path) -> None:
    names = [f"kind {i}" for i in range(count)]
    rows = [{"label": name, "split": part} for name in names for part in ("train", "train", "val", "val")]
    colours = [(8 * i % 256, 200 - 5 * i, 90) for i in range(count) for _ in range(4)]
    data = draw(tmp_path / "data", rows, colours)
    found = gather([learn(data, tmp_path / "linear", list_methods()["linear"].Config(), epochs=1)], data)
    shown, text = found.sections[0].measured, render(found)
    assert shown is not None and len(shown.classes) == count
    assert ('class="matrix"' in text, shown.confusion is None) == (count == 2, count == 2)
    assert ("Confused most often" in text) == (count == 30)
    assert not shown.groups and "run-1-groups" not in text
    assert all(name in text for name in names)


def test_several_classes_per_image(tmp_path: Path) -> None:
    rows = [
        {"labels": labels, "split": "val" if i % 3 == 0 else "train"}
        for i, labels in enumerate(["a", "a;b", "", "b"] * 9)
    ]
    data = draw(tmp_path / "data", rows, [COLOURS[i % 3] for i in range(36)])
    runs = [learn(data, tmp_path / name, list_methods()[name].Config(), 1) for name in ("linear", "sct", "alore")]
    found = gather(runs, data)
    page = Page(render(found))
    assert found.figure == "mean average precision" and all(row["interval"] is None for row in found.rows)
    assert "run-1-confusion" not in page.ids and {"run-2-channels", "run-3-parts", "run-1-classes"} <= set(page.ids)
    assert "average precision" in page.text and "decisions (images times classes)" in page.text
    for section in found.sections:
        assert section.measured is not None
        rates = [row.average_precision for row in section.measured.classes]
        assert np.mean(rates) == pytest.approx(section.row.figure)
    alone_ = gather(runs)
    assert [row["figure"] for row in alone_.rows] == pytest.approx([row["figure"] for row in found.rows])
    assert alone_.figure == found.figure


def test_without_data_the_page_holds_what_the_adapters_hold(
    report: ReportPage, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visgraft.report.section.measure_adapter", None)
    bare = gather(list(runs.values()))
    page = Page(render(bare))
    kinds = {one.split("-")[-1] for one in page.ids if one.startswith("run-") and one.count("-") == 2}
    assert kinds == {"curves", "channels", "costs", "configuration"}
    assert "With --data, this page also compares" in page.text
    assert [row["figure"] for row in bare.rows] == pytest.approx([row["figure"] for row in report.rows])
    assert "takes a comparison on the same images" in bare.verdict


def test_an_adapter_saved_by_hand_has_a_page_too(tmp_path: Path) -> None:
    model = enliven(attach(vit(), ALoREConfig()))
    path = save(model, tmp_path / "mine", classes=[str(i) for i in range(CLASSES)])
    text = Page(build_report([path])).text
    assert "holds no record of its epochs" in text and "No run has a figure to compare by" in text


def test_runs_of_one_name_are_told_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(runs["linear"], tmp_path / "linear")
    names = [row["name"] for row in gather([runs["linear"], copy]).rows]
    assert sorted(names) == sorted([str(runs["linear"]), str(copy)])


def refused(
    capsys: pytest.CaptureFixture[str], error: type[VisgraftError], says: str, *paths: Path, **more: Any
) -> None:
    with pytest.raises(error, match=says) as caught:
        report_verb(list(paths), **more)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_what_cannot_be_reported_on_is_one_line_and_nothing_is_written(
    runs: dict[str, Path], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linear, out = runs["linear"], tmp_path / "page.html"
    other = save(attach(vit(num_classes=2), ALoREConfig()), tmp_path / "other", classes=["up", "down"])
    foreign = tmp_path / "notes.html"
    foreign.write_text("<p>mine</p>")
    refused(capsys, AdapterError, "is not an adapter", linear, tmp_path / "nowhere", out=out)
    refused(capsys, AdapterError, "if it holds the images, pass --data", linear, table.parent, out=out)
    refused(capsys, AdapterError, "other are not those of .*linear", linear, other, out=out)
    refused(capsys, DataError, "classes that the adapter does not know", other, out=out, data=str(table))
    refused(capsys, VisgraftError, "the folder .*none does not exist", linear, out=tmp_path / "none" / "page.html")
    refused(capsys, VisgraftError, "is a folder; choose a file", linear, out=tmp_path)
    refused(capsys, VisgraftError, "is not an earlier report", linear, out=foreign)
    damaged = shutil.copytree(runs["sct"], tmp_path / "damaged")
    (damaged / TENSORS).write_bytes(b"no tensors")
    refused(capsys, AdapterError, "damaged/adapter_model.safetensors is missing or damaged", damaged, out=out)
    shutil.copy(runs["linear"] / TENSORS, damaged)
    refused(capsys, AdapterError, "does not fit its config", damaged, out=out)
    config = read_record(runs["linear"]).to_json()
    (damaged / CONFIG).write_text(json.dumps(config | {"backbone": {"num_classes": 3}}))
    refused(capsys, AdapterError, "adapter_config.json is damaged: backbone", damaged, out=out)
    refused(capsys, VisgraftError, "split is 'train'", linear, out=out, split="train")
    refused(capsys, DataError, "does not exist", linear, out=out, data=str(tmp_path / "nowhere"))
    refused(capsys, DataError, "no test images", linear, out=out, data=str(table), split="test")
    assert foreign.read_text() == "<p>mine</p>"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "notes.html", "other"]


def test_the_verb_writes_a_page_and_prints_one_document(
    runs: dict[str, Path], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    report_verb([runs["linear"]], out=out, csv=table, json=True)
    told = capsys.readouterr()
    document = json.loads(told.out)
    assert told.out.count("\n") == 1 and document["bytes"] == out.stat().st_size
    assert (document["split"], [row["name"] for row in document["runs"]]) == ("val", ["linear"])
    assert "run-1-confusion" in Page(out.read_text(encoding="utf-8")).ids
    report_verb([runs["linear"]], out=out)  # an earlier report may be replaced
    assert "run-1-confusion" not in Page(out.read_text(encoding="utf-8")).ids
    assert "reaches a top-1 of" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_finished_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write_page(tmp_path / "page.html", f"{MARKER} first")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(VisgraftError, match="cannot be written"):
        write_page(out, f"{MARKER} second")
    assert out.read_text() == f"{MARKER} first" and len(list(tmp_path.iterdir())) == 1
