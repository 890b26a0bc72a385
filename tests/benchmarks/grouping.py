"""`grouping`: the groups of a million fingerprints, and the same links as a comparison of all pairs finds at 20,000."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import cv2
import numpy as np

from nucleus.data.fingerprints import Fingerprint, fingerprint
from nucleus.data.grouping import group_images
from nucleus.data.synthetic import generated_image
from tests.all_pairs import groups_of_all_pairs
from tests.benchmarks.measure import report

_SIDE = 256
_POOL = 200
_RELATED = 50
"""One image of so many is a copy of an earlier one, has a patch of it, or continues it."""
_PATCHES = 24
_CHUNK = 10_000


def grouping() -> None:
    """Groups of 20,000 generated tiles; then CPU time and memory of 100,000 and 1,000,000 made-up fingerprints."""
    tiles = _child("tiles", 20_000)
    small, large = (_child("made", count) for count in (100_000, 1_000_000))
    report(
        "grouping",
        large["cpu_s"] / small["cpu_s"],
        same_groups_at_20000=tiles["same"],
        cpu_s_20000=tiles["cpu_s"],
        cpu_s_20000_all_pairs=tiles["cpu_s_all_pairs"],
        cpu_s=[small["cpu_s"], large["cpu_s"]],
        minutes=large["minutes"],
        groups=large["groups"],
        peak_gib=large["peak_gib"],
    )


def _tiles(count: int) -> dict[str, object]:
    """The groups of generated tiles, by the product and by a comparison of all pairs."""
    prints = [fingerprint(generated_image(number, 96, 96)[0]) for number in range(count)]
    pictures = [None] * count
    started = time.process_time()
    found = group_images(prints, pictures)
    searched = time.process_time()
    same = found == groups_of_all_pairs(prints)
    taken = {"cpu_s": searched - started, "cpu_s_all_pairs": time.process_time() - searched}
    return {**taken, "same": same, "groups": max(found) + 1}


def _made(count: int) -> dict[str, object]:
    prints = list(made_fingerprints(count))
    cpu, started = time.process_time(), time.perf_counter()
    groups = max(group_images(prints, [None] * count)) + 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    taken = {"cpu_s": time.process_time() - cpu, "minutes": (time.perf_counter() - started) / 60}
    return {**taken, "peak_gib": peak, "groups": groups}


def made_fingerprints(count: int) -> Iterator[Fingerprint]:
    """Yield fingerprints as of images of 256 x 256 pixels, a hundred times faster than such images can be drawn.

    Lines are rows of generated images, shifted, mirrored, and with another brightness, contrast and noise. Thumbnails
    are smooth noise, as those of images with many nuclei are. One image of 50 is like an earlier one.
    """
    rng = np.random.default_rng(0)
    pool = np.stack([cv2.cvtColor(generated_image(n, _SIDE, _SIDE)[0], cv2.COLOR_RGB2GRAY) for n in range(_POOL)])
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        lines = _lines(pool, rng, size)
        patches = rng.integers(2**63, size=(size, _PATCHES), dtype=np.uint64)
        fields = rng.normal(size=(size, 16, 16)).astype(np.float32)
        thumbnails = _grey(60 + 60 * np.stack([cv2.GaussianBlur(field, (0, 0), 0.7) for field in fields]))
        for at in range(_RELATED, size, _RELATED):
            kind = at // _RELATED % 3
            if kind == 0:
                turned = np.rot90(thumbnails[at - 1], at % 4) + rng.normal(0, 3, (16, 16))
                thumbnails[at] = _grey(turned)
            elif kind == 1:
                patches[at, 0] = patches[at - 1, 0]
            else:
                lines[at, 0] = _grey(lines[at - 1, 1] + rng.normal(0, 1, _SIDE))
        patches.sort(axis=1)
        for own in zip(lines, patches, thumbnails, strict=True):
            yield Fingerprint(_SIDE, _SIDE, *(each.tobytes() for each in own))


def _lines(pool: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """Return rows of generated images that were changed, count x 4 x 256."""
    rows = pool[rng.integers(_POOL, size=(count, 4)), rng.integers(_SIDE, size=(count, 4))]
    shifts, signs = rng.integers(_SIDE, size=(count, 4, 1)), rng.choice((-1, 1), (count, 4, 1))
    rows = np.take_along_axis(rows, (signs * np.arange(_SIDE) + shifts) % _SIDE, axis=2)
    gains, levels = rng.uniform(0.5, 1.3, (count, 4, 1)), rng.uniform(-10, 30, (count, 4, 1))
    return _grey(rows * gains + levels + rng.normal(0, 2, rows.shape))


def _grey(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _child(mode: str, count: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.grouping", mode, str(count)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    work = {"tiles": _tiles, "made": _made}[sys.argv[1]]
    print(json.dumps(work(int(sys.argv[2]))))
