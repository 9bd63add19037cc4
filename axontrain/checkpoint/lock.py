"""Lock: one process at a time on a run directory. The system lets it go when its owner ends, however that happens."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from pathlib import Path
from types import TracebackType

from axontrain.errors import ConfigurationError

NAME = ".lock"
# A process's own locks never stand in its own way, and closing any descriptor of the file gives them up: so who in this
# process holds one is known here, and the file is opened by its holder only.
_HELD: set[tuple[int, int]] = set()
_GUARD = threading.Lock()


class DirectoryLock:
    """Holds a directory from its making until :meth:`release`, or until the process ends.

    It is a POSIX record lock (on platforms that have none, a directory is guarded within one process only): processes forked
    meanwhile do not inherit it, so that none of them keeps it after the owner was killed.

    Args:
        directory: is made where it is not there.

    Raises:
        ConfigurationError: if it is held by somebody else.
    """

    def __init__(self, directory: Path) -> None:
        self._key: tuple[int, int] | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"directory={str(directory)!r} cannot be made: {error}") from error
        found = directory.stat()
        key = (found.st_dev, found.st_ino)
        with _GUARD:
            if key in _HELD:
                raise _refused(directory, "another Loop of this process")
            try:
                self._file = os.open(directory / NAME, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise ConfigurationError(f"directory={str(directory)!r} cannot be written to: {error}") from error
            try:
                if not _locked(self._file):
                    raise _refused(directory, os.read(self._file, 200).decode("utf-8", "replace").strip() or "another process")
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            except BaseException:
                os.close(self._file)
                raise
            self._key = key
            _HELD.add(key)

    def release(self) -> None:
        """Let others have the directory."""
        with _GUARD:
            if self._key is not None:
                _HELD.discard(self._key)
                os.close(self._file)
                self._key = None

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        # Of a run that was never begun.
        with contextlib.suppress(Exception):
            self.release()


def _locked(file: int) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _refused(directory: Path, owner: str) -> ConfigurationError:
    return ConfigurationError(
        f"directory={str(directory)!r} is in use by {owner}: a run directory has one run at a time. Wait until that one has "
        f"ended (the lock ends with its process), or choose another directory"
    )
