"""Where a model looks: how much its answer depends on each part of the picture."""

import torch
from torch import Tensor, nn

from visgraft.data.images import Images
from visgraft.measure.evaluation import answers_of


def occlusion(model: nn.Module, images: Images, index: int, label: int, cells: int = 7) -> Tensor:
    """Return how far the probability of `label` falls when one cell of the picture is painted over: [cells, cells].

    Of a number, how far that falls, in its unit.
    The cover is the mean colour of the picture. It works for every model, is measured rather than read from inside,
    and a cell that does not matter gets 0. Negative values (the answer gains) are kept.
    """
    pixels = images.pixels[index]
    height, width = pixels.shape[-2:]
    cover = pixels.float().mean(dim=(1, 2)).round().to(torch.uint8).view(-1, 1, 1)
    rows = [(i * height // cells, (i + 1) * height // cells) for i in range(cells)]
    columns = [(i * width // cells, (i + 1) * width // cells) for i in range(cells)]
    covered = [pixels]
    for top, bottom in rows:
        for left, right in columns:
            copy = pixels.clone()
            copy[:, top:bottom, left:right] = cover
            covered.append(copy)
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits = model(images.normalised(torch.stack(covered), device)).float()
        answer = answers_of(logits, images.tasks, images.multi_label)[:, label].cpu()
    return (answer[0] - answer[1:]).view(cells, cells).clone()
