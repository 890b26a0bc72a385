"""The searches for related images find what a comparison of all pairs finds."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nucleus.data import border_lines, thumbnails
from nucleus.data.border_lines import Borders
from nucleus.data.fingerprints import Fingerprint
from nucleus.data.grouping import group_images
from nucleus.data.thumbnails import near_duplicates
from tests.all_pairs import all_continued_lines, all_near_duplicates, components, groups_of_all_pairs


@pytest.fixture(autouse=True)
def searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small sets be searched as large ones are."""
    monkeypatch.setattr(thumbnails, "_ALL_PAIRS", 4)
    monkeypatch.setattr(border_lines, "_FEW_PAIRS", 8)
    monkeypatch.setattr(border_lines, "_BLOCK", 8)


def lines(rng: np.random.Generator, count: int, length: int, noise: float) -> np.ndarray:
    """Lines that are often alike: a few curves with other levels, contrasts and noise, and some without contrast."""
    curves = cv2.GaussianBlur(rng.normal(size=(max(1, count // 4), length)).astype(np.float32), (0, 1), 2) * 200
    chosen = curves[rng.integers(len(curves), size=count)] * rng.choice((0, 0.1, 0.9, 1, 1.1, 1.4), (count, 1))
    levels = rng.choice((100, 100, 110, 140, 0, 255), (count, 1))
    return np.clip(np.rint(chosen + levels + rng.normal(0, noise, chosen.shape)), 0, 255).astype(np.uint8)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 90), st.sampled_from((1, 2, 7, 16, 64)), st.sampled_from((0, 1, 9, 30))
)
def test_lines_are_matched_as_by_all_pairs(seed: int, count: int, length: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    both = lines(rng, 2 * count, length, noise)
    before, after = both[:count], both[count:]
    every = all_continued_lines(before, after)
    for above in (0, 0.93):
        i, j, scores = Borders(before, after).continued(above)
        expected = [each for each in every if each[2] > above]
        assert sorted(zip(i, j, strict=True)) == [each[:2] for each in expected]
        assert sorted(scores) == pytest.approx(sorted(score for *_, score in expected))


def test_equal_lines_are_matched_once() -> None:
    line = lines(np.random.default_rng(4), 1, 64, 20)
    assert line.std() > 5
    alike = np.repeat(line, 300, axis=0)
    i, j, _ = Borders(alike, alike).continued()
    assert list(zip(i, j, strict=True)) == [each[:2] for each in all_continued_lines(alike, alike)] != []


def near(rng: np.random.Generator, base: np.ndarray, noise: float) -> np.ndarray:
    """A thumbnail, turned, with another contrast and noise."""
    turned = np.rot90(base[:, :: rng.choice((-1, 1))], rng.integers(4)) * rng.uniform(0.3, 1)
    return np.clip(np.rint(100 + turned + rng.normal(0, noise, (16, 16))), 0, 255).astype(np.uint8).ravel()


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(9, 150), st.sampled_from((0.0, 2.0, 8.0)), st.sampled_from((1, 4, 40)))
def test_thumbnails_are_linked_as_by_all_pairs(seed: int, count: int, noise: float, pictures: int) -> None:
    rng = np.random.default_rng(seed)
    bases = cv2.GaussianBlur(rng.normal(size=(16, 16, pictures)).astype(np.float32), (0, 0), 0.6) * 60
    bases = bases.reshape(16, 16, pictures)
    values = np.stack([near(rng, bases[:, :, rng.integers(pictures)], noise) for _ in range(count)])
    values[rng.random(count) < 0.05] = 90
    pairs = list(zip(*near_duplicates(values), strict=True))
    assert components(count, pairs) == components(count, all_near_duplicates(values))


def test_a_chain_of_thumbnails_is_one_group() -> None:
    rng = np.random.default_rng(1)
    first, second = np.linalg.qr(rng.normal(size=(256, 2)))[0].T * 16
    angles = np.arange(16) * 0.3  # cos .3 is .955, cos .6 is .825
    values = np.stack([128 + 30 * (np.cos(a) * first + np.sin(a) * second) for a in angles])
    values = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    assert components(16, list(zip(*near_duplicates(values), strict=True))) == [0] * 16
    apart = values[::2]
    assert components(8, list(zip(*near_duplicates(apart), strict=True))) == list(range(8))


def test_the_probability_of_a_miss() -> None:
    """Pairs right at the threshold, each round of tables finds as many as it was planned with."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(2000, 256))
    first -= first.mean(axis=1, keepdims=True)
    other = rng.normal(size=first.shape)
    other -= other.mean(axis=1, keepdims=True)
    other -= (other * first).sum(axis=1, keepdims=True) / (first**2).sum(axis=1, keepdims=True) * first
    second = 0.9 * first + np.sqrt(1 - 0.81) * other
    values = np.clip(np.rint(128 + 25 * np.concatenate([first, second])), 0, 255).astype(np.uint8)
    _, signs = thumbnails._turned(values, thumbnails._pattern(rng, 1)[:, 0], thumbnails._pattern(rng, 128))
    keys = np.stack([thumbnails._keys(signs, rng, 16) >> np.uint64(32) for _ in range(thumbnails._TABLES)])
    together = (keys[:, :2000] == keys[:, 2000:]).any(axis=0)
    same = 128 - np.bitwise_count(signs[:, :2000] ^ signs[:, 2000:]).sum(axis=0)
    found = (together & (same >= thumbnails._FEWEST_SAME)).mean()
    planned = thumbnails._found(16)
    assert planned - 0.02 <= found <= planned + 0.15  # more are turned alike than was counted on
    assert (1 - planned) ** thumbnails._rounds(16) <= 1e-6


def test_groups_of_everything_together() -> None:
    rng = np.random.default_rng(3)
    prints = []
    for number in range(120):
        sides = [lines(rng, 1, 40 + 20 * (number % 2), 3)[0].tobytes() for _ in range(4)]
        patches = np.sort(rng.integers(200, size=rng.integers(3))).astype("<u8")
        base = cv2.GaussianBlur(rng.normal(size=(16, 16)).astype(np.float32), (0, 0), 0.6) * 60
        side = 40 + 20 * (number % 2)
        prints.append(Fingerprint(side, side, b"".join(sides), patches.tobytes(), near(rng, base, 1).tobytes()))
    for first, second in ((0, 2), (5, 7)):  # one continues the other
        old = prints[second]
        moved = prints[first].line(1) + old.lines[old.width :]
        prints[second] = Fingerprint(old.height, old.width, moved, old.patches, old.thumbnail)
    groups = group_images(prints, [None] * len(prints))
    assert groups == groups_of_all_pairs(prints)
    assert groups[0] == groups[2]
    assert 1 < len(set(groups)) < len(groups)


def test_no_images_have_no_groups() -> None:
    assert group_images([], []) == []
