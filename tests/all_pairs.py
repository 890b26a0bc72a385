"""Groups of images by comparing all pairs, in plain code: what the searches of the product are compared with."""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.ndimage import uniform_filter1d
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from nucleus.data.fingerprints import Fingerprint

__all__ = ["all_continued_lines", "all_near_duplicates", "components", "groups_of_all_pairs"]

_BLOCK = 500


def groups_of_all_pairs(prints: Sequence[Fingerprint]) -> list[int]:
    """Return the groups of images, numbered in the order of their first image."""
    pairs = []
    matches, chance = [], []
    for first, second, side in ((1, 0, "width"), (3, 2, "height")):
        sizes = np.array([getattr(item, side) for item in prints])
        for size in np.unique(sizes):
            chosen = np.flatnonzero(sizes == size)
            before, after = (np.stack([border(prints[i], side) for i in chosen]) for side in (first, second))
            matches += [(s, chosen[i], chosen[j]) for i, j, s in all_continued_lines(before, after)]
            chance += chance_of_all_pairs(before, after)
    owners: dict[bytes, int] = {}
    for index, item in enumerate(prints):
        patches = (item.patches[at : at + 8] for at in range(0, len(item.patches), 8))
        pairs += [(owners.setdefault(patch, index), index) for patch in patches]
    pairs += all_near_duplicates(np.stack([np.frombuffer(item.thumbnail, np.uint8) for item in prints]))
    chance.sort(reverse=True)
    for decoys in range(len(chance), -1, -1):
        above = chance[decoys][0] if decoys < len(chance) else 0
        if decoys and decoys < len(chance) and chance[decoys - 1][0] == above:
            continue
        groups = components(len(prints), pairs + [(i, j) for score, i, j in matches if score > above])
        if sum(share for _, share in chance[:decoys]) <= max(10, 0.05 * (max(groups) + 1)):
            return groups
    raise AssertionError


def border(item: Fingerprint, side: int) -> np.ndarray:
    return np.frombuffer(item.line(side), np.uint8)


def chance_of_all_pairs(before: np.ndarray, after: np.ndarray) -> list[tuple[float, float]]:
    """Return the scores of mutual best matches with mirrored lines, and for how many lines each stands."""
    seen: dict[bytes, int] = {}
    lines = []  # with contrast, of equal ones the first two
    for place, line in enumerate(before):
        seen[line.tobytes()] = seen.get(line.tobytes(), 0) + 1
        if seen[line.tobytes()] <= 2 and _unit_details(line[np.newaxis].astype(np.float64)).any():
            lines.append(place)
    chosen = set(lines[:: -(-len(lines) // 2048) or 1])
    share = len(lines) / max(1, len(chosen))
    return [(score, share) for i, _, score in all_continued_lines(before[:, ::-1], after) if i in chosen]


def components(count: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Return the group of each item that pairs make, numbered in the order of their first item."""
    i, j = np.array(pairs, np.int64).reshape(-1, 2).T
    labels = connected_components(coo_array((np.ones(len(i)), (i, j)), shape=(count, count)), directed=False)[1]
    numbers: dict[int, int] = {}
    return [numbers.setdefault(int(label), len(numbers)) for label in labels]


def all_continued_lines(before: np.ndarray, after: np.ndarray) -> list[tuple[int, int, float]]:
    """Return the mutual best matches of lines that are alike (N x L each), of equal ones the first, with scores."""
    count = len(before)
    best_after, best_before = np.zeros(count, np.int64), np.zeros(count, np.int64)
    scores_after, scores_before = np.zeros(count), np.zeros(count)
    for start in range(0, count, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, count))
        scores = _line_scores(before[rows], after)
        scores[rows - start, rows] = 0
        best_after[rows], scores_after[rows] = scores.argmax(axis=1), scores.max(axis=1)
        better = scores.max(axis=0) > scores_before
        best_before[better] = start + scores.argmax(axis=0)[better]
        scores_before = np.maximum(scores_before, scores.max(axis=0))
    mutual = [i for i in range(count) if scores_after[i] > 0 and best_before[best_after[i]] == i]
    return [(i, int(best_after[i]), float(scores_after[i])) for i in mutual]


def _line_scores(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    a, b = before.astype(np.float64), after.astype(np.float64)
    mean_a, mean_b = a.mean(axis=1)[:, np.newaxis], b.mean(axis=1)
    covariance = (a @ b.T) / a.shape[1] - mean_a * mean_b
    spread = a.var(axis=1)[:, np.newaxis] + b.var(axis=1) + (mean_a - mean_b) ** 2
    levels = 2 * covariance / np.maximum(spread, 1e-6)
    details = _unit_details(a) @ _unit_details(b).T
    return np.where((details >= 0.7) & (levels >= 0.9), np.minimum(details, levels), 0)


def _unit_details(lines: np.ndarray) -> np.ndarray:
    details = lines - uniform_filter1d(lines, 31, axis=1, mode="reflect")
    norms = np.linalg.norm(details, axis=1, keepdims=True)
    return details / np.maximum(norms, 1e-9) * (details.std(axis=1, keepdims=True) >= 1)


def all_near_duplicates(thumbnails: np.ndarray) -> list[tuple[int, int]]:
    """Return the pairs of thumbnails (N x 256) that correlate by .9 in one of eight orientations.

    By more, if a sample whose quarters have changed places has that correlation with too many others.
    """
    varied = np.flatnonzero(np.ptp(thumbnails, axis=1))
    count = len(varied)
    chosen = np.arange(0, count, -(-count // 256) or 1)
    units = _unit_thumbnails(thumbnails[varied])
    decoys = np.roll(units[chosen].reshape(-1, 16, 16), (8, 8), axis=(1, 2)).reshape(-1, 256)
    chance = sorted((c for i, j, c in _turned_alike(decoys, units) if chosen[i] != j), reverse=True)
    accepted = int(max(10, 0.05 * count) / max(0.5, count / 2 / max(1, len(chosen))))
    above = chance[accepted] + 1e-9 if accepted < len(chance) else 0
    return [(int(varied[i]), int(varied[j])) for i, j, c in _turned_alike(units, units) if i < j and c > above]


def _unit_thumbnails(thumbnails: np.ndarray) -> np.ndarray:
    values = thumbnails.astype(np.float64) - thumbnails.mean(axis=1, keepdims=True)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def _turned_alike(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[int, int, float]]:
    upright = second.reshape(-1, 16, 16)
    for flipped in (upright, upright[:, :, ::-1]):
        for turns in range(4):
            turned = np.rot90(flipped, turns, axes=(1, 2)).reshape(len(second), -1)
            for start in range(0, len(first), _BLOCK):
                products = first[start : start + _BLOCK] @ turned.T
                for i, j in np.argwhere(products >= 0.9):
                    yield start + int(i), int(j), float(products[i, j])
