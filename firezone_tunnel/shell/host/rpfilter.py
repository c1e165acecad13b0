"""Keep strict reverse-path filtering from dropping replies to our marked sockets.

The filter drops a packet if the route to its source does not leave through the interface it arrived on. Once a
resource covers a peer's address, the route for unmarked packets leads into the tunnel. So replies get the mark of
their connection, and src_valid_mark makes the filter use the mark in its lookup.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from firezone_tunnel.errors import PlatformError
from firezone_tunnel.shell.host.nftables import OwnTable
from firezone_tunnel.shell.host.parts import Aspect, Change, HostState, Part
from firezone_tunnel.shell.host.sysctl import Sysctls
from firezone_tunnel.shell.host.tables import FIREZONE_MARK
from firezone_tunnel.shell.logs import events as log


def is_strict(interface: str, read: Callable[[str], str | None]) -> bool:
    """Whether an interface filters strictly. `read` returns a setting such as "net/ipv4/conf/eth0/rp_filter".

    The kernel uses the larger of the interface's own value and that for all interfaces.
    """
    values = [read(f"net/ipv4/conf/{name}/rp_filter") for name in ("all", interface)]
    return max(int(value or 0) for value in values) == _STRICT


class ReplyMarks(Part):
    """Marks replies, so that strict reverse-path filtering does not drop them.

    Once installed they stay until `remove`: another uplink may filter strictly again.
    """

    watches = Aspect.SETTINGS | Aspect.NFTABLES

    def __init__(self, *, state_directory: Path) -> None:
        """`state_directory` stores the host's original settings until `remove` restores them."""
        self._sysctls = Sysctls(state_directory / "client-sysctls.json")
        self._table = OwnTable(_TABLE, _OWN_TABLE)
        self._has_recovered = False
        self._is_installed = False

    def needs(self, state: HostState) -> object:
        return state.uplinks

    def put_right(self, state: HostState, *, is_suspect: bool) -> list[Change]:
        """The first call removes the marks of a predecessor that was killed, unless they are needed.

        Raises: PlatformError, if the marks are needed but can't be installed.
        """
        if not self._has_recovered:
            self._has_recovered = True
            self._is_installed = self._sysctls.recover()
        strict = [uplink for uplink in state.uplinks if is_strict(uplink, self._sysctls.read)]
        if not strict and not self._table.is_made:
            self.remove()
            return []
        was_installed, self._is_installed = self._is_installed, True
        try:
            self._sysctls.remember([_SRC_VALID_MARK])
            changes = self._table.put_right()
            if self._sysctls.read(_SRC_VALID_MARK) != "1":
                self._sysctls.write(_SRC_VALID_MARK, "1")
                changes.append(Change("net.ipv4.conf.all.src_valid_mark = 1"))
        except PlatformError as error:
            raise PlatformError(
                f"Can't exempt replies to this client from strict reverse-path filtering on {', '.join(strict)} "
                f"({error}): set net.ipv4.conf.{(*strict, 'default')[0]}.rp_filter and net.ipv4.conf.all.rp_filter to 2"
            ) from error
        if was_installed:
            return changes
        log.info("rpfilter:reply_marks_installed", interfaces=strict)
        return []  # they were not missing before

    def remove(self) -> None:
        if not self._is_installed:
            return
        self._is_installed = False
        self._table.remove()
        self._sysctls.restore()


_TABLE = "firezone_client"
_SRC_VALID_MARK = "net/ipv4/conf/all/src_valid_mark"
_STRICT = 1  # RFC 3704, section 2.2

_OWN_TABLE = f"""
    chain output {{
        type filter hook output priority mangle; policy accept;
        meta mark {FIREZONE_MARK:#x} ct mark set meta mark
    }}
    chain prerouting {{
        type filter hook prerouting priority mangle; policy accept;
        ct mark {FIREZONE_MARK:#x} meta mark set ct mark
    }}
"""
