"""What does it cost to know images by their content? Seconds to hash their files, beside decoding them.

    python benchmarks/identity.py --images 10000        # about a minute on 2 cores

Photographs of 500 × 375 pixels, drawn once and written under other names with a byte changed, so that each is a file of
its own, are looked at (`os.stat`), hashed (`visgraft.data.identity`), and some of them decoded as for a ViT. Files have
just been written, so the system still has them in memory: a disk that reads more slowly than the hashing adds its own
time, once per run.
"""

import io
import tempfile
import time
from pathlib import Path

import numpy as np
import shared
from PIL import Image

from visgraft.data.dataset import Example
from visgraft.data.identity import content_digests
from visgraft.data.images import load_images

CONFIG = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9}
DECODED = 500


def write(folder: Path, count: int) -> list[Example]:
    """Write so many JPEG files that differ in a byte behind the picture."""
    noise = np.random.default_rng(0).normal(128, 40, (47, 63, 3)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=98)
    grain = np.asarray(Image.open(buffer)) + np.random.default_rng(1).normal(0, 12, (375, 500, 3))
    buffer = io.BytesIO()
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(buffer, "jpeg", quality=90)
    content = buffer.getvalue()
    paths = [folder / f"{number:06}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(content + number.to_bytes(4, "big"))
    return [Example(path, 0) for path in paths]


def main() -> None:
    parser = shared.arguments(__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        examples = write(Path(place), asked.images)
        size = examples[0].path.stat().st_size
        rows = []
        for name, count, run in (
            ("sizes and times", asked.images, lambda: [example.path.stat() for example in examples]),
            ("content", asked.images, lambda: content_digests(examples)),
            ("decoding", DECODED, lambda: load_images(examples[:DECODED], CONFIG)),
        ):
            begin = time.perf_counter()
            run()
            seconds = (time.perf_counter() - begin) * asked.images / count
            rows.append([name, f"{seconds:.2f}", f"{1e6 * seconds / asked.images:.0f}"])
    print(f"{asked.images:,} files of {size / 1000:.0f} KB\n")
    print(shared.table(["", "seconds", "µs per image"], rows))
    shared.report(asked, {"images": asked.images, "bytes": size, "rows": rows})


if __name__ == "__main__":
    main()
