"""The listening sockets: one for each worker and address family."""

from __future__ import annotations

import socket

from firezone_tunnel.apps.relay.config import EngineConfig
from firezone_tunnel.shell.udp.sockets import bind


def bind_listening(config: EngineConfig, port: int) -> list[list[socket.socket]]:
    """For each worker a list with a socket of each family.

    The sockets of a family share the port. The kernel gives all datagrams of a sender to the same socket, as long as
    no socket is closed or added (docs/decisions.md, 24).

    Raises: PlatformError.
    """
    workers = config.relaying.workers
    sockets: list[list[socket.socket]] = [[] for _ in range(workers)]
    try:
        for family in config.relaying.hosts:
            host = config.bind_host(family)
            if workers > 1:
                bind(host, [port], mark=None).close()  # or another relay's sockets would share the port with ours
            for ours in sockets:
                ours.append(bind(host, [port], mark=None, reuse_port=workers > 1))
    except BaseException:
        close_all(sockets)
        raise
    return sockets


def close_all(sockets: list[list[socket.socket]]) -> None:
    for ours in sockets:
        for one in ours:
            one.close()
