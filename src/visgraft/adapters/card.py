"""The model card of an adapter: all that its record tells a reader, with the metadata by which the hub finds it."""

import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from visgraft.adapters.calibrated import told_calibration
from visgraft.adapters.record import AdapterRecord
from visgraft.backbones.creation import Backbone

MEASURES = {
    "top1": ("top-1 accuracy", "accuracy"),
    "macro_f1": ("macro-F1", "f1"),
    "balanced_accuracy": ("balanced accuracy", "balanced_accuracy"),
    "mean_average_precision": ("mean average precision", "mean_average_precision"),
}
"""What a training measures on its validation images: how people and how the hub call it."""
OF_NUMBERS = {
    "mae": ("mean absolute error", "mae"),
    "rmse": ("root mean squared error", "rmse"),
    "constant_mae": ("mean absolute error of a constant answer", ""),
    "r2": ("R²", "r_squared"),
    "spearman": ("Spearman's rank correlation", "spearmanr"),
}
"""The same of numbers; the errors are in the number's unit, and that of a constant answer is none of the adapter's."""
ERRORS = ("mae", "rmse", "constant_mae")
NAMES_SHOWN = 300
COVERAGES, LEVELS = (90, 80, 50), (5, 10, 20, 50)
"""Percentages, of which the card names the best one that the validation images allow; one image allows 50."""
FEW_IMAGES = 10  # of a class, below which the card warns of it
WIDE = 0.1  # an interval
_ACTS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKUP = re.compile(r"[\\`*_{}\[\]<>|~&@:/$]|^[-+#=]")
_NUMBERED = re.compile(r"^(\d{1,9})([.)])(?=\s|$)")


def make_card(record: AdapterRecord, place: str | None = None) -> str:
    """Return the card of an adapter, in the hub's format; `place` is what to load it by, None where that is open.

    Its last line holds the digest of all before, by which `is_made` tells that nobody has changed it.
    """
    figures = _figures(record)
    text = _template().render(
        metadata=_metadata(record, figures, place).to_yaml(),
        record=record,
        options=json.dumps(record.method.to_dict()),
        base=base_model(record.backbone),
        place=place or "path/to/this-folder",
        figures=figures,
        others={name: value for name, value in record.figures.items() if name.removeprefix("val_") not in _measured()},
        size=_input_size(record),
        images=_counts(record, "images"),
        measured=record.figures.get("val_images"),
        calibration=told_calibration(record.calibrated, record.tasks),
        coverage=_coverage(record),
        level=_level(record),
        limits=_limits(record, figures),
        shown=NAMES_SHOWN,
    )
    return f"{text.rstrip()}\n\n{_mark(text)}\n"


def is_made(text: str) -> bool:
    """Return whether a card is as `make_card` wrote it, here or in another version."""
    head, _, last = text.rstrip().rpartition("\n")
    return last == _mark(head)


def _mark(text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.rstrip().splitlines())  # as editors and git may leave them
    return f"<!-- written by visgraft, sha256 {hashlib.sha256(lines.encode()).hexdigest()} -->"


def base_model(backbone: Backbone) -> str | None:
    """Return the hub's name of a backbone whose weights came from there, None for another."""
    name = backbone.name.removeprefix("timm/")
    if backbone.weights != "hub":
        return None
    if name.startswith(("hf-hub:", "hf_hub:")):
        found = name.partition(":")[2].partition("@")[0]
    else:
        try:
            facts = timm.get_pretrained_cfg(name)
        except RuntimeError:  # a tag that timm does not know
            return None
        known = (facts and facts.hf_hub_id) or ""
        found = f"{known}{name.partition('.')[0]}.{facts.tag}" if facts and known.endswith("/") else known
    try:
        validate_repo_id(found)
    except HFValidationError:
        return None
    return found if "/" in found else None


def plain(text: object) -> str:
    """Return text of the user as Markdown that shows just that: on one line, and as no markup, link or tag."""
    seen = _ACTS.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), str(text))
    return _NUMBERED.sub(r"\1\\\2", _MARKUP.sub(r"\\\g<0>", seen))


def code(text: object) -> str:
    """Return text as a span of code, fenced by more backticks than stand in it."""
    seen = _ACTS.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), str(text))
    fence = "`" * (max(map(len, re.findall("`+", seen)), default=0) + 1)
    return f"{fence} {seen} {fence}" if "`" in seen else f"`{seen}`"


def _metadata(record: AdapterRecord, figures: Sequence[Mapping[str, Any]], place: str | None) -> ModelCardData:
    title = place.removeprefix("hf:") if place else f"{record.method.method} adapter"
    task = "image-classification"
    results = [
        EvalResult(
            task_type=task,
            dataset_type="imagefolder",
            dataset_name="validation images of the training",
            dataset_split="validation",
            metric_type=figure["kind"],
            metric_name=figure["name"] + (f" (95 % interval {figure['interval']})" if figure["interval"] else ""),
            metric_value=figure["value"],
        )
        for figure in figures
        if figure["kind"]
    ]
    base = base_model(record.backbone)
    relation: dict[str, Any] = {"base_model_relation": "adapter"} if base else {}
    return ModelCardData(
        library_name="visgraft",
        pipeline_tag=task,
        base_model=base,
        tags=["visgraft", "timm", "adapter", "parameter-efficient-fine-tuning", record.method.method],
        metrics=list(dict.fromkeys(figure["kind"] for figure in figures if figure["kind"])) or None,
        model_name=title if results else None,
        eval_results=results or None,
        **relation,
    )


def _measured() -> set[str]:
    return {*MEASURES, "top1_ci95", "images", "tasks"}


def _figures(record: AdapterRecord) -> list[dict[str, Any]]:
    """Return the figures on validation images that are numbers, with their intervals."""
    found = _rates({name.removeprefix("val_"): value for name, value in record.figures.items()}, MEASURES)
    by_task = record.figures.get("val_tasks")
    for task in record.tasks:
        stored = by_task.get(task.name) if isinstance(by_task, Mapping) else None
        if isinstance(stored, Mapping):
            measures = OF_NUMBERS if task.kind == "number" else MEASURES
            found += _rates(stored, {
                key: (f"{task.name}: {name}{f' in {task.unit}' if key in ERRORS and task.unit else ''}", kind)
                for key, (name, kind) in measures.items()
            })  # fmt: skip
    return found


def _rates(stored: Mapping[str, Any], measures: Mapping[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """Return the figures among these measures that are numbers."""
    found = list[dict[str, Any]]()
    for key, (name, kind) in measures.items():
        value: Any = stored.get(key)
        limits: Any = stored.get(f"{key}_ci95")
        if _is_number(value):
            both = isinstance(limits, list | tuple) and len(limits) == 2 and all(map(_is_number, limits))
            low, high = limits if both else (0.0, 0.0)
            found.append({"name": name, "kind": kind, "value": round(float(value), 4),
                          "interval": f"{low:.3f}–{high:.3f}" if both else None,
                          "wide": both and key not in ERRORS and high - low > WIDE})  # fmt: skip
    return found


def _coverage(record: AdapterRecord) -> float | None:
    """Return a coverage that the adapter can answer with; None: it has a task that is not calibrated, or is not."""
    if len(record.calibrated) < max(1, len(record.tasks)):
        return None
    images = min(one.images for one in record.calibrated.values())
    return max(percent for percent in COVERAGES if (images + 1) * percent <= images * 100) / 100


def _level(record: AdapterRecord) -> float:
    """Return a level at which the adapter can mark pictures unlike its training's, by how many were held out."""
    images = record.figures.get("val_images")
    known = images if isinstance(images, int) and images > 0 else 100
    return min(percent for percent in LEVELS if (known + 1) * percent >= 100) / 100


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _input_size(record: AdapterRecord) -> tuple[Any, ...]:
    """Return (channels, height, width) of the images; empty where that is not known."""
    size = record.data_config.get("input_size")
    return tuple(size) if isinstance(size, list | tuple) and len(size) == 3 else ()


def _counts(record: AdapterRecord, key: str) -> dict[str, int]:
    """Return numbers by name that the record may hold of its data, empty where it does not."""
    found = record.facts.get("data", {}).get(key)
    right = isinstance(found, Mapping) and all(isinstance(value, int) for value in found.values())
    return {str(name): value for name, value in found.items()} if right else {}


def _limits(record: AdapterRecord, figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a user should not expect of the adapter, as far as its record shows it; text of Markdown."""
    facts, size = record.facts, _input_size(record)
    images = _counts(record, "images")
    closed = "It gives each class that it knows a probability of its own" if record.multi_label else (
        "It names one of the classes that it knows for every picture, whatever that shows"
    )  # fmt: skip
    if record.tasks:
        closed = "It answers every task for every picture, whatever that shows"
    found = [f"{closed}; it was not taught to say that a picture shows none of them."]
    if figures:
        chosen = " and ".join(
            ["the method with its setting"] * ("chosen" in facts)
            + ["the epoch to keep"] * (record.training.get("select") == "val")
        )
        found.append(
            "The figures are of validation images"
            + (f", by which {chosen} was chosen, so that they are slightly better than on new ones" if chosen else "")
            + f". No test images were {'measured for this card' if images.get('test', 1) else 'set apart'}."
        )
    else:
        found.append("Nothing was measured that this card knows of.")
    if any(figure["wide"] for figure in figures):
        found.append("The validation images are few, as the width of the interval shows.")
    per_class = _counts(record, "train_images_by_class")
    few = [f"{plain(name)} ({count})" for name, count in per_class.items() if count < FEW_IMAGES]
    if few:
        more = f" and {len(few) - NAMES_SHOWN} more" if len(few) > NAMES_SHOWN else ""
        found.append(f"Few training images: {', '.join(few[:NAMES_SHOWN])}{more}.")
    if size:
        found.append(f"Pictures are made {size[1]} × {size[2]} pixels; what is too small to see there is lost.")
    if record.precision == "bf16":
        found.append("It was trained and measured in bf16; in float32, single answers may differ.")
    if "diverged_after_epoch" in facts:
        found.append(
            f"Its training diverged after epoch {plain(facts['diverged_after_epoch'])}; this is the last good state."
        )
    if record.backbone.weights == "none":
        found.append("The backbone is random, not pretrained.")
    if "blend" in facts:
        parts = ", ".join(map(plain, facts["blend"].get("adapters", ())))
        found.append(f"It was blended of {parts}, not trained as it is; their own cards say what each was taught.")
    else:
        found.append("It is one training with one seed; another would differ somewhat.")
    return found


def _number(value: Any) -> str:
    return f"{value:,}" if _is_number(value) else "an unknown number of"


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("visgraft", "adapters"),
        autoescape=False,  # the template escapes for Markdown instead
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": plain, "code": code, "number": _number}
    return environment.get_template("card.md")
