"""What does each way out cost, and how does it answer? Sizes, differences, milliseconds and seconds of exporting.

    python benchmarks/export.py ADAPTER DATA                 # every format that is installed, some minutes
    python benchmarks/export.py ADAPTER DATA --pictures 200  # and real photographs of mixed sizes, resized in the graph

ADAPTER is a folder that `visgraft train` or `visgraft demo` wrote, DATA its images. The figures are the certificates':
each format's own runtime computes the answers, and the time per image is held against eager torch in turn.
The photographs are pieces of the two that come with scikit-learn, cut and shrunk to many sizes and shapes.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import shared
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from visgraft import VisgraftError, export_adapter, load
from visgraft.backbones.creation import image_transform
from visgraft.export.format import Subject, missing_packages
from visgraft.export.formats import FORMATS
from visgraft.export.run import export_subject, make_options
from visgraft.export.samples import Samples

WAYS: list[tuple[str, dict[str, Any]]] = [
    ("timm", {}),
    ("onnx", {}),
    ("onnx", {"pixels": "uint8"}),
    ("onnx", {"pixels": "any-size"}),
    ("onnx", {"precision": "fp16"}),
    ("onnx", {"precision": "int8"}),
    ("onnx", {"precision": "int8", "quantization": "static"}),
    ("onnx-adapter", {}),
    ("onnx-adapter", {"precision": "int8"}),
    ("torch", {}),
    ("openvino", {}),
    ("executorch", {}),
    ("peft", {}),
]


def way_out(adapter: Path, data: str, form: str, options: dict[str, Any], folder: Path) -> list[str]:
    """Return the row of one export."""
    told = f"{form} {' '.join(map(str, options.values()))}".strip()
    if form not in FORMATS or missing_packages(FORMATS[form]):
        return [told, "not installed", *[""] * 6]
    out = folder / f"out{FORMATS[form].suffix}"
    # Below the usual bound the figure is what is wanted, not a refusal.
    loose = {"least_agreement": 0.0} if options.get("precision", "fp32") != "fp32" else {}
    try:
        found = export_adapter(adapter, out, form, data=data, **options, **loose)
    except VisgraftError as error:
        return [told, str(error), *[""] * 6]
    ratio = found["seconds_per_image"] / found["torch_seconds_per_image"]
    return [
        told,
        f"{found['largest_difference']:.1e}",
        f"{100 * found['agreement']:.1f}",
        f"{100 * found['accuracy']:.1f}" if found["accuracy"] is not None else "–",
        f"{found['bytes'] / 2**20:.1f}",
        f"{1000 * found['seconds_per_image']:.1f}",
        f"{ratio:.2f}",
        f"{found['seconds']:.0f}",
    ]


def photographs(data_config: Any, count: int) -> Samples:
    """Return pieces of photographs of many sizes and shapes, and what Pillow makes of them for the model."""
    generator, whole = np.random.default_rng(0), load_sample_images().images
    originals = []
    for number in range(count):
        source = whole[number % len(whole)]
        height, width = (int(generator.integers(40, side + 1)) for side in source.shape[:2])
        top, left = (
            int(generator.integers(0, side - part + 1))
            for side, part in zip(source.shape[:2], (height, width), strict=True)
        )
        piece = Image.fromarray(source[top : top + height, left : left + width])
        scale = float(generator.uniform(0.3, 2.5))
        size = (max(8, round(width * scale)), max(8, round(height * scale)))
        originals.append(np.asarray(piece.resize(size, Image.Resampling.BICUBIC)))
    steps = image_transform(data_config).transforms[:-2]
    prepared = []
    for original in originals:
        picture: Any = Image.fromarray(original)
        for step in steps:
            picture = step(picture)
        prepared.append(torch.from_numpy(np.array(picture)).movedim(-1, 0))
    return Samples(torch.stack(prepared), None, data_config, "photographs", lambda number: originals[number])


def main() -> None:
    parser = shared.arguments(__doc__)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("data")
    parser.add_argument("--pictures", type=int, default=0)
    parser.add_argument("--only", default="", help="formats, separated by commas")
    asked = parser.parse_args()
    chosen = [way for way in WAYS if not asked.only or way[0] in asked.only.split(",")]
    rows = []
    for form, options in chosen:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(way_out(asked.adapter, asked.data, form, options, Path(folder)))
            print(f"{rows[-1][0]}: {', '.join(rows[-1][1:])}", flush=True)
    print()
    print(shared.table(["way out", "difference", "same %", "right %", "MiB", "ms/image", "÷ torch", "export s"], rows))
    if asked.pictures:
        adapted = load(asked.adapter)
        samples = photographs(adapted.record.data_config, asked.pictures)
        with tempfile.TemporaryDirectory() as folder:
            form = FORMATS["onnx"]
            options = make_options(form, {"pixels": "any-size"})
            found = export_subject(Subject(adapted, "the model", samples), form, options, Path(folder) / "any.onnx")
        print(f"\nany-size, {found.images} photographs: {100 * found.agreement:.2f} % the same, {found.verdict}")
    shared.report(asked, {"rows": rows})


if __name__ == "__main__":
    main()
