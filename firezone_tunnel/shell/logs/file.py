"""The file that a process logs to, one for each start (docs/protocol/client-application.md, 6.3)."""

from __future__ import annotations

import contextlib
import errno
import os
from datetime import UTC, datetime
from pathlib import Path

from firezone_tunnel.errors import ConfigurationError

LATEST = "latest"

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class LogFile:
    """`<base>.YYYY-MM-DD-HH-MM-SS.log` in a directory, and a symlink `latest` to it: what `LogWriter` writes to.

    A file that is deleted comes back with the next line. Nothing is buffered: what was written can be read.
    """

    def __init__(self, directory: Path, base: str, now: datetime | None = None) -> None:
        """The directory is made where it is missing; `now` is in UTC. A full disk is no error, it may be empty later.

        Raises: ConfigurationError.
        """
        self.path = directory / f"{base}.{now or datetime.now(UTC):%Y-%m-%d-%H-%M-%S}.log"
        self._descriptor: int | None = None
        self._is_torn = False
        try:
            self._open()
        except OSError as error:
            if error.errno not in _FULL:
                raise ConfigurationError(
                    f"Can't log to a file in {directory} ({error.strerror}): choose another --log-dir"
                ) from error

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> None:
        """Append whole lines, which end with a newline.

        Raises: OSError.
        """
        if self._descriptor is None or not self.path.exists():
            self._open()
        assert self._descriptor is not None
        data = ("\n" * self._is_torn + text).encode(errors="replace")
        written = os.write(self._descriptor, data)
        self._is_torn = written < len(data)
        if self._is_torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        """There is nothing to do."""

    def close(self) -> None:
        """May be called more than once."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _open(self) -> None:
        self.close()
        self.path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self._is_torn = False
        with contextlib.suppress(OSError):  # a convenience, which some file systems don't have
            os.fchmod(self._descriptor, 0o640)  # whatever the umask is
            self._point_latest_here()

    def _point_latest_here(self) -> None:
        temporary = self.path.with_name(f"{LATEST}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(self.path.name)
        temporary.replace(self.path.with_name(LATEST))
