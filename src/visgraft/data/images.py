"""Images decoded once: resized and cropped as the backbone wants them, kept as bytes, normalised per batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from visgraft.backbones.creation import image_transform
from visgraft.data.cache import Decode, Pixels, choose_cache, hold_pixels, is_on_disk
from visgraft.data.dataset import Example
from visgraft.data.decode import open_image
from visgraft.errors import DataError


@dataclass(frozen=True)
class Loading:
    """How images are read: where decoded ones are kept, whether broken ones are left out, what is behind transparency.

    See `load_images`; without a background, an adapter's images are read with that of its training.
    """

    cache: str = "auto"
    skip_broken: bool = False
    background: str | None = None


class Skipped(NamedTuple):
    """An image that was left out because it does not decode, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Images:
    """A set of images, ready to be normalised.

    `pixels` uint8 [N, 3, H, W], indexed like a tensor by number, slice or int64 [B]; `labels` int64 [N], or, where an
    image may have several classes, float32 [N, classes] of 0 and 1; `mean` and `std` [3] of the normalisation; `paths`
    of the files, `groups` as the examples have them, and `skipped` what was left out.
    """

    pixels: Pixels
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    paths: tuple[Path, ...] = ()
    groups: tuple[str | None, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes, or none."""
        return self.labels.ndim == 2

    @property
    def distinct(self) -> int:
        """After how many images the pixels come again, where a few stand for all; otherwise all of them."""
        return int(getattr(self.pixels, "distinct", len(self)))

    def normalised(self, pixels: Tensor, device: torch.device | None = None) -> Tensor:
        """Return uint8 pixels [B, 3, H, W] as the backbone's input, float32."""
        x = pixels.to(device).float().div_(255)
        mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return x.sub_(mean).div_(std)

    def batches(self, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images [B, 3, H, W] float32, labels [B]) in order, without augmentation."""
        for start in range(0, len(self), size):
            chosen = slice(start, start + size)
            yield self.normalised(self.pixels[chosen]), self.labels[chosen]


def load_images(
    examples: Sequence[Example],
    data_config: Mapping[str, Any],
    *,
    outputs: int = 0,
    background: str | None = None,
    cache: str = "ram",
    skip_broken: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Images:
    """Decode, resize and crop every image once, with the transform that `load` returns for single pictures.

    Args:
        examples: the images and their labels.
        data_config: timm's preprocessing facts.
        outputs: the number of classes, needed where images may have several.
        background: the colour behind transparent places, by name or as #rrggbb; None: white.
        cache: where the result is kept (see `visgraft.data.cache`): auto, ram, disk or none.
        skip_broken: leave out what does not decode and list it in `skipped`.
        on_progress: called with (images done, images in all).

    Raises:
        DataError: a file is no image (named), there is nothing to load, or the disk is full.
    """
    if not examples:
        raise DataError("there are no images to load; check the folder's splits")
    pixels, broken = hold_pixels(examples, _decode(data_config, background), cache, skip_broken, on_progress)
    kept = [example for index, example in enumerate(examples) if index not in broken]
    if not kept:
        raise DataError(f"none of the {len(examples)} images decodes, e.g. {broken[0]}")
    return Images(
        pixels,
        make_labels(kept, outputs),
        tuple(data_config["mean"]),
        tuple(data_config["std"]),
        tuple(example.path for example in kept),
        tuple(example.group for example in kept),
        tuple(Skipped(examples[index].path, reason) for index, reason in sorted(broken.items())),
    )


def _decode(data_config: Mapping[str, Any], background: str | None) -> Decode:
    """Return how an example becomes pixels for a backbone, without the normalisation."""
    colour = background or "white"
    steps = image_transform(data_config).transforms[:-2]  # the last two make a float tensor and normalise it

    def decode(example: Example) -> Tensor:
        picture: Any = open_image(example, colour)
        for step in steps:
            picture = step(picture)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    return Decode(decode, {"data_config": dict(data_config), "background": colour})


def find_cache(
    examples: Sequence[Example], data_config: Mapping[str, Any], loading: Loading
) -> tuple[Literal["ram", "disk", "none"], bool]:
    """Return where `load_images` would keep these images, and whether an earlier run left them there decoded.

    Raises:
        VisgraftError: no such cache.
    """
    decode = _decode(data_config, loading.background)
    cache: Any = choose_cache(loading.cache, len(examples), decode)
    return cache, cache == "disk" and is_on_disk(examples, decode)


def make_labels(examples: Sequence[Example], outputs: int = 0) -> Tensor:
    """Return the labels of examples as `Images` holds them: int64 [N], or float32 [N, outputs] of 0 and 1."""
    if isinstance(examples[0].label, int):
        return torch.tensor([example.label for example in examples])
    if not outputs:
        raise DataError("images with several labels need the number of classes; pass outputs=len(classes)")
    labels = torch.zeros(len(examples), outputs)
    for row, example in zip(labels, examples, strict=True):
        row[list(example.label)] = 1.0  # type: ignore[arg-type]
    return labels
