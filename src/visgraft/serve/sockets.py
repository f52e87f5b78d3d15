"""The socket of a server."""

import socket

from visgraft.errors import VisgraftError


def listen(host: str, port: int) -> socket.socket:
    """Return a socket on which a server can listen; port 0 means one that is free.

    Raises:
        VisgraftError: there is no such address, or the port is taken.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (")[0]  # without the address again
        raise VisgraftError(
            f"{host}:{port} cannot be listened on ({reason}); choose another --host or --port"
        ) from error
