"""Resizing and cropping as Pillow and torchvision do, as tensor arithmetic that goes into an exported graph.

Pillow resizes in two passes, one along the width and one along the height, and rounds to whole levels after each.
A pass is a product with a matrix of weights that depends on the size of the picture only. An ONNX Resize does both at
once, without the rounding between, and its results lie up to 21 levels away.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from visgraft.backbones.creation import image_transform
from visgraft.errors import VisgraftError

HALF = 11
"""Pillow keeps weights as whole numbers of 2^-22; here they are two halves of so many bits."""


def _triangle(x: Tensor) -> Tensor:
    return (1 - x).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5, at distances x >= 0."""
    a = -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _lanczos(x: Tensor) -> Tensor:
    """The sinc of x times that of x / 3, at distances x >= 0."""
    safe = math.pi * x.clamp(min=1e-12)
    wave = torch.sin(safe) / safe * torch.sin(safe / 3) / (safe / 3)
    return torch.where(x < 3, wave, torch.zeros_like(x))


FILTERS: Mapping[InterpolationMode, Callable[[Tensor], Tensor]] = {
    InterpolationMode.BILINEAR: _triangle,
    InterpolationMode.BICUBIC: _cubic,
    InterpolationMode.LANCZOS: _lanczos,
}


@dataclass(frozen=True)
class ResizePlan:
    """What the transform does with a picture: the size it resizes to, by rule, and the crop.

    `rule` `short`: the shorter side becomes `size[0]`; `both`: exactly `size` (height, width); `keep`: the ratio is
    kept, `longest` weighs the side that has to shrink most. `crop` (height, width) is cut from the middle, and `fill`
    [3] stands where the picture does not reach.
    """

    rule: str
    size: tuple[int, int]
    longest: float
    interpolation: InterpolationMode
    crop: tuple[int, int]
    fill: tuple[float, ...]


def resize_plan(data_config: Mapping[str, Any]) -> ResizePlan:
    """Return the plan of a data configuration.

    Raises:
        VisgraftError: a step is none of those that can go into a graph.
    """
    if data_config["input_size"][0] != 3:
        raise VisgraftError(
            f"pictures have 3 channels, and the model takes {data_config['input_size'][0]}; leave --pixels any-size out"
        )
    steps = image_transform(data_config).transforms[:-2]
    resize, crop = (*steps, None, None)[:2]
    if (
        len(steps) != 2
        or not isinstance(resize, Resize | ResizeKeepRatio)
        or not isinstance(crop, CenterCrop | CenterCropOrPad)
    ):
        named = ", ".join(type(step).__name__ for step in steps)
        raise VisgraftError(f"these steps cannot go into a graph: {named}; leave --pixels any-size out")
    if resize.interpolation not in FILTERS:
        known = ", ".join(mode.value for mode in FILTERS)
        raise VisgraftError(
            f"the interpolation {resize.interpolation} cannot go into a graph, only {known}; leave --pixels any-size "
            "out"
        )
    fill: Any = getattr(crop, "fill", 0)
    height, width = crop.size
    plan = ResizePlan(
        "both",
        (0, 0),
        0.0,
        resize.interpolation,
        (height, width),
        tuple(fill) if isinstance(fill, list | tuple) else (fill,) * 3,
    )
    if isinstance(resize, ResizeKeepRatio):
        return dataclasses.replace(plan, rule="keep", size=tuple(resize.size), longest=resize.longest)
    size: Any = resize.size
    if isinstance(size, int) or len(size) == 1:
        side = size if isinstance(size, int) else size[0]
        return dataclasses.replace(plan, rule="short", size=(side, side))
    return dataclasses.replace(plan, size=tuple(size))


def why_not_resized(data_config: Mapping[str, Any]) -> str | None:
    """Return why a graph cannot resize pictures as this configuration does, as `it ...`; None where it can."""
    try:
        resize_plan(data_config)
    except VisgraftError as error:
        return f"prepares its images in a way that no graph has: {error}"
    return None


class AnySize(nn.Module):
    """Turns pictures uint8 [B, H, W, 3], of whichever size, into pixels [B, 3, height, width] as Pillow would.

    The result is float32 and holds whole levels from 0 to 255.
    """

    fill: Tensor

    def __init__(self, plan: ResizePlan) -> None:
        super().__init__()
        self.plan, self.tall_first = plan, pillow_resizes_tall_first()
        self.register_buffer("fill", torch.tensor(plan.fill, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        # Sizes are float64, because in float32 the place of a pixel in a large picture would be off by a hundredth.
        height, width = (torch.scalar_tensor(side, dtype=torch.float64) for side in pictures.shape[1:3])
        new_height, new_width = self.new_size(height, width)
        x = pictures.permute(0, 3, 1, 2).float()
        kernel = FILTERS[self.plan.interpolation]
        across, inside_x = pass_weights(width, new_width, pictures.shape[2], self.plan.crop[1], kernel)
        down, inside_y = pass_weights(height, new_height, pictures.shape[1], self.plan.crop[0], kernel)
        if self.tall_first:
            tall = (height > new_height) & (height - new_height > 2 * (width - new_width))
            x = torch.cond(tall, _down_then_across, _across_then_down, (x, across, down))
        else:
            x = _across_then_down(x, across, down)
        return torch.where(inside_y[:, None] & inside_x[None, :], x, self.fill)

    def new_size(self, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """Return the height and width to which a picture of this size is resized, before the crop."""
        plan = self.plan
        target = [torch.scalar_tensor(side, dtype=torch.float64) for side in plan.size]
        if plan.rule == "both":
            return target[0], target[1]
        if plan.rule == "short":
            short = torch.minimum(height, width)
            # torchvision cuts the longer side's fraction off
            return tuple(
                torch.where(side == short, target[0], torch.floor(target[0] * side / short)) for side in (height, width)
            )  # type: ignore[return-value]
        ratios = height / target[0], width / target[1]
        ratio = torch.maximum(*ratios) * plan.longest + torch.minimum(*ratios) * (1 - plan.longest)
        return torch.round(height / ratio), torch.round(width / ratio)


def pass_weights(
    length: Tensor, new: Tensor, columns: int, crop: int, filter: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return one pass's weights [2 crop, columns] and which of the crop's places lie in the picture [crop].

    The first half of the rows holds each weight's higher bits, the second its lower ones, as whole numbers: float32
    adds up either exactly, so that no half is rounded to the other side than Pillow rounds it to.
    """
    beyond = new - crop
    offset = torch.where(beyond >= 0, torch.round(beyond / 2), -torch.floor(-beyond / 2))
    place = torch.arange(crop, dtype=torch.float64) + offset
    scale = length / new
    center = (place + 0.5) * scale
    # A picture that grows is interpolated; one that shrinks is averaged over as many pixels as become one.
    spread = scale.clamp(min=1.0)
    distance = (torch.arange(columns, dtype=torch.float64) - center[:, None] + 0.5).abs() / spread
    weight = filter(distance)
    weight = weight / weight.sum(1, keepdim=True)
    whole = weight.sign() * torch.floor(weight.abs() * 2.0 ** (2 * HALF) + 0.5)
    high = torch.round(whole / 2.0**HALF)
    return torch.cat([high, whole - high * 2.0**HALF]).float(), (place >= 0) & (place < new)


def _across_then_down(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    x = _levels(*torch.matmul(x, across.T).chunk(2, dim=3))
    return _levels(*torch.matmul(down, x).chunk(2, dim=2))


def _down_then_across(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    x = _levels(*torch.matmul(down, x).chunk(2, dim=2))
    return _levels(*torch.matmul(x, across.T).chunk(2, dim=3))


@functools.cache
def pillow_resizes_tall_first() -> bool:
    """Whether this Pillow takes the height first where it shrinks by over twice as many pixels as the width.

    Versions from 13 on do; which it does shows in how often the rounding between the passes falls otherwise.
    """
    picture = torch.randint(0, 256, (1, 200, 60, 3), generator=torch.Generator().manual_seed(0)).byte()
    found = Image.fromarray(picture[0].numpy()).resize((50, 50), Image.Resampling.BILINEAR)
    wanted = torch.from_numpy(np.array(found)).movedim(-1, 0)
    new = torch.tensor(50.0, dtype=torch.float64)
    sides = [pass_weights(new / 50 * side, new, side, 50, _triangle)[0] for side in (60, 200)]
    x = picture.permute(0, 3, 1, 2).float()
    orders = {False: _across_then_down, True: _down_then_across}
    return max(orders, key=lambda tall: int((orders[tall](x, *sides)[0] == wanted).sum()))


def _levels(high: Tensor, low: Tensor) -> Tensor:
    """Return whole levels from both halves of a pass's sums, halves rounded upwards as Pillow does."""
    step = 2.0**HALF
    return torch.floor((high + step / 2 + torch.floor(low / step)) / step).clamp(0, 255)
