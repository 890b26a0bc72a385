"""Lines that are held back from stderr, by several threads at once."""

import os
import threading

import pytest

from nucleus.lazy import stderr_without


def test_lines_that_match_are_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    with stderr_without(b"^remark") as real:
        os.write(2, b"remark\nkept\n")
        os.write(real, b"at once\n")
    assert capfd.readouterr().err == "at once\nkept\n"


def test_stderr_is_back_after_several_threads_held_it(capfd: pytest.CaptureFixture[str]) -> None:
    """The first to begin ends first, which would leave the file of the second in the place of stderr."""
    began, ended = threading.Event(), threading.Event()

    def first() -> None:
        with stderr_without(b"none"):
            began.set()
            second_thread.join(0.2)  # it waits for this one
        ended.set()

    def second() -> None:
        began.wait(10)
        with stderr_without(b"none"):
            ended.wait(10)

    first_thread, second_thread = threading.Thread(target=first), threading.Thread(target=second)
    second_thread.start()
    first_thread.start()
    first_thread.join(20)
    second_thread.join(20)
    os.write(2, b"shown\n")
    assert capfd.readouterr().err == "shown\n"
