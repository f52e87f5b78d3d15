"""The backbone's own tensors: its head, its digest, and what each tensor is."""

import contextlib
import copy
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from visgraft.backbones.digest import tensors_digest
from visgraft.backbones.heads import head_paths
from visgraft.backbones.wrappers import unwrapped
from visgraft.core.families import NORMS
from visgraft.core.method import OwnTensor

CHILD = "visgraft"
"""Name of the child module that `attach` registers on the backbone; it holds everything that the method adds."""

SMALL = 2**16
"""Tensors of at most so many numbers are copied together to be looked at in one go."""


_IN_EVAL: dict[nn.Module, tuple[int, dict[nn.Module, bool]]] = {}
_IN_EVAL_LOCK = threading.Lock()


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode inside the context; afterwards each of its modules has the mode that it had.

    Where several threads are inside for one model, the last that leaves gives the modes back.
    """
    model = unwrapped(model)
    with _IN_EVAL_LOCK:
        users, modes = _IN_EVAL.get(model) or (0, {module: module.training for module in model.modules()})
        model.eval()
        _IN_EVAL[model] = (users + 1, modes)
    try:
        yield
    finally:
        with _IN_EVAL_LOCK:
            users, modes = _IN_EVAL.pop(model)
            if users > 1:
                _IN_EVAL[model] = (users - 1, modes)
            else:
                for module, mode in modes.items():
                    module.training = mode


def backbone_digest(
    model: nn.Module,
    without: Collection[str] = (),
    *,
    dtype: torch.dtype | None = None,
    originals: Mapping[str, Tensor] | None = None,
) -> str | None:
    """Return the sha256 of the plain backbone's tensors in order of name; None where tensors hold no data (meta).

    The head is left out because it is new for every task, and position embeddings because resampling them to
    another image size may round differently on another machine.

    Args:
        model: the model, with or without something attached.
        without: names of further tensors to leave out.
        dtype: the precision to convert tensors of the model's own precision to; None: as they are.
        originals: what tensors were before they trained, by name.
    """
    own = precision_of(model)
    tensors = {name: tensor for name, tensor in _digested(model).items() if name not in without}
    tensors |= {name: t.to(tensors[name].dtype) for name, t in (originals or {}).items() if name in tensors}
    if dtype not in (None, own):
        tensors = {name: tensor.to(dtype) if tensor.dtype == own else tensor for name, tensor in tensors.items()}
    return _sha256(tensors)


def sharing_copy(model: nn.Module, own: Iterable[str] = ()) -> nn.Module:
    """Return a deep copy that shares all tensors with the model but those named in `own`."""
    apart = set(own)
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return copy.deepcopy(model, {id(tensor): tensor for name, tensor in tensors if name not in apart})


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds a number that is not finite; small ones are looked at together."""
    small = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel() <= SMALL}
    checked = bool(small) and bool(torch.cat([t.reshape(-1) for t in small.values()]).isfinite().all())
    others = {name: t for name, t in tensors.items() if not (checked and name in small)}
    return next((name for name, tensor in others.items() if not bool(tensor.isfinite().all())), None)


def precision_of(model: nn.Module) -> torch.dtype:
    """Return the precision of a model's weights: that of its first parameter."""
    return next(model.parameters()).dtype


def _digested(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that the digest is made of, as the model's modules hold them."""
    left_out = tuple(f"{path}." for path in (*head_paths(model), CHILD))
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return {
        name: tensor for name, tensor in state.items() if not (name.startswith(left_out) or name.endswith("pos_embed"))
    }


def _sha256(tensors: Mapping[str, Tensor]) -> str | None:
    return None if any(tensor.is_meta for tensor in tensors.values()) else tensors_digest(tensors)


class LazyDigest:
    """The `backbone_digest` of a plain model, made when it is first asked for: it takes longer than all of `attach`.

    Until then it refers to the model's tensors without copying them. A change of device or precision gives the model
    new ones, and the old are held, so the digest stays that of the model as it was given, in its `dtype`; `settle` lets
    go of them.
    Of tensors that train, pass the copies to `keep` before they do.
    """

    def __init__(self, model: nn.Module) -> None:
        self.dtype = precision_of(model)
        self._now = _digested(model)
        self._then = {name: tensor.detach() for name, tensor in self._now.items()}
        self._value: str | None = None

    def keep(self, originals: Mapping[str, Tensor]) -> None:
        """Take the given tensors in place of the model's own of the same names."""
        for name in originals.keys() & self._then.keys():
            self._then[name] = originals[name]
            del self._now[name]

    def leave_out(self, model: nn.Module, names: Collection[str], originals: Mapping[str, Tensor]) -> None:
        """Make the digest without some tensors; one that was made already is made anew of the model's."""
        if self._then:
            for name in names & self._then.keys():
                del self._then[name]
                self._now.pop(name, None)
        else:
            self.dtype, self._value = precision_of(model), backbone_digest(model, names, originals=originals)

    def settle(self) -> None:
        """Make the digest now if the model has left tensors behind, so that they are not held for it alone."""
        if any(tensor.data_ptr() != self._then[name].data_ptr() for name, tensor in self._now.items()):
            self.value()

    def value(self) -> str | None:
        """Return the digest; None where tensors hold no data (meta)."""
        if self._then:
            self._value = _sha256(self._then)
            self._now, self._then = {}, {}
        return self._value

    def __getstate__(self) -> dict[str, Any]:
        # A copy would carry a second set of the backbone's tensors, which nothing ties to those of the copied model.
        return {"dtype": self.dtype, "_now": {}, "_then": {}, "_value": self.value()}


def own_tensors(model: nn.Module) -> list[OwnTensor]:
    """Return what each of the backbone's own tensors is, the head's left out, in the order of the state dict."""
    inside = tuple(f"{path}." for path in head_paths(model))
    state: dict[str, Tensor] = {
        name: tensor for name, tensor in model.state_dict().items() if not (inside and name.startswith(inside))
    }
    parameters = {name for name, _ in model.named_parameters()}
    layers = _layers(model, state)
    count = max(layers.values(), default=0) + 1
    found = []
    for name in state:
        owner, _, last = name.rpartition(".")
        is_bias = last in ("bias", "beta") or last.endswith("_bias")
        role = "buffer" if name not in parameters else "bias" if is_bias else "weight"
        norm = isinstance(model.get_submodule(owner), NORMS)
        found.append(OwnTensor(name, role, norm, layers[name], count))  # type: ignore[arg-type]
    return found


def _layers(model: nn.Module, state: dict[str, Tensor]) -> dict[str, int]:
    """Return each tensor's layer, counted from the images; groups of norms alone belong to the layer before them."""
    if not hasattr(model, "group_matcher"):
        return dict.fromkeys(state, 0)
    groups: dict[str, int] = {}
    for number, names in group_parameters(model, model.group_matcher(coarse=False)).items():  # type: ignore[operator]
        groups |= dict.fromkeys(names, number)
    own = {name: groups[name] for name in state if name in groups}
    solid = sorted({group for name, group in own.items() if state[name].ndim > 1})
    layer = {group: max(sum(other <= group for other in solid) - 1, 0) for group in set(own.values())}
    by_owner = {name.rpartition(".")[0]: layer[group] for name, group in own.items()}
    return {name: layer[own[name]] if name in own else by_owner.get(name.rpartition(".")[0], 0) for name in state}
