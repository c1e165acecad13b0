"""Run a part of a test on a host of the lab, including its sockets, devices, threads and subprocesses."""

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
    """Run this thread, and the threads and processes that it starts, in the host's network namespace."""
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
