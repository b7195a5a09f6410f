"""A session as one file, to be kept or carried to another machine.

A zip with three members: ``session.json`` (format, name, settings), ``transcript.jsonl`` (see ``transcript_lines``)
and ``state.stream``, where a stream was saved. A file may come from outside: its members are read by these names alone,
their sizes are bounded, settings and lines are checked, and a session comes to be whole or not at all. Constant memory,
however long the transcript is.
"""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

from streamllm.atomic import replacing
from streamllm.errors import StateError, StreamLLMError, TakenError
from streamllm.hold import Hold, make_private
from streamllm.session_settings import check_settings
from streamllm.sessions import STATE, TRANSCRIPT, Session, check_name, hidden, sessions_folder, sweep
from streamllm.transcript import Transcript
from streamllm.transcript_lines import dump, load

FORMAT = 1
"""Version of the file; one of another version is refused."""

HEADER = "session.json"
LINES = "transcript.jsonl"

HEADER_BYTES = 2**20
LINE_BYTES = 2**26
TOTAL_BYTES = 2**34
"""A file that unpacks to more, 16 GiB, is refused."""

_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OverflowError, NotImplementedError)
"""What ``zipfile`` raises for files that are damaged or of an unknown kind."""


def export_session(name: str, file: Path, folder: Path | None = None) -> int:
    """Write a session to a file, which only its owner may read; an older one there stays until the new one is whole.

    Args:
        name: of the session.
        file: by custom ``*.zip``.
        folder: of sessions; ``sessions_folder()`` if left out.

    Returns:
        How many turns it has.

    Raises:
        BusyError: a process holds the session.
        ConfigError: no session can be called so.
        StateError: there is no such session, it is damaged, or the file cannot be written.
    """
    with Session(name, create=False, folder=folder) as session:
        transcript = session.transcript
        header = {"format": FORMAT, "name": name, "settings": transcript.settings()}
        try:
            with (
                replacing(file, mode=0o600) as temporary,
                zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive,
            ):
                archive.writestr(HEADER, json.dumps(header, indent=2))
                with archive.open(LINES, "w", force_zip64=True) as member:
                    for line in dump(transcript):
                        member.write(line.encode())
                if session.state.exists():
                    archive.write(session.state, STATE, zipfile.ZIP_STORED)  # numbers do not get smaller
        except OSError as error:
            raise StateError(
                f"Session {name!r} cannot be written to {file}: {error.strerror or error}; choose another place."
            ) from error
        return transcript.count()


def import_session(
    file: Path, name: str | None = None, folder: Path | None = None, *, most: int | None = None, shown: str = ""
) -> str:
    """Make a session from a file that ``export_session`` wrote.

    Args:
        file: the file.
        name: of the new session; that of the old one if left out.
        folder: of sessions; ``sessions_folder()`` if left out.
        most: bytes that it may unpack to; ``TOTAL_BYTES`` if left out.
        shown: how the file is called where something is wrong with it; its path if left out.

    Returns:
        The name.

    Raises:
        ConfigError: no session can be called so; or one is: ``TakenError``.
        StateError: the file is damaged or none of ours, or none can be written.
    """
    folder, shown = folder or sessions_folder(), shown or str(file)
    with _sentences(shown), zipfile.ZipFile(file) as archive:
        header = _header(archive, shown, TOTAL_BYTES if most is None else most)
        name = str(header["name"]) if name is None else name
        check_name(name)
        _refuse_taken(folder / name)
        new = hidden(folder)
        make_private(new)
        sweep(folder)
        hold = Hold(new, f"Session {name!r}")
        try:
            _unpack(archive, header["settings"], new, f"{LINES} in {shown}")
            try:
                hold.move(folder / name)
            except OSError:
                _refuse_taken(folder / name)
                raise
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        finally:
            hold.release()
    return name


def _header(archive: zipfile.ZipFile, file: str, most: int) -> dict[str, Any]:
    """What ``session.json`` says, when the members are what they must be."""
    members = archive.infolist()
    names = sorted(member.filename for member in members)
    if names not in (sorted([HEADER, LINES]), sorted([HEADER, LINES, STATE])):
        raise StateError(f"{file} is no exported session; it holds {', '.join(names)[:200] or 'nothing'}.")
    if any(member.flag_bits & 1 for member in members):
        raise StateError(f"{file} is encrypted; unpack it and pack it again without a password.")
    if sum(member.file_size for member in members) > most or archive.getinfo(HEADER).file_size > HEADER_BYTES:
        raise StateError(f"{file} unpacks to more than a session may have, {most:,} bytes here; it was not imported.")
    header: dict[str, Any] = json.loads(archive.read(HEADER))
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise StateError(
            f"{file} has format {found!r:.40}, this version reads format {FORMAT}; "
            "use the version of streamllm that wrote it."
        )
    if not isinstance(header.get("name"), str) or not isinstance(header.get("settings"), dict):
        raise StateError(f"{HEADER} in {file} lacks the name or the settings; export the session again.")
    check_settings(header["settings"], f"A setting in {file}")
    return header


def _unpack(archive: zipfile.ZipFile, settings: dict[str, Any], new: Path, what: str) -> None:
    """Write the files of a session into a folder."""
    with closing(Transcript(new / TRANSCRIPT)) as transcript:
        for key, value in settings.items():
            transcript.put(key, value)
        with archive.open(LINES) as member:
            load(transcript, _lines(member), what)
    if STATE in archive.namelist():
        with archive.open(STATE) as member, replacing(new / STATE, mode=0o600) as path, path.open("wb") as target:
            shutil.copyfileobj(member, target)


def _lines(member: IO[bytes]) -> Iterator[bytes]:
    while line := member.readline(LINE_BYTES + 1):
        if len(line) > LINE_BYTES:
            raise ValueError(f"a line has more than {LINE_BYTES} bytes")
        yield line


def _refuse_taken(path: Path) -> None:
    """Keep what is there already."""
    if path.exists():
        raise TakenError(
            f"There is a session {path.name!r} already; import it under another --name, or delete that one."
        )


@contextmanager
def _sentences(file: str) -> Iterator[None]:
    """Turn what goes wrong with a file into one sentence."""
    try:
        yield
    except StreamLLMError:
        raise
    except OSError as error:
        where = error.filename or file
        raise StateError(f"{file} cannot be imported: {where}: {error.strerror or error}.") from error
    except _BROKEN as error:
        raise StateError(f"{file} is damaged or no exported session ({error}); export it again.") from error
