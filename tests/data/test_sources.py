"""Folders and zips as people have them: links, hidden files, what cannot be read, and zips of every program."""

import io
import os
import socket
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nucleus.data.folder_listing import is_hidden, list_folder
from nucleus.data.layouts import find_images
from nucleus.data.sources import open_source
from nucleus.errors import DataError, ImageError
from tests.data.test_layouts import make


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    root = make(tmp_path / "root", "a/1.png", "b/2.png")
    other = make(tmp_path / "other", "3.png", "deep/4.tif")
    (root / "far").symlink_to(other)
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "b").symlink_to("../b")
    (root / "b" / "a").symlink_to("../a")
    (other / "back").symlink_to(root / "far")
    (root / "link.png").symlink_to(other / "3.png")
    found = list_folder(root)
    assert found.files == ["a/1.png", "a/b/2.png", "b/2.png", "b/a/1.png", "far/3.png", "far/deep/4.tif", "link.png"]
    assert found.unread == {}


def test_links_of_all_folders_to_all_others_come_to_an_end(tmp_path: Path) -> None:
    names = [f"f{number}" for number in range(9)]
    make(tmp_path, *(f"{name}/{name}.png" for name in names))
    for name in names:
        for other in set(names) - {name}:
            (tmp_path / name / other).symlink_to(tmp_path / other)
    found = list_folder(tmp_path)
    assert {f"{name}/{name}.png" for name in names} <= set(found.files)
    assert len(found.files) <= 9 * 100
    assert all("100 names" in reason for reason in found.unread.values())
    assert found.unread


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "good/1.png", "closed/2.png", "image.zarr/0.png")
    (tmp_path / "gone.png").symlink_to("nowhere/x.png")
    (tmp_path / "gone folder").symlink_to("/nowhere/at all")
    (tmp_path / "gone.md").symlink_to("nowhere.md")
    (tmp_path / "self.png").symlink_to("self.png")
    os.mkfifo(tmp_path / "pipe.tif")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xb5.png"))).write_bytes(b"x")
    forbid(monkeypatch, tmp_path / "closed")
    found = list_folder(tmp_path)
    assert found.files == ["good/1.png"]
    reasons = {
        "closed": "Permission denied",
        "gone folder": "/nowhere/at all, which does not exist",
        "gone.png": "nowhere/x.png, which does not exist",
        "image.zarr": "OME-TIFF",
        "odd\\udcb5.png": "UTF-8",
        "pipe.tif": "neither",
        "self.png": "symbolic links",
    }
    assert set(found.unread) == set(reasons)
    for path, reason in reasons.items():
        assert reason in found.unread[path]


def forbid(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make a folder unreadable, also for root."""
    scandir = os.scandir

    def refuse(path: str | Path) -> object:
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


def test_a_source_that_cannot_be_read_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, tmp_path)
    with pytest.raises(DataError, match="Permission denied"):
        open_source(tmp_path).entries()
    with pytest.raises(DataError, match="Zarr"):
        list_folder(make(tmp_path / "x.zarr", "0.png"))


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    names = (
        *("._a.png", ".a.png", ".git/a.png", "__MACOSX/a.png", "@eaDir/a.png/THUMB.jpg", "$RECYCLE.BIN/a.png"),
        *("s/lost+found/a.png", "s/.thumbnails/a.png"),
    )
    root = make(tmp_path / "root", "a.png", "s/b.tif", "Thumbs.db", *names)
    assert open_source(root).entries() == ["a.png", "s/b.tif"]
    assert open_source(root).left_out() == {}
    assert all(is_hidden(name) for name in names)
    assert not any(is_hidden(name) for name in ("a.png", "s/b..tif", "../a.png", "./a.png"))
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("a.png", "s/b.tif", "Thumbs.db", *names):
            file.writestr(name, "x")
    assert open_source(archive).entries() == ["a.png", "s/b.tif"]


def test_folders_named_like_images_are_folders(tmp_path: Path) -> None:
    make(tmp_path, "x.tif/y.png", "z.png/deeper.tif/w.tif")
    assert list_folder(tmp_path).files == ["x.tif/y.png", "z.png/deeper.tif/w.tif"]


def test_very_deep_folders(tmp_path: Path) -> None:
    paths = [f"{tmp_path}{'/d' * depth}" for depth in range(1, 1501)]
    for path in paths:
        Path(path).mkdir()
    try:
        assert list_folder(make(tmp_path, "a.png")).files == ["a.png"]
    finally:
        for path in reversed(paths):  # rmtree is recursive
            Path(path).rmdir()


def zipped(path: Path, *names: str, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name in names:
            info = zipfile.ZipInfo("placeholder")
            info.filename = name  # as it is: ZipInfo replaces backslashes on some systems
            info.compress_type = compression
            file.writestr(info, name * 50)
    return path


def test_backslashes_are_folders(tmp_path: Path) -> None:
    source = open_source(zipped(tmp_path / "a.zip", "data\\", "data\\images\\1.png", "data\\labels\\1.png"))
    assert source.entries() == ["data/images/1.png", "data/labels/1.png"]
    assert source.read("data/images/1.png") == b"data\\images\\1.png" * 50
    assert find_images(source).name == "labelled"
    with pytest.raises(DataError, match="outside the zip"):
        open_source(zipped(tmp_path / "b.zip", "..\\..\\1.png")).read("../../1.png")
    with pytest.raises(DataError, match="slashes only"):
        open_source(zipped(tmp_path / "c.zip", "a\\1.png", "a/1.png"))


def flagged(path: Path, local: int, central: int, value: int) -> Path:
    """Change a byte in both headers of each entry of a zip."""
    data = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\3\4", local), (b"PK\1\2", central)):
        place = data.find(magic)
        while place >= 0:
            data[place + offset] = value
            place = data.find(magic, place + 4)
    path.write_bytes(data)
    return path


def halved(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def without_contents(path: Path) -> Path:
    """Overwrite the list of contents."""
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\1\2")
    data[start : start + 20] = bytes(20)
    path.write_bytes(data)
    return path


def tar(path: Path, mode: str) -> Path:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        info = tarfile.TarInfo("images/1.png")
        info.size = 1
        file.addfile(info, io.BytesIO(b"x"))
    return path


def text(path: Path) -> Path:
    path.write_text("no zip")
    return path


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "encrypted": (lambda path: flagged(zipped(path, "images/1.png"), 6, 8, 1), r"images/1\.png .*is encrypted"),
    "Deflate64": (lambda path: flagged(zipped(path, "images/1.png"), 8, 10, 9), r"packed with method 9"),
    "truncated": (lambda path: halved(zipped(path, "images/1.png")), r"breaks off after \d+ bytes"),
    "damaged list": (lambda path: without_contents(zipped(path, "a.png")), "list of contents cannot be read"),
    "within a zip": (
        lambda path: zipped(path, "train.zip", "b.csv"),
        r"1 archive within it, such as 'train\.zip'\. Unp",
    ),
    "empty zip": (zipped, "found none"),
    "tar.gz": (lambda path: tar(path, "w:gz"), r"gzip \(\.gz, \.tar\.gz\)\. Unpack"),
    "tar": (lambda path: tar(path, "w"), "another kind, tar. Unpack"),
    "text": (text, "is neither"),
    "nothing": (lambda path: path, "nothing is there"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_zip_of_images_is_refused_by_name(case: str, tmp_path: Path) -> None:
    write, said = REFUSED[case]
    with pytest.raises(DataError, match=said):
        find_images(open_source(write(tmp_path / "a.zip")))


def test_one_damaged_entry_does_not_concern_the_others(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", "1.png", "2.png", compression=zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    place = data.index(b"1.png") + len(b"1.png")
    data[place : place + 4] = b"\xff" * 4
    path.write_bytes(data)
    source = open_source(path)
    with pytest.raises(ImageError, match=r"1\.png"):
        source.read("1.png")
    assert source.read("2.png") == b"2.png" * 50


def test_archives_beside_images_are_named(tmp_path: Path) -> None:
    names = ("images/1.png", "labels/1.png", "more.zip")
    layout = find_images(open_source(zipped(tmp_path / "a.zip", *names)))
    assert list(layout.left_out) == ["more.zip"]
    with pytest.raises(DataError, match=r"such as 'train\.zip'"):
        find_images(open_source(make(tmp_path / "folder", "train.zip", "notes.txt")))


def test_a_socket_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("x.png")
        assert list(list_folder(tmp_path).unread) == ["x.png"]


def test_a_file_that_is_gone_concerns_itself_only(tmp_path: Path) -> None:
    source = open_source(make(tmp_path, "a.png"))
    (tmp_path / "a.png").unlink()
    with pytest.raises(ImageError, match=r"a\.png"):
        source.read("a.png")
