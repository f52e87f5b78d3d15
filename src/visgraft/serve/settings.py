"""What a server is told once, when it starts."""

import json
from dataclasses import asdict, dataclass
from typing import Any

MEGABYTE = 2**20


@dataclass(frozen=True)
class ServeConfig:
    """Options of a server.

    Args:
        store: the folder in which its processes keep which adapters there are, and those that are uploaded.
        adapters: the folder below which `PUT /adapters/NAME` finds adapters by path; None: only uploads.
        weights: where the backbone's weights come from, in place of what the adapters say.
        capacity: how many adapters are held beside the backbone; None: all.
        pinned: names of adapters that are never parked.
        max_batch: images in one forward at most.
        max_delay_ms: how long an idle model waits for images that are being decoded, at most.
        max_queue: images that may be under way at once, decoded or not; more are told to come again.
        max_images: images in one request at most.
        max_body: bytes of a request's body at most.
        max_pixels: of a picture, by its header.
        body_seconds: in which a request's headers, and then its body, must arrive.
        tokens: of which every request must bear one; empty: none is asked for.
        hosts: names by which the server may be called; empty: any.
        threads: of torch in each process; None: torch's own choice.
    """

    store: str
    adapters: str | None = None
    weights: str | None = None
    capacity: int | None = None
    pinned: tuple[str, ...] = ()
    max_batch: int = 32
    max_delay_ms: float = 5.0
    max_queue: int = 512
    max_images: int = 64
    max_body: int = 32 * MEGABYTE
    max_pixels: int = 50_000_000
    body_seconds: float = 30.0
    tokens: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    threads: int | None = None

    def to_json(self) -> str:
        """Return it as text, for a process that is started anew."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ServeConfig":
        """Return it from `to_json`'s text."""
        stored: Any = json.loads(text)
        facts: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        return cls(**facts)
