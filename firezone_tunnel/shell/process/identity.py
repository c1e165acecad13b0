"""The identity of a device, which the portal recognizes it by.

See docs/protocol/client-application.md, 3.7; docs/protocol/gateway-and-relay.md, 1.3.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from pathlib import Path

from firezone_tunnel.errors import ConfigurationError


def load_identity(path: Path) -> str:
    """The identity in a file. A missing file is created with a random identity.

    Both `{"id": "…"}` and, as upstream's gateways have it, the bare text are understood. A file that is neither is
    never overwritten.

    Raises: ConfigurationError.
    """
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return _create(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"Can't read the device's identity in {path}: {error}") from error
    identity = _parse(text)
    if not identity:
        raise ConfigurationError(f"{path} holds no identity: restore it, or delete it to become a new device")
    return identity


def _parse(text: str) -> str:
    if not text.startswith("{"):
        return text if text.isprintable() and " " not in text else ""
    with contextlib.suppress(ValueError):
        stored = json.loads(text)
        if isinstance(stored.get("id"), str):
            return str(stored["id"])
    return ""


def _create(path: Path) -> str:
    identity = hashlib.sha256(str(uuid.uuid4()).encode()).hexdigest()
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o770, parents=True, exist_ok=True)
        with temporary.open("x") as file:
            os.fchmod(file.fileno(), 0o640)
            file.write(json.dumps({"id": identity}))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename it never overwrites
        finally:
            temporary.unlink()
    except FileExistsError:
        return load_identity(path)
    except OSError as error:
        raise ConfigurationError(
            f"Can't store the device's identity in {path} ({error.strerror}): give a --firezone-id or --state-dir"
        ) from error
    return identity
