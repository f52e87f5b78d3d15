"""The field's protocols, and the offline suite, as rows of data."""

from visgraft.errors import VisgraftError, nearest
from visgraft.protocols.offline import OFFLINE, OFFLINE_FEW_SHOT
from visgraft.protocols.row import Protocol

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in (OFFLINE, OFFLINE_FEW_SHOT)}


def get_protocol(name: str) -> Protocol:
    """Return a protocol by its name.

    Raises:
        VisgraftError: there is none of this name.
    """
    if name not in PROTOCOLS:
        raise VisgraftError(f"unknown protocol {name!r}{nearest(name, PROTOCOLS)}; `visgraft bench list` shows all")
    return PROTOCOLS[name]
