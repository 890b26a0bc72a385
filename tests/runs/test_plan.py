"""The plan of a run: the recipe that is given with `--resume` must be that of the run."""

from typing import Any

import pytest

from nucleus.config.recipe import NormalizationOptions, Recipe
from nucleus.config.settings import parse_recipe
from nucleus.errors import RecipeError
from nucleus.model.architecture import ModelConfig, recipe_from_start
from nucleus.registry.manifest import EncoderWeightsOrigin, StartOrigin
from nucleus.runs.plan import RunPlan, check_same_recipe

BASE = {"model": "m", "dataset": "d", "optimizer": {"epochs": 60}, "cache_dir": "/fast"}


def recipe(**changes: Any) -> Recipe:
    return parse_recipe({**BASE, **changes}, "r.toml")


def plan(begun: Recipe, **changes: Any) -> RunPlan:
    known: dict[str, Any] = {
        "run": "trial",
        "bucket": "s3://b/p",
        "recipe": begun.model_dump(mode="json"),
        "dataset": "s3://b/p/datasets/d@0123456789ab",
        "weights_uri": None,
        "weights": EncoderWeightsOrigin(source="none", sha256=None),
        "wandb_mode": "disabled",
        "wandb_dir": "/w",
        "encoder_replaced": False,
    }
    return RunPlan(**known | changes)


def test_every_key_that_differs_is_named_with_both_values() -> None:
    edited = recipe(model="other", seed=3, optimizer={"epochs": 8}, augment={"flips": False}, workers=[1, 2])
    with pytest.raises(RecipeError) as caught:
        check_same_recipe(plan(recipe()), edited)
    message = str(caught.value)
    for text in (
        'model: "m" in the run, "other" here',
        "seed: 0 in the run, 3 here",
        "optimizer.epochs: 60 in the run, 8 here",
        "augment.flips: true in the run, false here",
        "workers: 1 in the run, [1, 2] here",
        "nucleus train --resume trial",
    ):
        assert text in message
    assert "cache_dir" not in message
    assert caught.value.exit_code == 2


def test_a_key_that_was_taken_out_differs_from_the_run() -> None:
    with pytest.raises(RecipeError, match=r"seed: 3 in the run, 0 here"):
        check_same_recipe(plan(recipe(seed=3)), recipe())


@pytest.mark.parametrize(
    "same",
    [
        {},
        {"bucket": "s3://b/p"},
        {"dataset": "d@0123456789ab"},
        {"dataset": "s3://b/p/datasets/d"},
        {"dataset": "s3://b/p/datasets/d@0123456789ab"},
    ],
)
def test_the_same_recipe_in_other_words_is_accepted(same: dict[str, Any]) -> None:
    assert check_same_recipe(plan(recipe()), recipe(**same)) == []


@pytest.mark.parametrize("other", ["e", "d@ba9876543210", "s3://c/datasets/d"])
def test_another_dataset_is_refused(other: str) -> None:
    with pytest.raises(RecipeError, match=r"dataset: .*0123456789ab"):
        check_same_recipe(plan(recipe()), recipe(dataset=other))


def test_another_cache_is_only_told() -> None:
    (told,) = check_same_recipe(plan(recipe()), recipe(cache_dir="/slow"))
    assert told == 'cache_dir: "/fast" in the run, "/slow" here'


def test_an_encoder_that_the_demo_replaced_is_no_difference() -> None:
    """A plan of an older version does not say whether the encoder was replaced, so that it is not refused either."""
    replaced = recipe().with_random_encoder()
    for known in (True, None):
        assert check_same_recipe(plan(replaced, encoder_replaced=known), recipe()) == []
    with pytest.raises(RecipeError, match=r'network.weights: "none" in the run, "imagenet" here'):
        check_same_recipe(plan(replaced), recipe())
    with pytest.raises(RecipeError, match=r"seed"):
        check_same_recipe(plan(replaced, encoder_replaced=True), recipe(seed=1))


def test_the_command_to_resume_names_the_bucket_of_the_recipe() -> None:
    assert plan(recipe()).resume_command == "nucleus train --resume trial"
    own = plan(recipe(bucket="s3://b/p"), submitted=True)
    assert own.resume_command == "NUCLEUS_BUCKET=s3://b/p nucleus submit --resume trial"


START = StartOrigin(version="nuclei@3", sha256="a" * 64)
NETWORK = ModelConfig(
    encoder="plain",
    decoder_channels=[8] * 5,
    heads="border",
    normalization=NormalizationOptions(low=2.0),
    tile=64,
    overlap=16,
)


def test_what_was_taken_from_the_start_need_not_be_in_the_recipe_that_resumes() -> None:
    given = recipe(network={"start": "nuclei@latest"}, mix={"old": 0.5})
    begun = plan(recipe_from_start(given, NETWORK, "nuclei@3"), start=START)
    assert begun.recipe.network.encoder == "plain"
    assert check_same_recipe(begun, given) == []
    for change in ({"start": "nuclei@2"}, {"start": "nuclei@latest", "heads": "both"}):
        with pytest.raises(RecipeError, match=rf"network\.{list(change)[-1]}: .* in the run"):
            check_same_recipe(begun, recipe(network=change, mix={"old": 0.5}))
    with pytest.raises(RecipeError, match=r"mix\.old: 0\.5 in the run, 0\.4 here"):
        check_same_recipe(begun, recipe(network={"start": "nuclei@latest"}, mix={"old": 0.4}))
    with pytest.raises(RecipeError, match=r"network\.start"):
        check_same_recipe(begun, recipe(mix={"old": 0.5}))
