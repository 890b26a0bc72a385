"""Augmentation with OpenCV against the same operations in TensorFlow, with the same random numbers."""

import numpy as np
import pytest
import tensorflow as tf

from nucleus.config.recipe import AugmentOptions
from nucleus.data import augmentation
from nucleus.data.augmentation import augmented, drawn_choices
from nucleus.data.synthetic import generated_image
from tests.benchmarks.ingest_cost import FULL
from tests.benchmarks.tensor_augmentation import changed_by_tensors

CROP, EDGE = 64, 6
NOTHING = dict.fromkeys(("scale", "invert", "grey", "contrast", "brightness"), 0.0) | {"flips": False}
SAME = np.arange(256, dtype=np.uint8)
# Options, and by how many grey values a crop may differ: on average, and anywhere. Pixels are resized in 8 bits.
CASES = {
    "nothing": ({}, 0, 0),
    "turns": ({"flips": True}, 0, 0),
    "scale": ({"scale": 0.3}, 1.5, 16),
    "much scale": ({"scale": 2.0}, 1.5, 24),
    "grey and inverted": ({"grey": 0.5, "invert": 0.5}, 0.1, 1),
    "stains": ({"hed": 0.3, "stain": 0.2, "gamma": 0.4}, 0.1, 1),
    "powers": ({"stain": 0.2, "gamma": 0.4}, 0.1, 1),
    "contrast": ({"contrast": 0.5, "brightness": 0.1}, 0.1, 1),
    "shading": ({"shading": 0.4, "contrast": 0.5}, 0.1, 1),
    "blur": ({"blur": 0.7, "blur_sigma": 3.0}, 0.1, 1),
    "noise": ({"noise": 0.1}, 0.1, 1),
    "all but scale": ({**FULL, "scale": 0.0, "flips": True}, 0.1, 1),
}


@pytest.mark.parametrize(("options", "mean", "most"), CASES.values(), ids=CASES)
def test_the_same_numbers_give_the_same_crop(options: dict[str, float], mean: float, most: int) -> None:
    augment = AugmentOptions.model_validate({**NOTHING, **options})
    compared = 0
    for number in range(16):
        image, labels = generated_image(number, 90, 100) if number % 4 else generated_image(number, 40, 70)
        choices, fields = drawn_choices((7, number))
        noise = np.stack([augmentation._noise((CROP, CROP), choices[f"noise_{c}"]) for c in range(3)], axis=-1)
        expected, expected_labels = changed_by_tensors(
            tf.constant(image),
            tf.constant(labels.astype(np.int32)[..., np.newaxis]),
            {name: tf.constant(value, tf.float32) for name, value in choices.items()},
            tf.constant(np.moveaxis(fields, 0, -1)),
            tf.constant(noise),
            CROP,
            augment,
        )
        pixels = image[..., 0] if (image == image[..., :1]).all() else image
        found, found_labels = augmented(
            lambda rows, columns, pixels=pixels, labels=labels: (pixels[rows, columns], labels[rows, columns]),
            labels.shape, SAME, (choices, fields), CROP, augment,
        )  # fmt: skip
        assert found.shape == (CROP, CROP, 3)
        assert (found_labels != expected_labels.numpy()).mean() < 0.01
        if not expected.numpy().any() and found.any():  # the reference's fault
            continue
        inside = slice(EDGE, -EDGE) if options.get("blur") else slice(None)
        difference = np.abs(found.astype(int) - expected.numpy())[inside, inside]
        assert difference.mean() <= mean
        assert difference.max() <= most
        compared += 1
    assert compared >= 12


def test_numbers_are_uniform_and_independent_of_each_other() -> None:
    drawn = [drawn_choices((1, epoch, place)) for epoch in range(4) for place in range(500)]
    numbers = np.array([list(choices.values()) for choices, _ in drawn])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for column in numbers.T:
        shares = np.histogram(column, 10, (0, 1))[0] / len(column)
        assert np.abs(shares - 0.1).max() < 0.035  # five standard deviations
    together = np.corrcoef(numbers.T) - np.eye(numbers.shape[1])
    assert np.abs(together).max() < 0.12
    fields = np.stack([values for _, values in drawn])
    assert np.abs(fields.mean(axis=0)).max() < 0.07
    assert np.abs(fields.std(axis=0) - 3**-0.5).max() < 0.05
    assert len({choices["top"] for choices, _ in drawn}) == len(drawn)


def test_noise_is_normal_and_differs_between_channels_and_crops() -> None:
    flat = np.full((CROP, CROP), 128, np.uint8)
    labels = np.zeros((CROP, CROP), np.uint16)
    options = AugmentOptions.model_validate({**NOTHING, "noise": 0.1})
    found = []
    for number in range(40):
        drawn = drawn_choices((number,))
        image, _ = augmented(lambda *_: (flat, labels), (CROP, CROP), SAME, drawn, CROP, options)
        values = (image.astype(float) - 128) / max(25.5 * drawn[0]["noise"], 1)
        found.append(values)
    many = np.stack([values for values in found if values.std() > 0.9])
    assert len(many) > 30
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.05
    flat_values = many.reshape(len(many), -1, 3)
    assert max(abs(np.corrcoef(values.T)[0, 1]) for values in flat_values) < 0.1
    assert abs(np.corrcoef(flat_values[0, :, 0], flat_values[1, :, 0])[0, 1]) < 0.1
    large = augmentation._noise((1500, 1500), 0.5)
    assert large.shape == (1500, 1500)
    assert abs(large.std() - 1) < 0.01


def test_a_value_at_the_end_of_the_range_does_not_spoil_a_crop() -> None:
    """Inverted or restained values below 0, raised to a power, made whole crops black in the reference."""
    options = AugmentOptions.model_validate({**FULL, "invert": 1.0, "noise": 0.0})
    for number in range(40):
        image, labels = generated_image(number, 90, 100)
        image[:8] = (0, 128, 255)
        found, _ = augmented(
            lambda rows, columns, image=image, labels=labels: (image[rows, columns], labels[rows, columns]),
            labels.shape, SAME, drawn_choices((number,)), CROP, options,
        )  # fmt: skip
        assert found.std() > 1
