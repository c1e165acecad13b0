"""Reads the seed file, and the files and time zones that it names."""

from __future__ import annotations

from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from firezone_tunnel.core.portal.seed import Seed, SeedContext, SeedError, parse_seed
from firezone_tunnel.errors import ConfigurationError


def load_seed(path: str) -> Seed:
    """Read and parse the seed file.

    Raises: ConfigurationError, naming the file; its cause is a SeedError if the file can be read.
    """
    directory = Path(path).parent

    def read_file(name: str) -> str:
        try:
            return (directory / name).read_text()
        except OSError as error:
            raise ValueError(f"can't read {directory / name}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{directory / name} is not UTF-8 text") from error

    try:
        return parse_seed(Path(path).read_text(), SeedContext(read_file, _time_zone))
    except OSError as error:
        raise ConfigurationError(f"can't read the seed file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"the seed file {path} is not UTF-8 text") from None
    except SeedError as error:
        raise ConfigurationError(f"the seed file {path} is invalid: {error}") from error


def _time_zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(f"there is no time zone {name!r} on this machine") from error
