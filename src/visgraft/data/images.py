"""Images decoded once: resized and cropped as the backbone wants them, kept as bytes, normalised per batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from visgraft.backbones.creation import image_transform
from visgraft.data.cache import Decode, Pixels, choose_cache, hold_pixels, is_on_disk
from visgraft.data.dataset import Example
from visgraft.data.decode import open_image
from visgraft.data.examples import Examples, chosen, groups_of, labels_of, paths_of, tasks_of
from visgraft.data.task_tensors import membership
from visgraft.data.tasks import LabelTask, label_row
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
    image may have several classes, float32 [N, classes] of 0 and 1, or, with several `tasks`, float32 [N, columns] as
    `visgraft.data.tasks.label_row` has them, NaN where a label is not known; `mean` and `std` [3] of the normalisation;
    `paths` of the files, `groups` as the examples have them, and `skipped` what was left out. `outputs` is the number
    of classes, 0 where it is not known.

    It is a data set for torch's DataLoader as well, with (image float32 [3, H, W], label) by number, in processes of
    its own too.
    """

    pixels: Pixels
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    paths: Sequence[Path] = ()
    groups: tuple[str | None, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    outputs: int = 0
    tasks: tuple[LabelTask, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """Return one image [3, H, W] float32, without augmentation, and its label."""
        return self.normalised(self.pixels[number][None])[0], self.labels[number]

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes, or none."""
        return self.labels.ndim == 2 and not self.tasks

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
        """Yield (images [B, 3, H, W] float32, labels [B]) in order, without augmentation.

        With several tasks, labels are float32 [B, classes] of 0 and 1, fifths of a number counting as classes.
        """
        labels = membership(self.labels, self.tasks) if self.tasks else self.labels
        for start in range(0, len(self), size):
            chosen = slice(start, start + size)
            yield self.normalised(self.pixels[chosen]), labels[chosen]


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
        outputs: the number of classes; needed where images may have several, otherwise labels are checked against it.
        background: the colour behind transparent places, by name or as #rrggbb; None: white.
        cache: where the result is kept (see `visgraft.data.cache`): auto, ram, disk or none.
        skip_broken: leave out what does not decode and list it in `skipped`.
        on_progress: called with (images done, images in all).

    Raises:
        DataError: a file is no image (named), there is nothing to load, a label is none of the classes, the model takes
            other than three channels, or the disk is full.
    """
    if not examples:
        raise DataError("there are no images to load; check the folder's splits")
    make_labels(examples, outputs)  # what is wrong with them is said before anything is decoded
    _check_colour(data_config)
    pixels, broken = hold_pixels(examples, _decode(data_config, background), cache, skip_broken, on_progress)
    kept = chosen(examples, (n for n in range(len(examples)) if n not in broken)) if broken else examples
    if not kept:
        raise DataError(f"none of the {len(examples)} images decodes, e.g. {broken[0]}")
    return Images(
        pixels,
        make_labels(kept, outputs),
        tuple(data_config["mean"]),
        tuple(data_config["std"]),
        paths_of(kept),
        _groups(kept),
        tuple(Skipped(examples[number].path, reason) for number, reason in sorted(broken.items())),
        outputs,
        tasks_of(kept),
    )


def _check_colour(data_config: Mapping[str, Any]) -> None:
    """Raise a DataError where a model takes other images than those in colour that files are decoded to."""
    channels = data_config["input_size"][0]
    if channels != 3:
        raise DataError(
            f"images are read in colour, with 3 channels, but the model takes {channels} (in_chans={channels}); create "
            "it with in_chans=3, for which timm adapts pretrained weights, or make visgraft.Images of your own pixels"
        )


@dataclass(frozen=True)
class _Read:
    """Decodes an example and takes the steps of a transform; no closure, so that other processes can be given it."""

    steps: tuple[Any, ...]
    colour: str

    def __call__(self, example: Example) -> Tensor:
        picture: Any = open_image(example, self.colour)
        width, height = picture.size
        try:
            for step in self.steps:
                picture = step(picture)
        except (ValueError, RuntimeError, MemoryError) as error:  # of a side that would shrink to nothing
            raise DataError(
                f"{example.path}, {width:,} × {height:,} pixels, cannot be brought to the model's size ({error}); cut "
                "it into pieces, or leave it out"
            ) from error
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _decode(data_config: Mapping[str, Any], background: str | None) -> Decode:
    """Return how an example becomes pixels for a backbone, without the normalisation."""
    colour = background or "white"
    steps = image_transform(data_config).transforms[:-2]  # the last two make a float tensor and normalise it
    return Decode(_Read(tuple(steps), colour), {"data_config": dict(data_config), "background": colour})


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
    """Return the labels of examples as `Images` holds them.

    Raises:
        DataError: a label is no number of a class, or the number of classes is needed and not given.
    """
    if tasks_of(examples):
        coded = labels_of(examples)
        return torch.tensor([label_row(label) for label in coded.values])[torch.from_numpy(coded.codes).long()]
    several = isinstance(examples[0].label, tuple | list)
    if several and not outputs:
        raise DataError("images with several labels need the number of classes; pass outputs=len(classes)")
    codes = examples.labels.codes if isinstance(examples, Examples) else np.arange(len(examples))
    _, first, each = np.unique(codes, return_index=True, return_inverse=True)
    numbers = [_class_numbers(examples[place], several, outputs) for place in first.tolist()]
    if not several:
        return torch.tensor([number for (number,) in numbers])[torch.from_numpy(each)]
    labels = torch.zeros(len(numbers), outputs)
    for row, several_numbers in zip(labels, numbers, strict=True):
        row[several_numbers] = 1.0
    return labels[torch.from_numpy(each)]


def _groups(examples: Sequence[Example]) -> tuple[str | None, ...]:
    found = groups_of(examples)
    return (None,) * len(examples) if found is None else tuple(found.values[code] for code in found.codes)


def _class_numbers(example: Example, several: bool, outputs: int) -> list[int]:
    """Return the checked numbers of an example's classes, of which there are `outputs` (0: not known)."""
    label: Any = example.label
    try:
        numbers = [index(number) for number in (label if several else (label,))]
    except TypeError as error:
        wanted = "a tuple of the numbers of its classes" if several else "the number of its class"
        found = " ".join(repr(label).split())
        raise DataError(f"{example.path} has the label {found}; pass {wanted}, the first being 0") from error
    for number in numbers:
        if number < 0 or (outputs and number >= outputs):
            known = f"0 to {outputs - 1} (outputs={outputs})" if outputs else "numbers from 0 on"
            raise DataError(f"{example.path} has the label {number}, but classes are {known}; correct the label")
    return numbers
