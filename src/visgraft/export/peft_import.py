"""The way back: a LoRA that peft trained on a timm model as an adapter of the method `lora`, proven to answer alike."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visgraft.adapters.canary import canary_difference
from visgraft.adapters.directory import CONFIG, save
from visgraft.adapters.names import class_names
from visgraft.backbones.creation import KINDS, Backbone, create_backbone, model_data_config
from visgraft.backbones.heads import head_paths, output_layers
from visgraft.core.attach import attach
from visgraft.core.attached import get_attached
from visgraft.core.fitting import check_shape
from visgraft.core.placing import choose_places, find_positions
from visgraft.core.sites import Sites
from visgraft.errors import AdapterError, SiteError
from visgraft.export.affine import fold_target
from visgraft.export.peft_open import FACTS, KEYS, NAME, PREFIXES, hosted, open_peft, peft_answers
from visgraft.export.peft_read import PeftFolder, read_peft
from visgraft.export.proof import compare_logits, torch_answers
from visgraft.export.samples import drawn_samples
from visgraft.files import check_target
from visgraft.methods.lora import PROJECTIONS, LoRAConfig

Rows = tuple[int, int] | None
Spot = tuple[str, Rows]
"""A layer's path, and the rows of its output to which one branch of `lora` adds; None: to all."""


class Part(NamedTuple):
    """The low-rank map beside some rows of a layer, float64: `down` [in, r] and `up` [r, rows]."""

    down: Tensor
    up: Tensor


class Branch(NamedTuple):
    """One branch of peft's, float64: it adds `scale` · `up` [out, r] · `down` [r, in]."""

    up: Tensor
    down: Tensor
    scale: float


def import_peft(
    folder: str | Path,
    out: str | Path,
    *,
    backbone: str | None = None,
    weights: str | None = None,
    image_size: int | None = None,
    classes: Sequence[str] = (),
) -> dict[str, Any]:
    """Write an adapter of the method `lora` that answers as a LoRA of peft's does on its timm model.

    Args:
        folder: what peft's `save_pretrained` wrote.
        out: the directory of the adapter; an earlier one there is replaced.
        backbone: timm's name of the model that it was trained on; None: as visgraft wrote beside the adapter.
        weights: where the backbone's weights come from (see `Backbone`); None: as written there, or timm's own.
        image_size: in pixels; None: the model's own.
        classes: names of the head's outputs; none: as written there.

    Returns:
        `out`, `rank`, `targets`, `last_blocks`, `outputs`, and the `largest_difference` of a logit that was found and
        `tolerance`, the one that was allowed.

    Raises:
        AdapterError: the folder is damaged or no LoRA, says what `lora` cannot, does not fit the backbone, or answers
            otherwise as `lora`; nothing is left behind then.
        WeightsError: the backbone's weights cannot be had.
    """
    folder, out = Path(folder), Path(out)
    _check_out(out)
    read = read_peft(folder)
    origin = _origin(read, backbone, weights, image_size)
    outputs = _outputs(read, origin)
    names = class_names(classes or read.told.classes, outputs)
    plain = create_backbone(origin, outputs).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = create_backbone(origin, outputs)  # a second one, because peft changes it in place
        model = open_peft(folder, hosted(base, origin, outputs, read.host))
    branches = _branches(read, model, plain)
    _take_head(read, model, plain)
    config = _attach(read, plain, branches)
    facts = dict(read.told.preprocessing or model_data_config(plain))
    measured = _prove(read, model, plain, facts)
    _check_told(read, plain, facts)
    save(plain, out, classes=names, data_config=facts, record=_record(read, names, measured["largest_difference"]))
    told = {"rank": config.rank, "targets": list(config.targets or ()), "last_blocks": config.last_blocks}
    return {"out": str(out), **told, "outputs": outputs, "classes": names, **measured}


def _check_out(out: Path) -> None:
    """Raise unless the adapter can be written; peft's adapters have a file of the same name, and are never replaced."""
    check_target(out, CONFIG)
    if (out / CONFIG).is_file():
        try:
            known = json.loads((out / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = None
        if not isinstance(known, dict) or "method" not in known:
            raise AdapterError(f"{out} exists and is no adapter of visgraft; choose another --out")


def _origin(read: PeftFolder, name: str | None, weights: str | None, image_size: int | None) -> Backbone:
    """Return the backbone that is asked for, or that is told.

    Raises:
        AdapterError: neither names one, both differ, or the told one came from a file.
    """
    told = read.told.backbone
    if told is None:
        if name is None:
            raise AdapterError(f"{read.path} does not say which timm model it is for; add --backbone NAME")
        return Backbone(name, weights or "hub", image_size)
    for flag, given, stored in (("backbone", name, told.name), ("image-size", image_size, told.image_size)):
        if given is not None and given != stored:
            raise AdapterError(f"--{flag} is {given}, but {read.path} was exported for {stored}; leave it out")
    if weights is None and told.weights not in KINDS:
        raise AdapterError(
            f"{read.path} was exported for the weights file {told.weights}; pass it again: "
            f"--weights PATH/{told.weights}"
        )
    return dataclasses.replace(told, weights=weights or told.weights)


def _outputs(read: PeftFolder, origin: Backbone) -> int:
    """Return how many outputs the head has that the adapter holds or changes; 0 where there is nothing on it."""
    with torch.device("meta"):
        empty = create_backbone(dataclasses.replace(origin, weights="none"), 1)
    for path in output_layers(empty):
        for last in ("weight", "lora_B.weight"):
            weight = read.tensors.get(f"{KEYS}{PREFIXES[read.host]}{path}.{last}")
            if weight is not None and weight.ndim:
                return len(weight)
    return 0


def _branches(read: PeftFolder, model: Any, plain: nn.Module) -> dict[str, Branch]:
    """Return the branches of a peft model by the paths of timm's layers.

    Raises:
        AdapterError: tensors of the file are not in the model or the other way round, or the layers beside the branches
            are not the backbone's.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    odd = sorted(set(read.tensors) ^ set(get_peft_model_state_dict(model)))
    if odd:
        where = "is in the file, but not in" if odd[0] in read.tensors else "is not in the file, but in"
        raise AdapterError(
            f"{read.path} does not fit the backbone: {odd[0]} {where} the model that peft makes; check --backbone"
        )
    found, state = {}, plain.state_dict()
    for path, module in model.base_model.model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = path.removeprefix(PREFIXES[read.host])
        if not torch.equal(module.get_base_layer().weight, state[f"{name}.weight"]):
            raise AdapterError(f"{read.path} changes the weight of {name}, which lora cannot say; keep it in peft")
        if NAME not in module.lora_A:
            raise AdapterError(f"{read.path} adapts {name} as an embedding, which lora cannot say; keep it in peft")
        up, down = (layer[NAME].weight.detach().double().flatten(1) for layer in (module.lora_B, module.lora_A))
        found[name] = Branch(up, down, float(module.scaling[NAME]))
    return found


def _take_head(read: PeftFolder, model: Any, plain: nn.Module) -> None:
    """Copy the head into the plain model.

    Raises:
        AdapterError: the adapter holds further layers whole, and they differ from the backbone's, or one head of two.
    """
    from peft.utils.other import ModulesToSaveWrapper

    inside, state, taken = tuple(f"{path}." for path in head_paths(plain)), plain.state_dict(), set()
    for path, module in model.base_model.model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        for key, tensor in module.modules_to_save[NAME].state_dict().items():
            name = f"{path}.{key}".removeprefix(PREFIXES[read.host])
            if inside and name.startswith(inside):
                state[name].copy_(tensor)
                taken.add(name)
            elif name not in state or not torch.equal(tensor, state[name]):
                raise AdapterError(
                    f"{read.path} trains {name} as a whole (modules_to_save), which lora cannot say; keep it in peft"
                )
    lacking = [name for name in state if inside and name.startswith(inside) and name not in taken]
    if lacking:
        raise AdapterError(
            f"{read.path} does not hold {lacking[0]}, without which the head is not the one that was trained; name the "
            "whole head in peft's modules_to_save"
        )


def _attach(read: PeftFolder, plain: nn.Module, branches: Mapping[str, Branch]) -> LoRAConfig:
    """Attach `lora` to the plain model so that it says the branches; returns its options.

    Raises:
        AdapterError: a branch stands where `lora` cannot, or all are zero.
    """
    parts, config = _divided(read, plain, branches)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attach(plain, config).eval()
    attached = get_attached(plain)
    with torch.no_grad():
        for key, position in attached.where.items():
            module: Any = attached.positions[key]
            part = parts.get(_spot(attached.sites, position))
            if part is None:
                continue
            rank = len(part.up)  # beyond it, the branch stays as a new one: down at random, up at zero
            module.down[:, :rank] = part.down
            module.up[:rank] = part.up / config.scale
    return config


def _divided(read: PeftFolder, plain: nn.Module, branches: Mapping[str, Branch]) -> tuple[dict[Spot, Part], LoRAConfig]:
    """Return the branches as `lora` has them, one for each projection, and its options; those of zero are left out.

    Raises:
        AdapterError: a branch stands where `lora` cannot, or all are zero.
    """
    targets = _offered(plain)
    known: dict[Spot, tuple[str, int]] = {}
    if targets:
        every = LoRAConfig(targets=targets)
        positions, sites = find_positions(plain, every)
        named = dict(zip(choose_places(every, sites, type(plain).__name__), targets, strict=True))
        known = {_spot(sites, position): (named[position.place], position.block or 0) for position in positions}
    parts: dict[Spot, Part] = {}
    for path, branch in branches.items():
        spots = [spot for spot in known if spot[0] == path]
        if not spots:
            raise AdapterError(
                f"{read.path} adapts {path}, where lora cannot stand (in blocks, it takes "
                f"{', '.join(targets) or 'nothing'}); keep it in peft"
            )
        parts |= _parts_of(read, branch, spots)
    if not parts:
        raise AdapterError(f"{read.path} changes nothing but the head: all its branches are zero; train it first")
    chosen = {known[spot][0] for spot in parts}
    first, count = min(known[spot][1] for spot in parts), 1 + max(block for _, block in known.values())
    scales = {branch.scale for branch in branches.values()}
    config = LoRAConfig(
        rank=max(len(part.up) for part in parts.values()),
        targets=tuple(target for target in PROJECTIONS if target in chosen),
        scale=scales.pop() if len(scales) == 1 and min(scales) > 0 else 1.0,
        dropout=read.dropout,
        last_blocks=count - first if first else None,
    )
    return parts, config


def _offered(plain: nn.Module) -> tuple[str, ...]:
    """Return the projections beside which `lora` can stand in this backbone."""
    offered = []
    for target in PROJECTIONS:
        try:
            find_positions(plain, LoRAConfig(targets=(target,)))
        except SiteError:
            continue
        offered.append(target)
    return tuple(offered)


def _spot(sites: Sites, position: Any) -> Spot:
    """Return the layer beside which a branch of `lora` stands."""
    target = fold_target(*sites.at(position))
    assert target is not None and target.side == "beside"
    return target.neighbours[0].path, target.neighbours[0].rows


def _parts_of(read: PeftFolder, branch: Branch, spots: Collection[Spot]) -> dict[Spot, Part]:
    """Return the parts of a branch that `lora` has a place for, each of its own rank; those of zero are left out.

    Raises:
        AdapterError: the branch adds to rows for which there is no place.
    """
    rest = torch.ones(len(branch.up), dtype=torch.bool)
    # Two thin decompositions in place of a large one: the map's values are those of the triangles' product.
    (left, high), (right, low) = torch.linalg.qr(branch.up), torch.linalg.qr(branch.down.T)
    size = branch.scale * (high @ low.T).norm().item()
    # The factors were rounded to float32 at best; a value below that is no part of the map.
    noise = torch.finfo(torch.float32).eps * size
    found = {}
    for spot in spots:
        rows = slice(*spot[1]) if spot[1] else slice(None)
        rest[rows] = False
        if part := _part(branch.scale * left[rows] @ high @ low.T, right, noise):
            found[spot] = part
    if bool(rest.any()) and _part(branch.scale * left[rest] @ high @ low.T, right, noise):
        first = int(rest.nonzero()[0])
        raise AdapterError(
            f"{read.path} adapts row {first} of the output of {next(iter(spots))[0]}, where lora cannot stand; keep it "
            "in peft"
        )
    return found


def _part(change: Tensor, right: Tensor, noise: float) -> Part | None:
    """Return `change` [rows, r] · `right`ᵀ [r, in] as factors of its numerical rank; None where that is 0."""
    left, values, turned = torch.linalg.svd(change, full_matrices=False)
    kept = int((values > noise).sum())
    if not kept:
        return None
    root = values[:kept].sqrt()
    return Part(right @ turned[:kept].T * root, root[:, None] * left[:, :kept].T)


def _prove(read: PeftFolder, model: Any, plain: nn.Module, data_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the largest difference of a logit between peft's model and ours, what was allowed, and on how many images.

    Raises:
        AdapterError: it is above that, or the images are told to be of a size that the model does not take.
    """
    channels, *size = data_config["input_size"]
    told = f"images prepared as {read.path / FACTS} says"
    check_shape(plain, channels, size, told, kind=AdapterError, remedy="restore that file")
    samples = drawn_samples(data_config)
    expected, found = peft_answers(model, samples), torch_answers(plain, samples)
    difference, allowed = compare_logits(expected, found)
    if not difference <= allowed:
        raise AdapterError(
            f"{read.path} answers otherwise as lora than in peft: a logit differs by {difference:.2g}, above "
            f"{allowed:.2g}; nothing was written: keep it in peft, and report this"
        )
    return {"largest_difference": difference, "tolerance": allowed, "images": len(samples)}


def _check_told(read: PeftFolder, model: nn.Module, data_config: Mapping[str, Any]) -> None:
    """Raise an AdapterError where a model answers the seeded picture otherwise than the adapter that was exported."""
    if read.told.canary is None:
        return
    found, allowed = canary_difference(model, read.told.canary, data_config)
    if not found <= allowed:
        raise AdapterError(
            f"{read.path} answers a seeded picture otherwise than the adapter that it was exported from: a logit "
            f"differs by {found:.2g}, above {allowed:.2g}; pass the same weights with --weights, or restore the folder"
        )


def _record(read: PeftFolder, names: Sequence[str], difference: float) -> dict[str, Any]:
    """Return what is kept of where an adapter came from; tasks only where no other names were given."""
    told = read.told
    several: dict[str, Any] = {"multi_label": True} if told.task == "several_classes" else {}
    if told.tasks and tuple(names) == told.classes:
        several = {"tasks": [task.to_json() for task in told.tasks]}
    data = {**({"background": told.background} if told.background else {}), **several}
    imported = {"from": f"peft {read.config.get('peft_version') or 'of unknown version'}", "difference": difference}
    return {"imported": imported, **({"data": data} if data else {})}
