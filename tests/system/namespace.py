"""Run a part of a test inside a host of the lab: its sockets, devices, threads and subprocesses are that host's."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from tests.system.hosts import Host

_CLONE_NEWNET = 0x40000000  # <linux/sched.h>
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def inside(host: Host) -> Iterator[None]:
    """This thread, and every thread and process it starts, is in the host's network namespace; then back home."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(Path("/run/netns") / host.namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(there)
        try:
            yield
        finally:
            _enter(home)
    finally:
        os.close(there)
        os.close(home)


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET) == -1:
        raise OSError(ctypes.get_errno(), "setns")
