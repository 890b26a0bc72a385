import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from nucleus.config.names import Kind
from nucleus.errors import DataError
from nucleus.metrics.nuclei import SIZES, THRESHOLDS, MatchCounts, find_mistakes, match_nuclei, pair_labels
from nucleus.metrics.scores import (
    HEADLINES,
    ImageScores,
    PixelCounts,
    ScoreSums,
    count_pixels,
    score_cells,
    score_labels,
)

STARDIST = json.loads((Path(__file__).parent / "stardist_metrics.json").read_text())


def labelled_pair(seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Truth and prediction, 96 x 80: discs, moved, missed and grown; with numbers that leave gaps."""
    rng = np.random.default_rng(seed)
    truth, predicted = np.zeros((96, 80), int), np.zeros((96, 80), int)
    y, x = np.mgrid[:96, :80]
    for number in range(1, 3 + seed * 3):
        cy, cx, r = rng.uniform(0, 96), rng.uniform(0, 80), rng.uniform(3, 11)
        truth[(y - cy) ** 2 + (x - cx) ** 2 <= r * r] = number
        if rng.random() < 0.85:
            dy, dx, f = rng.normal(0, 1), rng.normal(0, 1), rng.uniform(0.75, 1.2)
            predicted[(y - cy - dy) ** 2 + (x - cx - dx) ** 2 <= (f * r) ** 2] = 200 - number
    return truth, predicted


def scores_of(truth: NDArray[np.int64], predicted: NDArray[np.int64], loss: float = 0.0) -> ImageScores:
    return score_labels(truth, predicted, loss)


def test_pixels_worked_example() -> None:
    truth = np.array([[1, 1, 0], [1, 0, 0]], bool)
    predicted = np.array([[1, 0, 0], [1, 1, 0]], bool)
    counts = count_pixels(truth, predicted)
    assert counts == PixelCounts(2, 1, 1, 2)
    assert (counts.iou, counts.dice, counts.accuracy) == (2 / 4, 4 / 6, 4 / 6)


def test_nuclei_worked_example() -> None:
    """Nucleus 1 is found with IoU 4/5, nucleus 2 with 3/5, nucleus 3 is missed, and label 9 is nowhere in the truth."""
    truth = np.array([[1, 1, 1, 1, 0, 2, 2, 2, 2], [0, 3, 0, 0, 0, 0, 0, 0, 0]])
    predicted = np.array([[7, 7, 7, 7, 7, 0, 5, 5, 5], [0, 0, 0, 0, 9, 0, 0, 0, 5]])
    counts = match_nuclei(truth, predicted)
    assert (counts.true_nuclei, counts.predicted_nuclei) == (3, 3)
    # Label 7 covers 5 pixels, 4 of them nucleus 1; label 5 shares 3 pixels with nucleus 2 and their union has 5.
    assert counts.matches.tolist() == [2, 2, 2, 1, 1, 1, 1, 0, 0, 0]
    assert counts.matched_iou[0] == pytest.approx(4 / 5 + 3 / 5)
    assert counts.ap.tolist() == [2 / 4, 2 / 4, 2 / 4, 1 / 5, 1 / 5, 1 / 5, 1 / 5, 0, 0, 0]
    assert counts.f1[0] == 4 / 6
    assert counts.pq[0] == pytest.approx((4 / 5 + 3 / 5) / 3)
    assert counts.mean_ap == pytest.approx((3 * 0.5 + 4 * 0.2) / 10)


def test_of_two_halves_one_matches() -> None:
    whole, halves = np.array([[4, 4, 4, 4]]), np.array([[1, 1, 2, 2]])
    for truth, predicted in ((whole, halves), (halves, whole)):
        counts = match_nuclei(truth, predicted)
        assert counts.matches.tolist() == [1] + [0] * 9
        assert counts.ap[0] == 1 / 2


def test_nothing_to_find_and_nothing_found_is_perfect() -> None:
    empty, some = np.zeros((2, 2), int), np.array([[1, 0], [0, 0]])
    counts = count_pixels(empty > 0, empty > 0)
    assert (counts.iou, counts.dice, counts.accuracy) == (1, 1, 1)
    nothing = match_nuclei(empty, empty)
    assert nothing.ap.tolist() == nothing.f1.tolist() == nothing.pq.tolist() == [1.0] * 10
    for truth, predicted in ((empty, some), (some, empty)):
        assert match_nuclei(truth, predicted).ap.tolist() == [0.0] * 10


@pytest.mark.parametrize("seed", range(6))
def test_the_same_as_stardist(seed: int) -> None:
    counts = match_nuclei(*labelled_pair(seed))
    expected = STARDIST["images"][seed]
    assert (counts.true_nuclei, counts.predicted_nuclei) == (expected["true"], expected["predicted"])
    for name in ("ap", "f1", "pq"):
        assert getattr(counts, name) == pytest.approx(expected[name], abs=1e-6)


@pytest.mark.parametrize("seed", range(6, 12))
def test_the_same_as_an_optimal_assignment(seed: int) -> None:
    truth, predicted = labelled_pair(seed)
    found = match_nuclei(truth, predicted)
    masks, others = ([grid == n for n in np.unique(grid) if n] for grid in (truth, predicted))
    iou = np.array([[(a & b).sum() / (a | b).sum() for b in others] for a in masks])
    for i, threshold in enumerate(THRESHOLDS):
        rows, columns = linear_sum_assignment(-np.where(iou >= threshold, 1 + iou, 0))
        kept = iou[rows, columns][iou[rows, columns] >= threshold]
        assert found.matches[i] == len(kept)
        assert found.matched_iou[i] == pytest.approx(kept.sum())


def test_pooled_scores_are_those_of_stardist() -> None:
    sums = ScoreSums()
    for seed in range(6):
        sums.add(Kind.STAIN, scores_of(*labelled_pair(seed)))
    scores, pooled = sums.scores(), STARDIST["pooled"]
    found = [scores[f"pooled_ap_{round(100 * threshold)}"] for threshold in THRESHOLDS]
    assert found == pytest.approx(pooled["ap"], abs=1e-6)
    assert scores["pooled_map"] == pytest.approx(np.mean(pooled["ap"]), abs=1e-6)
    assert (scores["pooled_f1_50"], scores["pooled_pq_50"]) == pytest.approx(
        (pooled["f1"][0], pooled["pq"][0]), abs=1e-6
    )
    for name in ("f1", "pq"):
        means = [image[name][0] for image in STARDIST["images"]]
        assert scores[f"{name}_50"] == pytest.approx(np.mean(means), abs=1e-6)
    assert scores["map"] == pytest.approx(np.mean([image["ap"] for image in STARDIST["images"]]), abs=1e-6)


def test_sums_over_workers_are_the_sums_over_images() -> None:
    samples = [(list(Kind)[i % 3], scores_of(*labelled_pair(i), loss=float(i))) for i in range(7)]
    together, parts = ScoreSums(), [ScoreSums(), ScoreSums(), ScoreSums()]
    for i, sample in enumerate(samples):
        together.add(*sample)
        parts[i % 3].add(*sample)
    added = ScoreSums(sum((part.array for part in parts), np.zeros_like(together.array)))
    assert added.scores() == pytest.approx(together.scores(), abs=1e-12)
    scores = together.scores()
    assert scores["iou"] == pytest.approx(np.mean([sample.pixels.iou for _, sample in samples]))
    assert scores["ap_70"] == pytest.approx(np.mean([sample.nuclei.ap[4] for _, sample in samples]))
    assert scores["loss"] == 3.0
    errors = [abs(sample.nuclei.true_nuclei - sample.nuclei.predicted_nuclei) for _, sample in samples]
    assert scores["count_error"] == pytest.approx(np.mean(errors))
    pixels = [sample.pixels for _, sample in samples]
    pooled = PixelCounts(*(sum(getattr(c, f) for c in pixels) for f in PixelCounts.__dataclass_fields__))
    assert scores["pooled_iou"] == pooled.iou
    nuclei = [sample.nuclei for _, sample in samples]
    matches = MatchCounts(
        sum(n.true_nuclei for n in nuclei),
        sum(n.predicted_nuclei for n in nuclei),
        sum((n.matches for n in nuclei), np.zeros(10, np.int64)),
        sum((n.matched_iou for n in nuclei), np.zeros(10)),
    )
    assert scores["pooled_map"] == pytest.approx(matches.mean_ap)
    assert together.report()["all"]["images"] == 7
    assert together.report()["stain"]["images"] == sum(kind is Kind.STAIN for kind, _ in samples)


def test_mistakes_by_name() -> None:
    truth = np.array([[1, 1, 2, 2, 0, 3, 3, 3, 3, 0, 4, 4, 0, 0, 0, 5, 5, 5, 5]])
    found = np.array([[7, 7, 7, 7, 0, 8, 8, 9, 9, 0, 0, 0, 0, 6, 0, 2, 2, 2, 2]])
    mistakes = find_mistakes(truth, found)
    assert (mistakes.merged, mistakes.split) == ({7}, {3})
    assert (mistakes.missed, mistakes.extra) == ({4}, {6})
    assert str(mistakes) == "1 missed, 1 extra, 2 merged, 1 split"  # true nuclei that are merged
    assert str(find_mistakes(truth, truth)) == "none"
    nothing = np.zeros_like(truth)
    assert find_mistakes(nothing, found).extra == {2, 6, 7, 8, 9}
    assert find_mistakes(truth, nothing).missed == {1, 2, 3, 4, 5}
    assert (mistakes.in_merged, mistakes.split) == ({1, 2}, {3})


def test_labels_with_gaps_pair_as_those_without() -> None:
    truth, predicted = labelled_pair(4)
    few, many = pair_labels(truth, predicted), pair_labels(truth * 1000, predicted * 1000)
    assert (many.true // 1000).tolist() == few.true.tolist()
    assert (many.predicted // 1000).tolist() == few.predicted.tolist()
    assert many.shared.tolist() == few.shared.tolist()
    assert many.true_areas[::1000].tolist() == few.true_areas.tolist()
    counts, others = match_nuclei(truth, predicted), match_nuclei(truth * 1000, predicted * 1000)
    assert counts.matched_iou.tolist() == others.matched_iou.tolist()


def test_labels_of_any_type_of_integers_have_the_same_scores() -> None:
    truth, predicted = labelled_pair(4)
    expected = match_nuclei(truth, predicted).matched_iou.tolist()
    for factor, kind in ((1, np.uint64), (1000, np.uint64), (1000, np.int32)):
        others = match_nuclei((truth * factor).astype(kind), (predicted * factor).astype(kind))
        assert others.matched_iou.tolist() == expected


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda labels: labels[:1], "shapes"),  # would be repeated for each row
        (lambda labels: labels[:, :1], "shapes"),
        (lambda labels: labels[: len(labels) // 2], "shapes"),
        (lambda labels: labels / 2, "float64"),
        (lambda labels: np.stack([labels] * 3, axis=2), "3"),
        (lambda labels: labels[:0], "0, "),
        (lambda labels: labels - 1, "-1"),
        (lambda labels: labels + (1 << 40), "relabel_sequential"),
    ],
)
def test_what_are_no_labels_of_the_image_is_no_score(
    change: Callable[[NDArray[np.integer]], NDArray[np.integer]], found: str
) -> None:
    truth, predicted = (labels.astype(np.int64) for labels in labelled_pair(4))
    with pytest.raises(DataError, match=found):
        score_labels(truth, change(predicted), 0.0)
    with pytest.raises(DataError, match=found):
        match_nuclei(change(truth), predicted)


# Each true nucleus has 4 pixels: of predicted ones those with more than 2 of them hold most of it.
@pytest.mark.parametrize(
    ("truth", "predicted", "counts"),
    [
        ([1, 1, 1, 1, 0, 0], [2, 2, 2, 2, 0, 0], (0, 0, 0, 0)),
        ([1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], (1, 0, 0, 0)),
        ([0, 0, 0, 0, 0, 0], [2, 2, 0, 3, 3, 3], (0, 2, 0, 0)),
        # Found with an IoU below 0.5: one missed, and one too many.
        ([1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 2, 2, 2, 2, 2], (1, 1, 0, 0)),
        # Two in one; and the same where the larger is matched.
        ([1, 1, 1, 1, 2, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5], (0, 0, 2, 0)),
        ([1, 1, 1, 1, 1, 1, 1, 2], [5, 5, 5, 5, 5, 5, 5, 5], (0, 0, 2, 0)),
        # One in two; and with a third that goes beyond it.
        ([1, 1, 1, 1, 0, 0], [5, 5, 6, 6, 0, 0], (0, 0, 0, 1)),
        ([1, 1, 1, 1, 0, 0], [5, 6, 7, 8, 8, 8], (0, 1, 0, 1)),
        # Nucleus 1 lies in label 5 with nucleus 2, and holds labels 6 and 7: it counts once.
        ([1, 1, 1, 1, 1, 2, 2], [5, 5, 5, 6, 7, 5, 5], (0, 0, 2, 0)),
    ],
)
def test_each_mistake(truth: list[int], predicted: list[int], counts: tuple[int, ...]) -> None:
    sums = ScoreSums()
    sums.add(Kind.STAIN, scores_of(np.array([truth]), np.array([predicted])))
    found = sums.scores()
    assert tuple(found[f"nuclei_{name}"] for name in ("missed", "extra", "merged", "split")) == counts


def test_recall_by_size() -> None:
    truth, predicted = np.zeros((2, 64, 256), int)
    squares = [(10, 1), (11, 1), (20, 0), (30, 1), (40, 0), (42, 1), (60, 1)]  # of 11, 12.4, 23, 34, 45, 47, 68 px
    start = 0
    for number, (side, is_found) in enumerate(squares, 1):
        truth[:side, start : start + side] = number
        predicted[:side, start : start + side] = is_found * 2 * number
        start += side
    sums = ScoreSums()
    sums.add(Kind.STAIN, scores_of(truth, predicted))
    scores = sums.scores()
    assert [scores[f"nuclei_true_{size}"] for size in SIZES] == [1, 2, 3, 1]
    assert [scores[f"recall_50_{size}"] for size in SIZES] == [1, 1 / 2, 2 / 3, 1]
    assert scores["nuclei_missed"] == 2


def test_no_recall_without_nuclei() -> None:
    sums = ScoreSums()
    sums.add(Kind.STAIN, scores_of(np.array([[1, 1]]), np.array([[1, 1]])))
    scores = sums.scores()
    assert {name: value for name, value in scores.items() if name.startswith("recall")} == {"recall_50_under_12px": 1}
    assert scores["nuclei_true_over_48px"] == 0
    sums = ScoreSums()
    sums.add(Kind.STAIN, scores_of(np.zeros((2, 2), int), np.zeros((2, 2), int)))
    assert not any(name.startswith("recall") for name in sums.scores())


@pytest.mark.parametrize("predicted", [np.zeros((4, 4), int), np.eye(4, dtype=int)])
def test_scores_of_images_without_nuclei_are_undefined(predicted: NDArray[np.int64]) -> None:
    empty = np.zeros((4, 4), int)
    sums = ScoreSums()
    for _ in range(3):
        sums.add(Kind.STAIN, scores_of(empty, predicted, loss=2.0))
    extra = int(predicted.max())
    scores = sums.scores()
    defined = {name: value for name, value in scores.items() if value is not None}
    assert defined == {
        "loss": 2.0,
        "count_error": extra,
        "nuclei_true": 0,
        "nuclei_predicted": 3 * extra,
        "nuclei_missed": 0,
        "nuclei_extra": 3 * extra,
        "nuclei_merged": 0,
        "nuclei_split": 0,
        **{f"nuclei_true_{size}": 0 for size in SIZES},
    }
    assert {key for key, _ in HEADLINES} | {"f1_50", "pq_50", "pooled_map", "pooled_iou"} <= set(scores) - set(defined)
    cells = score_cells({"test": sums.report()})
    assert [row[:3] for row in cells] == [("test", "all", "3"), ("test", "stain", "3")]
    assert {cell for row in cells for cell in row[3:]} == {"undefined"}


def test_an_image_without_nuclei_counts_beside_others() -> None:
    one, empty = np.array([[1, 1], [1, 1]]), np.zeros((2, 2), int)
    sums = ScoreSums()
    sums.add(Kind.STAIN, scores_of(one, empty))
    sums.add(Kind.DARK_FIELD, scores_of(empty, empty))
    report = sums.report()
    assert (report["all"]["map"], report["stain"]["map"], report["dark-field"]["map"]) == (0.5, 0, None)


@pytest.mark.parametrize("workers", [2, 3])
def test_mistakes_and_sizes_over_workers_are_those_of_one(workers: int) -> None:
    together, parts = ScoreSums(), [ScoreSums() for _ in range(workers)]
    images = [scores_of(*labelled_pair(seed)) for seed in range(7)]
    for number, image in enumerate(images):
        for sums in (together, parts[number % workers]):
            sums.add(list(Kind)[number % 3], image)
    added = ScoreSums(sum((part.array for part in parts), np.zeros_like(together.array))).report()
    names = {name for name in together.scores() if name.startswith(("nuclei_", "recall_"))}
    assert len(names) == 2 + 4 + len(SIZES) + 2  # no disc is larger than 22 px
    for kind, scores in together.report().items():
        assert {name: added[kind].get(name) for name in names} == {name: scores.get(name) for name in names}
    total = together.scores()
    assert total["nuclei_missed"] == sum(len(image.mistakes.missed) for image in images) > 0
    assert sum(total[f"nuclei_true_{size}"] for size in SIZES) == total["nuclei_true"]
    matched = sum(total.get(f"recall_50_{size}", 0.0) * total[f"nuclei_true_{size}"] for size in SIZES)
    assert matched == pytest.approx(sum(image.nuclei.matches[0] for image in images))
