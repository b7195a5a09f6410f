"""Files that are written whole or not at all, also through a power cut."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, *, mode: int | None = None) -> Iterator[Path]:
    """A new file beside ``path``, which takes its place when the block ends well, and is gone if it does not.

    Args:
        path: the file; its folder exists.
        mode: permissions of the file, whatever the umask; ``None``: those that any new file gets.

    Raises:
        OSError: no space, no permission, no such folder.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    temporary = Path(name)
    try:
        os.close(handle)
        yield temporary
        temporary.chmod(0o666 & ~_umask() if mode is None else mode)  # a temporary file is private
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def sweep_parts(path: Path) -> None:
    """Delete what processes left that were killed while they replaced ``path``.

    Args:
        path: the file; nobody else may be writing it.
    """
    with contextlib.suppress(OSError):
        for part in path.parent.iterdir():
            if part.name.startswith(f".{path.name}.") and part.name.endswith(".part"):
                part.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``; an older file there stays whole until the new one is complete.

    Raises:
        OSError: as ``replacing``.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _umask() -> int:
    """Permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename last, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
