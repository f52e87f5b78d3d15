"""The first k images of each class in an order that a seed draws: the k-shot version of any data set."""

from collections.abc import Sequence

import numpy as np

from visgraft.data.dataset import Example
from visgraft.errors import DataError


def order_of_class(count: int, label: int, seed: int) -> list[int]:
    """Return 0 to count - 1 in the order in which a class's images are drawn; its first k are the k shots."""
    return [int(i) for i in np.random.default_rng((seed, label)).permutation(count)]


def draw_shots(
    examples: Sequence[Example], shots: int, seed: int, *, classes: Sequence[str] | None = None
) -> tuple[Example, ...]:
    """Return `shots` examples of each class, ordered by class and then as they came.

    The draw of a class depends on the seed, its label and the order of its examples alone, so a further class changes
    nothing, and a smaller draw is part of a larger one.

    Args:
        examples: with one class each.
        shots: how many of each class, from 1 on.
        seed: of the draw, from 0 on.
        classes: the classes' names, for messages; None: the folder of the class's first image.

    Raises:
        DataError: fewer than 1 shot, or a class with fewer examples.
    """
    check_shots(shots)
    chosen: list[Example] = []
    for label, members in by_class(examples).items():
        if len(members) < shots:
            name = classes[label] if classes and label < len(classes) else members[0].path.parent
            raise DataError(
                f"class {label} ({name}) has {len(members)} images, fewer than {shots} shots; ask for fewer shots"
            )
        chosen += [members[i] for i in sorted(order_of_class(len(members), label, seed)[:shots])]
    return tuple(chosen)


def draw_up_to(examples: Sequence[Example], most: int, seed: int) -> tuple[Example, ...]:
    """Draw as `draw_shots` does, but take all examples of a class that has fewer.

    Raises:
        DataError: `most` is below 1, or an example has not one class.
    """
    check_shots(most)
    return tuple(
        members[i]
        for label, members in by_class(examples).items()
        for i in sorted(order_of_class(len(members), label, seed)[:most])
    )


def check_shots(shots: int) -> None:
    """Raise a DataError unless at least one image of each class is asked for."""
    if shots < 1:
        raise DataError(f"shots is {shots}, but must be 1 or more")


def by_class(examples: Sequence[Example]) -> dict[int, list[Example]]:
    """Return the examples of each class, the classes in order.

    Raises:
        DataError: an example has not exactly one class.
    """
    found: dict[int, list[Example]] = {}
    for example in examples:
        if not isinstance(example.label, int):
            raise DataError("shots are drawn per class, so every image needs exactly one; give one class per image")
        found.setdefault(example.label, []).append(example)
    return dict(sorted(found.items()))
