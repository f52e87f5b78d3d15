"""What does SCT's scoring pass cost beyond a plain forward pass, and does its memory grow with the number of images?

    python benchmarks/scoring.py           # about 3 minutes on 2 cores

The time of choosing the channels (`salient_channels_at`: hooks, sums, sorting, all of it) is divided by that of a plain
forward pass over the same images in the same batches, in eval mode and without gradient, in turned order; the median
over rounds is shown with the quartiles. Memory is the peak of the bytes in tensor storages that any operation
returned and that are still alive, which a TorchDispatchMode counts; the images come from a generator and count too.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import shared
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visgraft.methods.salience import SCORING_BATCH, salient_channels_at

SITES = {"attn": ["stream.mid"], "mlp": ["stream.out"], "qkv": ["attn.q", "attn.v"]}  # per mode of SCT
CLASSES = 100


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensor storages that operations returned and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        """Add a storage that is new, and take it off when it is freed."""
        address = storage._cdata
        if address not in self.known:
            self.known.add(address)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, address, storage.nbytes())

    def free(self, address: int, size: int) -> None:
        """Take a storage off."""
        self.known.discard(address)
        self.live -= size


def stream(count: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images [B, 3, H, W] with labels [B], made when they are asked for."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, SCORING_BATCH):
        batch = min(SCORING_BATCH, count - start)
        images = torch.randn(batch, 3, size, size, generator=generator)
        yield images, (start + torch.arange(batch)) % CLASSES


def plain_pass(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Run the model on all images."""
    with torch.no_grad():
        for images, _ in batches:
            model(images)


def peak_mib(model: nn.Module, count: int, size: int) -> float:
    """Return the peak of scoring `count` images for mode attn, in MiB."""
    with LiveBytes() as found:
        salient_channels_at(model, stream(count, size), None, SITES["attn"], "class_aware")
    return round(found.peak / 2**20, 1)


def measure(backbone: str, asked: Any) -> tuple[list[dict[str, Any]], dict[int, float]]:
    """Return a row per mode of SCT, and the peak per number of images."""
    model = timm.create_model(backbone, num_classes=CLASSES).eval()
    batches = list(stream(asked.images, asked.image_size))
    cpu = torch.device("cpu")
    parts = {"plain": shared.seconds_of(lambda: plain_pass(model, batches), cpu)}
    for mode, names in SITES.items():
        parts[mode] = shared.seconds_of(
            lambda names=names: salient_channels_at(model, batches, None, names, "class_aware"), cpu
        )
    found = shared.in_turns(parts, asked.rounds)
    seconds = round(shared.quartiles([one["plain"] for one in found])[1], 3)
    rows = [
        {"backbone": backbone, "mode": mode, "plain_s": seconds, "ratio": shared.ratios(found, mode, "plain")}
        for mode in SITES
    ]
    return rows, {count: peak_mib(model, count, asked.image_size) for count in asked.counts}


def main() -> None:
    """Print two tables."""
    parser = shared.arguments(__doc__)
    parser.set_defaults(rounds=7)
    parser.add_argument("--backbones", default="vit_small_patch16_224,swin_tiny_patch4_window7_224")
    parser.add_argument("--images", type=int, default=SCORING_BATCH)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--counts", type=int, nargs="+", default=[64, 128, 256], help="images for the peak of memory")
    asked = parser.parse_args()
    torch.manual_seed(0)
    rows, peaks = [], {}
    for backbone in asked.backbones.split(","):
        found, peaks[backbone] = measure(backbone, asked)
        rows += found
    cells = [(row["backbone"], row["mode"], row["plain_s"], shared.shown(*row["ratio"])) for row in rows]
    print(shared.table(("backbone", "mode", "plain pass, s", "scoring ÷ plain"), cells))
    head = ("backbone", *(f"{count} images, MiB" for count in asked.counts))
    print("\n" + shared.table(head, [(backbone, *found.values()) for backbone, found in peaks.items()]))
    shared.report(asked, {"rows": rows, "peak_mib": peaks})


if __name__ == "__main__":
    main()
