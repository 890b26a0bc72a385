import json
import math
from pathlib import Path

import pytest

from nucleus.config.recipe import CardOptions, Recipe
from nucleus.config.settings import parse_recipe, read_recipe, recipe_path
from nucleus.errors import RecipeError

RECIPES = sorted((Path(__file__).parents[2] / "job" / "recipes").glob("*.toml"))
MINIMAL = {"model": "m", "dataset": "d"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_right(path: Path) -> None:
    recipe = read_recipe(recipe_path(path.stem))
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_shipped_recipes_are_those_of_the_readme() -> None:
    assert [path.stem for path in RECIPES] == ["demo", "dsb2018-cpu", "dsb2018-gpu", "dsb2018-long", "nuclei"]


def test_when_and_how_fast_the_encoder_is_trained() -> None:
    def network(**options: object) -> tuple[int | None, float]:
        found = parse_recipe({**MINIMAL, "network": options}, "r.toml").network
        return found.encoder_trained_from, found.encoder_rate_factor

    assert network() == (None, 0.1)
    assert network(unfreeze_epoch=4, encoder_learning_rate_factor=0.02) == (4, 0.02)
    assert network(freeze_encoder=False) == (0, 0.1)
    assert network(freeze_encoder=False, weights="none") == (0, 1.0)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_with_a_random_encoder_are_recipes(path: Path) -> None:
    recipe = read_recipe(path).with_random_encoder()
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert recipe.network.encoder_trained_from == 0


def test_learning_rates_follow_the_batch_where_it_is_asked_for() -> None:
    def rates(batch: int, **options: object) -> tuple[float, float]:
        optimizer = {"learning_rate": 4e-3, "final_learning_rate": 1e-4, **options}
        return parse_recipe({**MINIMAL, "input": {"batch_size": batch}, "optimizer": optimizer}, "r").learning_rates

    assert rates(384) == (4e-3, 1e-4)
    assert rates(96, learning_rate_batch=96) == (4e-3, 1e-4)
    assert rates(384, learning_rate_batch=96) == pytest.approx((16e-3, 4e-4))
    assert rates(24, learning_rate_batch=96) == pytest.approx((1e-3, 25e-6))


def test_the_recipe_for_a_gpu_takes_more_of_them() -> None:
    one = read_recipe(recipe_path("dsb2018-gpu"))
    four = read_recipe(recipe_path("dsb2018-gpu"), ["workers=4", "input.batch_size=384"])
    assert [recipe.batch_per_worker(recipe.workers.most) for recipe in (one, four)] == [96, 96]
    assert four.learning_rates == pytest.approx([4 * rate for rate in one.learning_rates])
    assert one.optimizer.warmup_steps
    elastic = read_recipe(recipe_path("dsb2018-gpu"), ["workers=[1,4]"])
    assert [elastic.batch_per_worker(count) for count in elastic.workers.counts] == [96, 48, 32, 24]


def test_elastic_workers() -> None:
    recipe = parse_recipe({**MINIMAL, "workers": [1, 2]}, "r.toml")
    assert (recipe.workers.fewest, recipe.workers.most, recipe.workers.elastic) == (1, 2, True)
    assert [recipe.batch_per_worker(count) for count in recipe.workers.counts] == [8, 4]
    assert recipe.model_dump(mode="json")["workers"] == [1, 2]
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_recipes_from_before_the_card_are_read() -> None:
    stored = parse_recipe(MINIMAL, "r.toml").model_dump(mode="json")
    del stored["card"]
    assert Recipe.model_validate_json(json.dumps(stored)).card == CardOptions()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_state_licences_of_certain_data(path: Path) -> None:
    card = read_recipe(path).card
    assert card.data_license
    assert card.data_source
    assert card.data_import == ("images" if path.stem == "demo" else "stage1_train")


def test_settings_change_keys(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('model = "m"\ndataset = "d"\n')
    recipe = read_recipe(
        path,
        ["optimizer.epochs=3", "network.weights=none", "network.freeze_encoder=false", 'bucket="s3://b"', "workers=2"],
    )
    assert (recipe.optimizer.epochs, recipe.network.weights, recipe.bucket) == (3, "none", "s3://b")
    assert recipe.workers == (2, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"dataset": "d"}, "key 'model' is missing"),
        ({**MINIMAL, "worker": 2}, "unknown key 'worker' (did you mean 'workers'?)"),
        ({**MINIMAL, "optimizer": {"epoch": 2}}, "unknown key 'optimizer.epoch' (did you mean 'epochs'?)"),
        (
            {**MINIMAL, "optimizer": {"learning_rate": math.inf}},
            "optimizer.learning_rate: input should be a finite number",
        ),
        ({**MINIMAL, "workers": "two"}, "workers: expected a number from 1 to 1024, or [fewest, most], found 'two'"),
        ({**MINIMAL, "workers": 0}, "workers: expected a number from 1 to 1024, or [fewest, most], found 0"),
        ({**MINIMAL, "workers": [2, 1]}, "workers: expected a number from 1 to 1024, or [fewest, most], found [2, 1]"),
        (
            {**MINIMAL, "workers": [1, 4]},
            "input.batch_size (8) must be a multiple of every number of workers from 1 to 4: the workers share each "
            "batch equally. The range may go up to 2",
        ),
        ({**MINIMAL, "input": {"crop": 100}}, "input.crop: input should be a multiple of 32, found 100"),
        ({**MINIMAL, "input": {"crop": -32}}, "input.crop: input should be greater than or equal to 32"),
        ({**MINIMAL, "input": {"overlap": 600}}, "overlap must be at most half of tile"),
        ({**MINIMAL, "workers": 3}, "input.batch_size (8) must be a multiple of workers (3)"),
        ({**MINIMAL, "network": {"encoder": "resnet"}}, "network.encoder: input should be 'mobilenet_v2'"),
        ({**MINIMAL, "model": "My Model"}, "Try 'my-model'"),
        ({**MINIMAL, "network": {"weights": "none"}}, "network.freeze_encoder must be false"),
        (
            {**MINIMAL, "workers": 2, "optimizer": {"gradient_accumulation_steps": 3}},
            "input.batch_size / workers (4) must be a multiple of optimizer.gradient_accumulation_steps (3)",
        ),
        ({**MINIMAL, "network": {"freeze_encoder": False, "unfreeze_epoch": 2}}, "needs network.freeze_encoder = true"),
        (
            {**MINIMAL, "network": {"unfreeze_epoch": 0}},
            "unfreeze_epoch: input should be greater than or equal to 1",
        ),
        ({**MINIMAL, "optimizer": {"ema_momentum": 1.0}}, "optimizer.ema_momentum: input should be less than 1"),
        ({**MINIMAL, "card": {"licence": "MIT"}}, "unknown key 'card.licence' (did you mean 'license'?)"),
        ({**MINIMAL, "card": {"contact": "a\nb"}}, "card.contact: string should match pattern"),
        ({**MINIMAL, "card": {"contact": ""}}, "card.contact: string should match pattern"),
        ({**MINIMAL, "cache_limit_gib": 0.0}, "cache_limit_gib: input should be greater than 0"),
        ({**MINIMAL, "cache_dir": "relative"}, "cache_dir must be an absolute path"),
        ({**MINIMAL, "mix": {"a": 0.5, "b": 0.5}}, "mix must be below 1 in all, found 1"),
        ({**MINIMAL, "mix": {"a": 0.0}}, "mix.a: input should be greater than 0"),
        ({**MINIMAL, "tracking": {"wandb": "on"}}, "tracking.wandb: input should be 'online', 'offline' or 'disabled'"),
    ],
)
def test_wrong_recipes_say_which_key(content: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(content, "r.toml")
    assert message in str(caught.value)
    assert "r.toml" in str(caught.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml.*demo, dsb2018-cpu"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("= 3")
    with pytest.raises(RecipeError, match=r"bad\.toml"):
        read_recipe(tmp_path / "bad.toml")
    (tmp_path / "r.toml").write_text('model = "m"\ndataset = "d"\n')
    with pytest.raises(RecipeError, match="KEY=VALUE"):
        read_recipe(tmp_path / "r.toml", ["epochs"])
    with pytest.raises(RecipeError, match="model"):
        read_recipe(tmp_path / "r.toml", ["model.x=1"])


@pytest.mark.parametrize(
    ("images", "changes", "steps"),
    [
        (50, {}, 6),
        (7, {}, 0),
        (50, {"mix": {"a": 0.5}}, 12),
        (7, {"mix": {"a": 0.2, "b": 0.1}}, 1),
        (7, {"optimizer": {"steps_per_epoch": 20}}, 20),
    ],
)
def test_steps_of_an_epoch(images: int, changes: dict[str, object], steps: int) -> None:
    """Each image of `dataset` once with what is mixed in, unless the recipe says how many."""
    assert parse_recipe({**MINIMAL, **changes}, "r.toml").steps_of_epoch(images) == steps


def test_a_start_needs_no_encoder_weights() -> None:
    found = parse_recipe({**MINIMAL, "network": {"start": "m@1", "encoder": "plain", "weights": "none"}}, "r.toml")
    assert found.network.encoder_rate_factor == 0.1, "its encoder is trained already"
