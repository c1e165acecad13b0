"""Make a function hang in a process that a test starts, as a call that the kernel never answers does."""

from __future__ import annotations

from pathlib import Path

_SITE = """
import pathlib, pkgutil, time

def hang(*_, **__):
    pathlib.Path({called!r}).touch()
    time.sleep(600)  # longer than any test: the process is ended from outside

setattr(pkgutil.resolve_name({owner!r}), {name!r}, hang)
"""


def hanging(directory: Path, target: str) -> Path:
    """A directory that, first in PYTHONPATH, makes `target` ("socket.getaddrinfo") never return.

    Once it is called there is a file `called` in the directory.
    """
    owner, _, name = target.rpartition(".")
    path = directory / "hanging"
    path.mkdir()
    (path / "sitecustomize.py").write_text(_SITE.format(owner=owner, name=name, called=str(path / "called")))
    return path
