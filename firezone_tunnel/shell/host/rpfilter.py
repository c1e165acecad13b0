"""Keep strict reverse-path filtering from dropping replies to our marked sockets.

The filter drops a packet if the route to its source does not leave through the interface it arrived on. Once a
resource covers a peer's address, the route for unmarked packets leads into the tunnel. So replies get the mark of
their connection, and src_valid_mark makes the filter use the mark in its lookup.
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
    """Whether an interface filters strictly. `read` returns a setting such as "net/ipv4/conf/eth0/rp_filter".

    The kernel uses the larger of the interface's own value and that for all interfaces.
    """
    values = [read(f"net/ipv4/conf/{name}/rp_filter") for name in ("all", interface)]
    return max(int(value or 0) for value in values) == _STRICT


class ReplyMarks:
    """Marks replies, so that strict reverse-path filtering does not drop them."""

    def __init__(self, worker: WorkerThread, *, state_directory: Path) -> None:
        """`state_directory` stores the host's original settings until `remove` restores them."""
        self._worker = worker
        self._host = _FilteringHost(Sysctls(state_directory / "client-sysctls.json"))

    def ensure(self, uplinks: Iterable[str]) -> Deferred[list[str]]:
        """Install the marks if any of these interfaces filters strictly. Call it again when the uplinks change.

        Fires with the interfaces that filter strictly.

        Fails with: PlatformError, if the marks are needed but can't be installed.
        """
        return self._worker.call(self._host.ensure, tuple(uplinks))

    def remove(self) -> Deferred[None]:
        """Remove the marks and restore the original settings.

        Fails with: PlatformError.
        """
        return self._worker.call(self._host.remove)


_TABLE = "firezone_client"
_SRC_VALID_MARK = "net/ipv4/conf/all/src_valid_mark"
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
    """The blocking implementation, run in the worker thread."""

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
            self._sysctls.remember([_SRC_VALID_MARK])
            self._is_installed = True
            nftables.run(_OWN_TABLE)
            self._sysctls.write(_SRC_VALID_MARK, "1")
        except PlatformError as error:
            raise PlatformError(
                f"Can't exempt replies to this client from strict reverse-path filtering on {', '.join(strict)} "
                f"({error}): set net.ipv4.conf.{strict[0]}.rp_filter and net.ipv4.conf.all.rp_filter to 2"
            ) from error
        log.info("rpfilter:reply_marks_installed", interfaces=strict)
