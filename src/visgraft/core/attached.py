"""What is attached to a model: the method's modules, where they stand, and all that taking them off again needs."""

from collections.abc import Collection, Iterator
from typing import Any, Self

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from visgraft.backbones.heads import classifier_paths, head_paths
from visgraft.backbones.wrappers import unwrapped
from visgraft.core.families import NORMS
from visgraft.core.method import Method, Position
from visgraft.core.registry import get_method
from visgraft.core.sites import Sites
from visgraft.core.taps import Taps
from visgraft.core.tensors import CHILD, LazyDigest
from visgraft.errors import VisgraftError
from visgraft.options import MethodConfig


class Attached(nn.Module):
    """What `attach` leaves on the model: the method's modules and all that `detach`, `save` and `merge` need.

    `positions` maps a key to the method's module there; `shared` holds the modules common to all positions. `sites` are
    the backbone's, found once; none where the method puts no modules anywhere. `originals` are copies of the
    backbone's own tensors that train, the head's among them, as they were; `adopted` names those of them that somebody
    else unfroze.
    """

    def __init__(self, model: nn.Module, config: MethodConfig, sites: Sites) -> None:
        super().__init__()
        self.config, self.sites = config, sites
        self.plain = LazyDigest(model)
        self.positions = nn.ModuleDict()
        self.shared = nn.ModuleDict()
        self.where: dict[str, Position] = {}
        self.unfrozen: tuple[str, ...] = ()
        self.originals: dict[str, Tensor] = {}
        self.adopted: tuple[str, ...] = ()
        self.frozen: tuple[nn.Parameter, ...] = ()
        self.flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.taps = Taps()
        self.settings: dict[tuple[str, str], Any] = {}
        self.classifiers = {path: model.get_submodule(path) for path in classifier_paths(model)}
        owners = {"", *(path.rpartition(".")[0] for path in self.classifiers)}
        self.outputs = {path: vars(model.get_submodule(path)).get("num_classes") for path in owners}
        self._backbone: tuple[nn.Module] = (model,)  # in a tuple, because a child must not register its parent

    @property
    def method(self) -> type[Method]:
        """The registered class of the attached method."""
        return get_method(self.config.method)

    @property
    def head(self) -> tuple[str, ...]:
        """The paths of the head's layers, also of one that was made or replaced after attaching."""
        return head_paths(self._backbone[0], tuple(self.classifiers))

    @property
    def digest(self) -> str | None:
        """The sha256 of the backbone that the method was attached to; None where its tensors hold no data (meta).

        It leaves out what was `adopted`, of which nobody knows whether it was trained before.
        """
        return self.plain.value()

    @property
    def digest_dtype(self) -> torch.dtype:
        """The precision in which the tensors were of which `digest` is made."""
        return self.plain.dtype

    def stored(self) -> dict[str, Tensor]:
        """Return what an adapter holds, as the model has it: the method's tensors, the head's, and what else trains."""
        self.adopt()
        model, paths = self._backbone[0], (*self.head, CHILD)
        inside = tuple(f"{path}." for path in paths)
        if all(name.startswith(inside) for name in self.originals):  # then no other module need be looked through
            each = (model.get_submodule(path).state_dict(prefix=f"{path}.") for path in paths)
            return {name: tensor for state in each for name, tensor in state.items()}
        state = model.state_dict()
        return {name: tensor for name, tensor in state.items() if name.startswith(inside) or name in self.originals}

    def adopt(self, names: Collection[str] = ()) -> None:
        """Take in what trains of the backbone though the method does not train it, and the given tensors.

        It is stored, counted and set back by `detach` like what the method trains itself, as it was when first seen: by
        a forward with gradients, `train()`, `eval()` or `stored()`. Statistics beside an adopted norm move with it.
        """
        model = self._backbone[0]
        if set(names) <= self.originals.keys() and not any(
            p.requires_grad and name not in self.originals for name, p in _outside(model, {*self.head, CHILD})
        ):
            return
        known = (*(f"{path}." for path in (*self.head, CHILD)),)
        own = {name: p for name, p in model.named_parameters() if not name.startswith(known)}
        found = [name for name, p in own.items() if (p.requires_grad or name in names) and name not in self.originals]
        owners = dict.fromkeys(name.rpartition(".")[0] for name in found)
        beside = [
            f"{owner}.{name}"
            for owner in owners
            if isinstance(model.get_submodule(owner), NORMS)
            for name in model.get_submodule(owner).state_dict(keep_vars=True)
        ]
        state = model.state_dict(keep_vars=True)
        added = [name for name in dict.fromkeys((*found, *beside, *names)) if name in state]
        added = [name for name in added if name not in self.originals]
        for name in set(added) & own.keys():
            own[name].requires_grad_(True)
        self.originals |= {name: state[name].detach().clone() for name in added}
        self.adopted = (*self.adopted, *added)
        self.frozen = tuple(p for name, p in own.items() if name not in self.originals)
        self.plain.leave_out(model, set(self.adopted), self.originals)

    def set(self, path: str, attribute: str, value: Any) -> None:
        """Set an attribute of one of the backbone's modules, to be set back by `reset`."""
        module = self._backbone[0].get_submodule(path)
        self.settings.setdefault((path, attribute), getattr(module, attribute))
        setattr(module, attribute, value)

    def reset(self) -> None:
        """Take off the hooks and set back what `set` changed."""
        self.taps.remove()
        for (path, attribute), value in self.settings.items():
            setattr(self._backbone[0].get_submodule(path), attribute, value)

    def reset_head(self) -> None:
        """Put back the classifier that was there on attaching, where another took its place."""
        for path, module in self.classifiers.items():
            owner, _, name = path.rpartition(".")
            like = next(self._backbone[0].parameters())
            setattr(self._backbone[0].get_submodule(owner), name, module.to(like.device, like.dtype))
        for path, outputs in self.outputs.items():
            if outputs is not None:
                self._backbone[0].get_submodule(path).num_classes = outputs

    def train(self, mode: bool = True) -> Self:
        """Set the mode; parts of the backbone that do not train stay in eval mode, drop-path excepted.

        A frozen part in training mode would drop features at random and move BatchNorm's statistics.
        """
        super().train(mode)
        self.plain.settle()
        self.adopt()
        trained = {name.rpartition(".")[0] for name in (*self.unfrozen, *self.adopted)}
        trained |= {".".join(path.split(".")[:n]) for path in trained for n in range(path.count(".") + 1)}
        inside = tuple(f"{path}." for path in (*self.head, CHILD))
        for path, module in self._backbone[0].named_modules():
            if path and not f"{path}.".startswith(inside) and not isinstance(module, DropPath):
                owner = path if next(module.parameters(), None) is not None else path.rpartition(".")[0]
                module.training = mode and owner in trained
        return self


class AdoptHook:
    """Forward pre-hook on the whole model that adopts what somebody unfroze before an optimizer can move it."""

    def __init__(self, attached: Attached) -> None:
        self.attached = attached

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if any(parameter.requires_grad for parameter in self.attached.frozen):
            self.attached.adopt()


def find_attached(model: nn.Module) -> Attached | None:
    """Return what `attach` left on the model, or on the one inside its wrappers; None: nothing."""
    found = unwrapped(model)._modules.get(CHILD)
    return found if isinstance(found, Attached) else None


def get_attached(model: nn.Module) -> Attached:
    """Return what `attach` left on the model, or on the one inside its wrappers.

    Raises:
        VisgraftError: nothing is attached, or it is to a part of this model, which is named.
    """
    attached = find_attached(model)
    if attached is not None:
        return attached
    inside = [path for path, module in model.named_modules() if isinstance(module, Attached)]
    if inside:
        raise VisgraftError(
            f"nothing is attached to this {type(model).__name__}, but to its {inside[0].removesuffix(f'.{CHILD}')}; "
            "pass that"
        )
    raise VisgraftError(f"nothing is attached to this {type(model).__name__}; call visgraft.attach first")


def _outside(model: nn.Module, paths: Collection[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that are not below these paths, in any order; faster than torch's own walk."""
    waiting = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}{leaf}", parameter
        for name, child in module._modules.items():
            if child is not None and f"{prefix}{name}" not in paths:
                waiting.append((f"{prefix}{name}.", child))
