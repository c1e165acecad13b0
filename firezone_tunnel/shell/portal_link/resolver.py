"""The host's name resolver, asked in threads that never hold up the end of the process.

getaddrinfo(3) can't be interrupted, and where no name server answers it takes half a minute. Twisted's own resolver
asks in the reactor's thread pool, whose threads are joined when the reactor stops.
"""

from __future__ import annotations

import socket
import threading
from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.internet.error import DNSLookupError
from twisted.python.failure import Failure

MAX_LOOKUPS = 8
"""Lookups at a time. Attempts follow each other faster than lookups that hang end."""


class HostResolver:
    """Resolves names with the host's configuration."""

    def __init__(self, reactor: Any) -> None:
        """`reactor` must provide IReactorFromThreads."""
        self._reactor = reactor
        self._lookups = 0

    def resolve(self, host: str) -> Deferred[list[str]]:
        """The addresses of a host, best first. Cancelling it only stops the waiting.

        Fails with: DNSLookupError.
        """
        if self._lookups >= MAX_LOOKUPS:
            return fail(DNSLookupError(f"the name servers of this host don't answer, and so not for {host}"))
        self._lookups += 1
        done: Deferred[list[str]] = Deferred()
        threading.Thread(target=self._look_up, args=(host, done), name=f"resolve {host}", daemon=True).start()
        return done

    def _look_up(self, host: str, done: Deferred[list[str]]) -> None:
        result: list[str] | Failure
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            result = [str(address[0]) for *_, address in found]
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            result = Failure(DNSLookupError(f"no address is known for {host}: {reason}"))
        self._reactor.callFromThread(self._looked_up, done, result)

    def _looked_up(self, done: Deferred[list[str]], result: list[str] | Failure) -> None:
        self._lookups -= 1
        done.callback(result)  # a Failure starts the errbacks
