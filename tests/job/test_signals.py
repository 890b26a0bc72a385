"""Signals to a running job: once and twice, with and without workers, and what the trainer makes of them."""

import os
import pickle
import signal
from types import SimpleNamespace

import pytest

from job.events import _Calls
from job.signals import RunSignals, stops_on_signals
from nucleus.errors import RunStoppedError
from nucleus.training.callbacks import Callback, Signal


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Told(Callback):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def on_warning(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("job.signals.time", clock)
    return clock


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def how() -> str:
    return "Run: nucleus train --resume deaf"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_first_signal_asks_and_the_second_ends_the_run(number: int, status: int, clock: Clock) -> None:
    asked, told = [], Told()
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    def run() -> None:
        with stops_on_signals(told, how) as stop:
            stop.resumable = True
            with stop.asking(lambda: not asked.append("stop")):
                send(number)
                send(number)  # of the same moment: a group and each of its processes were signalled
                assert (asked, len(told.warnings), stop.asked) == (["stop"], 1, True)
                clock.now += 2
                send(number)
                pytest.fail("it goes on")

    with pytest.raises(RunStoppedError, match="--resume deaf") as caught:
        run()
    assert asked == ["stop"]
    assert caught.value.exit_code == status
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.exit_code, again.signal) == (str(caught.value), status, number)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


@pytest.mark.usefixtures("clock")
def test_a_signal_ends_a_run_that_cannot_save() -> None:
    """There are no workers yet, or no more: nobody is asked. A run that is not in the bucket has nothing to resume."""

    def run(*, resumable: bool, asking: bool, inside: bool = True) -> None:
        with stops_on_signals(Told(), how) as stop:
            stop.resumable = resumable
            with stop.asking(lambda: asking):
                if inside:
                    send(signal.SIGTERM)
            send(signal.SIGTERM)

    with pytest.raises(RunStoppedError, match="had not begun") as caught:
        run(resumable=False, asking=False)
    assert "--resume" not in str(caught.value)
    with pytest.raises(RunStoppedError, match="--resume deaf"):
        run(resumable=True, asking=False)
    with pytest.raises(RunStoppedError, match="--resume deaf"):
        run(resumable=True, asking=True, inside=False)


def test_ignored_signals_stay_ignored() -> None:
    """As under nohup (SIGHUP), and in the background of a shell without job control (SIGINT)."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        with stops_on_signals(Told(), how) as stop:
            send(signal.SIGHUP)
            send(signal.SIGINT)
            assert stop.signal is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_display_that_fails_is_told_once_and_the_calls_go_on() -> None:
    class Broken(Told):
        def on_stage(self, text: str) -> None:
            if text == "bad":
                raise OSError("terminal gone")
            self.warnings.append(text)

    shown = Broken()
    calls = _Calls(shown)
    for text in ("bad", "good", "bad", "better"):
        calls.make("on_stage", (text,))
    first, *others = shown.warnings
    assert "terminal gone" in first
    assert others == ["good", "better"]


def test_what_a_worker_hears_and_when_it_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop goes before all; a machine that leaves is a reason to save once; a checkpoint is due by the clock."""

    now, leaving, answer = [0.0], set(), [False]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("ray.train.collective.broadcast_from_rank_zero", lambda values: values)
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: SimpleNamespace(preempted_node_ids=leaving))
    monkeypatch.setattr("ray.wait", lambda answers, timeout: (answers, []))  # noqa: ARG005
    monkeypatch.setattr("ray.get", lambda _: answer[0])
    request = SimpleNamespace(asked=SimpleNamespace(remote=object))
    first = RunSignals(request, 30.0, first=True)
    assert not RunSignals(request, 30.0, first=False).pending()
    assert not first.pending()
    now[0] = 10.0
    assert first.pending()
    assert first.read() is Signal.CONTINUE
    assert not first.pending()  # it has just looked
    now[0] = 30.0
    assert first.pending()
    assert first.read() is Signal.SAVE
    first.saved()
    assert first.read() is Signal.CONTINUE
    leaving.add("node")
    assert first.read() is Signal.SAVE_BEFORE_LOSS
    assert first.read() is Signal.CONTINUE
    answer[0] = True
    assert [first.pending() for _ in range(2)] == [False, True]  # one call asks, a later one has the answer
    assert first.read() is Signal.STOP
