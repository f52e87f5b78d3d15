"""The report: its sections, what its numbers mean, text that is escaped, and pictures that say what they claim."""

import base64
import csv
import dataclasses
import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import CLASSES, batches, enliven, fitted, images, logits, vit

from visgraft import ALoREConfig, Backbone, MethodConfig, SCTConfig, TrainConfig, attach, detach, merge, methods, save
from visgraft.attach import get_attached
from visgraft.cli.report import report as report_verb
from visgraft.data.images import Images
from visgraft.errors import AdapterError, DataError, VisgraftError
from visgraft.evaluate import confusion, score
from visgraft.method import Grid
from visgraft.report import channels, compare, tables
from visgraft.report.embed import heat_map
from visgraft.report.figures import large_confusion
from visgraft.report.looking import occlusion
from visgraft.report.mistakes import find_mistakes
from visgraft.report.page import MARKER, build_report, gather, render, write_page
from visgraft.report.parts import entering, keep_parts, show_parts
from visgraft.report.section import Run, make_section
from visgraft.salience import salient_channels
from visgraft.workflow import train_folder

BACKBONE = Backbone("test_vit", "none", 32)
NAMES = ("<b>x</b>", 'a & "b"', "c$2^x$ c")
COLOURS = ((200, 40, 40), (40, 190, 60), (40, 60, 200))
GROUPS = ("cam <1>", "cam 2")
SECTIONS = ("curves", "confusion", "calibration", "mistakes", "classes", "costs", "configuration")


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
        {"label": NAMES[i % 3], "split": "val" if i >= 18 else "train", "group": GROUPS[i // 3 % 2] if i >= 18 else f"t{i}"}
        for i in range(42)
    ]
    return draw(tmp_path_factory.mktemp("table") / "data", rows, [COLOURS[i % 3] for i in range(42)])


@pytest.fixture(scope="module")
def runs(table: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: learn(table, folder / name, methods()[name].Config()) for name in ("linear", "sct", "alore")}


@pytest.fixture(scope="module")
def page(runs: dict[str, Path], table: Path) -> str:
    return build_report(list(runs.values()), table)


def logits_model(table: dict[int, torch.Tensor]) -> Any:
    raise NotImplementedError
