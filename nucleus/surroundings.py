"""What this process finds around it: the operating system, folders for caches, proxies, and versions.

What differs between Linux, macOS and Windows is here and, for locks, in `nucleus.storage.claims`.

Containers often run under a user without a home folder, or with one that cannot be written. All caches of this project
are then in a folder of the temporary directory, and so is what Keras, Matplotlib, Ray and W&B would write to the home
folder.
"""

import mmap
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from platformdirs import user_cache_path

from nucleus.errors import UsageError

if sys.platform != "win32":
    import pwd

__all__ = [
    "BINARY",
    "CACHE_VARIABLE",
    "CLOCK_FIX",
    "COMMIT_VARIABLE",
    "ENDING_SIGNALS",
    "REUSES_ADDRESSES",
    "TRAINS_HERE",
    "CacheFolder",
    "cache_folder",
    "check_can_train",
    "commit",
    "disk_space",
    "exempt_this_machine",
    "export",
    "find_cache",
    "free_pages",
    "installed_versions",
    "loopback_exemption",
    "name_on_disk",
    "provide_folders",
    "proxy_advice",
    "proxy_of",
    "repository",
    "take_room",
    "who_may_write",
]

ENDING_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
)
"""Signals that ask a program to end: Ctrl-C first. Windows has no SIGHUP; others have no SIGBREAK."""
TRAINS_HERE = sys.platform != "win32"
"""Whether training, Ray and the embedded S3 server run on this operating system."""
REUSES_ADDRESSES = sys.platform != "win32"
"""Whether SO_REUSEADDR lets a port be used again at once; on Windows it lets two programs share one."""
BINARY: int = getattr(os, "O_BINARY", 0)
"""Flag for `os.open`: without it, Windows translates line ends."""
_ZEROS = 1 << 20

CACHE_VARIABLE = "XDG_CACHE_HOME"
"""Environment variable of the folder for caches; this project's folder `nucleus` is in it."""
COMMIT_VARIABLE = "WANDB_GIT_COMMIT"
"""W&B's variable for the commit of code outside a git clone, such as in a job or an image."""

_PACKAGES = ("nucleus", "onnxruntime", "ray", "tensorflow", "keras")
_NAME = "nucleus"
_HOME = "USERPROFILE" if sys.platform == "win32" else "HOME"


def export(variable: str, value: str = "DIR") -> str:
    """Return the command that sets an environment variable: for a shell, or for PowerShell on Windows."""
    return f'$env:{variable} = "{value}"' if sys.platform == "win32" else f"export {variable}={value}"


_CHANGE = f"To choose another folder, run: {export(CACHE_VARIABLE)}"
CLOCK_FIX = {
    "darwin": "Turn on the automatic date and time in the system settings.",
    "win32": "Run: w32tm /resync",
}.get(sys.platform, "Run: timedatectl set-ntp true (for a container, on its host).")
"""How to set the clock of this machine."""
_LIBRARY_FOLDERS = {
    "KERAS_HOME": ("keras", ".keras", True),
    "MPLCONFIGDIR": ("matplotlib", ".config/matplotlib", False),
    "WANDB_CACHE_DIR": ("wandb/cache", ".cache/wandb", False),
    "WANDB_CONFIG_DIR": ("wandb/config", ".config/wandb", True),
    "WANDB_DATA_DIR": ("wandb/data", ".local/share/wandb", False),
}
"""Variables of libraries that write to the home folder: a folder below the cache, the usual folder in the home folder,
and whether that one is used if it exists, though it cannot be written: it may hold weights or a key."""
_USER_VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""Where Python looks for the user's name before it asks the system, which may not know the user."""
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_SSH_ADDRESS = re.compile(r"[\w.-]+@[\w.-]+:[\w./~-]+")
_choosing = threading.Lock()
_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class CacheFolder:
    """The folder of this project's caches.

    Attributes:
        path: The folder; it may not exist yet.
        writable: Whether this process can write to it, or create it.
        temporary: Whether it is in the temporary directory, for want of a home folder.
        problem: Why the home folder is not used; None if it is, or if XDG_CACHE_HOME is set.
    """

    path: Path
    writable: bool
    temporary: bool = False
    problem: str | None = None


def find_cache() -> CacheFolder:
    """Return the folder of the caches, without creating it: that of XDG_CACHE_HOME, else in the home folder.

    If the home folder does not exist or cannot be written, it is a folder of the temporary directory.

    Raises:
        UsageError: There is no temporary directory either.
    """
    given, problem = os.environ.get(CACHE_VARIABLE, "").strip(), _home_problem()
    if given:
        path = Path(given).absolute() / _NAME
        return CacheFolder(path, _can_write(path))
    if problem is None:
        usual = Path(user_cache_path(_NAME, appauthor=False))
        if _can_write(usual):
            return CacheFolder(usual, writable=True)
        problem = f"{usual} cannot be written"
    path = _temporary_home(problem) / _NAME
    return CacheFolder(path, _can_write(path), temporary=True, problem=problem)


def cache_folder() -> Path:
    """Return the folder of the caches; it can be written, but may not exist yet.

    If it is in the temporary directory, a note on stderr says so, once, and XDG_CACHE_HOME is set for this process and
    those that it starts.

    Raises:
        UsageError: No folder can be written.
    """
    with _choosing:  # or several threads would each note it
        found = find_cache()
        if not found.writable:
            where = str(found.path) if found.temporary else f"{CACHE_VARIABLE}={os.environ[CACHE_VARIABLE]}"
            raise UsageError(
                f"Expected a folder for caches that can be written; found {where}, which cannot. {_CHANGE}"
            )
        if found.temporary:
            _claim(found.path.parent)
            os.environ[CACHE_VARIABLE] = str(found.path.parent)
            sys.stderr.write(f"Note: caches are in {found.path}, because {found.problem}. {_CHANGE}\n")
        return found.path


def provide_folders() -> None:
    """Set environment variables of libraries that would otherwise fail or warn for want of a home folder.

    Nothing is set for a library whose usual folder in the home folder can be written. What the user has set stays. Call
    it before such a library is imported, or Ray is started.

    Raises:
        UsageError: No folder can be written.
    """
    home, problem = _home(), _home_problem()
    missing = [variable for variable in _LIBRARY_FOLDERS if variable not in os.environ and not _has_folder(variable)]
    if problem is None and not missing:
        return
    base = cache_folder() / "libraries"
    for variable in missing:
        folder = base / _LIBRARY_FOLDERS[variable][0]
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str(folder)
    if home is None or not home.is_dir():
        os.environ[_HOME] = str(base)
    if not any(os.environ.get(name) for name in _USER_VARIABLES) and _listed_home() is None:
        os.environ["USER"] = f"uid-{_user()}"


def _has_folder(variable: str) -> bool:
    """Return whether a library of `_LIBRARY_FOLDERS` can use its usual folder in the home folder."""
    home, (_, usual, kept) = _home(), _LIBRARY_FOLDERS[variable]
    if home is None or not home.is_dir():
        return False
    return _can_write(home / usual) or (kept and (home / usual).is_dir())


def _home_problem() -> str | None:
    """Return why the home folder cannot be used; None if it can."""
    home = _home()
    if home is None:
        return f"{_HOME} is not set, and the system does not know the user {_user()}"
    if not home.is_dir():
        return f"the home folder {home} does not exist"
    return None if os.access(home, os.W_OK | os.X_OK) else f"the home folder {home} cannot be written"


def _home() -> Path | None:
    """Return the folder of the home variable, else of the system's list of users; None if neither is known."""
    home = Path(os.environ.get(_HOME, ""))
    return home if home.is_absolute() else _listed_home()


def _listed_home() -> Path | None:
    if sys.platform != "win32":  # whose list of users has no folders
        with suppress(KeyError):
            return Path(pwd.getpwuid(os.getuid()).pw_dir)
    return None


def _user() -> str:
    """Return the number of the user; on Windows, the name."""
    if sys.platform == "win32":
        user = os.environ.get("USERNAME", "unknown")
    else:
        user = str(os.getuid())
    return user


def _can_write(folder: Path) -> bool:
    """Return whether a folder can be written or, if it does not exist, created."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def _temporary_home(problem: str) -> Path:
    try:
        return Path(tempfile.gettempdir()) / f"{_NAME}-{_user()}"
    except FileNotFoundError as error:
        raise UsageError(
            f"Expected a folder for caches that can be written; {problem}, and no temporary directory can be written. "
            f"{_CHANGE}"
        ) from error


def _claim(folder: Path) -> None:
    """Create a folder in the temporary directory for this user alone.

    Raises:
        UsageError: Another user owns it, or can write to it, and could replace what is cached.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _is_private(folder.lstat()):
        raise UsageError(f"Expected {folder} to be a folder that only this user can write; it is not. {_CHANGE}")


def _is_private(found: os.stat_result) -> bool:
    private = stat.S_ISDIR(found.st_mode)
    if sys.platform != "win32":  # where each user has a temporary directory
        private = private and found.st_uid == os.getuid() and not found.st_mode & _WRITABLE_BY_OTHERS
    return private


def who_may_write(place: Path) -> str:
    """Return what may explain a refused write to a file or folder: its owner or, on Windows, another program."""
    if sys.platform == "win32":
        text = "another program may have it open"
    else:
        text = f"this process is user {os.getuid()}, and {place} belongs to user {place.stat().st_uid}"
    return text


def check_can_train(what: str) -> None:
    """Raise `UsageError` where training does not run.

    Args:
        what: Name of the command or function.
    """
    if not TRAINS_HERE:
        raise UsageError(
            f"Expected Linux, macOS or WSL for {what}; found Windows, where models are used and not trained. Run it in "
            "WSL, or on another machine."
        )


def disk_space(place: Path) -> tuple[int | None, bool]:
    """Return the bytes that this user can write to the disk of a path, and whether it can take more files.

    The bytes are None if the file system does not say.
    """
    free: int | None
    if sys.platform == "win32":
        free, more_files = shutil.disk_usage(place).free, True
    else:
        disk = os.statvfs(place)
        free = disk.f_bavail * disk.f_frsize if disk.f_blocks else None
        more_files = not disk.f_files or disk.f_favail > 0
    return free, more_files


def take_room(descriptor: int, size: int) -> None:
    """Fill an empty file with zeros that have their place on the disk. Raises `OSError` if it has no room.

    A process that writes through `mmap` to a file without room would be killed.
    """
    if sys.platform == "linux":
        os.posix_fallocate(descriptor, 0, size)
    else:
        zeros = memoryview(bytes(min(size, _ZEROS)))
        while size:
            size -= os.write(descriptor, zeros[:size])


def free_pages(pages: mmap.mmap) -> None:
    """Free the memory of a mapped file, which keeps its content; Windows does so by itself when memory is short."""
    if sys.platform != "win32":
        pages.madvise(mmap.MADV_DONTNEED)


def name_on_disk(name: str) -> str:
    """Return a relative path in the form by which the file systems of this machine compare it.

    Those of Windows and macOS ignore the case of letters, and macOS the ways to compose an accent.
    """
    return name if sys.platform == "linux" else unicodedata.normalize("NFC", name).casefold()


def proxy_of(url: str) -> str | None:
    """Return the variable and the address, without credentials, of the proxy through which a URL is requested.

    Args:
        url: Any `http://` or `https://` URL.

    Returns:
        Such as `HTTP_PROXY=http://proxy:3128`; None if no proxy is used.
    """
    parts, proxies = urlsplit(url), getproxies_environment()
    if not parts.hostname or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    scheme = next((name for name in (parts.scheme, "all") if proxies.get(name)), None)
    if scheme is None:
        return None
    names = (f"{scheme}_proxy", f"{scheme}_proxy".upper())
    variable = next((name for name in names if os.environ.get(name) == proxies[scheme]), names[1])
    address = urlsplit(proxies[scheme] if "://" in proxies[scheme] else f"http://{proxies[scheme]}")
    return f"{variable}={address.scheme}://{address.netloc.rpartition('@')[2]}"


def proxy_advice(url: str) -> str:
    """Return a sentence, with a blank before it, about the proxy of a URL that does not answer; empty without one."""
    proxy = proxy_of(url)
    if proxy is None:
        return ""
    return f" Requests go through the proxy of {proxy}; to do without it, add {urlsplit(url).hostname} to NO_PROXY."


def loopback_exemption() -> dict[str, str]:
    """Return variables that exempt this machine's own servers from its proxy; empty if it has none, or they are."""
    exempted = _exempted()
    missing = [host for host in _THIS_MACHINE if host not in exempted]
    if not {*getproxies_environment()} - {"no"} or not missing or "*" in exempted:
        return {}
    value = ",".join([*exempted, *missing])
    return {"no_proxy": value, "NO_PROXY": value}


def exempt_this_machine() -> None:
    """Exempt this machine's own servers from its proxy, in this process and those that it starts.

    A proxy could not reach them: to it, `127.0.0.1` is another machine.
    """
    os.environ.update(loopback_exemption())


def _exempted() -> list[str]:
    """Return the hosts that NO_PROXY and no_proxy name."""
    text = ",".join(os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY"))
    return list(dict.fromkeys(host.strip() for host in text.split(",") if host.strip()))


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of those of `_PACKAGES` that are installed; `tensorflow-cpu` is TensorFlow."""
    found = {name: _version(name) or _version(f"{name}-cpu") for name in _PACKAGES}
    return {"python": platform.python_version(), **{name: text for name, text in found.items() if text}}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of this code, from WANDB_GIT_COMMIT or its git clone; `-dirty` marks changed files.

    None if the code is not in a clone, or git is not installed.
    """
    given = os.environ.get(COMMIT_VARIABLE)
    root = Path(__file__).parents[1]
    if given or not (root / ".git").exists() or not shutil.which("git"):
        return given or None
    head = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if head and changed else head or None


def repository() -> str | None:
    """Return the address of the git repository that this code was cloned from, without credentials.

    None if the code is not in a clone, git is not installed, or the origin is not a server.
    """
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    address = _git(root, "remote", "get-url", "origin")
    if "://" not in address:  # such as git@host:owner/name.git, or a path of this machine
        return address if _SSH_ADDRESS.fullmatch(address) else None
    parts = urlsplit(address)
    if not parts.hostname:
        return None
    user = f"{parts.username}@" if parts.scheme == "ssh" and parts.username else ""
    return parts._replace(netloc=user + parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)  # noqa: S603, S607
    return done.stdout.strip() if done.returncode == 0 else ""
