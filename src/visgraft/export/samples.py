"""The pictures that an exported file is proven on: the user's own, or drawn ones of many sizes."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visgraft.adapters.canary import canary_pixels, normalised
from visgraft.adapters.record import AdapterRecord, Facts
from visgraft.backbones.creation import image_transform
from visgraft.data.dataset import Example
from visgraft.data.decode import open_image
from visgraft.data.images import Loading
from visgraft.data.read import AnySource
from visgraft.errors import DataError
from visgraft.measure.measuring import adapter_data, load_as_trained

SAMPLES = 200
PROOF_PARTS = ("val", "test", "train")
TRAINING = "training images"
"""What samples are called where there were only those."""
DRAWN_SIZES = ((320, 240), (97, 211), (224, 224), (640, 480), (50, 40), (333, 500), (512, 128), (231, 229))
"""Width and height of the pictures drawn where there are none: larger and smaller than models take, of odd shapes."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Pictures as they come, and as the adapter's transform makes them.

    Attributes:
        pixels: uint8 [N, 3, H, W], resized and cropped by Pillow.
        labels: as `Images` has them; None where there are none.
        data_config: timm's facts on how they were prepared.
        source: what they are, in words.
        original: returns a picture by its number, RGB uint8 [height, width, 3], of any size.
    """

    pixels: Tensor
    labels: Tensor | None
    data_config: Facts
    source: str
    original: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return len(self.pixels)

    def first(self, count: int) -> "Samples":
        """Return the first so many of them."""
        labels = None if self.labels is None else self.labels[:count]
        return dataclasses.replace(self, pixels=self.pixels[:count], labels=labels)

    def batches(self, size: int = 32) -> Iterator[Tensor]:
        """Yield the pixels [B, 3, H, W], uint8, batch by batch."""
        for start in range(0, len(self), size):
            yield self.pixels[start : start + size]

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return uint8 pixels [B, 3, H, W] as the backbone's input, float32."""
        return normalised(pixels, self.data_config)


def read_samples(
    adapter: Path, record: AdapterRecord, data: AnySource, loading: Loading, parts: Sequence[str] = PROOF_PARTS
) -> Samples:
    """Return up to 200 of the user's pictures, of the first of these parts that has any.

    Raises:
        DataError, AdapterError: the data cannot be used with this adapter, or have none of these parts.
    """
    dataset, _ = adapter_data(adapter, data)
    part = next((name for name in parts if getattr(dataset, name)), None)
    if part is None:
        raise DataError(f"{dataset.root} has no {' or '.join(parts)} images, which are needed here; add some")
    examples = _spread(getattr(dataset, part))
    images = load_as_trained(examples, record, len(dataset.classes), loading)
    kept = {example.path: example for example in examples}
    background = loading.background or record.background or "white"

    def original(number: int) -> np.ndarray:
        return np.asarray(open_image(kept[images.paths[number]], background).convert("RGB"))

    names = {"val": "validation images", "test": "test images", "train": TRAINING}
    pixels = torch.as_tensor(images.pixels[:])
    return Samples(pixels, images.labels, record.data_config, names[part], original)


def _spread(examples: Sequence[Example]) -> list[Example]:
    """Return at most so many examples as are used, evenly over all of them, so that every class is among them."""
    if len(examples) <= SAMPLES:
        return list(examples)
    return [examples[i * len(examples) // SAMPLES] for i in range(SAMPLES)]


def drawn_samples(data_config: Facts) -> Samples:
    """Return seeded pictures of many sizes, smooth as photographs are, in place of the user's.

    For a model of other than three channels they are drawn at its own size.
    """
    channels, *size = data_config["input_size"]
    generator = torch.Generator().manual_seed(0)
    if channels != 3:
        pixels = torch.stack([canary_pixels((channels, *size)).roll(3 * k, (1, 2)[k % 2]) for k in range(8)])
        return Samples(
            pixels, None, data_config, "drawn pictures", lambda number: pixels[number].movedim(0, -1).numpy()
        )
    steps = image_transform(data_config).transforms[:-2]  # the last two make a float tensor and normalise it
    originals, prepared = [], []
    for width, height in DRAWN_SIZES:
        cells = torch.rand(1, 3, 9, 9, generator=generator)
        smooth = torch.nn.functional.interpolate(cells, (height, width), mode="bicubic", align_corners=False)[0]
        grain = 0.06 * torch.randn(3, height, width, generator=generator)
        picture = ((smooth + grain).clamp(0, 1) * 255).byte().movedim(0, -1).numpy()
        originals.append(picture)
        made = Image.fromarray(picture)
        for step in steps:
            made = step(made)
        prepared.append(torch.from_numpy(np.array(made)).movedim(-1, 0))
    return Samples(torch.stack(prepared), None, data_config, "drawn pictures", lambda number: originals[number])


def feed_of(samples: Samples, number: int, pixels: str) -> np.ndarray:
    """Return one picture as a graph takes it in the form `float`, `uint8` or `any-size`: a batch of one."""
    if pixels == "any-size":
        return samples.original(number)[None]
    return feeds_of(samples.pixels[number : number + 1], samples, pixels)


def feeds_of(chunk: Tensor, samples: Samples, pixels: str) -> np.ndarray:
    """Return prepared pixels [B, 3, H, W] as a graph takes them in the form `float` or `uint8`."""
    x = samples.normalised(chunk) if pixels == "float" else chunk.permute(0, 2, 3, 1)
    return x.contiguous().numpy()


def answers_of(run: Callable[[np.ndarray], np.ndarray], samples: Samples, pixels: str, most: int = 32) -> Tensor:
    """Return the logits [N, classes] that `run` computes of samples in the form `pixels`: of any size, one by one.

    The others go in batches of up to `most`.
    """
    if pixels == "any-size":
        feeds: Iterable[np.ndarray] = (feed_of(samples, number, pixels) for number in range(len(samples)))
    else:
        feeds = (feeds_of(chunk, samples, pixels) for chunk in samples.batches(most))
    return torch.cat([torch.from_numpy(run(feed)) for feed in feeds])
