"""Change kernel settings while the process runs, and restore them at its end. All calls block."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path

from firezone_tunnel.errors import PlatformError, one_line
from firezone_tunnel.shell.logs import events as log

PROC_SYS = Path("/proc/sys")
_NOT_WRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_BOOT_ID = PROC_SYS / "kernel/random/boot_id"


class Sysctls:
    """Settings by their path under /proc/sys, such as "net/ipv4/ip_forward".

    The original values are on disk before any of them changes, so that the next process can restore them if this one
    is killed. Values from an earlier boot are ignored. Where the disk can't be written, as with a read-only root, they
    are in memory only.
    """

    def __init__(self, originals_file: Path) -> None:
        self._file = originals_file
        self._originals: dict[str, str] = {}
        self.notes: list[str] = []
        """Stored with the originals, for the process that restores them."""

    def read(self, name: str) -> str | None:
        """The current value, or None if this kernel doesn't have the setting."""
        try:
            return (PROC_SYS / name).read_text().strip()
        except OSError:
            return None

    def names(self, pattern: str) -> list[str]:
        """The settings that match a pattern such as "net/ipv6/conf/*/accept_ra"."""
        return sorted(str(path.relative_to(PROC_SYS)) for path in PROC_SYS.glob(pattern))

    def recover(self) -> bool:
        """Load the original values that a killed process left behind. Returns whether there were any from this boot.

        Raises: PlatformError, if the file exists but can't be read.
        """
        try:
            recorded = json.loads(self._file.read_text())
            if recorded["boot_id"] != _boot_id():
                return False
            self._originals = dict(recorded["originals"])
            self.notes = list(recorded["notes"])
        except (FileNotFoundError, PermissionError):  # this process could not have written there either
            return False
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise PlatformError(
                f"Can't read the host's original settings from {self._file} ({one_line(error)}): "
                "restore them by hand if needed, then delete the file"
            ) from error
        return True

    def remember(self, names: Iterable[str]) -> None:
        """Store the current values of these settings, except for any stored before. Call it before `write`.

        Raises: PlatformError.
        """
        values = {name: self.read(name) for name in names if name not in self._originals}
        found = {name: value for name, value in values.items() if value is not None}
        if not found:
            return
        self._originals |= found
        try:
            record = {"boot_id": _boot_id(), "originals": self._originals, "notes": self.notes}
            _write_durably(self._file, json.dumps(record, indent=1))
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise PlatformError(
                    f"Can't save the host's original settings to {self._file} ({error.strerror}): "
                    "make room there, or choose another --state-dir"
                ) from error
            log.info(
                "host:originals_not_stored",
                path=str(self._file),
                reason=error.strerror,
                consequence="they are restored at the end, but not if this process is killed",
            )

    def write(self, name: str, value: str) -> None:
        """Set a value, unless it is set already. Call `remember` first.

        Raises: PlatformError.
        """
        if self.read(name) == value:
            return
        try:
            (PROC_SYS / name).write_text(value)
        except OSError as error:
            dotted = name.replace("/", ".")
            raise PlatformError(
                f"Can't set {dotted} to {value} ({error.strerror}): set it in the host's sysctl configuration"
            ) from error

    def changed(self) -> list[str]:
        """The names of remembered settings whose value now differs. A setting that no longer exists is left out."""
        return [name for name, value in self._originals.items() if self.read(name) not in {value, None}]

    def restore(self) -> None:
        """Restore all remembered settings in the order they were remembered. Settings that can't be set are logged."""
        for name, value in self._originals.items():
            if self.read(name) in {value, None}:  # read inside the loop, as writing one setting may change others
                continue
            try:
                (PROC_SYS / name).write_text(value)
            except OSError as error:
                log.warning("host:sysctl_not_restored", name=name, value=value, reason=error.strerror)
        self.forget()

    def forget(self) -> None:
        """Keep the current values for good: discard the remembered ones."""
        self._originals.clear()
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:  # a read-only file system refuses even if there is no such file
            log.debug("host:originals_not_deleted", path=str(self._file), reason=error.strerror)


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()


def _write_durably(path: Path, text: str) -> None:
    """Replace a file atomically: after a crash it has either the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
