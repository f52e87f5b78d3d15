"""Images decoded once: resized and cropped as the backbone wants them, kept as bytes, normalised per batch."""

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from visgraft.backbone import image_transform
from visgraft.data.dataset import Example
from visgraft.data.decode import open_image
from visgraft.errors import DataError, VisgraftError


@dataclass(frozen=True)
class Images:
    """A set of images in memory.

    `pixels` uint8 [N, 3, H, W], `labels` int64 [N], `mean` and `std` [3] of the normalisation, `paths` of the files.
    """

    pixels: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    paths: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

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


def load_images(examples: Sequence[Example], data_config: Mapping[str, Any]) -> Images:
    """Decode, resize and crop every image once, with the transform that `load` returns for single pictures.

    Raises:
        DataError: a file is no image (named), or there is nothing to load.
    """
    if not examples:
        raise DataError("there are no images to load; check the folder's splits")
    steps = image_transform(data_config).transforms[:-2]  # the last two make a float tensor and normalise it

    def decode(example: Example) -> Tensor:
        picture: Any = open_image(example.path)
        for step in steps:
            picture = step(picture)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pixels = torch.stack(list(pool.map(decode, examples)))
    return Images(
        pixels,
        torch.tensor([example.label for example in examples]),
        tuple(data_config["mean"]),
        tuple(data_config["std"]),
        tuple(example.path for example in examples),
    )


def augmentation(
    images: Images, flip: bool, rand_augment: str | None, seed: int
) -> Callable[[Tensor, int], Tensor] | None:
    """Return a function (indices [B], epoch) -> augmented uint8 pixels [B, 3, H, W], or None for no augmentation.

    What happens to an image depends on (seed, epoch, index) alone.
    """
    if not (flip or rand_augment):
        return None
    policy = None
    if rand_augment:
        fill = tuple(round(255 * value) for value in images.mean)
        try:
            policy = rand_augment_transform(rand_augment, {"img_mean": fill})
        except (AssertionError, ValueError, KeyError) as error:
            raise VisgraftError(
                f"rand_augment {rand_augment!r} is not in timm's notation; use e.g. rand-m9-mstd0.5-inc1"
            ) from error

    def augment(indices: Tensor, epoch: int) -> Tensor:
        return torch.stack([_augment(images.pixels[i], flip, policy, (seed, epoch, int(i))) for i in indices])

    return augment


def _augment(pixels: Tensor, flip: bool, policy: Any, key: tuple[int, int, int]) -> Tensor:
    words = np.random.SeedSequence(key).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    if flip and random.random() < 0.5:
        pixels = pixels.flip(-1)
    if policy is not None:
        picture = policy(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return pixels
