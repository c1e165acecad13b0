"""Log files, a new one for each start of the process (docs/protocol/client-application.md, 6.3)."""

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
    """A stream for `LogWriter`: the file `<base>.YYYY-MM-DD-HH-MM-SS.log`, and a symlink `latest` that points to it.

    If the file is deleted, the next line creates it again. Writes are not buffered.
    """

    def __init__(self, directory: Path, base: str, now: datetime | None = None) -> None:
        """Create the directory if needed, and the file. `now` is in UTC. A full disk is not an error: writes may
        succeed later.

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
                    f"Can't create a log file in {directory} ({error.strerror}): choose another --log-dir"
                ) from error

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> None:
        """Append complete lines, including the final newline.

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
        """Do nothing: writes are not buffered."""

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
        with contextlib.suppress(OSError):  # some file systems support neither modes nor symlinks
            os.fchmod(self._descriptor, 0o640)  # independent of the umask
            self._point_latest_here()

    def _point_latest_here(self) -> None:
        temporary = self.path.with_name(f"{LATEST}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(self.path.name)
        temporary.replace(self.path.with_name(LATEST))
