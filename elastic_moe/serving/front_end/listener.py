"""The listening socket of a node's front end. The supervisor holds it, so that it outlives any one front end."""

import errno
import socket

from elastic_moe.config import ServerConfig


def listen(config: ServerConfig) -> socket.socket:
    """A socket that listens where `config` says. Bound before anything slow is done, so that a mistake shows at once.

    Raises:
        ValueError: it cannot be had; says why and what to change.
    """
    family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            other = "choose another with server.port=PORT (0: any free one)"
            raise ValueError(f"server.port={config.port} is taken on {config.host}; {other}") from error
        where = f"server.host={config.host} server.port={config.port}"
        raise ValueError(f"{where}: cannot listen there: {error.strerror}") from error


def url_of(listener: socket.socket) -> str:
    """The address clients use, for example `http://127.0.0.1:8000`."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
