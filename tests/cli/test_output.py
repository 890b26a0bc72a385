"""What the terminal shows: bars on a pseudo-terminal, a line a stage elsewhere, tables for people and for pipes."""

import doctest
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from pathlib import Path

import pytest

import nucleus.text
from nucleus.cli.output import print_facts
from nucleus.cli.progress_bars import TrainingDisplay, clock, show_progress
from nucleus.progress import no_progress, split_progress

ROOT = Path(__file__).parents[2]
TRAINING = """
import sys
from nucleus.cli.output import warn
from nucleus.cli.progress_bars import TrainingDisplay
with TrainingDisplay() as display:
    with display.progress("publish", "bytes") as advance:
        advance(0, 9_000_000)
        advance(9_000_000, 9_000_000)
    for epoch in range(1, 13):
        for step in range(3):
            display.on_steps_end(epoch, 12, step + 1, 3, 0.25, 1234.5)
        warn(f"number {epoch}.")
        scores = {name: 0.5 for name in ("val_loss", "val_map", "val_iou", "val_dice")}
        display.on_epoch_end({"epoch": float(epoch), "loss": 0.2, "images_per_second": 1234.5, **scores})
    sys.stderr.flush()
    display._bar and display._bar.refresh()
print("result")
"""
BARS = """
from nucleus.cli.progress_bars import show_progress
with show_progress("evaluate train val test and more") as read, show_progress("send", "bytes") as sent:
    read(600, 1200)
    read(1200, 1200)
    sent(0, 123_000_000)
    sent(123_000_000, 123_000_000)
with show_progress("nothing", "bytes"):
    pass
"""
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def on_terminal(code: str, width: int, changes: Mapping[str, str] | None = None) -> str:
    """All that a process writes to a terminal of that width, raw."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    plain = {name: value for name, value in os.environ.items() if name not in {"CI", "NO_COLOR", "FORCE_COLOR"}}
    environment = {**plain, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **(changes or {})}
    environment = {name: value for name, value in environment.items() if name not in {"COLUMNS", "LINES"}}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=there, stdout=there, stderr=there, env=environment)
    os.close(there)
    written = b""
    while True:
        try:
            part = os.read(here, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(here)
    assert process.wait() == 0, written
    return written.decode()


def frames(written: str) -> list[str]:
    """What stood on each line at any time, without colours."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", _CONTROL.sub("", written)) if line.strip()]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_run_on_a_terminal(width: int) -> None:
    written = on_terminal(TRAINING, width)
    lines = frames(written)
    bars = [line for line in lines if "━" in line]
    assert max(map(len, bars)) <= width  # or the terminal would wrap it, and leave what it wraps behind
    assert any(re.match(r"publish ━+ 9.0/9.0 MB", line) for line in bars)
    last = next(line for line in reversed(lines) if line.startswith("epoch 12/12 ") and ":" not in line[:13])
    assert re.fullmatch(r"epoch 12/12 ━* ?100% loss 0.2000 IoU 0.5000 1234 images/s in ((\d+:\d\d)|0:…)", last)
    assert width == 60 or "━" in last
    for epoch in range(1, 13):  # each whole, on a line of its own
        assert f"Warning: number {epoch}." in lines
        line = f"epoch {epoch}/12: loss 0.2000, val loss 0.5000, mAP 0.5000, IoU 0.5000, Dice 0.5000"
        assert width == 60 or f"{line}, 1234.5 images/s" in lines or (width == 80 and line in lines)
    assert lines[-1] == "result"
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")  # the cursor is there again


@pytest.mark.parametrize("width", [50, 80])
def test_bars_fit_the_terminal_and_stand_in_order(width: int) -> None:
    bars = [line for line in frames(on_terminal(BARS, width)) if "━" in line]
    assert max(map(len, bars)) <= width
    names = [line.split()[0] for line in bars]
    assert names == sorted(names)
    assert width == 50 or "1200/1200" in next(line for line in reversed(bars) if line.startswith("evaluate"))
    assert "123.0/123.0 MB" in bars[-1]
    assert "nothing" not in names


@pytest.mark.parametrize("changes", [{"TERM": "dumb"}, {"CI": "true"}])
def test_terminals_without_bars(changes: dict[str, str]) -> None:
    written = on_terminal(TRAINING, 200, changes)
    assert "━" not in written
    assert "\x1b[?25l" not in written
    assert "images/s, 0:00 left" in written


def test_no_colour_where_none_is_wanted() -> None:
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", on_terminal(BARS, 80))
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", on_terminal(BARS, 80, {"NO_COLOR": "1"}))


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes a pipe for a terminal
    with show_progress("read images") as read, show_progress("send", "bytes") as sent:
        read(1, 2)
        read(2, 2)
        sent(0, 5_000_000)
        sent(5_000_000, 5_000_000)
    with show_progress("nothing", "bytes"):
        pass
    with show_progress("segment images"):
        pass
    told = capsys.readouterr()
    assert told.out == ""
    first, second, third = told.err.splitlines()
    assert re.fullmatch(r"read images: 2 of 2 in \d+\.\d s", first)
    assert re.fullmatch(r"send: 5\.0 MB in \d+\.\d s \(.+/s\)", second)
    assert re.fullmatch(r"segment images: 0 of 0 in \d+\.\d s", third)


def test_a_run_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with TrainingDisplay() as display:
        display.on_stage("Training r on 2 workers")
        for epoch in range(1, 4):
            for step in range(2):
                now[0] += 30
                display.on_steps_end(epoch, 3, step + 1, 2, 0.5, 4.0)
            scores = {"val_loss": 0.6, "val_map": 0.1, "val_iou": 0.7, "val_dice": 0.8} if epoch == 3 else {}
            display.on_epoch_end({"epoch": float(epoch), "loss": 0.5, "images_per_second": 4.0, **scores})
        display.on_warning("a remark")
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "Training r on 2 workers",
        "epoch 1/3: loss 0.5000, 4.0 images/s, 2:00 left",
        "epoch 2/3: loss 0.5000, 4.0 images/s, 1:00 left",
        "epoch 3/3: loss 0.5000, val loss 0.6000, mAP 0.1000, IoU 0.7000, Dice 0.8000, 4.0 images/s, 0:00 left",
        "Warning: a remark",
    ]


def test_time_left_of_a_run_that_goes_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    display = TrainingDisplay()
    for moment, epoch, done in ((0, 1, 1), (1, 1, 2), (500, 1, 1), (510, 1, 2)):  # a worker died after a second
        now[0] = float(moment)
        display.on_steps_end(epoch, 2, done, 2, 0.5, 4.0)
    display.on_epoch_end({"epoch": 1.0, "loss": 0.5, "images_per_second": 4.0})
    assert "0:20 left" in capsys.readouterr().err  # two steps of ten seconds each


def test_tables_of_facts(capsys: pytest.CaptureFixture[str]) -> None:
    print_facts({"model": "m@1", "predict": "nucleus predict [x]"}, ("what", "where"))
    assert capsys.readouterr().out == "what\twhere\nmodel\tm@1\npredict\tnucleus predict [x]\n"
    command = "nucleus predict " + "x" * 100 + " [bold]"
    code = f"from nucleus.cli.output import print_facts\nprint_facts({{'model': 'm@1', 'predict': {command!r}}})"
    lines = frames(on_terminal(code, 80))
    assert [line.split(maxsplit=1) for line in lines] == [["what", "value"], ["model", "m@1"], ["predict", command]]


def test_scores_have_room_on_a_narrow_terminal() -> None:
    names = ("images", "ap_50", "ap_70", "ap_90", "map", "iou", "dice", "accuracy")
    scores = dict.fromkeys(names, 0.1234) | {"images": 531}
    kinds = {"bright-field": scores, "stain": {"images": 0}}  # of no images there is no row
    code = f"from nucleus.cli.output import print_scores\nprint_scores({{'train': {kinds}}})"
    head, row = frames(on_terminal(code, 80))
    assert head.split() == ["split", "kind", "images", "AP.5", "AP.7", "AP.9", "mAP", "IoU", "Dice", "accuracy"]
    assert row.split() == ["train", "bright-field", "531", *["0.1234"] * 7]


def test_texts_are_as_their_examples_say() -> None:
    tried = doctest.testmod(nucleus.text)
    assert tried.attempted > 8
    assert tried.failed == 0


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 5.4, 59.6, 754, 3723)] == ["0:00", "0:05", "1:00", "12:34", "1:02:03"]


def test_shares_of_a_whole() -> None:
    told: list[tuple[int, int]] = []
    shares = split_progress({"a": 3, "b": 5}, lambda done, total: told.append((done, total)))
    shares["b"](2, 5)
    shares["a"](3, 3)
    shares["b"](0, 5)  # begins anew
    shares["b"](5, 5)
    assert told == [(0, 8), (2, 8), (5, 8), (3, 8), (8, 8)]
    assert split_progress({"a": 3}, no_progress) == {"a": no_progress}
