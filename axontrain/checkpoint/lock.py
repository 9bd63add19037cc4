"""Lock: one process at a time on a run directory. The system lets it go when its owner ends, however that happens."""

from __future__ import annotations

import os
import socket
import stat
import sys
import threading
import warnings
from pathlib import Path
from types import TracebackType

from axontrain.checkpoint.directory import make
from axontrain.errors import AxonWarning, ConfigurationError

NAME = ".lock"
# By device and inode of the directory: the open files, of which the first has the lock. The other is the directory itself: as
# long as it is open, its inode is nobody else's.
_HELD: dict[tuple[int, int], list[int]] = {}
_GUARD = threading.RLock()  # the collector may let go of one lock while another is taken


def _let_go_in_child() -> None:
    # The lock is that of an open file, which a fork shares: a worker would keep it after its parent was killed. Closing a copy
    # of the file takes nothing from the parent.
    for held in _HELD.values():
        for file in held:
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
            make(directory)
        except OSError as error:
            raise ConfigurationError(f"directory={str(directory)!r} cannot be made: {error}") from error
        try:
            key = key_of(directory)
        except OSError as error:
            raise ConfigurationError(f"directory={str(directory)!r} cannot be looked at: {error}") from error
        with _GUARD:
            if key in _HELD:
                raise _refused(directory, "another Loop of this process")
            held = [_opened(directory)]
            try:
                if not _locked(held[0]):
                    raise _refused(directory, os.read(held[0], 200).decode("utf-8", "replace").strip() or "another process")
                _sign(held[0], directory)
                if sys.platform != "win32":
                    held.append(os.open(directory, os.O_RDONLY))
            except BaseException as error:
                for file in held:
                    os.close(file)
                if isinstance(error, OSError):
                    raise ConfigurationError(f"directory={str(directory)!r} cannot be locked: {error}") from error
                raise
            self._key = key
            _HELD[key] = held

    def release(self) -> None:
        """Let others have the directory."""
        with _GUARD:
            # In a forked child it is closed already, and its number may be another file's.
            for file in _HELD.pop(self._key, ()) if self._key is not None else ():
                os.close(file)
            self._key = None

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        # Of a run that was never begun. At the end of the program what this needs may be gone; the files are closed anyway.
        try:
            self.release()
        except Exception:
            return


def key_of(directory: Path) -> tuple[int, int]:
    """What tells a directory from any other, as long as it is held."""
    found = directory.stat()
    return found.st_dev, found.st_ino


def lost(directory: Path, key: tuple[int, int]) -> str:
    """What has become of a directory that is held, where its path no longer leads to it; "" where it does.

    Raises:
        OSError: if it cannot be looked at.
    """
    what = "was renamed or removed while this run writes there"
    if not directory.is_absolute():
        what += ", or the program has changed its working directory"
    try:
        if key_of(directory) == key:
            return ""
    except (FileNotFoundError, NotADirectoryError):
        return f"{directory} {what}"
    return f"{directory} is another directory than the one that this run has begun in: that {what}"


def _opened(directory: Path) -> int:
    path = directory / NAME
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        file = os.open(path, flags, 0o644)
    except OSError as error:
        if path.is_symlink():
            raise _no_file(path) from error
        raise ConfigurationError(f"directory={str(directory)!r} cannot be written to: {error}") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise _no_file(path)
    return file


def _no_file(path: Path) -> ConfigurationError:
    return ConfigurationError(f"{path} is a link, or no file: a run has a file of its own there; remove it")


def _sign(file: int, directory: Path) -> None:
    """Write down who has the lock, for whoever is refused."""
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        warnings.warn(
            f"{directory / NAME} could not be written: {error}. The directory is this run's, but who else wants it is not told "
            f"whose it is; and checkpoints will need room",
            AxonWarning,
            stacklevel=6,
        )


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
