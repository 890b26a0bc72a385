import numpy as np
import pytest

from nucleus.data.kinds import Kind
from nucleus.model.metrics import PixelCounts, ScoreSums, count_pixels


def test_worked_example() -> None:
    truth = np.array([[1, 1, 0], [1, 0, 0]], bool)
    predicted = np.array([[1, 0, 0], [1, 1, 0]], bool)
    counts = count_pixels(truth, predicted)
    assert counts == PixelCounts(2, 1, 1, 2)
    assert (counts.iou, counts.dice, counts.accuracy) == (2 / 4, 4 / 6, 4 / 6)


def test_nothing_to_find_and_nothing_found_is_perfect() -> None:
    empty = np.zeros((2, 2), bool)
    counts = count_pixels(empty, empty)
    assert (counts.iou, counts.dice, counts.accuracy) == (1, 1, 1)


def test_sums_over_workers_are_the_sums_over_images() -> None:
    rng = np.random.default_rng(0)
    samples = [
        (list(Kind)[i % 3], count_pixels(rng.random((9, 7)) > 0.5, rng.random((9, 7)) > 0.4), float(i))
        for i in range(7)
    ]
    together, parts = ScoreSums(), [ScoreSums(), ScoreSums(), ScoreSums()]
    for i, sample in enumerate(samples):
        together.add(*sample)
        parts[i % 3].add(*sample)
    added = ScoreSums(sum((part.array for part in parts), np.zeros_like(together.array)))
    assert added.scores() == pytest.approx(together.scores(), abs=1e-12)
    assert together.scores()["iou"] == pytest.approx(np.mean([counts.iou for _, counts, _ in samples]))
    pooled = PixelCounts(*(sum(getattr(c, f) for _, c, _ in samples) for f in PixelCounts.__dataclass_fields__))
    assert together.scores()["pooled_iou"] == pooled.iou
    assert together.report()["all"]["images"] == 7
    assert together.report()["stain"]["images"] == sum(kind is Kind.STAIN for kind, _, _ in samples)
