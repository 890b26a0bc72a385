import warnings
from collections import Counter

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from nucleus.data.splits import _stratified_folds, split_images
from nucleus.errors import DataError


def split(kinds: list[str], groups: list[int], given: list[str | None] | None = None, seed: int = 0) -> list[str]:
    return split_images(kinds, groups, given or [None] * len(kinds), seed=seed, val=0.1, test=0.1)


def test_kinds_are_spread_and_groups_whole() -> None:
    kinds = ["dark"] * 400 + ["stain"] * 80 + ["bright"] * 20
    groups = [i // 2 for i in range(500)]
    splits = split(kinds, groups)
    for group in set(groups):
        assert len({splits[i] for i in range(500) if groups[i] == group}) == 1
    counts = Counter(zip(kinds, splits, strict=True))
    for kind, total in Counter(kinds).items():
        for part in ("val", "test"):
            assert counts[kind, part] == pytest.approx(0.1 * total, abs=2)


def test_the_seed_decides() -> None:
    kinds, groups = ["dark"] * 50, list(range(50))
    assert split(kinds, groups) == split(kinds, groups)
    assert split(kinds, groups) != split(kinds, groups, seed=1)


@pytest.mark.parametrize("count", [3, 4, 5, 8, 12])
def test_small_sets_have_all_splits(count: int) -> None:
    splits = Counter(split(["dark"] * count, list(range(count))))
    assert set(splits) == {"train", "val", "test"}
    assert splits["train"] >= splits["val"]


def test_every_kind_alone() -> None:
    assert set(split(["dark", "stain", "bright"], [0, 1, 2])) == {"train", "val", "test"}


def test_too_few_groups() -> None:
    with pytest.raises(DataError, match=r"at least 3 independent images .* found 2"):
        split(["dark"] * 4, [0, 0, 1, 1])


def test_a_given_test_split_is_kept_with_its_groups() -> None:
    given = ["test"] * 5 + ["train"] * 25
    groups = list(range(30))
    groups[5] = 0  # a training image that is a tile of a test image
    splits = split(["dark"] * 30, groups, given)
    assert [i for i, part in enumerate(splits) if part == "test"] == [0, 1, 2, 3, 4, 5]
    assert "val" in splits


def test_no_split_is_left_empty() -> None:
    with pytest.raises(DataError, match="train"):
        split_images(["dark"] * 3, [0, 1, 2], [None] * 3, seed=0, val=0.5, test=0.4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_folds_are_those_of_scikit_learn(seed: int) -> None:
    """The light install does without scikit-learn; datasets that were split by it are split alike again."""
    random = np.random.default_rng(seed)
    images, number = int(random.integers(30, 300)), int(random.integers(1, 6))
    shares = random.dirichlet(np.ones(number))
    kinds = [f"kind {i}" for i in random.choice(number, images, p=shares)]
    groups = random.integers(0, random.integers(25, images + 25), images).tolist()
    count = min(20, len(set(groups)), max(Counter(kinds).values()))
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        expected = [fold.tolist() for _, fold in splitter.split(kinds, kinds, groups)]
    assert _stratified_folds(kinds, groups, count, seed) == expected
