"""The first k images of each class in an order that a seed draws: the k-shot version of any data set."""

from collections.abc import Sequence

import numpy as np

from visgraft.data.dataset import Example
from visgraft.errors import DataError


def draw_shots(examples: Sequence[Example], shots: int, seed: int) -> tuple[Example, ...]:
    """Return `shots` examples of each class, ordered by class and then as they came.

    The draw of a class depends on the seed, its label and the order of its examples alone, so a further class changes
    nothing, and a smaller draw is part of a larger one.

    Raises:
        DataError: fewer than 1 shot, or a class with fewer examples.
    """
    if shots < 1:
        raise DataError(f"shots is {shots}, but must be 1 or more")
    of_class: dict[int, list[Example]] = {}
    for example in examples:
        if not isinstance(example.label, int):
            raise DataError("shots are drawn per class, so every image needs exactly one; give one class per image")
        of_class.setdefault(example.label, []).append(example)
    chosen: list[Example] = []
    for label, members in sorted(of_class.items()):
        if len(members) < shots:
            where = members[0].path.parent
            raise DataError(
                f"class {label} ({where}) has {len(members)} images, fewer than {shots} shots; ask for fewer"
            )
        order = np.random.default_rng((seed, label)).permutation(len(members))[:shots]
        chosen += [members[i] for i in sorted(order)]
    return tuple(chosen)
