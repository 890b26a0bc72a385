"""`make gpu-check` on a CPU: its rows appear as parts print them, its parts measure something, its costs are right."""

import json
import sys
from typing import Any

import click
import keras
import pytest
import tensorflow as tf
from click.testing import CliRunner

from tests.benchmarks import gpu_check, gpu_parts
from tests.benchmarks.network_cost import Cost, cost_of

OPTIONS = {"data": None, "weights": None, "recipe": "dsb2018-gpu", "small": True}
PART = """
import json, sys, time
print("a library's own line")
print(json.dumps({"what": "rate", "value": 1234.5, "unit": "crops/s", "goal": ">= 1500"}), flush=True)
if sys.argv[1] == "hangs":
    time.sleep(600)
sys.exit("Expected a GPU" if sys.argv[1] == "fails" else 0)
"""


def checked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, list[str]]:
    """The status and the lines of a check whose parts are `PART`."""
    parts = dict.fromkeys(("works", "fails", "hangs"), None)
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "_command", lambda part, _: [sys.executable, "-c", PART, part])
    (only,) = [option for option in gpu_check.main.params if option.name == "only"]
    monkeypatch.setattr(only, "type", click.Choice(list(parts)))
    done = CliRunner().invoke(gpu_check.main, list(arguments))
    return done.exit_code, done.output.splitlines()


def test_each_part_shows_its_rows_and_how_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    status, lines = checked(monkeypatch, "--only", "fails", "--only", "works")
    assert status == 1
    assert [line.split() for line in lines[1:]] == [
        ["fails:", "rate", "1234", "crops/s", ">=", "1500"],
        ["fails:", "not", "finished", "failed:", "exit", "status", "1", "Expected", "a", "GPU"],
        ["works:", "rate", "1234", "crops/s", ">=", "1500"],
    ]
    status, lines = checked(monkeypatch, "--only", "works", "--json")
    assert status == 0
    assert [json.loads(line) for line in lines] == [
        {"part": "works", "what": "rate", "value": 1234.5, "unit": "crops/s", "goal": ">= 1500"}
    ]


def test_the_budget_ends_a_part_that_hangs_and_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_SHORTEST", 1.0)
    status, lines = checked(monkeypatch, "--budget", "4", "--only", "hangs", "--only", "works")
    assert status == 1
    assert "1234" in lines[1]
    assert [line.split()[:5] for line in lines[2:]] == [
        ["hangs:", "not", "finished", "failed:", "the"],
        ["works:", "not", "run", "failed:", "the"],
    ]


def test_the_cost_of_a_convolution_and_its_gradients_by_hand() -> None:
    layer = keras.layers.Conv2D(4, 3, padding="same", use_bias=False)
    layer.build((None, 8, 8, 2))
    pixels, flop = 8 * 8, 2 * 9 * 2 * 4 * 8 * 8
    forward = 4 * (pixels * 2 + 9 * 2 * 4 + pixels * 4)

    def gradient(image: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            found = tf.reduce_sum(layer(image) ** 2)
        return tape.gradient(found, layer.kernel.value)

    assert cost_of(layer, (1, 8, 8, 2)) == Cost(flop, forward)
    both = cost_of(gradient, (1, 8, 8, 2))  # of the kernel alone: the image needs none
    assert both.flop == 2 * flop
    assert both.bytes == pytest.approx(2 * forward, abs=64)  # the second one reads the kernel's sizes too
    assert both.limit(bandwidth=both.bytes, rate=float("inf")) == 1
    assert both.limit(bandwidth=float("inf"), rate=both.flop / 2) == 0.5


def rows_of(part: str, capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    """The values that a part prints, by what they are of."""
    getattr(gpu_parts, part)(OPTIONS, **options)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    return {row["what"]: row["value"] for row in rows}


@pytest.mark.slow
def test_parts_measure_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert rows_of("device", capsys)["bandwidth of a copy"] > 0
    (difference,) = rows_of("exact", capsys).values()
    assert 0 <= difference < 1e-5
    until, rate, share = rows_of("steps", capsys, frozen=False).values()
    assert min(until, rate, share) > 0
