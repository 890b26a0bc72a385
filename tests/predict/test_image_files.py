"""Which files of a folder are predicted, under which names, and what happens where results cannot be written."""

import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tifffile

from nucleus.data.images import encode_png
from nucleus.errors import OutputError, UsageError
from nucleus.predict import blocks as blocks_module
from nucleus.predict import results, table_files
from nucleus.predict.blocks import assembled_labels
from nucleus.predict.image_files import check_outputs, find_inputs, predict_files
from nucleus.predict.table_files import IMAGES_TABLE, NUCLEI_TABLE
from tests.predict.test_predict import rows_of, small_model, spots


def images(folder: Path, *names: str) -> Path:
    """Write the same picture under several names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode_png(spots(60, 70, 7, count=8)))
    return folder


def test_folders_are_read_at_any_depth_and_results_keep_the_tree(tmp_path: Path) -> None:
    plate = images(tmp_path / "plate", "a.png", "sub/a.png", "sub/deep/b.PNG", "x.tif/y.png", ".hidden.png", "._a.png")
    images(plate, ".git/c.png", "__MACOSX/a.png", "old.overlay.png", "sub/b.CZI", ".b.czi", "notes.txt")
    images(tmp_path / "far", "d.png")
    (plate / "link").symlink_to(tmp_path / "far")
    (plate / "sub" / "circle").symlink_to(plate)
    (plate / "gone.png").symlink_to("nowhere.png")
    (plate / "v.zarr").mkdir()
    found = find_inputs([plate])
    names = ["a.png", "link/d.png", "sub/a.png", "sub/deep/b.PNG", "x.tif/y.png"]
    assert list(found.images) == names
    assert set(found.unread) == {"gone.png", "sub/b.CZI", "v.zarr"}
    assert "found Zeiss CZI" in found.unread["sub/b.CZI"]
    assert all(str(plate / name) in reason for name, reason in found.unread.items())

    out = plate / "results"
    predicted = predict_files(small_model(), found.images, out)
    assert list(predicted.counts) == names
    assert predicted.failures == {}
    assert min(predicted.counts.values()) == max(predicted.counts.values()) > 3
    assert [row["image"] for row in rows_of(out / IMAGES_TABLE)] == names
    assert {row["image"] for row in rows_of(out / NUCLEI_TABLE)} == set(names)
    whole = (out / "a.labels.tif").read_bytes()
    for name in names:
        stem = str(Path(name).with_suffix(""))
        assert (out / f"{stem}.labels.tif").read_bytes() == whole
        assert (out / f"{stem}.overlay.png").exists()
    assert len([path for path in out.rglob("*") if path.is_file()]) == 2 * len(names) + 2

    assert list(find_inputs([plate]).images) == names  # not the results, which lie below the images
    with pytest.raises(UsageError, match="and 11 more"):
        check_outputs(found.images, out)


def test_several_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path, "one/a.png", "two/a.png", "two/s/b.png", "c.png")
    found = find_inputs([tmp_path / "one", tmp_path / "two", tmp_path / "c.png"])
    assert list(found.images) == ["one/a.png", "two/a.png", "two/s/b.png", "c.png"]
    monkeypatch.chdir(tmp_path / "two")
    assert list(find_inputs([Path()]).images) == ["a.png", "s/b.png"]
    assert list(find_inputs([Path(), Path("../one")]).images) == ["two/a.png", "two/s/b.png", "one/a.png"]
    assert list(find_inputs([Path("../two/a.png")]).images) == ["a.png"]


def test_nothing_is_written_if_nothing_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    found = predict_files(small_model(), [tmp_path / "a.png"], tmp_path / "out")
    assert set(found.failures) == {"a.png"}
    assert not (tmp_path / "out").exists()
    tifffile.imwrite(tmp_path / "b.tif", np.zeros((2, 40, 50), np.uint8), imagej=True, metadata={"axes": "CYX"})
    without_choice = predict_files(small_model(), [tmp_path / "b.tif"], tmp_path / "out")
    assert "--channel 0" in without_choice.failures["b.tif"]
    assert not list((tmp_path / "out").iterdir())  # nothing that would be replaced when the choice is added


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (["one/a.png", "two/a.png"], r"both write a\.labels\.tif"),
        (["one/a.png", "one/a.png"], r"both write a\.labels\.tif"),
        (["same"], r"both write s/a\.labels\.tif"),
        (["empty"], "found none"),
        (["broken"], "found none.*nowhere"),
        (["nothing.png"], "nothing is there"),
        (["pipe.png"], "found neither"),
    ],
)
def test_inputs_that_are_refused(inputs: list[str], said: str, tmp_path: Path) -> None:
    images(tmp_path, "one/a.png", "two/a.png", "same/s/a.png", "same/s/a.tif", "empty/.a.png", "broken/a.txt")
    (tmp_path / "broken" / "b.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UsageError, match=said):
        find_inputs([tmp_path / name for name in inputs])


def test_images_that_fail_keep_no_earlier_results(tmp_path: Path) -> None:
    folder, out, formats = images(tmp_path / "in", "a.png", "b.png", "c.png"), tmp_path / "out", ("labels", "zarr")
    predict_files(small_model(), find_inputs([folder]).images, out, formats=formats)
    before = {path.name for path in out.iterdir()}
    assert before >= {"a.labels.tif", "a.labels.zarr", "b.labels.tif"}
    images(folder, "b.tif")
    (folder / "b.png").write_bytes(b"no image")  # of the same stem as one that can be read
    (folder / "c.png").write_bytes(b"no image")
    (out / "c.overlay.png").mkdir()  # is no result
    found = predict_files(small_model(), {name: folder / name for name in ("a.png", "b.png", "b.tif", "c.png")}, out)
    assert (set(found.counts), set(found.failures)) == ({"a.png", "b.tif"}, {"b.png", "c.png"})
    assert {path.name for path in out.iterdir()} == {
        *("a.labels.tif", "b.labels.tif", "a.overlay.png", "b.overlay.png", "c.overlay.png"),
        *(IMAGES_TABLE, NUCLEI_TABLE),
    }


def test_names_that_leave_no_room_for_their_outputs(tmp_path: Path) -> None:
    images(tmp_path / "in", f"{'x' * 243}.png", f"{'é' * 122}.png", f"{'y' * 244}.png", "good.png")
    found = predict_files(small_model(), find_inputs([tmp_path / "in"]).images, tmp_path / "out")
    assert {name[0] for name in found.counts} == {"x", "g"}
    assert {name[0] for name in found.failures} == {"é", "y"}
    assert all("at most 243 bytes" in reason for reason in found.failures.values())


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written stays whole, the rest leaves nothing behind, and the error has the path and what is left."""
    files = [images(tmp_path, name) / name for name in ("a.png", "b.png", "c.png")]
    write = results.write_atomic

    def full(path: Path, data: bytes) -> None:
        if path.name == "b.overlay.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(results, "write_atomic", full)
    with pytest.raises(OutputError, match=rf"{tmp_path / 'out'}.*No space left.*MiB are free.*have the 1 image before"):
        predict_files(small_model(), files, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("a.labels.tif", "a.overlay.png", "b.labels.tif", "images.csv", "nuclei.csv"),
    ]
    tables = [pd.read_csv(tmp_path / "out" / name) for name in (NUCLEI_TABLE, IMAGES_TABLE)]
    predict_files(small_model(), files[:1], tmp_path / "alone")
    for table, name in zip(tables, (NUCLEI_TABLE, IMAGES_TABLE), strict=True):
        pd.testing.assert_frame_equal(table, pd.read_csv(tmp_path / "alone" / name))
    assert tifffile.imread(tmp_path / "out" / "a.labels.tif").max() > 3


def test_large_labels_take_their_room_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing through mmap to a sparse file on a full disk would end the process with SIGBUS."""
    monkeypatch.setattr(blocks_module, "_IN_MEMORY_BYTES", 0)
    taken: list[int] = []

    def fallocate(_: int, start: int, size: int) -> None:
        taken.append(size - start)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(OSError, match="No space left"), assembled_labels((30, 40), tmp_path):
        pass
    assert taken == [4 * 30 * 40]


@pytest.mark.parametrize("out", ["file", "file/deeper"])
def test_a_file_in_place_of_the_folder(out: str, tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match="file; it is a file"):
        predict_files(small_model(), [tmp_path / "a.png"], tmp_path / out)
    assert (tmp_path / "file").read_text() == "kept"


def test_the_same_values_by_name_and_in_a_row(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    by_name = predict_files(small_model(), {"s/a.png": tmp_path / "a.png"}, tmp_path / "one")
    in_a_row = predict_files(small_model(), [tmp_path / "a.png"], tmp_path / "two")
    assert list(by_name.counts.values()) == list(in_a_row.counts.values())
    rows = [rows_of(tmp_path / folder / NUCLEI_TABLE) for folder in ("one", "two")]
    assert [{**row, "image": "a.png"} for row in rows[0]] == rows[1]
    assert np.array_equal(*(tifffile.imread(tmp_path / p) for p in ("one/s/a.labels.tif", "two/a.labels.tif")))


class FullFile(io.FileIO):
    """A file on a disk with room for a number of bytes; the last write writes what fits, as the system does."""

    room = 0

    def write(self, data: Any) -> int:
        if FullFile.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fits = min(len(data), FullFile.room)
        FullFile.room -= fits
        return super().write(bytes(data)[:fits])


def test_a_disk_without_room_for_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it fills up: the tables have the same images, whole rows only, or are missing, and the error says so."""
    files = [images(tmp_path, name) / name for name in ("a.png", "b.png")]
    predict_files(small_model(), files, tmp_path / "whole")
    whole = {name: (tmp_path / "whole" / name).read_text() for name in (NUCLEI_TABLE, IMAGES_TABLE)}
    monkeypatch.setattr(table_files.io, "FileIO", FullFile)
    headers = sum(len(text.splitlines()[0]) + 1 for text in whole.values())
    for room in (0, headers - 1, headers + 1, headers + 400, sum(map(len, whole.values())) - 1):
        FullFile.room = room
        out = tmp_path / f"out{room}"
        with pytest.raises(OutputError) as caught:
            predict_files(small_model(), files, out)
        found = {path.name: path.read_text() for path in out.glob("*.csv")}
        if room < headers:
            assert found == {}
            assert "nuclei.csv and images.csv are missing" in str(caught.value)
            continue
        assert all(whole[name].startswith(text) and text.endswith("\n") for name, text in found.items())
        listed = {line.split(",")[0] for line in found[IMAGES_TABLE].splitlines()[1:]}
        assert {line.split(",")[0] for line in found[NUCLEI_TABLE].splitlines()[1:]} == listed
        assert f"have the {len(listed)} image" in str(caught.value)
