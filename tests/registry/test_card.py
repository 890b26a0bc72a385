"""The model card, from origins that are made by hand."""

import json
import re
from typing import Any

import pytest
import yaml

from nucleus.cli.output import print_markdown
from nucleus.config.encoders import ENCODER_NAMES, ENCODERS, KNOWN_WEIGHTS, WITHOUT_IMAGENET
from nucleus.config.names import Kind
from nucleus.config.settings import parse_recipe
from nucleus.data.dataset import Addition, DatasetManifest, LeftOut
from nucleus.data.origins import DataOrigin, DataSource
from nucleus.data.samples import Sample
from nucleus.metrics.nuclei import SIZES
from nucleus.metrics.scores import HEADLINES
from nucleus.model.architecture import ModelConfig, config_of_recipe
from nucleus.registry.card import model_card, without_front_matter
from nucleus.registry.manifest import EncoderWeightsOrigin, MixOrigin, Origin

KNOWN = next(sha for sha, encoder in KNOWN_WEIGHTS.items() if encoder == "mobilenet_v2")
STATED = {
    "license": "Apache-2.0",
    "data_license": "CC0-1.0",
    "data_source": "Doe 2020",
    "data_import": "plates",
    "contact": "doe@example.org",
}


def scores(images: int, ap: float = 0.8, sizes: tuple[int, ...] = (40, 50, 9, 1), **changes: float) -> dict[str, float]:
    """Of 100 nuclei that are 10 missed, 6 merged and 4 split; of 80 predicted ones 8 are extra."""
    return {
        "images": images,
        **{key: ap for key, _ in HEADLINES},
        "ap_70": ap / 2,
        "ap_90": ap / 4,
        "count_error": 2.5,
        "nuclei_true": 100,
        "nuclei_predicted": 80,
        "nuclei_missed": 10,
        "nuclei_extra": 8,
        "nuclei_merged": 6,
        "nuclei_split": 4,
        **{f"nuclei_true_{size}": count for size, count in zip(SIZES, sizes, strict=True)},
        **{
            f"recall_50_{size}": recall
            for size, recall, count in zip(SIZES, (0.55, 0.9, 1, 1), sizes, strict=True)
            if count
        },
        **changes,
    }


def origin(metrics: dict[str, Any], card: dict[str, str] | None = None, **weights: Any) -> Origin:
    encoder = weights.pop("encoder", "mobilenet_v2")
    network = {"encoder": encoder, "weights": "none", "freeze_encoder": False}
    recipe = parse_recipe({"model": "m", "dataset": "d", "seed": 11, "network": network, "card": card or {}}, "test")
    return Origin(
        run="run-1",
        recipe=recipe.model_dump(mode="json"),
        dataset="s3://b/datasets/d@0123456789ab",
        encoder_weights=EncoderWeightsOrigin(**({"source": "none", "sha256": None} | weights)),
        metrics=metrics,
        code_version="9.9",
        wandb_run=None,
    )


def dataset(kinds: tuple[Kind, ...] = tuple(Kind), source: str = "plates.zip") -> DatasetManifest:
    samples = [
        Sample(
            name=f"{kind.value}-{split}-{number}",
            split=split,
            kind=kind,
            group=0,
            height=100 + number,
            width=300,
            nuclei=7,
            image_sha256="0" * 64,
            labels_sha256="0" * 64,
        )
        for kind in kinds
        for split in ("train", "val", "test")
        for number in range(25 if kind is Kind.DARK_FIELD else 3)
    ]
    return DatasetManifest(
        format=1,
        name="d",
        version="0123456789ab",
        created="2026-01-02T03:04:05",
        source=source,
        layout="kaggle",
        seed=0,
        samples=samples,
        shards=[],
        duplicates=[LeftOut(title="x", reason="same")] * 3,
        left_out=[],
    )


def config(made: Origin, **changes: Any) -> ModelConfig:
    recipe = parse_recipe({"model": "m", "dataset": "d", "network": made.recipe["network"]}, "test")
    return config_of_recipe(recipe).model_copy(update={"nucleus_diameter": 21.7, **changes})


def card_of(made: Origin, data: DatasetManifest | None = None, **changes: Any) -> str:
    return model_card("m", made, config(made, **changes), data or dataset())


def words(text: str) -> str:
    """The text as one line, so that a sentence is found however it is wrapped."""
    return re.sub(r"\s+", " ", text)


def section(card: str, title: str) -> str:
    return words(card.partition(f"\n## {title}\n")[2].partition("\n## ")[0])


ALL = {
    split: {
        "all": scores(30, 0.7),
        "dark-field": scores(20, 0.8),
        "bright-field": scores(4, 0.1),
        "stain": scores(6, 0.3),
    }
    for split in ("val", "test")
}


def test_measured_limits_in_sentences() -> None:
    limits = section(card_of(origin(ALL)), "Where it fails")
    for sentence in (
        "Measured on 30 images of the test split, which training did not use.",
        "Of 100 true nuclei, 80.0 % were found one for one, 10.0 % were missed, 6.0 % were merged with a neighbour "
        "and 4.0 % were split.",
        "Of the predicted nuclei, 10.0 % are extra",
        "The count per image is off by 2.5 nuclei on average.",
        "AP falls from 0.70 at IoU 0.5 to 0.35 at 0.7 and 0.17 at 0.9.",
        # Bright-field is worse, but four images tell nothing.
        "It is weakest on **stain** images: mAP 0.30, against 0.80 on dark-field images.",
        "Too few images to tell (under 5): bright-field.",
        "nuclei of under 12 px are found least often: 55.0 %, against 90.0 % of those of 12 to 24 px.",
        "| under 12 px | 55.0 % of 40 | 55.0 % of 40 | 55.0 % of 40 | 55.0 % of 40 |",
        "| stain | 6 | 100 | 80.0 % | 10.0 % | 6.0 % | 4.0 % | 10.0 % | 2.5 |",
    ):
        assert sentence in limits
    assert "for lack of images" not in limits
    assert "too few to tell.**" not in limits


def test_few_images_and_missing_kinds() -> None:
    metrics = {"val": {"all": scores(2)}, "test": {"all": scores(1, sizes=(100, 0, 0, 0)), "stain": scores(1)}}
    card = card_of(origin(metrics), dataset((Kind.STAIN,)))
    limits = section(card, "Where it fails")
    assert "**1 image: too few to tell.**" in limits
    assert "weakest" not in limits
    assert "least often" not in limits
    assert "Not measured, for lack of images: dark-field, bright-field." in limits
    assert "| over 48 px | – | 100.0 % of 1 |" in limits
    follows = section(card, "Limits that follow from its data")
    assert "Never seen in training: dark-field, bright-field images." in follows
    assert "Rarely seen in training: stain (3) images." in follows


def test_nothing_found_and_nothing_there() -> None:
    empty = {"nuclei_true": 0, "nuclei_predicted": 0, "nuclei_missed": 0, "nuclei_extra": 0, "nuclei_merged": 0}
    metrics = {"test": {"all": scores(9, ap=0.0, sizes=(0, 0, 0, 0), nuclei_split=0, **empty)}}
    limits = section(card_of(origin(metrics)), "Where it fails")
    assert (
        "These images contain no nuclei, so their scores are undefined. The model outlined 0 nuclei in them" in limits
    )
    assert "| all | 9 | 0 | – |" in limits
    missed = {"nuclei_predicted": 0, "nuclei_missed": 100, "nuclei_extra": 0, "nuclei_merged": 0, "nuclei_split": 0}
    limits = section(card_of(origin({"test": {"all": scores(9, ap=0.0, **missed)}})), "Where it fails")
    assert "0.0 % were found one for one, 100.0 % were missed" in limits
    assert "are extra" not in limits
    assert "AP falls" not in limits


def test_undefined_scores_are_named() -> None:
    undefined = dict.fromkeys((key for key, _ in HEADLINES))
    nothing = {"nuclei_true": 0, "nuclei_predicted": 8, "nuclei_missed": 0, "nuclei_merged": 0, "nuclei_split": 0}
    empty = scores(9, sizes=(0, 0, 0, 0)) | nothing | undefined
    card = card_of(origin({"test": {"all": empty, "stain": empty}}))
    assert "model-index" not in card
    assert "| test | stain | 9 | " + " | ".join(["undefined"] * len(HEADLINES)) in section(card, "Metrics")
    assert "The model outlined 8 nuclei in them" in section(card, "Where it fails")
    some = card_of(origin({"test": {"all": scores(30), "dark-field": scores(21), "stain": empty}}))
    assert "It is weakest on" not in some, "one kind with a score is compared with none"


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        (
            {"val": {"all": scores(30)}, "test": {"all": {"images": 0.0}}},
            "30 images of the val split, which also chose the weights and thresholds.",
        ),
        ({"val": {"all": {"images": 0.0}}, "test": {"all": {"images": 0.0}}}, "Not measured: there were no images"),
        (
            {"test": {"all": {name: value for name, value in scores(30).items() if "nuclei_m" not in name}}},
            "Not measured: the version of this package that trained the model did not count mistakes.",
        ),
    ],
)
def test_without_measurements(metrics: dict[str, Any], told: str) -> None:
    card = card_of(origin(metrics))
    assert told in section(card, "Where it fails")
    assert "| 0 |" not in section(card, "Metrics")
    assert ("model-index" in card) == bool(metrics["test"]["all"]["images"])


def test_data_and_making() -> None:
    made = origin(ALL, STATED, source="imagenet", sha256=KNOWN)
    card = card_of(made, pixel_size=0.5)
    data = section(card, "Data")
    for text in (
        "imported from `plates.zip` on 2026-01-02",
        "Source: Doe 2020",
        "Licence of the images and labels: CC0-1.0",
        "| train | all | 31 | 217 |",
        "| test | stain | 3 | 21 |",
        "Images have 100 to 300 px per side. Not used: 3 exact duplicates of other images, and 0 images",
    ):
        assert text in data
    making = section(card, "How it was made")
    for text in (
        "MobileNetV2 (Sandler",
        "seed 11",
        f"`imagenet` weights (SHA-256 `{KNOWN}`)",
        "nucleus 9.9",
        "`run-1`",
    ):
        assert text in making
    follows = section(card, "Limits that follow from its data")
    assert "about 22 px across" in follows
    assert "pixels of 0.5 micrometres" in follows
    assert "Never seen" not in follows
    unknown = section(card_of(made, nucleus_diameter=None), "Limits that follow from its data")
    assert "px across" not in unknown
    assert "not by micrometres" in unknown
    cited = section(card, "Citation and contact")
    assert "trained on `d@0123456789ab` with nucleus 9.9. Data: Doe 2020." in cited
    assert "Contact: doe@example.org" in cited
    metrics = section(card, "Metrics")
    assert "| test | stain | 6 | 0.300 | 0.150 | 0.075 | 0.300 |" in metrics


@pytest.mark.parametrize(
    ("weights", "told", "not_told"),
    [
        ({"source": "none"}, "initialised with: none, the weights were random", "ImageNet"),
        ({"source": "file", "sha256": "0" * 64}, "unknown: the weights came from a user-supplied file", "Apache"),
        ({"source": "s3", "sha256": "0" * 64}, "unknown: the weights came from a user-supplied file", "Apache"),
        ({"source": "s3", "sha256": KNOWN}, "Apache-2.0; as the documentation of Keras", "If somebody replaced"),
        ({"source": "imagenet", "sha256": "0" * 64}, "(If somebody replaced the file", "unknown"),
        (
            {"source": "imagenet", "sha256": "0" * 64, "encoder": "efficientnet_v2_b0"},
            "Keras Applications states none",
            "unknown",
        ),
        # The weights of another encoder are not those that are known.
        ({"source": "file", "sha256": KNOWN, "encoder": "efficientnet_v2_b0"}, "unknown: the weights came", "Apache"),
        ({"source": "file", "sha256": "0" * 64, "encoder": "plain"}, "unknown: the weights came", "Apache"),
    ],
)
def test_licence_of_the_encoders_weights(weights: dict[str, Any], told: str, not_told: str) -> None:
    text = section(card_of(origin(ALL, **weights)), "Licences")
    assert told in text
    assert not_told not in text


def test_encoders_with_weights_have_a_licence() -> None:
    assert set(ENCODERS) == set(ENCODER_NAMES)
    assert {"plain"} == WITHOUT_IMAGENET
    assert all(ENCODERS[encoder].weights_license for encoder in KNOWN_WEIGHTS.values())


def test_what_nobody_stated() -> None:
    card = card_of(origin(ALL))
    assert "93 images. Licence of the images and labels: not stated. Source: not stated" in words(card)
    assert "State what is missing when you import images (`--license`, `--source`)" in words(card)
    assert "The data: not stated (93 images)" in section(card, "Licences")
    assert "This model's weights: not stated (set `card.license` in the recipe)" in words(card)
    assert "Contact: not stated" in card
    assert "license" not in yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("source", ["mine.zip", "plates-2.zip", "images"])
def test_statements_about_other_data_are_not_repeated(source: str) -> None:
    card = card_of(origin(ALL, STATED), dataset(source=source))
    assert "Doe 2020" not in card
    assert "CC0-1.0" not in card
    assert f"From `{source}`: 93 images. Licence of the images and labels: not stated" in words(card)
    for same in ("plates", "plates.zip", "plates.tar"):
        assert "CC0-1.0" in card_of(origin(ALL, STATED), dataset(source=same))


@pytest.mark.parametrize(
    ("stated", "front"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("CC BY 4.0: see us", {"license": "other", "license_name": "CC BY 4.0: see us"}),
    ],
)
def test_front_matter_is_yaml(stated: str, front: dict[str, str]) -> None:
    card = card_of(origin(ALL, {"license": stated}))
    _, matter, body = card.split("---\n", 2)
    content = yaml.safe_load(matter)
    assert {key: value for key, value in content.items() if key.startswith("license")} == front
    (result,) = content["model-index"][0]["results"]
    assert result["dataset"] == {"name": "d", "type": "d", "revision": "0123456789ab", "split": "test"}
    assert {"type": "map", "name": "mAP", "value": 0.7} in result["metrics"]
    assert without_front_matter(card) == body.lstrip("\n")
    assert body.lstrip("\n").startswith("# m\n")
    assert without_front_matter("# an older card\n---\n") == "# an older card\n---\n"


def test_lines_are_readable_without_rendering() -> None:
    card = card_of(origin(json.loads(json.dumps(ALL)), STATED, source="imagenet", sha256=KNOWN))
    lines = card.splitlines()
    assert max(len(line) for line in lines if not line.startswith("|")) <= 110
    assert not any(line.startswith("%") for line in lines)
    tables = re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE)
    assert len(tables) == 4
    for table in tables:
        assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in table.splitlines()}) == 1


def test_a_card_is_rendered_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = "# m\n\n| kind  | images |\n| ----- | -----: |\n| stain |      6 |\n"
    print_markdown(card)
    assert capsys.readouterr().out == f"{card}\n"
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    print_markdown(card)
    rendered = capsys.readouterr().out
    assert "stain" in rendered
    assert "|" not in rendered


def test_the_recipe_says_nothing_of_what_was_added() -> None:
    facts = {"parent": "ab" * 6, "created": "2026-03-04T05:06:07", "layout": "labelled", "seed": 0, "known": 0}
    more = Addition(source="more.zip", added=10, replaced=2, **facts)
    card = words(card_of(origin(ALL, STATED), dataset().model_copy(update={"additions": [more]})))
    assert f"Added on 2026-03-04 to version `{'ab' * 6}`: 10 images of `more.zip`, new labels of 2 images" in card
    assert "From `plates.zip`: 83 images. Licence of the images and labels: CC0-1.0. Source: Doe 2020" in card
    assert "From `more.zip`: 10 images, labels of 2 images. Licence of the images and labels: not stated." in card
    assert "The data: CC0-1.0 (83 images), not stated (10 images, labels of 2 images)" in card


def test_each_source_has_its_licence() -> None:
    """What was stated at the import comes before what the recipe says; mixed datasets have their own."""
    data = dataset().model_copy(update={"stated": DataOrigin(license="CC-BY-4.0", origin="https://example.org/p")})
    mixed = MixOrigin(
        dataset="s3://b/datasets/e@0", share=0.5, data=[DataSource(name="e", images=7, license="CC-BY-NC-4.0")]
    )
    made = origin(ALL, STATED)
    card = card_of(made.model_copy(update={"mix": [mixed]}), data)
    assert "From `plates.zip`: 93 images. Licence of the images and labels: CC-BY-4.0." in section(card, "Data")
    assert "50 % of the training crops came from `s3://b/datasets/e@0`" in section(card, "Data")
    assert "From `e`: 7 images. Licence of the images and labels: CC-BY-NC-4.0." in section(card, "Data")
    assert "The data: CC-BY-4.0 (93 images), CC-BY-NC-4.0 (7 images)" in section(card, "Licences")
    assert "Data: https://example.org/p." in section(card, "Citation and contact")
    assert "CC0-1.0" not in card
    assert "State what is missing" not in card
