"""What `visgraft info` tells of adapters that training did not write, or not lately."""

import json
from pathlib import Path
from typing import Any

import pytest
from predicting import make
from test_cli import run

import visgraft
from visgraft.methods import get_method
from visgraft.options import MethodConfig

ONE = {"val_top1": 0.9, "val_top1_ci95": [0.8, 0.95], "val_macro_f1": 0.88, "val_balanced_accuracy": 0.87}
WHOLE: dict[str, Any] = {**ONE, "val_mean_average_precision": None, "val_images": 80}
SIZE = {"mae": 1.5, "constant_mae": 4.0, "rmse": 2.0, "r2": None, "spearman": None, "images": 9}
SAID = ["validation: top-1 90.0 % (80.0 to 95.0), macro-F1 88.0, on 80 images", "balanced accuracy: 87.0 %"]
AS_IT_STANDS = [f"{name}: {value}" for name, value in (ONE | {"val_top1": "0.9"}).items()]


def told(adapter: Path, **changes: Any) -> list[str]:
    """Return the lines of an adapter after changing parts of its record."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    code, out, err = run("info", adapter)
    assert (code, err) == (0, ""), err
    return out.splitlines()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("info") / "adapter", "linear")


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        (WHOLE, SAID),
        (WHOLE | {"test_top1": 0.7, "note": "[bold]x"}, [*SAID, "test_top1: 0.7", "note: [bold]x"]),
        ({"top1": 0.5, "macro_f1": 0.4, "images": 9}, ["top1: 0.5", "macro_f1: 0.4", "images: 9"]),
        ({"mean": 3.2}, ["mean: 3.2"]),
        (WHOLE | {"val_top1": "0.9"}, [*AS_IT_STANDS, "val_images: 80"]),
        (dict.fromkeys(ONE) | {"val_images": 0}, ["validation: no images"]),
        (
            {"val_mean": 0.0, "val_tasks": {"size": SIZE}, "val_images": 9},
            ["validation:", "  size: mean absolute error 1.5, a constant answer's 4, RMSE 2, on 9 images"],
        ),
        (
            {"val_mean": 0.0, "val_tasks": {"size": {"mae": 1.5}}},
            ["val_mean: 0.0", "val_tasks: {'size': {'mae': 1.5}}"],
        ),
        ({}, []),
    ],
)
def test_figures_stand_in_words_where_training_wrote_them_and_none_is_lost(
    metrics: dict[str, Any], says: list[str], adapter: Path
) -> None:
    lines = told(adapter, record={"metrics": metrics})
    assert lines[lines.index("unlike pictures: not told, so predict --unlike refuses it") + 1 :] == says


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (get_method("arc").Config(bias=False), "--bottleneck 50 --no-bias --dropout 0.1 --init mixed"),
        (
            get_method("lora").Config(targets=("q", "fc1"), dropout=0.0),
            "--rank 8 --targets q,fc1 --scale 5 --dropout 0",
        ),
        (get_method("linear").Config(), "none"),
    ],
)
def test_options_are_told_as_they_are_typed(config: MethodConfig, says: str, tmp_path: Path) -> None:
    model = visgraft.attach(visgraft.create_backbone(visgraft.Backbone("test_vit", "none", 32), 3), config)
    assert told(visgraft.save(model, tmp_path / "adapter"))[1] == f"options: {says}"


def test_what_a_record_lacks_is_told(adapter: Path) -> None:
    lines = told(adapter, parameters={"adapter": None}, data_config={}, classes=[])
    assert lines[2] == "parameters: not counted" and lines[3].startswith("input: size not known; ")
    outputs = json.loads((adapter / "adapter_config.json").read_text())["backbone"]["num_classes"]
    assert lines[4] == f"classes: {outputs} without names"
