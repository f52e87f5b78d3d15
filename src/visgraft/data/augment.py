"""Random changes of training images, drawn from (seed, epoch, index) alone."""

import random
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from torch import Tensor

from visgraft.data.images import Images
from visgraft.errors import VisgraftError


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

        for op in policy.ops:
            if op.aug_fn is posterize:
                op.aug_fn = _posterize

    def augment(indices: Tensor, epoch: int) -> Tensor:
        return torch.stack([_augment(images.pixels[i], flip, policy, (seed, epoch, int(i))) for i in indices])

    return augment


class View:
    """Pixels of images in one augmented view, uint8 [N, 3, H, W], made when they are indexed."""

    def __init__(self, augment: Callable[[Tensor, int], Tensor], images: int, epoch: int) -> None:
        self.augment, self.images, self.epoch = augment, images, epoch

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: Any, /) -> Tensor:
        chosen = torch.arange(self.images)[index]
        return self.augment(chosen, self.epoch) if chosen.ndim else self.augment(chosen[None], self.epoch)[0]


def _posterize(picture: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Keep so many bits of each colour, at least one: timm also asks for none, which newer Pillows refuse."""
    return cast(Image.Image, posterize(picture, max(bits, 1), **options))


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
