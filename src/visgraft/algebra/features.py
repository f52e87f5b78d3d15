"""What adapters of a bank do to features: those that enter the head, and those that every block returns."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visgraft.algebra.apart import Sums, sums_of_features
from visgraft.algebra.changes import block_paths
from visgraft.backbones.heads import classifier_paths
from visgraft.bank.bank import Bank
from visgraft.core.attached import find_attached
from visgraft.core.finding import token_grid
from visgraft.data.images import Images
from visgraft.errors import AdapterError
from visgraft.measure.precision import make_compute

BATCH_SIZE = 32


class Seen(NamedTuple):
    """A batch as a model sees it: what blocks return, what enters the head [B, F], and the answers [B, outputs].

    Of an adapter that answers tasks in passes of their own, the former two hold each pass behind the other, [tasks × B,
    ...].
    """

    blocks: tuple[Tensor, ...]
    pooled: Tensor
    logits: Tensor


@contextlib.contextmanager
def looking(model: nn.Module, blocks: Sequence[str] = ()) -> Iterator[Callable[[Tensor], Seen]]:
    """Yield what runs a model on prepared images and keeps what passes: of these blocks, and before the head."""
    outputs: dict[str, Tensor] = {}
    entering: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        return lambda module, args, output: outputs.update({path: output})

    def keep_input(path: str) -> Callable[..., None]:
        return lambda module, args: entering.update({path: args[0]})

    handles: list[Any] = [model.get_submodule(path).register_forward_hook(keep(path)) for path in blocks]
    heads = classifier_paths(model)
    handles += [model.get_submodule(path).register_forward_pre_hook(keep_input(path)) for path in heads]

    def run(x: Tensor) -> Seen:
        like = next(model.parameters())
        with torch.no_grad():
            logits = model(x.to(like.device, like.dtype)).float()
        pooled = [entering[path].float().flatten(1) for path in heads] or [logits]
        return Seen(tuple(outputs[path] for path in blocks), torch.cat(pooled, 1), logits)

    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


def pooled_features(bank: Bank, name: str | None, images: Images, precision: str) -> tuple[Tensor, Tensor]:
    """Return what enters the head [N, F] and the answers [N, outputs] of an adapter; None: of the backbone.

    The features of tasks that are answered in passes of their own stand side by side, [N, tasks × F].
    """
    compute = make_compute(precision)
    with bank.lent(name) as model, looking(model) as look, compute.autocast():
        seen, passes = [look(x) for x, _ in images.batches(BATCH_SIZE)], pass_count(model)
    pooled = torch.cat([one.pooled.unflatten(0, (passes, -1)).transpose(0, 1).flatten(1) for one in seen])
    return pooled.cpu(), torch.cat([one.logits for one in seen]).cpu()


def pass_count(model: nn.Module) -> int:
    """Return in how many passes a model answers an image: one for each task that has a pass of its own, else 1."""
    attached = find_attached(model)
    return len(attached.config.passes) or 1 if attached else 1


class FeaturesCompared(NamedTuple):
    """What two adapters do to images: how far apart behind each block and before the head, and their logits."""

    blocks: tuple[Sums, ...]
    pooled: Sums
    logits: tuple[Tensor, Tensor]


def compare_features(bank: Bank, first: str, second: str, images: Images) -> FeaturesCompared:
    """Compare how two adapters change the features of images, beside those of the plain backbone, in float32.

    Where one answers tasks in passes of their own, each of these is compared with the one pass of the others, or with
    that of the same place.

    Raises:
        AdapterError: both answer tasks in passes of their own, but not as many.
    """
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(bank.lent(name)) for name in (None, first, second)]
        paths, prefix = block_paths(models[0]), token_grid(models[0]).prefix_tokens
        looks = [stack.enter_context(looking(model, paths)) for model in models]
        passes = [pass_count(model) for model in models]
        if len({1, *passes}) > 2:
            raise AdapterError(
                f"one adapter answers its tasks in {passes[1]} passes and the other in {passes[2]}, so what they do to "
                "pictures is not compared; leave out --images (images= in Python)"
            )
        blocks, pooled = [Sums()] * len(paths), Sums()
        answers: list[tuple[Tensor, Tensor]] = []
        for x, _ in images.batches(BATCH_SIZE):
            plain, *both = (_in_passes(look(x), max(passes) // own) for look, own in zip(looks, passes, strict=True))
            for number, before in enumerate(plain.blocks):
                after = [own_tokens(seen.blocks[number], before, prefix) for seen in both]
                blocks[number] = blocks[number].plus(sums_of_features(before, *after))
            pooled = pooled.plus(sums_of_features(plain.pooled, *(seen.pooled for seen in both)))
            answers.append((both[0].logits.cpu(), both[1].logits.cpu()))
    logits = tuple(torch.cat(of_one) for of_one in zip(*answers, strict=True))
    return FeaturesCompared(tuple(blocks), pooled, (logits[0], logits[1]))


def _in_passes(seen: Seen, times: int) -> Seen:
    """Return the features of one pass so many times, to be held against those of an adapter with as many passes."""
    if times == 1:
        return seen
    blocks = tuple(x.repeat(times, *(1,) * (x.ndim - 1)) for x in seen.blocks)
    return Seen(blocks, seen.pooled.repeat(times, 1), seen.logits)


def own_tokens(x: Tensor, plain: Tensor, prefix: int) -> Tensor:
    """Return tokens [B, N + T, C] without those T that a method inserted behind the prefix: alike `plain` [B, N, C]."""
    more = x.shape[1] - plain.shape[1] if x.ndim == 3 else 0
    return torch.cat([x[:, :prefix], x[:, prefix + more :]], 1) if more else x
