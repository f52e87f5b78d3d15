"""What validation images say of how sure an adapter is: a temperature, and the scores that conformal answers need."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Calibrated:
    """What was measured on `images` validation images, of which none was trained on.

    Attributes:
        images: how many there were.
        ranks: from 1, ascending, of the scores that are kept; of many images not all are.
        scores: ascending; a score says how far the truth was from the answer (see `measure.conformal`).
        temperature: what logits are divided by; 1 for numbers.
    """

    images: int
    ranks: tuple[int, ...]
    scores: tuple[float, ...]
    temperature: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values; ranks only where they are not 1, 2, 3 …"""
        told = {} if len(self.ranks) == self.images else {"ranks": list(self.ranks)}
        return {"temperature": self.temperature, "images": self.images, **told, "scores": list(self.scores)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Calibrated":
        """Return it from `to_json`'s form.

        Raises:
            TypeError, ValueError, KeyError: it is damaged.
        """
        images, scores, temperature = stored["images"], stored["scores"], stored["temperature"]
        if not isinstance(images, int) or not isinstance(scores, list) or not isinstance(temperature, int | float):
            raise TypeError("images, scores or temperature is of another kind")
        ranks = stored.get("ranks", list(range(1, len(scores) + 1)))
        if not all(isinstance(rank, int) for rank in ranks) or not all(isinstance(s, int | float) for s in scores):
            raise TypeError("ranks and scores are not all numbers")
        if not ranks or ranks[-1] != images or len(ranks) != len(scores):
            raise ValueError(f"{len(scores)} scores with {len(ranks)} ranks are not those of {images} images")
        if list(ranks) != sorted(set(ranks)) or ranks[0] < 1 or list(scores) != sorted(scores):
            raise ValueError("ranks or scores do not ascend")
        if not all(math.isfinite(score) for score in scores) or not 0 < temperature < math.inf:
            raise ValueError("a score or the temperature is not finite")
        return cls(images, tuple(ranks), tuple(map(float, scores)), float(temperature))
