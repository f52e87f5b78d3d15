"""A step's images in pieces: those that each process has, and those that it runs one after another.

Gradients of the pieces add up to those of the whole: each piece's loss, a mean, is weighted by what it counts in the
batch's, and chance is drawn for the batch.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from visgraft.core.draws import Rows, device_generators, drawn_for_batch
from visgraft.errors import VisgraftError
from visgraft.executors import distributed
from visgraft.measure.precision import Compute
from visgraft.options import TrainConfig
from visgraft.training.objective import Objective


class Piece(NamedTuple):
    """Images of a batch that run together: `rows` of it, None where they are all.

    `loaded` int64 [B] are their numbers; where images are mixed, the one before them comes first.
    """

    loaded: Tensor
    rows: Rows | None


class Outcome(NamedTuple):
    """What a step gave: the mean loss over its batch, and how many images were right (one class each)."""

    loss: Tensor
    right: Tensor


def check_pieces(config: TrainConfig) -> None:
    """Raise a VisgraftError where a batch has fewer images than there are pieces to run it in."""
    pieces = distributed.count() * config.gradient_accumulation
    if pieces > config.batch_size:
        raise VisgraftError(
            f"batch_size is {config.batch_size}, but its images are shared by {distributed.count()} processes with "
            f"gradient_accumulation {config.gradient_accumulation}; make it {pieces} or more, or start fewer processes"
        )


def is_divided(config: TrainConfig) -> bool:
    """Whether batches run in more than one piece."""
    return distributed.count() * config.gradient_accumulation > 1


def pieces_of(batch: Tensor, config: TrainConfig) -> list[Piece]:
    """Return the pieces of a batch (int64 [B]) that this process runs, none where there are too few images for it."""
    if not is_divided(config):
        return [Piece(batch, None)]
    own = distributed.own_share(len(batch))
    found = []
    for part in distributed.shares(own.stop - own.start, config.gradient_accumulation):
        start, stop = own.start + part.start, own.start + part.stop
        if start < stop:
            before = batch[start - 1 : start] if start else batch[-1:]
            loaded = torch.cat((before, batch[start:stop])) if config.mixed else batch[start:stop]
            found.append(Piece(loaded, Rows(start, stop, len(batch))))
    return found


def add_gradients(
    task: Objective,
    model: nn.Module,
    batch: Tensor,
    pieces: Sequence[Piece],
    inputs: Iterator[Tensor],
    compute: Compute,
) -> Outcome:
    """Give the model's parameters, which have no gradients yet, those of a batch's mean loss, and return that loss.

    Args:
        task: the network, labels and loss.
        model: the model whose parameters train.
        batch: the numbers of the batch's images, int64 [B].
        pieces: those that this process runs.
        inputs: yields the inputs of each.
        compute: the device and the precision.
    """
    labels = task.labels[batch.to(task.labels.device)]
    outcomes = []
    for number, (piece, x) in enumerate(zip(pieces, inputs, strict=False), 1):
        # Every piece draws for the whole batch, so each begins where the first one did.
        with torch.random.fork_rng(device_generators(compute.device), enabled=number < len(pieces)):
            outcomes.append(_run(task, model, piece, x, labels, compute))
    if len(outcomes) == 1 and distributed.count() == 1:
        return outcomes[0]
    zero = torch.zeros((), device=compute.device)
    summed = (
        Outcome(*(sum(values, start=zero) for values in zip(*outcomes, strict=True)))
        if outcomes
        else Outcome(zero, zero)
    )
    return _combined(model, summed)


def _run(task: Objective, model: nn.Module, piece: Piece, x: Tensor, labels: Tensor, compute: Compute) -> Outcome:
    """Run a piece of a batch with these `labels` forwards and backwards."""
    y = task.labels[piece.loaded.to(task.labels.device)]
    mixed, target = task.mix(x, y) if task.mix else (x, y)
    if piece.rows is not None and task.mix:
        mixed, target, y = mixed[1:], target[1:], y[1:]
    with drawn_for_batch(model, piece.rows):
        with compute.autocast():
            logits = task.network(mixed)
        loss = task.loss(logits.float(), target)
        if piece.rows is not None:
            loss = loss * task.share_of_loss(target, labels)
        loss.backward()
    right = (logits.detach().argmax(-1) == y).sum() if y.ndim == 1 else torch.zeros((), device=loss.device)
    return Outcome(loss.detach(), right)


def _combined(model: nn.Module, outcome: Outcome) -> Outcome:
    """Add up gradients and outcome over the processes, in one tensor."""
    if distributed.count() == 1:
        return outcome
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A parameter that no process has a gradient for keeps none, because the optimizer would decay it otherwise.
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=outcome.loss.device)
    figures = torch.stack((outcome.loss, outcome.right.to(outcome.loss.dtype)))
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), there, figures])
    distributed.add_up(flat)
    *sums, there, figures = flat.split([*(p.numel() for p in parameters), len(parameters), 2])
    for parameter, gradient, count in zip(parameters, sums, there.tolist(), strict=True):
        parameter.grad = gradient.view_as(parameter) if count else None
    return Outcome(*figures)
