"""Lock: one process at a time on a run directory. The system lets it go when its owner ends, however that happens."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import warnings
from pathlib import Path
from types import TracebackType

from axontrain.errors import AxonWarning, ConfigurationError

NAME = ".lock"
_HELD: dict[tuple[int, int], int] = {}  # by device and inode of the directory: the open file that has the lock
_GUARD = threading.Lock()


def _let_go_in_child() -> None:
    # The lock is that of an open file, which a fork shares: a worker would keep it after its parent was killed. Closing a copy
    # of the file takes nothing from the parent.
    for file in _HELD.values():
        os.close(file)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


class DirectoryLock:
    """Holds a directory from its making until :meth:`release`, or until the process ends.

    It is a lock of ``flock(2)``; on platforms that have none, a directory is guarded within one process only.

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
            _HELD[key] = self._file

    def release(self) -> None:
        """Let others have the directory."""
        with _GUARD:
            # In a forked child it is closed already, and its number may be another file's.
            if self._key is not None and _HELD.pop(self._key, None) is not None:
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
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # as of a network's file system
        warnings.warn(
            f"the run directory cannot be locked ({error.strerror}): nothing but you sees to it that only one run at a time "
            f"uses it",
            AxonWarning,
            stacklevel=6,
        )
    return True


def _refused(directory: Path, owner: str) -> ConfigurationError:
    return ConfigurationError(
        f"directory={str(directory)!r} is in use by {owner}: a run directory has one run at a time. Wait until that one has "
        f"ended (the lock ends with its process), or choose another directory"
    )
