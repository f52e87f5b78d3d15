"""How far a picture lies from those of the training, by features of the frozen backbone.

The distance is that of probabilistic PCA (Tipping and Bishop 1999) of the training features: Mahalanobis' distance, in
which the many directions along which they hardly differ share one variance, so that few are kept. How far is far is
said by validation images: the share of them that lie at least as far is a p-value, whatever the distance is.
`benchmarks/unlike.py` compares it with other distances.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor, nn

from visgraft.adapters.reference import Reference, parse_reference
from visgraft.backbones.heads import classifier_paths
from visgraft.core.tensors import eval_mode
from visgraft.data.images import Images
from visgraft.executors.distributed import in_shares
from visgraft.measure.precision import Compute, make_compute

DIRECTIONS = 96
"""Most directions that are kept, in half precision: 74 KB of a ViT-S. Of fewer than four times as many images fewer."""
FEWEST = 8
"""Training images below which no direction is worth keeping."""
MOST_IMAGES = 2000
"""Images of the training, and of the validation part, that are looked at; of more, evenly spaced ones."""
BATCH_SIZE = 64
ROUNDING = 1e-6
"""Of the mean variance: what is below is rounding, and no direction along which pictures differ."""

Numbers = NDArray[np.float64]


class FrozenFeatures:
    """Returns what enters the head of a model [B, F], float32 on the CPU, of prepared images [B, C, H, W]."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.heads = model, classifier_paths(model)

    def __call__(self, x: Tensor, compute: Compute) -> Tensor:
        """Run the model in eval mode, without gradient."""
        entering: list[Tensor] = []
        handles = [
            self.model.get_submodule(path).register_forward_pre_hook(lambda _, args: entering.append(args[0]))
            for path in self.heads
        ]
        try:
            with torch.inference_mode(), compute.autocast(), eval_mode(self.model):
                like = next(self.model.parameters())
                found = self.model(x.to(like.device, like.dtype))
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat([one.float().flatten(1) for one in entering or [found]], 1).cpu()


def features_of(model: nn.Module, images: Images, precision: str) -> Numbers:
    """Return the features [N, F] of images by a plain backbone; of very many, of evenly spaced ones.

    Several processes each look at their share, and all of them get all features.
    """
    compute, before = make_compute(precision), next(model.parameters()).device
    look = FrozenFeatures(model.to(compute.device))
    some = range(0, len(images), -(-len(images) // MOST_IMAGES))

    def run(batch: slice) -> Tensor:
        pixels = torch.stack([images.pixels[number] for number in some[batch]])
        return look(images.normalised(pixels, compute.device), compute)

    found = in_shares(len(some), BATCH_SIZE, run).double().numpy()
    model.to(before)
    return np.asarray(found)


def make_reference(model: nn.Module, images: Images, val: Images | None, precision: str) -> Reference | None:
    """Return what pictures are compared with, of training and validation images and the plain backbone.

    None: there is nothing to compare with.
    """
    if val is None or len(images) < FEWEST:
        return None
    return fit_reference(features_of(model, images, precision), features_of(model, val, precision))


def fit_reference(train: Numbers, held_out: Numbers) -> Reference | None:
    """Return what pictures are compared with, of features of training images [N, F] and of others like them [M, F].

    None: there are too few of them, or they are all the same.
    """
    if len(train) < FEWEST or not len(held_out):
        return None
    found = PCA(min(DIRECTIONS, len(train) // 4, train.shape[1] - 1), svd_solver="full").fit(train)
    least = ROUNDING * float(train.var(0).mean())
    if not least > 0:
        return None
    noise = math.sqrt(max(float(found.noise_variance_), least))
    scales = np.sqrt(np.maximum(found.explained_variance_, noise**2))
    made = rounded(Reference(found.mean_, found.components_, scales, noise, np.zeros(1)))
    return replace(made, distances=np.float32(np.sort(distances(made, held_out))).astype(float))


def rounded(reference: Reference) -> Reference:
    """Return a reference as it is after it was written and read."""
    return parse_reference(reference.to_bytes())


def distances(reference: Reference, features: Numbers) -> Numbers:
    """Return how far features [N, F] lie from the training's [N], in standard deviations, a mean over directions."""
    x = features - reference.mean
    inside = x @ reference.directions.T
    outside = x - inside @ reference.directions
    squared = ((inside / reference.scales) ** 2).sum(1) + (outside**2).sum(1) / reference.noise**2
    return np.asarray(np.sqrt(squared / features.shape[1]))


def share_as_far(reference: Reference, features: Numbers) -> Numbers:
    """Return the share [N] of validation images, the picture itself among them, that lie at least as far as pictures.

    Of pictures like them it is at most s with a probability of at most s.
    """
    below = np.searchsorted(reference.distances, distances(reference, features), side="left")
    count = len(reference.distances)
    return np.asarray((1 + count - below) / (count + 1))
