"""Configurations: the adapters of one method with the same options are computed together."""

import copy
import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from visgraft.bank.ground import FrozenBackbone
from visgraft.bank.layout import Layout
from visgraft.core.attach import assemble
from visgraft.core.attached import Attached, get_attached
from visgraft.core.method import ActsByRows, InsertsByRows, Method, TokenMethod
from visgraft.core.sites import BEFORE_BLOCKS
from visgraft.options import MethodConfig


class OwnRows(NamedTuple):
    """A tensor of the backbone that an adapter replaces: its name, and which rows of the layer's own it is."""

    name: str
    rows: tuple[int, int] | None = None


Owned = dict[str, dict[str, list[OwnRows]]]
"""Which tensors of which layers are replaced: path of the layer -> its tensor ("bias") -> by what."""


class Configuration:
    """One method with its options, and the backbone's own tensors that train beside it.

    `apart` says why such adapters cannot share a forward with others; None: they can. `owned` are the layers whose
    tensors differ from image to image. `shared` is how many blocks give the same as without an adapter; None: not even
    what comes before them. `template` is the backbone with the method attached, on the bank's tensors.
    """

    def __init__(self, ground: FrozenBackbone, config: MethodConfig, own: Sequence[str]) -> None:
        self.config = config
        # Tasks with passes of their own need a head with the outputs of them all, which the bank's seldom has.
        plain = ground.with_head(sum(config.passes)) if config.passes else ground.copy()
        self.template = assemble(plain, config).eval()
        attached = get_attached(self.template)
        attached.adopt(own)
        heads = tuple(f"{path}." for path in attached.head)
        stored = {name: tensor for name, tensor in attached.stored().items() if not name.startswith(heads or " ")}
        self.layout = Layout(stored)
        own_names = [name for name in stored if name in attached.originals]
        attached.originals, attached.flags, attached.frozen = {}, {}, ()  # nothing is detached from a copy
        self.template.requires_grad_(False)
        self.owned: Owned = {}
        matrices = [name for name in own_names if not _is_vector(stored[name])]
        self.apart: str | None = "answers each of its tasks in a pass of its own" if config.passes else None
        if matrices:
            self.apart = f"replaces whole weights of the backbone, {matrices[0]} among them"
        else:
            self.owned, lost = _owned(ground, own_names)
            if lost:
                self.apart = f"replaces {lost}, which is not applied to each image by itself"
        modules = [module for module in attached.positions.values() if isinstance(module, Method)]
        self.inserts = any(isinstance(module, TokenMethod) for module in modules)
        self.shared = _shared_blocks(ground, attached, own_names)

    def copy(self) -> nn.Module:
        """Return modules of their own, the method attached, on the same tensors."""
        digest = get_attached(self.template).plain  # handed on as it is: a copy of it would make it
        shared = {id(tensor): tensor for tensor in (*self.template.parameters(), *self.template.buffers())}
        return copy.deepcopy(self.template, {**shared, id(digest): digest})

    @property
    def way(self) -> str:
        """How adapters of this configuration are computed beside others, in words."""
        if self.apart:
            return f"one forward for each adapter: it {self.apart}"
        attached = get_attached(self.template)
        kinds = {_way(module) for module in attached.positions.values() if isinstance(module, Method)}
        kinds |= {"layers with tensors of each image"} if self.owned else set()
        told = " and ".join(sorted(kinds)) or "the head alone"
        return f"{told}; a forward of their own, as they insert tokens" if self.inserts else told


def configuration_key(config: MethodConfig, own: Sequence[str]) -> str:
    """Return what is equal for adapters of one configuration."""
    return json.dumps([config.method, config.to_dict(), sorted(own)], sort_keys=True)


def _way(module: Method) -> str:
    if isinstance(module, ActsByRows | InsertsByRows):
        return "the method's own form for many images"
    if not isinstance(module, TokenMethod) and module.low_rank() is not None:
        return "batched low-rank factors"
    return "the method mapped over the images"


def _is_vector(tensor: torch.Tensor) -> bool:
    return tensor.numel() == max(tensor.shape, default=1)


def _owned(ground: FrozenBackbone, names: Sequence[str]) -> tuple[Owned, str | None]:
    """Return the layers whose tensors may differ from image to image, and the first name for which none is found."""
    runs, found = ground.runs(), Owned()
    apart = {
        bias.path: (projection.path, bias.rows) for projection in ground.projections for bias in projection.biases or ()
    }
    for name in names:
        path, _, leaf = name.rpartition(".")
        entry = OwnRows(name)
        if name in apart:
            path, leaf, entry = apart[name][0], "bias", OwnRows(name, apart[name][1])
            runs_of = path.rpartition(".")[0]  # attention uses the projection's weight without calling it
        else:
            runs_of = path
        run = runs.get(runs_of)
        leaves = not list(ground.plain.get_submodule(path).children())
        if run is None or not run.by_images or not leaves:
            return {}, name
        found.setdefault(path, {}).setdefault(leaf, []).append(entry)
    return found, None


def _shared_blocks(ground: FrozenBackbone, attached: Attached, own: Sequence[str]) -> int | None:
    """Return how many blocks give the same as in the plain backbone; None: not even what comes before them."""
    runs = ground.runs()
    touched = {name.rpartition(".")[0] for name in own}
    for position in attached.where.values():
        if position.place.reads in BEFORE_BLOCKS:
            return None
        reads, adds_to = attached.sites.at(position)
        touched |= {reads.host, adds_to.host, *(site.entry for site in (reads, adds_to) if site.entry)}
    begins = [runs[block["stream.in"].host].order for block in ground.sites.blocks if runs]
    orders = [runs[path].order if path in runs else 0 for path in touched]
    if not touched:
        return len(begins) if begins else None
    before = [number for number, order in enumerate(begins) if order <= min(orders)]
    return before[-1] if before else None
