"""Ways out of visgraft for an adapter with several tasks: the tasks go along, and the certificate holds each."""

# ruff: noqa: F401, F811  (fixtures are imported here, and then named as arguments)

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from browser import browser, served
from predicting import TASKS, make, make_tasks, pictures, shop
from test_web import real_runtime

from visgraft import blend, diff_adapters, export_adapter, load, merge_adapter, predict_stream
from visgraft.adapters.card import make_card
from visgraft.adapters.directory import read_record
from visgraft.data.tasks import LabelTask
from visgraft.errors import AdapterError
from visgraft.export.format import ExportError
from visgraft.export.task_proof import agreement_by_task, least_of_tasks, rightness_by_task
from visgraft.export.torch_program import METADATA

TOLD = [task.to_json() for task in TASKS]


def test_each_task_agrees_by_its_own_outputs() -> None:
    expected = torch.tensor([[3.0, 0, 0, 9.0, 1, 1], [0, 3.0, 0, 0.5, -1, 1]])
    found = expected.clone()
    found[0, 3] = 8.95  # within a tenth of a deviation, and still the largest of all outputs
    found[1, 3], found[1, 4] = 0.8, 0.1
    told = agreement_by_task(expected, found, TASKS)
    assert told["colour"] == {"agreement": 1.0} and told["tags"] == {"agreement": 0.75}
    assert told["size"]["agreement"] == 0.5 and told["size"]["unit"] == "cm"
    assert told["size"]["largest_difference"] == pytest.approx(3, abs=1e-5)
    assert told["size"]["largest_difference_of_std"] == pytest.approx(0.3, abs=1e-6)
    assert least_of_tasks(told) == 0.5
    nothing = float("nan")
    labels = torch.tensor([[0.0, 132.0, 1, 1], [2.0, nothing, nothing, nothing]])
    right = rightness_by_task(expected, labels, TASKS)
    assert right["colour"] == {"accuracy": 0.5} and right["tags"] == {"accuracy": 1.0}
    assert right["size"]["mean_absolute_error"] == pytest.approx(2)


def test_a_merged_folder_and_a_file_hold_the_tasks(shop: Path, pictures: list[Path], tmp_path: Path) -> None:
    table = tmp_path / "shop.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image_path", "colour", "size", "tags"])
        rows.writerows([str(path), "red", 30 + n, "ring"] for n, path in enumerate(pictures))
    merged = merge_adapter(shop, tmp_path / "merged", data=table)
    assert merged["tasks"].keys() == {"colour", "size", "tags"} and merged["top1_agreement"] == 1.0
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tasks"] == TOLD and config["label_names"][0] == "colour=red"
    out = tmp_path / "m.pt2"
    told = export_adapter(shop, out, "torch", data=table)
    certificate = json.loads(out.with_name("m.pt2.certificate.json").read_text())
    assert told["accuracy"] is None and certificate["tasks"] == told["tasks"]
    assert {"agreement", "accuracy", "torch_accuracy"} == told["tasks"]["colour"].keys()
    assert told["tasks"]["size"]["mean_absolute_error"] == pytest.approx(
        told["tasks"]["size"]["torch_mean_absolute_error"], abs=1e-2
    )
    extra = {METADATA: ""}
    torch.export.load(str(out), extra_files=extra)
    facts = json.loads(extra[METADATA])
    assert facts["task"] == "several_tasks" and json.loads(facts["tasks"]) == TOLD


def test_one_label_leaves_no_trace_of_tasks(tmp_path: Path) -> None:
    plain = make(tmp_path / "plain", "lora", classes="xyz")
    assert "tasks" not in merge_adapter(plain, tmp_path / "merged")
    assert "tasks" not in json.loads((tmp_path / "merged" / "certificate.json").read_text())
    assert "tasks" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_peft_takes_the_tasks_along_and_brings_them_back(shop: Path, pictures: list[Path], tmp_path: Path) -> None:
    from visgraft.export.peft_import import import_peft
    from visgraft.export.peft_open import FACTS

    export_adapter(shop, tmp_path / "peft", "peft")
    assert json.loads((tmp_path / "peft" / FACTS).read_text())["tasks"] == TOLD
    assert "- size: a number from 20 to 60 cm" in (tmp_path / "peft" / "README.md").read_text()
    import_peft(tmp_path / "peft", tmp_path / "back")
    assert load(tmp_path / "back").record.tasks == TASKS
    import_peft(tmp_path / "peft", tmp_path / "renamed", classes=list("abcdef"))
    assert load(tmp_path / "renamed").record.tasks == ()


def test_adapters_with_the_same_tasks_blend_and_compare(shop: Path, pictures: list[Path], tmp_path: Path) -> None:
    other = make_tasks(tmp_path / "other", seed=2)
    found = diff_adapters(shop, other, images=pictures)
    answers = [list(predict_stream([path], pictures)) for path in (shop, other)]
    same = 0
    for one, two in zip(*answers, strict=True):
        assert one.tasks and two.tasks
        alike = [one.tasks["colour"][0][0] == two.tasks["colour"][0][0]]  # type: ignore[index]
        alike.append({name for name, _ in one.tasks["tags"]} == {name for name, _ in two.tasks["tags"]})
        same += all(alike) and abs(one.tasks["size"].value - two.tasks["size"].value) < 1  # type: ignore[union-attr]
    assert found.agreement and found.agreement.share == pytest.approx(same / len(pictures))
    plain = make(tmp_path / "plain", "lora", classes="abcdef")
    assert diff_adapters(shop, plain, images=pictures).agreement is None
    shifted = (TASKS[0], dataclasses.replace(TASKS[1], mean=41.0), TASKS[2])
    with pytest.raises(AdapterError, match="because their tasks differ"):
        blend([shop, make_tasks(tmp_path / "shifted", shifted)])
    assert blend([shop, other]).record.tasks == TASKS


def test_the_card_tells_tasks_units_and_figures(tmp_path: Path) -> None:
    folder = make_tasks(tmp_path / "odd", (TASKS[1], LabelTask("a|<b>", "one_class", ("x*", "y"))))
    record = read_record(folder)
    rate = {"top1": 0.75, "top1_ci95": [0.6, 0.9], "images": 40}
    number = {"mae": 2.5, "mae_ci95": [2.0, 3.0], "constant_mae": 9.0, "r2": 0.9, "images": 30}
    metrics = {"val_images": 40, "val_mean": 0.8, "val_tasks": {"size": number, "a|<b>": rate}}
    card = make_card(dataclasses.replace(record, facts={**record.facts, "metrics": metrics}))
    assert "- size\\: a number from 20 to 60 cm\n" in card and "one of 2 classes: x\\*, y" in card
    assert "| size\\: mean absolute error in cm | 2.5 | 2.000–3.000 |" in card
    assert "| a\\|\\<b\\>\\: top-1 accuracy | 0.75 | 0.600–0.900 |" in card
    assert card.count("- type: mae") == 1 and "val\\_tasks" not in card


@pytest.mark.long
def test_the_page_in_a_browser_shows_each_task(
    shop: Path, pictures: list[Path], real_runtime: str, tmp_path: Path
) -> None:
    export_adapter(shop, tmp_path / "web", "web", precision="fp32", runtime=real_runtime)
    expected = next(iter(predict_stream([shop], pictures[:1], top=3))).tasks
    assert expected
    with served(tmp_path / "web") as address, browser() as tab:
        assert tab.open(address) == "ready"
        found = tab.choose(pictures[0])
        told = {task["name"]: task for task in found["tasks"]}
        size = expected["size"].value  # type: ignore[union-attr]
        assert told["size"]["value"] == pytest.approx(size, abs=0.01) and told["size"]["unit"] == "cm"
        assert dict(zip(told["colour"]["classes"], told["colour"]["probabilities"], strict=True)) == pytest.approx(
            dict(expected["colour"]), abs=1e-3
        )
        rows = tab.evaluate(
            "[...document.querySelectorAll('#answers li')].map((e) => e.className + '|' + e.textContent)"
        )
        assert [row for row in rows if row.startswith("task|")] == ["task|colour", "task|size", "task|tags"]
        assert f"number|{size:.4g} cm" in rows and rows[1].startswith(f"|{expected['colour'][0][0]}")
