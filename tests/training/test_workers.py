"""One, two and three real processes compute the same: weights, metrics, order, files, decisions.

Exactly the same is what has the same batches in the same parts and sums in the same order, with one thread: weights of
two workers and of one that computes two parts, files of every rank, a resumed run. Other numbers of workers add up the
same terms in another order, and are compared up to rounding.
"""

import json
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from nucleus.config.settings import parse_recipe, read_recipe, recipe_path
from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.data.synthetic import generated_image, write_generated
from nucleus.model.architecture import config_of_recipe
from nucleus.model.unet import build_unet, calibrate_encoder, encoder_of
from nucleus.storage.uri import parse_uri
from tests.whole_way import assert_same_scores

WORLDS = (1, 2, 3)
PORTS = 24700
STEPS_AN_EPOCH = 2
SAVED_AFTER = 3
GPU_RECIPE = read_recipe(recipe_path("dsb2018-gpu")).optimizer.model_dump()
# Encoder (the large one takes a minute to build in three processes), variables, learning rate, steps after which the
# weights are kept, and parts in which a worker computes its share of the batch of 12.
STEPS = {
    world: {
        "whole": ("plain", "all", 0.1, [1, 20] if world < 3 else [1], 1),
        **({"recipe": ("plain", "recipe", 0.0, [20], 1)} if world < 3 else {}),
        **({"gpu": ("plain", "gpu", 0.0, [6], 3 - world)} if world < 3 else {}),
        **({"decoder": ("mobilenet_v2", "decoder", 0.002, [20], 1)} if world < 3 else {}),
        **({"halves": ("plain", "all", 0.1, [20], 2)} if world == 1 else {}),
    }
    for world in WORLDS
}
RUNS = {1: ["options"], 2: ["options", "stops"], 3: []}
PRETRAINED = {"encoder": "plain", "weights": "given", "decoder_channels": [8, 8, 8, 8, 8]}
CHANGES: dict[str, dict[str, Any]] = {
    "gpu": {
        "network": PRETRAINED,
        "optimizer": {
            **{key: value for key, value in GPU_RECIPE.items() if value is not None},
            "precision": "mixed_bfloat16",
            "learning_rate_batch": 6,
        },
    },
    # Everything at once that must see the gradients of all workers.
    "options": {
        "network": {**PRETRAINED, "unfreeze_epoch": 1},
        "optimizer": {
            "epochs": 3,
            "steps_per_execution": 1,
            "validate_every": 2,
            "warmup_steps": 1,
            "gradient_accumulation_steps": 2,
            "global_clipnorm": 0.5,
            "ema_momentum": 0.9,
        },
    },
    # Steps too small to change the score: no validation is better than the first.
    "stops": {
        "network": PRETRAINED,
        "optimizer": {
            "epochs": 9,
            "patience": 1,
            "learning_rate": 1e-12,
            "final_learning_rate": 1e-12,
            "weight_decay": 0.0,
        },
    },
}


@dataclass
class Found:
    """What each rank of each world found."""

    by_rank: dict[int, list[dict[str, Any]]]
    root: Path

    def weights(self, name: str, world: int, steps: int) -> list[np.ndarray]:
        """The last rank's weights after some SGD."""
        with np.load(self.root / f"{name}-{steps}-{world}-{world - 1}.npz") as stored:
            return [stored[key] for key in stored.files]


@pytest.fixture(scope="module")
def found(store: object, tmp_path_factory: pytest.TempPathFactory) -> Found:  # noqa: ARG001
    root = tmp_path_factory.mktemp("workers")
    uri = parse_uri("s3://nucleus/workers")
    write_generated(root / "images", 41, side=96)
    dataset = import_dataset(root / "images", uri / "datasets" / "d", SplitOptions(val=0.14, test=0.1)).dataset
    sizes = {split: len(dataset.manifest.split_samples(split)) for split in ("train", "val")}
    assert sizes["val"] % 2
    assert sizes["val"] % 3
    assert sizes["train"] // 12 == STEPS_AN_EPOCH
    recipe = {
        "model": "m",
        "dataset": "d",
        "bucket": str(uri),
        "network": {
            "encoder": "plain",
            "weights": "none",
            "freeze_encoder": False,
            "decoder_channels": [8, 8, 8, 8, 8],
        },
        "input": {"crop": 64, "batch_size": 12, "tile": 64, "overlap": 16},
    }
    model = build_unet(config_of_recipe(parse_recipe(recipe, "test")))
    calibrate_encoder(model, np.stack([generated_image(seed, 64, 64)[0] for seed in range(4)]))
    weights = root / "encoder.weights.h5"
    encoder_of(model).save_weights(weights)
    keras.backend.clear_session()
    task = {
        "worlds": addresses(),
        "recipe": recipe,
        "steps": STEPS,
        "frozen": {"network": PRETRAINED},
        "runs": RUNS,
        "changes": CHANGES,
        "weights": str(weights),
        "save_after": SAVED_AFTER,
    }
    (root / "task.json").write_text(json.dumps(task))
    command = [sys.executable, str(Path(__file__).with_name("worker_process.py")), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    logs = [path.read_text()[-3000:] for path in sorted(root.glob("*.log"))]
    assert done.returncode == 0, "\n".join([done.stderr, *logs])
    return Found({w: [json.loads((root / f"{w}-{r}.json").read_text()) for r in range(w)] for w in WORLDS}, root)


def addresses() -> dict[int, list[str]]:
    """Those of the workers of each world."""
    return {world: [f"127.0.0.1:{port}" for port in free_ports(world, PORTS + 10 * world)] for world in WORLDS}


def free_ports(count: int, first: int) -> range:
    """Neighbouring ports that are free, from `first` on."""
    for start in range(first, 32000, 100):  # below those that the system gives away
        ports = range(start, start + count)
        try:
            for port in ports:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return ports
    raise AssertionError("no free ports")


def test_sgd_gives_the_same_weights(found: Found) -> None:
    """Up to the rounding of sums over a batch, which the images and the CPU decide; the next test is about bits."""
    for name, steps, world, tolerance in (("decoder", 20, 2, 1e-5), ("whole", 1, 2, 5e-6), ("whole", 1, 3, 5e-6)):
        losses = [found.by_rank[count][0]["losses"][name][0] for count in (1, world)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        for alone, together in zip(found.weights(name, 1, steps), found.weights(name, world, steps), strict=True):
            np.testing.assert_allclose(together, alone, rtol=0, atol=tolerance)


def test_the_same_parts_give_the_same_bits(found: Found) -> None:
    """One worker that computes its batch in two parts does what two workers do: not a bit may differ."""
    for alone, together in zip(found.weights("halves", 1, 20), found.weights("whole", 2, 20), strict=True):
        assert np.isfinite(alone).all()
        assert (together == alone).all()


def test_the_recipe_for_a_gpu_is_as_exact(found: Found) -> None:
    """Its optimizer in bfloat16, and with a batch for which the linear rule doubles the rates, while they warm up."""
    for alone, together in zip(found.weights("gpu", 1, 6), found.weights("gpu", 2, 6), strict=True):
        assert np.isfinite(alone).all()
        assert (together == alone).all()
    (before,) = found.by_rank[1][0]["losses"]["gpu"]
    assert before > 0


def test_validation_is_the_same_number(found: Found) -> None:
    """Each world batches the images otherwise; the ranks of one world have the same sums."""
    alone = found.by_rank[1][0]["scores"]
    assert {"loss", "iou", "dice", "accuracy", "pooled_iou"} <= alone["all"].keys()
    for world in (2, 3):
        for rank in found.by_rank[world]:
            assert rank["scores"] == found.by_rank[world][0]["scores"]
            assert_same_scores(rank["scores"], alone)


def test_the_recipes_optimizer_gives_the_same_predictions(found: Found) -> None:
    alone, together = (np.array(found.by_rank[world][0]["predictions"]["recipe"]) for world in (1, 2))
    assert together == pytest.approx(alone, abs=1e-3)


def test_every_option_gives_the_same_run(found: Found) -> None:
    alone, together = (found.by_rank[world][0]["runs"]["options"] for world in (1, 2))
    assert np.array(together["predictions"]) == pytest.approx(np.array(alone["predictions"]), abs=1e-3)
    for one, many in zip(alone["history"], together["history"], strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert many["learning_rate"] == one["learning_rate"]


def test_the_best_and_worst_images_are_the_same(found: Found) -> None:
    """Four test images: the two best, the best first, and the two worst, the worst first."""
    (alone,) = [rank["runs"]["options"]["ranked"] for rank in found.by_rank[1]]
    assert [group for group, _ in alone] == ["best", "best", "worst", "worst"]
    assert len({name for _, name in alone}) == len(alone)
    together = [rank["runs"]["options"]["ranked"] for rank in found.by_rank[2]]
    assert all(together)
    assert sorted([*together[0], *together[1]]) == sorted(alone)


def test_some_images_are_watched_on_the_first_worker(found: Found) -> None:
    """Before training, after the first and the second validation (epochs 2 and 3), and at the end."""
    (alone,) = [rank["runs"]["options"]["watched"] for rank in found.by_rank[1]]
    assert [epochs for epochs, _ in alone] == [0, 2, 3, None]
    assert len({tuple(names) for _, names in alone}) == 1
    assert len(set(alone[0][1])) == 4
    first, second = [rank["runs"]["options"]["watched"] for rank in found.by_rank[2]]
    assert (first, second) == (alone, [])


def test_every_rank_would_save_the_same_bytes(found: Found) -> None:
    first, second = (rank["runs"]["options"] for rank in found.by_rank[2])
    assert first["sums"]
    assert all(
        sums.keys() == {"current.npz", "best.weights.h5", "decoder.npz", "encoder.npz"} for sums in first["sums"]
    )
    assert second["sums"] == first["sums"]
    assert second["metrics"] == first["metrics"]


def test_training_stops_everywhere_at_the_same_epoch(found: Found) -> None:
    assert [rank["runs"]["stops"]["epochs"] for rank in found.by_rank[2]] == [2, 2]


def test_a_resumed_run_sees_the_order_of_the_unbroken_one(found: Found) -> None:
    for ranks in found.by_rank.values():
        for rank in ranks:
            unbroken, resumed = rank["orders"]
            assert unbroken[STEPS_AN_EPOCH:] == resumed
            assert len(set(unbroken)) == 3 * STEPS_AN_EPOCH


def test_a_run_saved_within_an_epoch_goes_on_as_if_nothing_had_been(found: Found) -> None:
    for rank in found.by_rank[2]:
        unbroken, resumed = rank["runs"]["options"], rank["resumed"]
        state = json.loads((Path(unbroken["middle"]) / "state.json").read_text())
        assert (state["epochs_done"], state["steps_done"]) == divmod(SAVED_AFTER, STEPS_AN_EPOCH)
        assert resumed["sums"][-1] == unbroken["sums"][-1]
        assert resumed["losses"] == pytest.approx([m["loss"] for m in unbroken["history"]], rel=1e-6)  # of two parts
