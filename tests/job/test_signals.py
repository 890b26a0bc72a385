"""What a run is told from outside: SIGTERM once and twice."""

import os
import signal
from types import SimpleNamespace

import pytest

from job.signals import stops_on_sigterm
from nucleus.config.settings import parse_recipe
from nucleus.errors import RunStoppedError
from nucleus.registry.manifest import EncoderWeightsOrigin
from nucleus.runs.plan import RunPlan


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
