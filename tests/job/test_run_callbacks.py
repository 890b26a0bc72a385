"""Callbacks of a worker without Ray: how W&B is closed, what TensorBoard shows, and the lines of a trial."""

import errno
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.events import EventCallback
from job.run_callbacks import ProfileCallback, TensorBoardCallback, WandbCallback, _saved
from job.sweep import _TrialCallback
from nucleus.errors import OutputError
from nucleus.storage.files import check_sums
from nucleus.training.callbacks import CallbackList, TrainingResult


class Tracked:
    """A run in W&B that records the calls, and fails to close if wanted."""

    kept_files: dict[str, Path]

    def __init__(self, *, broken: bool = False) -> None:
        self.calls: list[Any] = []
        self.mode = "online"
        self.kept_files = {}
        self._broken = broken

    def log(self, metrics: dict[str, float]) -> None:
        self.calls.append(metrics["epoch"])

    def finish(self, summary: dict[str, float]) -> None:
        self.calls.append(summary)

    def abort(self) -> None:
        self.calls.append("aborted")
        if self._broken:
            raise OSError("W&B is gone")


def wandb_callback(tracked: Tracked, monkeypatch: pytest.MonkeyPatch) -> WandbCallback:
    monkeypatch.setattr("job.run_callbacks.keep_files", lambda *_: tracked.calls.append("kept"))
    return WandbCallback(tracked, None, tracked.calls.append)  # type: ignore[arg-type]


def result() -> TrainingResult:
    return SimpleNamespace(metrics={"val": {"all": {"map": 0.5}}}, model=None)  # type: ignore[return-value]


def test_a_finished_run_is_not_aborted_in_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = Tracked()
    callback = wandb_callback(tracked, monkeypatch)
    callback.on_resume([{"epoch": 1.0}, {"epoch": 2.0}], "epoch 2, step 0 on 1 worker")
    callback.on_epoch_end({"epoch": 3.0})
    callback.on_train_end(result(), lambda _: None)
    callback.on_close(failed=False)
    assert tracked.calls == [1.0, 2.0, 3.0, {"val_map": 0.5}, "kept"]


@pytest.mark.parametrize("failed", [True, False])
def test_a_run_that_was_stopped_or_has_failed_is_aborted_in_wandb(
    failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked = Tracked()
    wandb_callback(tracked, monkeypatch).on_close(failed=failed)
    assert tracked.calls == ["aborted", "kept"]


def test_the_profile_ends_though_wandb_cannot_be_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stopped: list[bool] = []
    profile = ProfileCallback(0, tmp_path)
    monkeypatch.setattr(profile, "on_close", lambda *, failed: stopped.append(failed))
    callback = CallbackList([wandb_callback(Tracked(broken=True), monkeypatch), profile])
    with pytest.raises(OSError, match="gone"):
        callback.on_close(failed=True)
    assert stopped == [True]


def test_tensorboard_shows_earlier_predictions_and_those_of_the_best_weights_last() -> None:
    pictures = SimpleNamespace(
        predictions={2: {"a": b"new"}, None: {"a": b"best"}},
        uploaded_predictions=lambda epochs: {0: {"a": b"first"}, epochs: {"a": b"old"}},
    )
    callback = TensorBoardCallback(None, Path(), pictures, None, print)  # type: ignore[arg-type]
    callback.on_resume([{"epoch": 1.0}, {"epoch": 2.0}], "epoch 2")
    assert callback._tagged_pictures(3) == {
        0: {"predictions/a": b"first"},
        2: {"predictions/a": b"new"},
        3: {"best/a": b"best"},
    }


def test_wandbs_files_that_vanished_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for mode, files, told in (
        ("offline", {}, 1),
        ("offline", {"a": tmp_path}, 0),
        ("online", {}, 0),
        ("disabled", {}, 0),
    ):
        tracked = Tracked()
        tracked.mode, tracked.kept_files = mode, files
        wandb_callback(tracked, monkeypatch).on_close(failed=False)
        assert len([call for call in tracked.calls if "have vanished" in call]) == told
        assert tracked.calls[-1] == "kept"


def test_a_folder_that_cannot_be_written_is_told_once_and_the_bucket_has_the_events(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("job.run_callbacks.events_of", lambda *_: b"events")
    put: list[str] = []
    told: list[str] = []
    (tmp_path / "file").touch()
    callback = TensorBoardCallback(
        SimpleNamespace(put=lambda name, _: put.append(name)),  # type: ignore[arg-type]
        tmp_path / "file" / "run",
        SimpleNamespace(predictions={}),  # type: ignore[arg-type]
        SimpleNamespace(files={}),  # type: ignore[arg-type]
        told.append,
    )
    for _ in range(2):
        callback.upload([])()
    assert len(put) == 2
    (text,) = told
    assert str(tmp_path / "file") in text


def test_a_trial_sends_lines_with_its_number_and_no_steps() -> None:
    sent: list[Any] = []
    callback = _TrialCallback(3, EventCallback(SimpleNamespace(put=sent.append)))
    callback.on_stage("Workers started: 1")
    callback.on_steps_end(1, 1, 1, 2, 0.5, 4.0)
    callback.on_epoch_end({"epoch": 1.0, "loss": 0.25, "val_map": 0.5})
    callback.on_warning("a remark")
    assert sent == [
        ("on_stage", ("trial 3: Workers started: 1",)),
        ("on_stage", ("trial 3: epoch 1: loss 0.2500, mAP 0.5000",)),
        ("on_warning", ("trial 3: a remark",)),
    ]


def test_a_checkpoint_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it stays on the full disk, and the error names the variable of the folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def save(folder: Path) -> None:
        (folder / "weights").write_bytes(b"half")
        raise RuntimeError(f"Unable to flush (errno = 28, error message = '{os.strerror(errno.ENOSPC)}')")  # HDF5's

    with pytest.raises(OutputError, match=rf"{tmp_path}/nucleus-checkpoint-.*export TMPDIR=DIR"):
        _saved(save)
    assert list(tmp_path.iterdir()) == []
    check_sums(Path(_saved(lambda folder: (folder / "weights").write_bytes(b"whole"))), "here")
