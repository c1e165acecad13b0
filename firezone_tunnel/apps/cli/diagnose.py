"""Check whether this host can run a client and a gateway, without changing its configuration.

All calls block, for a few seconds at most.
"""

from __future__ import annotations

import enum
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import attrs

from firezone_tunnel.errors import ConfigurationError, PlatformError, one_line
from firezone_tunnel.shell.host import nftables
from firezone_tunnel.shell.host.addresses import Uplink, host_candidates, uplinks
from firezone_tunnel.shell.host.instance import owner
from firezone_tunnel.shell.host.rpfilter import is_strict
from firezone_tunnel.shell.host.rtnetlink import RtNetlink
from firezone_tunnel.shell.host.snapshot import read_snapshot
from firezone_tunnel.shell.host.sysctl import PROC_SYS
from firezone_tunnel.shell.portal_link.url import LoginUrl
from firezone_tunnel.shell.tun.device import DEFAULT_NAME, Offload, open_tun
from firezone_tunnel.shell.udp import sockets

ROLES = ("client", "gateway")
_PORTAL_TIMEOUT = 5.0


class CheckState(enum.Enum):
    """The result of a check. With LIMIT the tunnel works, but more slowly or with fewer features."""

    OK = "ok"
    LIMIT = "limit"
    MISSING = "missing"


@attrs.frozen
class Finding:
    """The result of one check, with advice. `needed_by` names the roles that can't run if the result is MISSING."""

    check: str
    state: CheckState
    found: str
    advice: str = ""
    needed_by: tuple[str, ...] = ROLES


def diagnose(interface: str = DEFAULT_NAME, api_url: str | None = None, ca_file: Path | None = None) -> list[Finding]:
    """Run all checks. The portal is checked only if its URL is given.

    :param interface: the name of the client's or gateway's TUN device.
    """
    network = list(_network(interface))
    needs_nft = ROLES if any(finding.check == _STRICT for finding in network) else ("gateway",)
    findings = [_privileges(), *_tun(), *_udp(), *network, _nft(needs_nft), _forwarding(), _occupied()]
    if api_url is not None:
        findings.append(_portal(api_url, ca_file))
    return findings


def is_usable(findings: list[Finding], role: str) -> bool:
    """Whether the host has everything that a client, or a gateway, needs."""
    return not any(finding.state is CheckState.MISSING and role in finding.needed_by for finding in findings)


_NO_UPGRADE = "the answer to the WebSocket upgrade is missing: "
_WEBSOCKET = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)
_CAP_NET_ADMIN = 12  # <linux/capability.h>
_STRICT = "strict rp_filter"
_SLOWER = "the tunnel works, but is slower: use Linux 6.2 or later"
_OFFLOADS = {
    Offload.UDP: "TCP and UDP segmentation",
    Offload.TCP: "TCP segmentation",
    Offload.CHECKSUM: "checksums only",
    Offload.NONE: "no offloads",
}


def _privileges() -> Finding:
    if os.geteuid() == 0 and _has_net_admin():
        return Finding("privileges", CheckState.OK, "root, with CAP_NET_ADMIN")
    if _has_net_admin():
        return Finding("privileges", CheckState.OK, "CAP_NET_ADMIN")
    found = "root, but without CAP_NET_ADMIN" if os.geteuid() == 0 else "neither root nor CAP_NET_ADMIN"
    advice = "run as root; in a container, add the capability NET_ADMIN"
    return Finding("privileges", CheckState.MISSING, found, advice)


def _has_net_admin() -> bool:
    """Whether CAP_NET_ADMIN is effective (proc(5))."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1)
    return False


def _tun() -> Iterator[Finding]:
    """Create a TUN device with another name, and delete it."""
    try:
        device = open_tun("fz-diagnose%d")  # the kernel replaces %d by the first free number
    except PlatformError as error:
        yield Finding("tun", CheckState.MISSING, str(error), "run modprobe tun; in a container, add /dev/net/tun")
        return
    device.close()
    yield Finding("tun", CheckState.OK, "TUN devices can be created")
    is_best = device.offload is Offload.UDP
    yield Finding(
        "tun offloads",
        CheckState.OK if is_best else CheckState.LIMIT,
        _OFFLOADS[device.offload],
        "" if is_best else _SLOWER,
    )


def _udp() -> Iterator[Finding]:
    try:
        with sockets.bind("0.0.0.0", [0], mark=None) as udp:
            features = sockets.configure(udp, gso=True, gro=True)
    except PlatformError as error:
        yield Finding("udp", CheckState.MISSING, one_line(error), "allow this user to open UDP sockets")
        return
    lacking = [name for name, has in (("GSO", features.gso), ("GRO", features.gro)) if not has]
    yield Finding(
        "udp offloads",
        CheckState.LIMIT if lacking else CheckState.OK,
        f"without {' and '.join(lacking)}" if lacking else "GSO and GRO",
        _SLOWER if lacking else "",
    )
    size = features.receive_buffer // 2  # the kernel reports twice the requested size
    is_large = size >= sockets.RECEIVE_BUFFER
    yield Finding(
        "udp buffer",
        CheckState.OK if is_large else CheckState.LIMIT,
        f"receive buffer of {size >> 10} KiB",
        "" if is_large else f"run as root, or set net.core.rmem_max to {sockets.RECEIVE_BUFFER}",
    )


def _nft(needed_by: tuple[str, ...]) -> Finding:
    try:
        nftables.rules()
    except PlatformError as error:
        return Finding("nftables", CheckState.MISSING, str(error), "install nftables; run as root", needed_by)
    return Finding("nftables", CheckState.OK, "rule set can be read", "", needed_by)


def _forwarding() -> Finding:
    path = PROC_SYS / "net/ipv4/ip_forward"
    if _read(path) == "1":
        return Finding("forwarding", CheckState.OK, "IPv4 forwarding is on", needed_by=("gateway",))
    if os.access(path, os.W_OK):
        return Finding("forwarding", CheckState.OK, "off; the gateway turns it on", needed_by=("gateway",))
    return Finding(
        *("forwarding", CheckState.MISSING, "off, and this user can't turn it on"),
        "set net.ipv4.ip_forward=1 (Docker: --sysctl)",
        needed_by=("gateway",),
    )


def _network(interface: str) -> Iterator[Finding]:
    netlink = RtNetlink()
    try:
        snapshot = read_snapshot(netlink)
    except (PlatformError, OSError) as error:
        yield Finding("network", CheckState.MISSING, one_line(error), "allow this user to open netlink sockets")
        return
    finally:
        netlink.close()
    found = uplinks(snapshot, own_link=interface)
    for family, uplink in (("IPv4", found.ipv4), ("IPv6", found.ipv6)):
        yield _uplink(f"{family} uplink", uplink)
    hosts = host_candidates(snapshot, own_link=interface)
    if hosts:
        yield Finding("candidates", CheckState.OK, ", ".join(hosts))
    else:
        advice = "configure an IP address on a network interface"
        yield Finding("candidates", CheckState.MISSING, "no address that a peer could use", advice)
    for name in dict.fromkeys(uplink.interface for uplink in found if uplink is not None):
        if is_strict(name, lambda setting: _read(PROC_SYS / setting)):
            yield Finding(_STRICT, CheckState.OK, f"on {name}: the client marks replies with nftables")


def _uplink(check: str, uplink: Uplink | None) -> Finding:
    if uplink is None:
        advice = "add a default route to reach peers outside of the local networks"
        return Finding(check, CheckState.LIMIT, "no default route", advice)
    via = f" via {uplink.next_hop}" if uplink.next_hop else ""
    source = f" from {uplink.preferred_source}" if uplink.preferred_source else ""
    return Finding(check, CheckState.OK, f"{uplink.interface}{via}{source}")


def _occupied() -> Finding:
    occupant = owner()
    if occupant is None:
        return Finding("occupied", CheckState.OK, "no client or gateway is running")
    advice = "stop it before you start another: a host has room for one client or gateway"
    return Finding("occupied", CheckState.LIMIT, f"{occupant} is running in this network namespace", advice)


def _portal(api_url: str, ca_file: Path | None) -> Finding:
    """Connect to the portal, verify its TLS certificate, and see whether it answers a WebSocket upgrade."""
    missing = ""
    try:
        portal = LoginUrl.client(api_url, "", device_id="diagnose", name="diagnose")
        with socket.create_connection((portal.host, portal.port), _PORTAL_TIMEOUT) as connection:
            address = connection.getpeername()[0]
            if portal.is_secure:
                missing = "the TLS handshake is missing: "
                context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
                with context.wrap_socket(connection, server_hostname=portal.host) as secured:
                    missing = _NO_UPGRADE
                    _upgrade(secured, portal)
            else:
                missing = _NO_UPGRADE
                _upgrade(connection, portal)
    except ConfigurationError as error:
        return Finding("portal", CheckState.MISSING, one_line(error), "check --api-url")
    except ssl.SSLCertVerificationError as error:
        advice = "check the portal's certificate, or pass its CA with --ca-file"
        return Finding("portal", CheckState.MISSING, f"{portal} is not trusted: {error.verify_message}", advice)
    except OSError as error:
        advice = "check --api-url, name resolution and the firewall"
        return Finding("portal", CheckState.MISSING, f"{portal} does not answer: {missing}{_reason(error)}", advice)
    return Finding("portal", CheckState.OK, f"{portal} answers at {address}")


def _upgrade(connection: socket.socket, portal: LoginUrl) -> None:
    """Ask for a WebSocket without a token, which a portal refuses.

    Raises: OSError.
    """
    headers = "".join(f"{name}: {value}\r\n" for name, value in portal.headers)
    connection.sendall(f"GET {portal.target()} HTTP/1.1\r\n{headers}{_WEBSOCKET}\r\n".encode())
    answer = b""
    while len(answer) < len(b"HTTP/1.1 401") and (data := connection.recv(64)):
        answer += data
    if not answer:
        raise OSError("the portal dropped the connection")
    version, _, status = answer.partition(b" ")
    if not version.startswith(b"HTTP/"):
        raise OSError("what answers is not HTTP")
    if status[:1] in {b"2", b"3"} or status[:3] == b"404":
        raise OSError(f"what answers is not a portal: HTTP {status[:3].decode('ascii', 'replace')}")


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
