"""Make a function hang in a process that a test starts, as a call that the kernel never answers does."""

from __future__ import annotations

from pathlib import Path

_SITE = """
import pkgutil, time

def hang(*_, **__):
    time.sleep(600)

setattr(pkgutil.resolve_name({owner!r}), {name!r}, hang)
"""


def hanging(directory: Path, target: str) -> Path:
    """A directory that, first in PYTHONPATH, makes `target` ("socket.getaddrinfo") never return."""
    owner, _, name = target.rpartition(".")
    path = directory / "hanging"
    path.mkdir()
    (path / "sitecustomize.py").write_text(_SITE.format(owner=owner, name=name))
    return path
