"""The most confident mistakes of a run and its worst numbers, each with its picture and what it depends on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from visgraft.data.images import Images
from visgraft.data.tasks import written
from visgraft.measure.evaluation import Evaluation, is_multi_label
from visgraft.measure.numbers import NumberFigures
from visgraft.pictures import Picture, PixelArray, heat_map, photograph
from visgraft.report.looking import occlusion

MOST = 8
FAINT = 0.05  # a fall below this stays pale: a map scaled to its own noise would claim a reason


@dataclass(frozen=True)
class Mistake:
    """A wrong answer. In a multi-label run, `true` is empty where the class is wrongly given or wrongly missing.

    `probability` is the answer's, between 0 and 1; `strongest` says how far it falls when the part of the picture that
    matters most is covered; `map` is None where no answer was given that could depend on anything.
    """

    file: str
    true: str
    answered: str
    probability: float
    picture: Picture
    map: Picture | None
    strongest: float


def picture_of(images: Images, index: int) -> PixelArray:
    """Return an image's pixels as [H, W, 3]."""
    pixels: PixelArray = images.pixels[index].permute(1, 2, 0).numpy()
    return pixels


def count_mistakes(evaluation: Evaluation) -> int:
    """Return the number of wrong answers; of a multi-label run, those over all images and classes."""
    if is_multi_label(evaluation):
        return int(((evaluation.probabilities >= 0.5) != (evaluation.labels > 0.5)).sum())
    return int((evaluation.probabilities.argmax(-1) != evaluation.labels).sum())


def find_mistakes(
    model: nn.Module, images: Images, evaluation: Evaluation, classes: Sequence[str], most: int = MOST
) -> list[Mistake]:
    """Return the wrong answers of highest probability, the most confident first."""
    if is_multi_label(evaluation):
        return _label_mistakes(model, images, evaluation, classes, most)
    best = evaluation.probabilities.max(-1)
    wrong = torch.nonzero(best.indices != evaluation.labels).flatten()
    worst = wrong[best.values[wrong].argsort(descending=True, stable=True)][:most].tolist()
    return [
        _mistake(model, images, i, classes[int(evaluation.labels[i])], classes, int(best.indices[i]), best.values[i])
        for i in worst
    ]


@dataclass(frozen=True)
class FarOff:
    """A number far from the true one, both in their unit.

    `strongest` says how far the number moves when the part of the picture that matters most is covered.
    """

    file: str
    true: float
    answered: float
    picture: Picture
    map: Picture
    strongest: float


def find_far_off(model: nn.Module, images: Images, found: NumberFigures, most: int = MOST) -> list[FarOff]:
    """Return the answers furthest from the truth, the worst first; `images` are of that task alone."""
    order = (found.answers - found.truth).abs().argsort(descending=True, stable=True)[:most].tolist()
    return [_far_off(model, images, i, float(found.truth[i]), float(found.answers[i])) for i in order]


def _far_off(model: nn.Module, images: Images, index: int, true: float, answered: float) -> FarOff:
    pixels, file = picture_of(images, index), images.paths[index].name if images.paths else f"image {index}"
    moved = occlusion(model, images, index, 0).abs().numpy().astype(np.float64)
    strongest, task = float(moved.max()), images.tasks[0]
    heat = heat_map(pixels, moved / max(strongest, FAINT * task.std), f"What {task.name} depends on")
    picture = photograph(pixels, f"{file}, answered {written(answered, task.std)}")
    return FarOff(file, true, answered, picture, heat, strongest)


def _label_mistakes(
    model: nn.Module, images: Images, evaluation: Evaluation, classes: Sequence[str], most: int
) -> list[Mistake]:
    """The class decisions furthest from the truth: given with a high probability, or missed with a low one."""
    distance = (evaluation.probabilities - evaluation.labels).abs()
    order = distance.flatten().argsort(descending=True, stable=True)[:most].tolist()
    cells = [divmod(flat, len(classes)) for flat in order]
    return [
        _mistake(model, images, row, "", classes, column, evaluation.probabilities[row, column])
        for row, column in cells
        if distance[row, column] > 0.5
    ]


def _mistake(
    model: nn.Module, images: Images, index: int, true: str, classes: Sequence[str], answer: int, sure: torch.Tensor
) -> Mistake:
    pixels, file = picture_of(images, index), images.paths[index].name if images.paths else f"image {index}"
    heat, strongest = None, 0.0
    if true or sure >= 0.5:
        drop = occlusion(model, images, index, answer).clamp_min(0).numpy().astype(np.float64)
        strongest = float(drop.max())
        heat = heat_map(pixels, drop / max(strongest, FAINT), f"What the answer {classes[answer]} depends on")
    picture = photograph(pixels, f"{file}, answered {classes[answer]}")
    return Mistake(file, true, classes[answer], float(sure), picture, heat, strongest)
