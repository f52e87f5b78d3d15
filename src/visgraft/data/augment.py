"""Random changes of training images, drawn from (seed, epoch, index) alone."""

import importlib.util
import random
import threading
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visgraft.data.images import Images
from visgraft.errors import VisgraftError
from visgraft.options import TrainConfig


class _Draws(threading.local):
    """The generators that augmentation draws from, each thread's own; nobody else's are touched."""

    def __init__(self) -> None:
        self.python, self.numpy = random.Random(), np.random.RandomState()


_draws = _Draws()


class _Generator:
    """Stands for Python's `random` or NumPy's `np.random` in a module: its functions draw from this thread's own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, function: str) -> Any:
        return getattr(getattr(_draws, self.name), function)


@cache
def _timms(name: str) -> Any:
    """Return a copy of timm's module that draws from our generators: the module itself knows only the global ones."""
    spec = importlib.util.find_spec(f"timm.data.{name}")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.random, module.np = _Generator("python"), SimpleNamespace(**{**vars(np), "random": _Generator("numpy")})
    return module


def augmentation(images: Images, config: TrainConfig) -> Callable[[Tensor, int], Tensor] | None:
    """Return a function (indices [B], epoch) -> augmented uint8 pixels [B, 3, H, W], or None for no augmentation.

    What happens to an image depends on (seed, epoch, index) alone. Pieces are cut out of pictures that are already of
    the backbone's size.

    Raises:
        VisgraftError: the policy is unknown, or it changes colours and the images have none.
    """
    if not config.augmented:
        return None
    crop, policy, rand_augment = None, None, config.rand_augment
    if config.crop_scale:
        size = tuple(images.pixels.shape[-2:])
        scale = (max(config.crop_scale, 1 / (size[0] * size[1])), 1.0)  # at least a pixel
        crop = _timms("transforms").RandomResizedCropAndInterpolation(size, scale, interpolation="bilinear")
    if rand_augment:
        if images.pixels.shape[1] != 3:
            raise VisgraftError(
                f"rand_augment changes colours, but the images have {images.pixels.shape[1]} channels; leave it out"
            )
        fill = tuple(round(255 * value) for value in images.mean)
        try:
            policy = _timms("auto_augment").rand_augment_transform(rand_augment, {"img_mean": fill})
        except (AssertionError, ValueError, KeyError) as error:
            raise VisgraftError(
                f"rand_augment {rand_augment!r} is not in timm's notation; use e.g. rand-m9-mstd0.5-inc1"
            ) from error

        for op in policy.ops:
            if op.aug_fn is _timms("auto_augment").posterize:
                op.aug_fn = _posterize

    def augment(indices: Tensor, epoch: int) -> Tensor:
        keys = [(config.seed, epoch, int(i)) for i in indices]
        return torch.stack([_augment(images.pixels[key[2]], config.flip, crop, policy, key) for key in keys])

    return augment


class View:
    """Pixels of images in one augmented view, uint8 [N, 3, H, W], made when they are indexed.

    `distinct` is after how many images the pixels come again, where a few stand for all.
    """

    def __init__(
        self, augment: Callable[[Tensor, int], Tensor], shape: tuple[int, ...], distinct: int, epoch: int
    ) -> None:
        self.augment, self.shape, self.distinct, self.epoch = augment, shape, distinct, epoch

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any, /) -> Tensor:
        chosen = torch.arange(len(self))[index]
        return self.augment(chosen, self.epoch) if chosen.ndim else self.augment(chosen[None], self.epoch)[0]


def _posterize(picture: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Keep so many bits of each colour, at least one: timm also asks for none, which newer Pillows refuse."""
    return cast(Image.Image, _timms("auto_augment").posterize(picture, max(bits, 1), **options))


def _augment(pixels: Tensor, flip: bool, crop: Any, policy: Any, key: tuple[int, int, int]) -> Tensor:
    words = np.random.SeedSequence(key).generate_state(2)
    _draws.python.seed(int(words[0]))
    _draws.numpy.seed(words[1])
    if flip and _draws.python.random() < 0.5:
        pixels = pixels.flip(-1)
    if crop is not None:
        pixels = crop(pixels)
    if policy is not None:
        picture = policy(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return pixels
