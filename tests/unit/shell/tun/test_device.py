"""Errors of opening a TUN device."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from firezone_tunnel.errors import InUseError, PlatformError
from firezone_tunnel.shell.tun import device
from firezone_tunnel.shell.tun.device import Offload, open_tun, tun_from_fd

TUNGETFEATURES = 0x800454CF  # <linux/if_tun.h>
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
VNET_HDR = 0x4000
FLAGS = 0x5001  # IFF_TUN, IFF_NO_PI, IFF_VNET_HDR


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kernel:
    kernel = Kernel(tmp_path / "tun")
    monkeypatch.setattr(device.fcntl, "ioctl", kernel.ioctl)
    return kernel


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EINVAL])
def test_a_device_that_is_busy_or_of_another_kind_is_in_use(kernel: Kernel, number: int) -> None:
    kernel.failures[TUNSETIFF] = number

    with pytest.raises(InUseError, match="tun-firezone is in use"):
        open_tun(node=kernel.node)
    assert kernel.open_descriptors() == 0


def test_a_missing_capability_is_named(kernel: Kernel) -> None:
    kernel.failures[TUNSETIFF] = errno.EPERM

    with pytest.raises(PlatformError, match="CAP_NET_ADMIN"):
        open_tun(node=kernel.node)
    assert kernel.open_descriptors() == 0


def test_a_node_without_a_driver_names_the_module(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match="kernel module tun"):
        open_tun(node=_node_without_driver(tmp_path))


def test_a_node_that_cant_be_created_is_named() -> None:
    with pytest.raises(PlatformError, match="/proc/none/tun"):
        open_tun(node=Path("/proc/none/tun"))


def test_a_driver_without_virtio_headers_is_refused(kernel: Kernel) -> None:
    kernel.features = 0

    with pytest.raises(PlatformError, match="virtio headers"):
        open_tun(node=kernel.node)


@pytest.mark.parametrize("name", ["", "a-name-that-is-too-long"])
def test_a_name_that_no_interface_can_have_is_refused(kernel: Kernel, name: str) -> None:
    with pytest.raises(PlatformError, match="name"):
        open_tun(name, node=kernel.node)


@pytest.mark.parametrize(
    ("known", "offload"),
    [(0x67, Offload.UDP), (0x07, Offload.TCP), (0x01, Offload.CHECKSUM), (0, Offload.NONE)],
)
def test_all_offloads_that_the_kernel_knows_are_switched_on(kernel: Kernel, known: int, offload: Offload) -> None:
    kernel.known_offloads = known

    opened = open_tun(node=kernel.node)

    assert (opened.offload, kernel.offloads) == (offload, known)
    opened.close()


def test_fewer_offloads_may_be_requested(kernel: Kernel) -> None:
    opened = open_tun(node=kernel.node, offload=Offload.CHECKSUM)

    assert (opened.offload, kernel.offloads) == (Offload.CHECKSUM, 1)
    opened.close()


def test_a_device_with_other_headers_is_not_taken_over(kernel: Kernel) -> None:
    kernel.flags = 0x1001
    fd = os.open(kernel.node, os.O_RDWR)

    with pytest.raises(PlatformError, match="without virtio headers"):
        tun_from_fd(fd)
    os.close(fd)


class Kernel:
    """A TUN driver behind an ordinary file."""

    def __init__(self, node: Path) -> None:
        node.write_bytes(b"")
        self.node = node
        self.failures: dict[int, int] = {}
        self.features = VNET_HDR
        self.flags = FLAGS
        self.known_offloads = 0x67
        self.offloads: int | None = None

    def ioctl(self, fd: int, request: int, argument: int | bytes) -> int | bytes:
        if request in self.failures:
            number = self.failures[request]
            raise OSError(number, os.strerror(number))
        if request == TUNGETFEATURES:
            return self.features.to_bytes(4, "little")
        if request == TUNGETIFF:
            return b"tun-firezone".ljust(16, b"\0") + self.flags.to_bytes(2, "little") + bytes(22)
        if request == TUNSETOFFLOAD:
            assert isinstance(argument, int)
            if argument & ~self.known_offloads:
                raise OSError(errno.EINVAL, "Invalid argument")
            self.offloads = argument
        return 0

    def open_descriptors(self) -> int:
        paths = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
        return sum(path.is_symlink() and os.readlink(path) == str(self.node) for path in paths)


def _node_without_driver(directory: Path) -> Path:
    """A Unix socket: opening it fails with ENXIO, as opening a device node without its driver does."""
    path = directory / "tun"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    return path
