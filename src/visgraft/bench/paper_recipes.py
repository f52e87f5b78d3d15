"""The papers' own recipes, task by task, as data.

SCT: the table in the authors' program (arXiv:2309.08513): learning rate, weight decay, scale s, form, augmentation and
label smoothing of each VTAB-1k task. Their ViT file runs the inference form, in which s has no effect; here it has.
Test accuracy chose their epoch; here the last one counts.

ALoRE: no program is public. The recipe is that of RepAdapter's program, with the scale chosen on validation among the
values that RepAdapter searches; on FGVC the learning rate too. All of it is UNVERIFIED.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PaperRecipe:
    """Options of a method and of training: `common` to all tasks, those of each task, and a grid to choose from.

    `tasks` and `grid` are by protocol; a protocol that is in neither has no such recipe. `normalisation` is that of the
    images.
    """

    name: str
    method: str
    source: str
    common: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    grid: Mapping[str, Mapping[str, tuple[Any, ...]]] = field(default_factory=dict)
    normalisation: str = "imagenet"


_RUN = {
    "epochs": 100, "warmup_epochs": 10.0, "batch_size": 64, "drop_path": 0.1, "min_lr": 1e-5, "warmup_lr": 1e-6,
    "schedule": "epoch", "drop_last": True,
}  # fmt: skip

# Task: learning rate, weight decay, scale, form, augmentation, label smoothing.
_SCT = {
    "cifar100": (0.013, 1.0, 0.4, "A", False, 0.1),
    "caltech101": (0.006, 0.35, 1.0, "A", False, 0.1),
    "dtd": (0.0032, 0.04, 0.25, "A", True, 0.1),
    "oxford_flowers102": (0.05, 0.11, 0.15, "A", False, 0.1),
    "oxford_iiit_pet": (0.0007, 0.8, 0.2, "A", True, 0.1),
    "svhn": (0.075, 0.03, 0.15, "A", True, 0.1),
    "sun397": (0.0017, 0.01, 0.15, "A", False, 0.1),
    "patch_camelyon": (0.0072, 0.002, 0.17, "A", True, 0.1),
    "eurosat": (0.06, 0.001, 0.1, "A", True, 0.1),
    "resisc45": (0.01, 0.01, 0.4, "A", True, 0.1),
    "diabetic_retinopathy": (0.004, 0.0003, 0.75, "A", True, 0.1),
    "clevr_count": (0.0033, 0.01, 0.52, "B", True, 0.0),
    "clevr_dist": (0.0018, 0.005, 0.1, "B", True, 0.0),
    "dmlab": (0.009, 0.1, 0.3, "A", True, 0.0),
    "kitti": (0.0072, 0.0001, 0.5, "A", True, 0.1),
    "dsprites_loc": (0.003, 0.001, 0.3, "B", False, 0.0),
    "dsprites_ori": (0.01, 0.05, 0.5, "B", False, 0.0),
    "smallnorb_azi": (0.0062, 0.005, 1.0, "B", False, 0.0),
    "smallnorb_ele": (0.0011, 0.0005, 0.65, "B", False, 0.0),
}
_AUGMENTED = {"flip": True, "rand_augment": "rand-m9-mstd0.5-inc1"}

SCT_PAPER = PaperRecipe(
    "sct-paper",
    "sct",
    "the authors' program, arXiv:2309.08513",
    {**_RUN, "mode": "attn", "channels": 96},
    {
        "vtab-1k": {
            task: {"lr": lr, "weight_decay": decay, "scale": scale, "form": form, "label_smoothing": smoothing}
            | (_AUGMENTED if augmented else {})
            for task, (lr, decay, scale, form, augmented, smoothing) in _SCT.items()
        }
    },
)

_FGVC = ("cub_200_2011", "nabirds", "oxford_flowers", "stanford_dogs", "stanford_cars")
_SCALES = (1.0, 0.1, 0.5, 5.0, 10.0)

ALORE_PAPER = PaperRecipe(
    "alore-paper",
    "alore",
    "UNVERIFIED: RepAdapter's program, with the method of arXiv:2412.08341",
    {**_RUN, "lr": 1e-3, "weight_decay": 1e-4, "rank": 4, "experts": 4, "dropout": 0.1},
    {"fgvc": {task: {"weight_decay": 0.05} for task in _FGVC}},
    {"vtab-1k": {"scale": _SCALES}, "fgvc": {"lr": (1e-3, 5e-3, 1e-2), "scale": _SCALES}},
)

PAPER_RECIPES = {recipe.name: recipe for recipe in (SCT_PAPER, ALORE_PAPER)}
