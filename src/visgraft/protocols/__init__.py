"""The field's protocols, and the offline suite, as rows of data.

Here belongs what says of a task where its images lie, how many there are and how they are divided. Running them
belongs to `bench`.
"""

from visgraft.errors import VisgraftError, nearest
from visgraft.protocols.domains import DOMAINS
from visgraft.protocols.few_shot import FEW_SHOT
from visgraft.protocols.fgvc import FGVC
from visgraft.protocols.offline import OFFLINE, OFFLINE_FEW_SHOT
from visgraft.protocols.row import Protocol
from visgraft.protocols.vtab import VTAB

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol for protocol in (OFFLINE, OFFLINE_FEW_SHOT, VTAB, FGVC, FEW_SHOT, DOMAINS)
}


def get_protocol(name: str) -> Protocol:
    """Return a protocol by its name.

    Raises:
        VisgraftError: there is none of this name.
    """
    if name not in PROTOCOLS:
        raise VisgraftError(f"unknown protocol {name!r}{nearest(name, PROTOCOLS)}; `visgraft bench list` shows all")
    return PROTOCOLS[name]
