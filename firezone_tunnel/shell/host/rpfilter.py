"""Strict reverse-path filtering, which would drop the answers to our marked sockets once a resource covers a peer.

Such a filter asks whether the answer's source would be reached by the interface it came from, and for what is not
marked that is the tunnel. So answers get the mark of what they answer, and the filter is told to heed marks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from twisted.internet.defer import Deferred

from firezone_tunnel.errors import PlatformError
from firezone_tunnel.shell.host import nftables
from firezone_tunnel.shell.host.kernel import FIREZONE_MARK
from firezone_tunnel.shell.host.sysctl import Sysctls
from firezone_tunnel.shell.host.worker_thread import WorkerThread
from firezone_tunnel.shell.logs import events as log


def is_strict(interface: str, read: Callable[[str], str | None]) -> bool:
    """Whether an interface filters strictly, by what `read` says of settings such as "net/ipv4/conf/eth0/rp_filter".

    The larger of the interface's own value and that of all of them holds.
    """
    values = [read(f"net/ipv4/conf/{name}/rp_filter") for name in ("all", interface)]
    return max(int(value or 0) for value in values) == _STRICT


class ReplyMarks:
    """Makes strict reverse-path filtering harmless, where there is any."""

    def __init__(self, worker: WorkerThread, *, state_directory: Path) -> None:
        """`state_directory` keeps the host's original settings for as long as ours hold."""
        self._worker = worker
        self._host = _FilteringHost(Sysctls(state_directory / "client-sysctls.json"))

    def ensure(self, uplinks: Iterable[str]) -> Deferred[list[str]]:
        """Call it with the interfaces that lead to the internet, at start and when they change.

        Fires with those that filter strictly: if there are none, nothing is changed.

        Fails with: PlatformError, if some do and nothing can be done about it.
        """
        return self._worker.call(self._host.ensure, tuple(uplinks))

    def remove(self) -> Deferred[None]:
        """Put everything back.

        Fails with: PlatformError.
        """
        return self._worker.call(self._host.remove)


_TABLE = "firezone_client"
_HEED_MARKS = "net/ipv4/conf/all/src_valid_mark"
_STRICT = 1  # RFC 3704, section 2.2

_NO_TABLE = f"add table inet {_TABLE}\ndelete table inet {_TABLE}\n"
_OWN_TABLE = f"""{_NO_TABLE}
table inet {_TABLE} {{
    chain output {{
        type filter hook output priority mangle; policy accept;
        meta mark {FIREZONE_MARK:#x} ct mark set meta mark
    }}
    chain prerouting {{
        type filter hook prerouting priority mangle; policy accept;
        ct mark {FIREZONE_MARK:#x} meta mark set ct mark
    }}
}}
"""


class _FilteringHost:
    """All of it, blocking."""

    def __init__(self, sysctls: Sysctls) -> None:
        self._sysctls = sysctls
        self._is_installed = False

    def ensure(self, uplinks: tuple[str, ...]) -> list[str]:
        if not self._is_installed and self._sysctls.recover():
            self._is_installed = True
            self.remove()
        strict = [uplink for uplink in uplinks if is_strict(uplink, self._sysctls.read)]
        if strict and not self._is_installed:
            self._install(strict)
        return strict

    def remove(self) -> None:
        if not self._is_installed:
            return
        self._is_installed = False
        nftables.run(_NO_TABLE)
        self._sysctls.restore()

    def _install(self, strict: list[str]) -> None:
        try:
            self._sysctls.remember([_HEED_MARKS])
            self._is_installed = True
            nftables.run(_OWN_TABLE)
            self._sysctls.write(_HEED_MARKS, "1")
        except PlatformError as error:
            raise PlatformError(
                f"Strict reverse-path filtering on {', '.join(strict)} would drop answers from outside the tunnel: "
                f"set net.ipv4.conf.{strict[0]}.rp_filter and net.ipv4.conf.all.rp_filter to 2 ({error})"
            ) from error
        log.info("rpfilter:reply_marks_installed", interfaces=strict)
