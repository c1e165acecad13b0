"""TUN devices, opened with virtio headers, so that a read or a write may carry a run of segments."""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import stat
import struct
from pathlib import Path

import attrs

from firezone_tunnel.core.packet.superpacket import VIRTIO_HEADER_SIZE
from firezone_tunnel.errors import InUseError, PlatformError

DEFAULT_NAME = "tun-firezone"  # docs/protocol/data-plane.md, 8
DEVICE_NODE = Path("/dev/net/tun")


class Offload(enum.IntEnum):
    """Offloads of the TUN device. Each value includes the lower ones."""

    NONE = 0
    CHECKSUM = 1  # partial checksums
    TCP = 2  # runs of TCP segments
    UDP = 3  # runs of UDP datagrams: since Linux 6.2


@attrs.frozen
class TunDevice:
    """An open TUN device. It exists, with its addresses and routes, until its descriptor is closed."""

    fd: int
    name: str
    offload: Offload

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        """Close the descriptor, once."""
        os.close(self.fd)


def open_tun(name: str = DEFAULT_NAME, *, offload: Offload = Offload.UDP, node: Path = DEVICE_NODE) -> TunDevice:
    """Create a TUN device in this network namespace, with as much of `offload` as the kernel offers.

    Addresses, MTU and state are for `host.link` to set. The device node is created where it is missing.

    Raises: InUseError, PlatformError.
    """
    if not 0 < len(name.encode()) < _IFNAMSIZ:
        raise PlatformError(f"{name!r} can't be the name of a network interface: at most {_IFNAMSIZ - 1} bytes")
    fd = _open_node(node)
    try:
        _attach(fd, name, node)
        return _adopt(fd, offload)
    except BaseException:
        os.close(fd)
        raise


def tun_from_fd(fd: int, *, offload: Offload = Offload.UDP) -> TunDevice:
    """Take over a descriptor whose device another process has created, perhaps in another network namespace.

    It must have been created with `TUN_FLAGS`. On an error the descriptor remains the caller's.

    Raises: PlatformError.
    """
    os.set_blocking(fd, False)
    return _adopt(fd, offload)


_IFNAMSIZ = 16  # <linux/if.h>
_TUNSETIFF = 0x400454CA  # <linux/if_tun.h>
_TUNGETFEATURES = 0x800454CF
_TUNSETOFFLOAD = 0x400454D0
_TUNGETIFF = 0x800454D2
_TUNSETVNETHDRSZ = 0x400454D8
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
TUN_FLAGS = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR

_TUN_F_CSUM = 0x01
_TUN_F_TSO = 0x02 | 0x04  # IPv4, IPv6
_TUN_F_USO = 0x20 | 0x40
_OFFLOAD_BITS = {
    Offload.UDP: _TUN_F_CSUM | _TUN_F_TSO | _TUN_F_USO,
    Offload.TCP: _TUN_F_CSUM | _TUN_F_TSO,
    Offload.CHECKSUM: _TUN_F_CSUM,
    Offload.NONE: 0,
}

_IFREQ = struct.Struct("=16sH22x")
"""interface name, flags: <linux/if.h>."""
_INT = struct.Struct("=i")


def _open_node(node: Path) -> int:
    try:
        if not node.exists():
            node.parent.mkdir(mode=0o751, parents=True, exist_ok=True)
            os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(10, 200))
        return os.open(node, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise PlatformError(f"{node} does not exist and can't be created: {error.strerror}") from error
    except PermissionError as error:
        raise PlatformError(
            f"{node} can't be opened: run as root, or with CAP_NET_ADMIN and the node's group"
        ) from error
    except OSError as error:
        # ENXIO and ENODEV: the node is there, but no driver behind it.
        raise PlatformError(f"{node} can't be opened ({error.strerror}): is the kernel module tun loaded?") from error


def _attach(fd: int, name: str, node: Path) -> None:
    try:
        offered = _INT.unpack(fcntl.ioctl(fd, _TUNGETFEATURES, bytes(4)))[0]
    except OSError as error:
        raise PlatformError(f"{node} is not a TUN device node: {error.strerror}") from error
    if not offered & _IFF_VNET_HDR:
        raise PlatformError("This kernel's TUN driver has no virtio headers: Linux 2.6.27 or newer is needed")
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), TUN_FLAGS))
    except PermissionError as error:
        raise PlatformError(f"Can't create the network interface {name}: run as root or with CAP_NET_ADMIN") from error
    except OSError as error:
        # EINVAL: it exists and is of another kind, such as multi-queue.
        if error.errno in {errno.EBUSY, errno.EINVAL}:
            raise InUseError(f"The network interface {name} is in use: is another instance running?") from error
        raise PlatformError(f"Can't create the network interface {name}: {error.strerror}") from error


def _adopt(fd: int, offload: Offload) -> TunDevice:
    try:
        name, flags = _IFREQ.unpack(fcntl.ioctl(fd, _TUNGETIFF, bytes(_IFREQ.size)))
        if flags & TUN_FLAGS != TUN_FLAGS:
            raise PlatformError("The TUN device was created without virtio headers or with packet information")
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, _INT.pack(VIRTIO_HEADER_SIZE))
    except OSError as error:
        raise PlatformError(f"The descriptor is not a usable TUN device: {error.strerror}") from error
    return TunDevice(fd, name.rstrip(b"\0").decode(), _negotiate(fd, offload))


def _negotiate(fd: int, most: Offload) -> Offload:
    """Switch on the most that the kernel knows, up to `most`."""
    for offload, bits in _OFFLOAD_BITS.items():
        if offload > most:
            continue
        try:
            fcntl.ioctl(fd, _TUNSETOFFLOAD, bits)
        except OSError:
            continue
        return offload
    return Offload.NONE
