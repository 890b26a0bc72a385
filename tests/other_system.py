"""Runs commands as on macOS or Windows, as far as that can be told on Linux: `python -m tests.other_system FILE`.

What this project's own modules import is not what Linux has: modules, functions and constants are missing as they are
there, `sys.platform` is another, and, as on Windows, files that are open can be neither renamed nor removed. Other
packages and Python itself see Linux. What cannot be told so: their own faults there, paths with drives, consoles.

FILE is JSON with `platform` and `steps`: each the arguments of a command, or the name of a function below in a list of
one, with `call:` before it. The outcomes are written to FILE.
"""

import builtins
import errno
import fcntl
import json
import mmap
import os
import struct
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

OURS = {"nucleus", "job"}
POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
MODULES = {"win32": POSIX_MODULES, "darwin": {"msvcrt", "winreg"}, "linux": {"msvcrt", "winreg"}}
LINUX_ALONE = {
    "os": {"O_TMPFILE", "memfd_create", "posix_fadvise", "posix_fallocate", "sched_getaffinity", "sched_setaffinity"},
    "select": {"epoll"},
    "signal": {"SIGPWR", "SIGSTKFLT", "sigtimedwait", "sigwaitinfo"},
}
POSIX_ALONE = {
    "mmap": {"MADV_DONTNEED", "MADV_WILLNEED", "MAP_PRIVATE", "MAP_SHARED", "PROT_READ", "PROT_WRITE"},
    "os": {
        *("O_CLOEXEC", "O_DIRECTORY", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC", "WNOHANG", "chown", "fchmod"),
        *("fchown", "fork", "forkpty", "getgid", "geteuid", "getloadavg", "getpgid", "getuid", "getgroups", "killpg"),
        *("lchown", "mkfifo", "nice", "openpty", "pread", "preadv", "pwrite", "pwritev", "readv", "sendfile", "setsid"),
        *("setuid", "statvfs", "fstatvfs", "sync", "sysconf", "tcgetpgrp", "uname", "wait", "writev", "getpriority"),
    },
    "select": {"epoll", "poll"},
    "signal": {
        *("SIGALRM", "SIGBUS", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGTSTP"),
        *("SIGUSR1", "SIGUSR2", "SIGWINCH", "SIG_BLOCK", "SIG_UNBLOCK", "alarm", "pause", "pthread_kill"),
        *("pthread_sigmask", "setitimer", "sigpending", "sigwait"),
    },
    "socket": {"AF_UNIX", "SO_REUSEPORT", "socketpair"},
    "time": {"tzset", "clock_settime", "pthread_getcpuclockid"},
}
MISSING = {
    "linux": {},
    "darwin": LINUX_ALONE,
    "win32": {name: LINUX_ALONE.get(name, set()) | found for name, found in POSIX_ALONE.items()},
}
"""Names by module that a platform lacks; those that this project might have used, not all."""
O_BINARY = 1 << 30


class Other(ModuleType):
    """A module as another platform has it: without some names, and with others; the rest is the module itself."""

    def __init__(self, module: ModuleType, missing: set[str], changed: dict[str, Any]) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(_module=module, _missing=missing, _changed=changed)

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"{self._module.__name__}.{name} does not exist on this platform")
        return self._changed[name] if name in self._changed else getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


class PlainMap(mmap.mmap):
    """A map without `madvise`."""

    def __getattribute__(self, name: str) -> Any:
        if name == "madvise":
            raise AttributeError(name)
        return super().__getattribute__(name)


def locking(descriptor: int, mode: int, size: int) -> None:
    """`msvcrt.locking`: a lock on bytes from the position on, of this open file; others could not read them."""
    kind = fcntl.F_UNLCK if mode == 0 else fcntl.F_WRLCK
    where = os.lseek(descriptor, 0, os.SEEK_CUR)
    assert where >= os.fstat(descriptor).st_size, "nobody could read what is locked"
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("hhlli4x", kind, os.SEEK_SET, where, size, 0))
    except BlockingIOError as error:
        raise PermissionError(errno.EACCES, "Permission denied") from error


def opened(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
    """`os.open`: without O_BINARY it would translate line ends."""
    assert flags & O_BINARY or path == os.devnull, f"{path} is opened as text"
    return os.open(path, flags & ~O_BINARY, mode, **more)


def in_use(path: Path) -> bool:
    """Whether this process has a file open or mapped, or one below a folder."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    held = [*(link.readlink() for link in links), *(Path(words[5]) for words in maps if len(words) > 5)]
    return any(path.absolute() in (place, *place.parents) for place in held)


def refusing(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `Path` that renames or removes, as Windows has it."""

    def checked(self: Path, *arguments: Any, **options: Any) -> Any:
        for path in (self, *(Path(argument) for argument in arguments if isinstance(argument, str | Path))):
            if in_use(path):
                raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))
        return method(self, *arguments, **options)

    return checked


def become(platform: str) -> None:
    """Let this project's modules, imported from now on, see another platform."""
    msvcrt = ModuleType("msvcrt")
    msvcrt.__dict__.update(LK_UNLCK=0, LK_LOCK=1, LK_NBLCK=2, locking=locking)
    changed: dict[str, dict[str, Any]] = {"sys": {"platform": platform}}
    if platform == "win32":
        changed |= {"os": {"O_BINARY": O_BINARY, "open": opened}, "mmap": {"mmap": PlainMap}}
        for name in ("unlink", "rename", "replace"):
            setattr(Path, name, refusing(getattr(Path, name)))
    missing = MISSING[platform]
    others = {
        name: Other(__import__(name), missing.get(name, set()), changed.get(name, {})) for name in {*missing, *changed}
    }
    real = builtins.__import__

    def imported(name: str, scope: Any = None, local: Any = None, names: Any = (), level: int = 0) -> Any:
        if level or (scope or {}).get("__name__", "").partition(".")[0] not in OURS:
            return real(name, scope, local, names, level)
        top = name.partition(".")[0]
        if top in MODULES[platform]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name == "msvcrt":
            return msvcrt
        return others.get(top if not names else name) or real(name, scope, local, names, level)

    builtins.__import__ = imported  # type: ignore[assignment]


def locks() -> None:
    """Claims and locks keep others out, and files that are open are not removed."""
    from nucleus.errors import OutputError
    from nucleus.storage.claims import claimed_folder, file_lock, remove_unused

    out, free = Path("claimed/out"), Path("claimed/free")
    with claimed_folder(out):
        refused(OutputError, claimed_folder(out), f"process {os.getpid()}")
        (out / "result").write_bytes(b"")
    with claimed_folder(out), claimed_folder(free):
        pass
    assert [path.name for path in Path("claimed").rglob("*")] == ["out", "result"]
    with file_lock(Path("x.lock")):
        refused(BlockingIOError, file_lock(Path("x.lock"), wait=False), "")
    with file_lock(Path("x.lock"), wait=False):
        assert not remove_unused(Path("x.lock"))
    assert remove_unused(Path("x.lock"))


def refused(kind: type[Exception], entered: Any, text: str) -> None:
    try:
        with entered:
            pass
    except kind as error:
        if text in str(error):
            return
        raise
    raise AssertionError("two hold the same")


def large() -> None:
    """Large labels are in a temporary file, which is gone afterwards."""
    import gc

    import numpy as np

    from nucleus.predict import blocks

    blocks._IN_MEMORY_BYTES = 0
    with blocks.assembled_labels((700, 600), Path()) as labels:
        labels.labels[100:200] = 7
        labels.release()
        assert labels.labels.sum() == 7 * 100 * 600
    assert np.asarray(labels.labels)[150, 3] == 7
    del labels
    gc.collect()
    assert not list(Path().glob(".nucleus-labels-*"))


def stdout() -> None:
    """The standard files of a command, and its signals."""
    from nucleus.cli.main import main

    sys.argv = ["nucleus", "--version"]
    main()


CALLS = {"locks": locks, "large": large, "stdout": stdout}


def outcome(step: list[str]) -> dict[str, Any]:
    """Run a step; return its exit status, and what it printed."""
    from click.testing import CliRunner

    if step[0].startswith("call:"):
        try:
            CALLS[step[0].removeprefix("call:")]()
        except SystemExit as error:
            return {"status": error.code or 0, "output": ""}
        except BaseException:
            return {"status": -1, "output": traceback.format_exc()}
        return {"status": 0, "output": ""}
    from nucleus.cli.main import cli

    done = CliRunner().invoke(cli, step)
    raised = done.exception if not isinstance(done.exception, SystemExit) else None
    trace = "".join(traceback.format_exception(raised)) if raised else ""
    return {"status": done.exit_code, "output": done.output + trace}


def helps() -> list[list[str]]:
    """The arguments that show the help of each command."""
    import click

    from nucleus.cli.main import cli

    def below(command: click.Command, names: list[str]) -> list[list[str]]:
        if not isinstance(command, click.Group):
            return [[*names, "--help"]]
        context = click.Context(command)
        listed = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
        return [[*names, "--help"], *(each for name, found in listed if found for each in below(found, [*names, name]))]

    return below(cli, [])


if __name__ == "__main__":
    file = Path(sys.argv[1])
    given = json.loads(file.read_text())
    assert not OURS & set(sys.modules)
    become(given["platform"])
    warnings.filterwarnings("error", category=EncodingWarning, module=r"(nucleus|job)\b")
    outcomes = [{"step": step, **outcome(step)} for step in helps() + given["steps"]]
    file.write_text(json.dumps(outcomes))
