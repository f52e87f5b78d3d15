"""Drawn pictures with several labels each, as tables beside a folder of pictures."""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from visgraft.errors import DataError
from visgraft.files import new_directory

LABELS, RESTYLED = "labels.csv", "restyled.csv"
PARTS = ("train", "val", "test", "restyled")


class Drawn(NamedTuple):
    """A picture, the part that it belongs to, and its columns."""

    part: str
    picture: Image.Image
    columns: Mapping[str, str | int | float]


def check_counts(counts: Mapping[str, int], seed: int) -> None:
    """Raise a DataError where a number of pictures or the seed is negative, or there is no picture to train on."""
    if min(*counts.values(), seed) < 0 or not counts["train"]:
        told = ", ".join(f"{part} {count}" for part, count in counts.items())
        raise DataError(f"numbers of pictures must not be negative and train not 0, got {told}, seed {seed}")


def write_tables(root: Path, drawn: Iterable[Drawn]) -> Path:
    """Write `root/labels.csv` and, of the part restyled, `root/restyled.csv` (all test images); returns `root`.

    Their columns are image_path, split and those of the pictures, which lie in `root/images/PART/NNNNN.png`. All is
    there or nothing; what an earlier call wrote there is replaced.

    Raises:
        VisgraftError: `root` holds something else, or cannot be written.
    """
    rows = defaultdict[str, list[dict[str, str | int | float]]](list)
    counts = Counter[str]()
    with new_directory(root, LABELS) as folder:
        for one in drawn:
            name = f"images/{one.part}/{counts[one.part]:05d}.png"
            counts[one.part] += 1
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            one.picture.save(folder / name, compress_level=3)
            table, split = (RESTYLED, "test") if one.part == "restyled" else (LABELS, one.part)
            rows[table].append({"image_path": name, "split": split, **one.columns})
        for table, found in rows.items():
            with (folder / table).open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(found)
    return root
