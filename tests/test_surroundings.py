"""Folders for caches and libraries where there is no home folder, and proxies."""

import getpass
import os
import stat
import tempfile
from pathlib import Path

import pytest

from nucleus.doctor import check_cache
from nucleus.errors import UsageError
from nucleus.surroundings import (
    cache_folder,
    exempt_this_machine,
    find_cache,
    loopback_exemption,
    provide_folders,
    proxy_advice,
    proxy_of,
    repository,
)

LIBRARIES = ("KERAS_HOME", "MPLCONFIGDIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")
PROXIES = [name for scheme in ("http", "https", "all", "no") for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper())]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the home folder `home` and the temporary directory `tmp`; nothing else is set."""
    for name in ("XDG_CACHE_HOME", *LIBRARIES):
        monkeypatch.setenv(name, "")  # so that it is as before after the test, whatever is set in it
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


@pytest.fixture
def unknown_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a name, as in a container with `--user 12345`."""

    def unknown(_: object) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a folder look as if it could not be written; the tests may run as root, who can write anywhere."""
    access = os.access

    def refused(path: str | Path, mode: int) -> bool:
        return access(path, mode) and not (Path(path).is_relative_to(folder) and mode & os.W_OK)

    monkeypatch.setattr(os, "access", refused)


def test_caches_are_in_the_home_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache_folder() == place / "home" / ".cache" / "nucleus"
    provide_folders()
    assert "XDG_CACHE_HOME" not in os.environ
    assert not set(LIBRARIES) & set(os.environ)
    assert list((place / "tmp").iterdir()) == []
    assert capsys.readouterr().err == ""


def test_a_folder_that_the_user_chose_is_used_or_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "mine"))
    assert cache_folder() == place / "mine" / "nucleus"
    assert check_cache().state == "ok"
    (place / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "file" / "below"))
    with pytest.raises(UsageError, match=r"XDG_CACHE_HOME=.*/file/below.*export XDG_CACHE_HOME=DIR"):
        cache_folder()
    assert check_cache().state == "failed"


@pytest.mark.usefixtures("unknown_user")
def test_a_user_without_a_home_folder_has_one_in_the_temporary_directory(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HOME", raising=False)
    finding = check_cache()
    assert (finding.state, "export XDG_CACHE_HOME=DIR" in str(finding.fix)) == ("warning", True)
    root = place / "tmp" / f"nucleus-{os.getuid()}"
    assert cache_folder() == cache_folder() == root / "nucleus"
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    told = capsys.readouterr().err
    assert told.count(str(root)) == 1
    assert "HOME is not set" in told
    assert os.environ["XDG_CACHE_HOME"] == str(root)  # for the processes that this one starts
    provide_folders()
    assert {Path(os.environ[name]).parents[-len(root.parents) - 1] for name in LIBRARIES} == {root}
    assert Path.home().is_relative_to(root)
    assert Path.home().is_dir()
    assert getpass.getuser()


@pytest.mark.parametrize("kind", ["missing", "read-only", "cache is read-only"])
def test_a_home_folder_that_cannot_be_written_is_only_read(
    kind: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = place / "home"
    (home / ".keras").mkdir()
    if kind == "missing":
        monkeypatch.setenv("HOME", str(place / "none"))
    else:
        read_only(home if kind == "read-only" else home / ".cache", monkeypatch)
        (home / ".cache").mkdir()
    found = find_cache()
    assert (found.temporary, found.writable) == (True, True)
    assert found.path.is_relative_to(place / "tmp")
    monkeypatch.setenv("MPLCONFIGDIR", "/mine")
    provide_folders()
    assert os.environ["MPLCONFIGDIR"] == "/mine"
    assert ("WANDB_DATA_DIR" in os.environ) == (kind != "cache is read-only")
    assert ("KERAS_HOME" in os.environ) == (kind == "missing")  # the folder that exists may hold weights
    assert (os.environ["HOME"] == str(home)) == (kind != "missing")  # it may hold credentials


def test_a_library_whose_own_folder_cannot_be_written_gets_another(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as Matplotlib's in a container whose home folder is a volume, and `.config` is not."""
    home = place / "home"
    (home / ".config" / "wandb").mkdir(parents=True)
    read_only(home / ".config", monkeypatch)
    provide_folders()
    assert Path(os.environ["MPLCONFIGDIR"]) == home / ".cache" / "nucleus" / "libraries" / "matplotlib"
    assert Path(os.environ["MPLCONFIGDIR"]).is_dir()
    assert not (set(LIBRARIES) - {"MPLCONFIGDIR"}) & set(os.environ)  # W&B's folder exists, and may hold a key
    assert os.environ["HOME"] == str(home)


@pytest.mark.parametrize(
    ("origin", "told"),
    [
        ("https://me:secret@git.example:8443/a/b.git?token=secret", "https://git.example:8443/a/b.git"),
        ("ssh://git:secret@git.example/a/b.git", "ssh://git@git.example/a/b.git"),
        ("git@git.example:a/b.git", "git@git.example:a/b.git"),
        ("/home/me/secret", None),
        ("file:///home/me/secret", None),
        ("", None),
    ],
)
def test_the_repository_is_told_without_credentials(
    origin: str, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nucleus.surroundings._git", lambda *_: origin)
    monkeypatch.setattr("shutil.which", lambda _: "git")
    monkeypatch.setattr("pathlib.Path.exists", lambda _: True)
    assert repository() == told


@pytest.mark.parametrize("kind", ["link", "open to others", "file"])
def test_a_folder_that_others_can_write_is_refused(kind: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place / "none"))
    root = place / "tmp" / f"nucleus-{os.getuid()}"
    if kind == "link":
        root.symlink_to(place / "home")
    elif kind == "file":
        root.touch()
    else:
        root.mkdir()
        root.chmod(0o777)
    with pytest.raises(UsageError, match="export XDG_CACHE_HOME=DIR"):
        cache_folder()


def test_without_any_folder_the_error_names_the_variable(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setenv("HOME", str(place / "none"))
    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    for call in (cache_folder, provide_folders):
        with pytest.raises(UsageError, match="export XDG_CACHE_HOME=DIR"):
            call()
    assert check_cache().state == "failed"


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in PROXIES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("changes", "url", "expected"),
    [
        ({}, "http://s3.example:9000", None),
        ({"HTTP_PROXY": "http://p:1"}, "http://s3.example:9000", "HTTP_PROXY=http://p:1"),
        ({"http_proxy": "http://p:1"}, "http://s3.example", "http_proxy=http://p:1"),
        ({"HTTP_PROXY": "http://p:1"}, "https://s3.example", None),
        ({"https_proxy": "http://p:1"}, "https://s3.example", "https_proxy=http://p:1"),
        ({"ALL_PROXY": "socks5://p:1"}, "https://s3.example", "ALL_PROXY=socks5://p:1"),
        ({"HTTP_PROXY": "http://me:secret@p:1"}, "http://s3.example", "HTTP_PROXY=http://p:1"),
        ({"HTTP_PROXY": "me:secret@p:1"}, "http://s3.example", "HTTP_PROXY=http://p:1"),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "a,.example"}, "http://s3.example:9000", None),
        ({"HTTP_PROXY": "http://p:1", "no_proxy": "*"}, "http://s3.example", None),
    ],
)
def test_the_proxy_of_a_url(
    changes: dict[str, str], url: str, expected: str | None, no_proxy: pytest.MonkeyPatch
) -> None:
    for name, value in changes.items():
        no_proxy.setenv(name, value)
    assert proxy_of(url) == expected
    advice = proxy_advice(url)
    assert (str(expected) in advice and "add s3.example to NO_PROXY" in advice) if expected else advice == ""


def test_this_machine_is_exempt_from_its_proxy(no_proxy: pytest.MonkeyPatch) -> None:
    assert loopback_exemption() == {}
    no_proxy.setenv("NO_PROXY", "a.example")
    assert loopback_exemption() == {}
    no_proxy.setenv("HTTP_PROXY", "http://p:1")
    exempt_this_machine()
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "a.example,127.0.0.1,localhost,::1"
    assert proxy_of("http://127.0.0.1:9000") is None
    assert proxy_of("http://other.example") is not None
    assert loopback_exemption() == {}
