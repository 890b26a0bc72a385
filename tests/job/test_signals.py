"""Signals to a running job: SIGTERM once and twice, and what the trainer makes of them."""

import os
import signal
from types import SimpleNamespace

import pytest

from job.signals import RunSignals, stops_on_sigterm
from nucleus.config.settings import parse_recipe
from nucleus.errors import RunStoppedError
from nucleus.registry.manifest import EncoderWeightsOrigin
from nucleus.runs.plan import RunPlan
from nucleus.training.callbacks import Signal


def test_the_second_sigterm_ends_a_run_that_does_not_hear() -> None:
    plan = RunPlan(
        run="deaf",
        bucket="s3://b",
        recipe=parse_recipe({"model": "m", "dataset": "d"}, "r.toml").model_dump(mode="json"),
        dataset="s3://b/datasets/d@0123456789ab",
        weights_uri=None,
        weights=EncoderWeightsOrigin(source="none", sha256=None),
        wandb_mode="disabled",
        wandb_dir="/",
    )
    asked: list[str] = []
    request = SimpleNamespace(ask=SimpleNamespace(remote=lambda: asked.append("stop")))
    before = signal.getsignal(signal.SIGTERM)
    with stops_on_sigterm(request, plan):
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked == ["stop"]
        with pytest.raises(RunStoppedError, match="--resume deaf"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert asked == ["stop"]
    assert signal.getsignal(signal.SIGTERM) == before
    assert RunStoppedError.exit_code == 128 + signal.SIGTERM


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
