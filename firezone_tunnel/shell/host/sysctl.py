"""Kernel settings that are changed for as long as we run, and put back as they were. Everything here blocks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from firezone_tunnel.errors import PlatformError
from firezone_tunnel.shell.logs import events as log

PROC_SYS = Path("/proc/sys")
_BOOT_ID = PROC_SYS / "kernel/random/boot_id"


class Sysctls:
    """Settings by their path under /proc/sys, such as "net/ipv4/ip_forward".

    What they were is on disk before the first of them changes, so that a successor can put back what a killed
    process left; those of an earlier boot don't count.
    """

    def __init__(self, originals_file: Path) -> None:
        self._file = originals_file
        self._originals: dict[str, str] = {}
        self.notes: list[str] = []
        """Kept on disk with the originals, for whoever puts them back."""

    def read(self, name: str) -> str | None:
        """The current value, or None where this kernel has no such setting."""
        try:
            return (PROC_SYS / name).read_text().strip()
        except OSError:
            return None

    def names(self, pattern: str) -> list[str]:
        """The settings that match a pattern such as "net/ipv6/conf/*/accept_ra"."""
        return sorted(str(path.relative_to(PROC_SYS)) for path in PROC_SYS.glob(pattern))

    def recover(self) -> bool:
        """Remember what a killed predecessor had found. Whether there was one since the host was started.

        Raises: PlatformError, if the file is there but can't be read.
        """
        try:
            recorded = json.loads(self._file.read_text())
            if recorded["boot_id"] != _boot_id():
                return False
            self._originals = dict(recorded["originals"])
            self.notes = list(recorded["notes"])
        except FileNotFoundError:
            return False
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise PlatformError(f"Can't read {self._file}, which holds the host's original settings") from error
        return True

    def remember(self, names: Iterable[str]) -> None:
        """Note on disk what these are, those not noted already: before changing them.

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
            raise PlatformError(f"Can't note the host's original settings in {self._file}: {error.strerror}") from error

    def write(self, name: str, value: str) -> None:
        """Set it, unless it has that value; `remember` it first.

        Raises: PlatformError.
        """
        if self.read(name) == value:
            return
        try:
            (PROC_SYS / name).write_text(value)
        except OSError as error:
            dotted = name.replace("/", ".")
            raise PlatformError(
                f"Can't set {dotted} to {value}: {error.strerror}; set it when the host starts"
            ) from error

    def changed(self) -> list[str]:
        """Those of the settings remembered that differ from what they were. One that is gone does not."""
        return [name for name, value in self._originals.items() if self.read(name) not in {value, None}]

    def restore(self) -> None:
        """Put back all that was remembered, in the order in which it was. What can't be set any more is told."""
        for name, value in self._originals.items():
            if self.read(name) in {value, None}:  # asked only now: one setting may change others
                continue
            try:
                (PROC_SYS / name).write_text(value)
            except OSError as error:
                log.warning("host:sysctl_not_restored", name=name, value=value, reason=error.strerror)
        self.forget()

    def forget(self) -> None:
        """Leave everything as it is now, for good."""
        self._originals.clear()
        self._file.unlink(missing_ok=True)


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()


def _write_durably(path: Path, text: str) -> None:
    """Replace a file so that after a crash there is either the old or the new one."""
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
