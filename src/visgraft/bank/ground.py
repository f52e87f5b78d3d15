"""The frozen backbone of a bank: held once, copied without its tensors, and what is known of its modules."""

import copy
import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visgraft.backbones.heads import classifier_paths, head_paths
from visgraft.backbones.input_size import built_size, input_size
from visgraft.backbones.wrappers import unwrapped
from visgraft.bank.layout import Layout
from visgraft.core.attached import find_attached
from visgraft.core.dryrun import meta_copy
from visgraft.core.finding import find_sites
from visgraft.core.sites import Neighbour, Sites
from visgraft.core.tensors import backbone_digest, precision_of, sharing_copy
from visgraft.errors import SiteError, VisgraftError

TRIED = (2, 3)
"""Numbers of images with which a backbone runs without data, to see which modules receive as many rows."""


class Run(NamedTuple):
    """How a module runs: as which one it begins, and whether each time rows of the images enter it."""

    order: int
    by_images: bool


@dataclass(frozen=True, eq=False)
class HeadKind:
    """The layers of a head without data, by path, and how their tensors lie; `outputs` 0: there is no head."""

    modules: dict[str, nn.Module]
    layout: Layout
    outputs: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What is equal for heads that are computed alike."""
        kinds = tuple((path, type(module), repr(module)) for path, module in self.modules.items())
        return kinds, tuple(self.layout.shapes.items())


class FrozenBackbone:
    """A plain backbone whose tensors every copy of its modules shares; nothing is ever changed in it."""

    def __init__(self, model: nn.Module) -> None:
        if find_attached(model):
            raise VisgraftError("a bank holds adapters on a plain backbone, and something is attached to this one; "
                                "call visgraft.detach first, or pass a plain model")  # fmt: skip
        model = unwrapped(model)
        memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
        memo |= {id(buffer): buffer for buffer in model.buffers()}
        self.plain = copy.deepcopy(model, memo).eval()
        like = next(self.plain.parameters())
        if like.is_meta:
            raise VisgraftError("this backbone holds no data (it is on the meta device); create it with its weights")
        self.device, self.dtype = like.device, precision_of(self.plain)
        if not head_paths(self.plain) and hasattr(self.plain, "reset_classifier"):  # adapters bring one
            self.plain.reset_classifier(1)  # type: ignore[operator]
            self.plain.to(self.device, self.dtype).eval()
        self.head_paths = classifier_paths(self.plain)
        self.size = built_size(self.plain)
        self._digests: dict[tuple[frozenset[str], torch.dtype], str | None] = {}
        self._heads: dict[int, HeadKind] = {}
        self._runs: dict[str, Run] | None = None
        self._halves: dict[int, nn.Parameter] | None = None
        self._lock = threading.RLock()
        try:
            self.sites = find_sites(self.plain)
        except SiteError:  # methods without modules do without
            self.sites = Sites()

    def copy(self) -> nn.Module:
        """Return modules of their own on the backbone's tensors."""
        return sharing_copy(self.plain)

    def digest(self, without: frozenset[str], dtype: torch.dtype) -> str | None:
        """Return the sha256 of the frozen tensors but some, in a precision."""
        with self._lock:
            key = without, dtype
            if key not in self._digests:
                self._digests[key] = backbone_digest(self.plain, without, dtype=dtype)
            return self._digests[key]

    def halves(self) -> dict[int, nn.Parameter]:
        """Return the tensors of linear layers and convolutions in bf16, by the ids of what they are made of.

        Autocast would make the very same in every forward. They are made when first asked for.
        """
        with self._lock:
            if self._halves is None:
                layers = [layer for layer in self.plain.modules() if type(layer) in (nn.Linear, nn.Conv2d)]
                whole = [t for layer in layers for t in layer.parameters(recurse=False) if t.dtype == torch.float32]
                self._halves = {id(t): nn.Parameter(t.to(torch.bfloat16), requires_grad=False) for t in whole}
            return self._halves

    @property
    def bytes(self) -> int:
        """The bytes of its tensors, and of `halves` where those were made."""
        tensors = {id(t): t for t in (*self.plain.parameters(), *self.plain.buffers(), *(self._halves or {}).values())}
        return sum(t.nbytes for t in tensors.values())

    @property
    def projections(self) -> list[Neighbour]:
        """The projections whose biases attention keeps apart."""
        made_by = [site.produced_by for block in self.sites.blocks for site in block.values()]
        return list({n.path: n for n in made_by if n is not None and n.biases}.values())

    def head(self, outputs: int) -> HeadKind:
        """Return the head that timm makes for this backbone with so many outputs.

        Raises:
            VisgraftError: the model cannot change its head.
        """
        with self._lock:
            if outputs not in self._heads:
                self._heads[outputs] = head_kind(self.with_head(outputs), outputs, self.dtype)
            return self._heads[outputs]

    def with_head(self, outputs: int) -> nn.Module:
        """Return modules of their own on the backbone's tensors, but with a head of so many outputs, drawn anew.

        Raises:
            VisgraftError: the model cannot change its head.
        """
        model = self.copy()
        if not hasattr(model, "reset_classifier"):
            raise VisgraftError(
                f"{type(model).__name__} cannot change its head, which needs {outputs} outputs; add the "
                "adapter as a loaded model"
            )
        model.reset_classifier(outputs)  # type: ignore[operator]
        return model

    def head_of(self, model: nn.Module, outputs: int) -> HeadKind:
        """Return the head that a model of this backbone has, whatever somebody put there."""
        kind = self._heads.get(outputs)
        if kind is not None and all(
            type(model.get_submodule(path)) is type(module) and repr(model.get_submodule(path)) == repr(module)
            for path, module in kind.modules.items()
        ):
            return kind
        found = head_kind(model, outputs, self.dtype)
        if all(type(module) is nn.Linear for module in found.modules.values()):
            with self._lock:
                self._heads[outputs] = found
        return found

    def runs(self) -> dict[str, Run]:
        """Return how each module runs in one forward, by path; nothing where the model does not run without data."""
        with self._lock:
            if self._runs is None:
                self._runs = _find_runs(self.plain)
            return self._runs


def head_kind(model: nn.Module, outputs: int, dtype: torch.dtype) -> HeadKind:
    """Return the kind of a model's head, its tensors in a precision."""
    paths = classifier_paths(model) if outputs else ()
    modules = {path: model.get_submodule(path) for path in paths}
    tensors: dict[str, Tensor] = {
        f"{path}.{name}": tensor.to(dtype) if tensor.is_floating_point() else tensor
        for path, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    return HeadKind({path: meta_copy(module).eval() for path, module in modules.items()}, Layout(tensors), outputs)


def _find_runs(model: nn.Module) -> dict[str, Run]:
    """Run a copy without data for different numbers of images and compare what enters the modules."""
    found: list[dict[str, list[int]]] = []
    for images in TRIED:
        entered: dict[str, list[int]] = {}
        blank = meta_copy(model)
        for path, module in blank.named_modules():

            def note(_: nn.Module, args: tuple[Any, ...], path: str = path, to: Any = entered) -> None:
                tensors = [x for x in args if isinstance(x, Tensor) and x.ndim]
                to.setdefault(path, []).append(len(tensors[0]) if tensors else 0)

            module.register_forward_pre_hook(note)
        like = next(blank.parameters())
        try:
            with torch.no_grad():
                blank(torch.empty(images, *input_size(blank), device="meta", dtype=like.dtype))
        except (RuntimeError, NotImplementedError, SiteError):
            return {}
        found.append(entered)
    few, many = found
    return {
        path: Run(order, _scales(few[path], many.get(path, []))) for order, path in enumerate(few)
    }  # in the order of their first run


def _scales(few: list[int], many: list[int]) -> bool:
    """Whether the rows that entered are so many for each image."""
    return len(few) == len(many) and all(
        a and a % TRIED[0] == 0 and a * TRIED[1] == b * TRIED[0] for a, b in zip(few, many, strict=True)
    )
