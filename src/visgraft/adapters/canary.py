"""The canary in every adapter: what it answered to one seeded picture when it was saved, checked on loading.

A wrong kernel, a wrong runtime or another adapter's tensors give answers of the right shape. No check of names and
shapes sees that; one picture does.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from visgraft.backbones.weights import first_line
from visgraft.backbones.wrappers import unwrapped
from visgraft.core.tensors import eval_mode
from visgraft.errors import AdapterError, warn_user

CELLS = 16
"""The picture is a chequer of so many coloured cells along each side: coarse enough for every resolution."""

STORED_LOGITS = 16
TOLERANCES = {"float64": 0.01, "float32": 0.01, "bfloat16": 0.1, "float16": 0.1}
"""Of the largest logit, by the coarser of the two precisions. A hundred times what rounding does on the processors
tried (4.5e-5 in float32), so that TF32 and other kernels pass; another adapter's answers differ by about a logit."""

_USUAL = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
"""What timm's transform takes where a data configuration does not say."""


@dataclass(frozen=True)
class Canary:
    """Logits of the `outputs` numbered so, for the seeded picture whose uint8 values have the sha256 `picture`.

    `precision` is that of the model which answered, without autocast.
    """

    picture: str
    outputs: tuple[int, ...]
    logits: tuple[float, ...]
    precision: str

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "picture": self.picture,
            "outputs": list(self.outputs),
            "logits": list(self.logits),
            "precision": self.precision,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Canary":
        """Return it from `to_json`'s form.

        Raises:
            TypeError, ValueError, KeyError: it is damaged.
        """
        outputs, logits = tuple(map(int, stored["outputs"])), tuple(map(float, stored["logits"]))
        if len(outputs) != len(logits) or not outputs or min(outputs) < 0 or stored["precision"] not in TOLERANCES:
            raise ValueError(f"{len(outputs)} outputs, {len(logits)} logits, {stored['precision']!r}")
        if not all(map(math.isfinite, logits)):  # which would let every answer pass
            raise ValueError(f"its logits are {logits!r:.80}")
        return cls(str(stored["picture"]), outputs, logits, stored["precision"])


def canary_pixels(size: Sequence[int]) -> Tensor:
    """Return the seeded picture of a size (channels, height, width): uint8 [C, H, W], the same wherever it is drawn."""
    channels, height, width = size
    drawn = hashlib.shake_256(b"visgraft").digest(channels * CELLS * CELLS)
    cells = torch.frombuffer(bytearray(drawn), dtype=torch.uint8).view(channels, CELLS, CELLS)
    rows, columns = (torch.arange(side) * CELLS // side for side in (height, width))
    return cells[:, rows][:, :, columns].contiguous()


def normalised(pixels: Tensor, data_config: Mapping[str, Any]) -> Tensor:
    """Return uint8 pixels [B, C, H, W] as the model's input, float32; fewer means than channels are taken in turn."""
    mean, std = (channel_values(data_config, name, pixels.shape[1]) for name in ("mean", "std"))
    return (pixels.float() / 255 - mean) / std


def channel_values(data_config: Mapping[str, Any], name: str, channels: int) -> Tensor:
    """Return `mean` or `std` of each channel [1, C, 1, 1], float32.

    Raises:
        TypeError, ValueError: it is no number, and no list of numbers.
    """
    values = torch.as_tensor(data_config.get(name, _USUAL[name]), dtype=torch.float32).flatten()
    if not len(values):
        raise ValueError(f"{name} is empty")
    return values[torch.arange(channels) % len(values)].view(1, -1, 1, 1)


def check_facts(data_config: Mapping[str, Any]) -> None:
    """Raise where no picture could be prepared by a data configuration.

    Raises:
        TypeError, ValueError: a fact that it has is not of its kind.
    """
    size = data_config.get("input_size", (3, 1, 1))
    if len(size) != 3 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"input_size is {size!r}")
    for name in _USUAL:
        channel_values(data_config, name, size[0])


def measure_canary(model: nn.Module, data_config: Mapping[str, Any]) -> Canary | None:
    """Return what a model answers to the picture now; None where it has no data (meta) or no finite answer.

    Where it does not run as it is, tensors of several precisions for instance, that is told, and None too: what was
    trained must not be lost for want of a check.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    pixels = canary_pixels(data_config["input_size"])
    try:
        logits, precision = _answer(model, pixels, data_config)
    except AdapterError as error:
        warn_user(f"the adapter is saved without a canary, so that loading cannot check its answers: {error}")
        return None
    finite = logits.isfinite().nonzero().flatten()
    if not len(finite):
        return None
    chosen = finite[torch.linspace(0, len(finite) - 1, min(STORED_LOGITS, len(finite))).round().long()]
    return Canary(_digest(pixels), tuple(chosen.tolist()), tuple(logits[chosen].tolist()), precision)


def canary_difference(model: nn.Module, canary: Canary, data_config: Mapping[str, Any]) -> tuple[float, float]:
    """Return by how much the model's logits differ from the stored ones, and what is allowed.

    The difference is infinite where an answer is lacking or not finite.

    Raises:
        AdapterError: the model does not answer.
    """
    logits, precision = _answer(model, canary_pixels(data_config["input_size"]), data_config)
    return compare_canary(logits, canary, precision)


def compare_canary(logits: Tensor, canary: Canary, precision: str = "float32") -> tuple[float, float]:
    """`canary_difference` of logits [outputs] that were computed elsewhere, in another runtime for instance."""
    stored = torch.tensor(canary.logits, dtype=torch.float64)
    allowed = max(TOLERANCES[precision], TOLERANCES[canary.precision]) * stored.abs().max().item() + 1e-6
    if max(canary.outputs) >= len(logits):
        return float("inf"), allowed
    found = (logits.double().cpu()[list(canary.outputs)] - stored).abs().nan_to_num(nan=torch.inf)
    return found.max().item(), allowed


def is_drawn_alike(canary: Canary, data_config: Mapping[str, Any]) -> bool:
    """Whether the picture that is drawn here is the one that the canary is about."""
    return _digest(canary_pixels(data_config["input_size"])) == canary.picture


def _answer(model: nn.Module, pixels: Tensor, data_config: Mapping[str, Any]) -> tuple[Tensor, str]:
    """Return the logits [outputs] for one picture, and the model's precision; unpooled features count as logits.

    Raises:
        AdapterError: the model does not run here.
    """
    model = unwrapped(model)
    like = next(model.parameters())
    x = normalised(pixels[None], data_config).to(like.device, like.dtype)
    with eval_mode(model), torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        try:
            logits = model(x).float().flatten().cpu()
        except Exception as error:  # whatever the model's own code and torch's kernels raise
            raise AdapterError(
                f"the model does not answer a seeded picture without autocast ({first_line(error)}); convert it to one "
                "precision first, or move it to a device that can"
            ) from error
    return logits, str(like.dtype).removeprefix("torch.")


def _digest(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.numpy().data).hexdigest()
