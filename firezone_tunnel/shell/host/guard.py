"""Drop packets of resources that would leave outside of the tunnel, while the tunnel's routing can't be relied on."""

from __future__ import annotations

import contextlib
import json

from firezone_tunnel.core.messages.common import Network
from firezone_tunnel.errors import PlatformError
from firezone_tunnel.shell.host.nftables import OwnTable
from firezone_tunnel.shell.host.parts import Aspect, Change, HostState, Part
from firezone_tunnel.shell.host.tables import FIREZONE_MARK


class ResourceGuard(Part):
    """While the wanted state is guarded: packets to its routes are refused on every interface but the tunnel's.

    Rules that another program deletes again and again, or routes that can't be added, would otherwise let them leave
    in clear by the uplink.
    """

    watches = Aspect.NFTABLES

    def __init__(self, *, interface: str) -> None:
        self._interface = interface
        self._table = OwnTable("firezone_guard", "")
        self._has_swept = False

    def needs(self, state: HostState) -> object:
        return state.routes if state.is_guarded else None

    def put_right(self, state: HostState, *, is_suspect: bool) -> list[Change]:
        if not state.is_guarded:
            self._sweep()
            self.remove()
            return []
        self._table.content = _content(self._interface, state.routes)
        return self._table.put_right()

    def remove(self) -> None:
        if self._table.is_made:
            self._table.remove()

    def _sweep(self) -> None:
        """Remove the guard of a predecessor that was killed."""
        if not self._has_swept:
            self._has_swept = True
            with contextlib.suppress(PlatformError):  # without nft there can't be one
                self._table.remove()


def _content(interface: str, routes: tuple[Network, ...]) -> str:
    sets, refusals = "", ""
    for version, kind, field in ((4, "ipv4_addr", "ip"), (6, "ipv6_addr", "ip6")):
        networks = ", ".join(str(network) for network in routes if network.version == version)
        if networks:
            name = f"resources{version}"
            sets += f"set {name} {{ type {kind}; flags interval; auto-merge; elements = {{ {networks} }} }}\n"
            refusals += f"{field} daddr @{name} reject with icmpx admin-prohibited\n"
    exempt = f'oifname {{ "lo", {json.dumps(interface)} }} accept\nmeta mark {FIREZONE_MARK:#x} accept\n'
    chains = (
        f"chain {hook} {{ type filter hook {hook} priority filter; policy accept;\n{exempt}{refusals}}}\n"
        for hook in ("output", "forward")
    )
    return sets + "".join(chains)
