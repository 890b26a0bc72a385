"""The overhead of small images in a bucket: `python -m tests.benchmarks.predict_prefix [LISTED] [PREDICTED]`.

Tiny images (64 px, four nuclei) in an embedded store, by the model that comes along, in this process: its CPU time an
image for each term, and the requests. LISTED images are put into the store's folder before it starts, listed as a
stream and cut into parts; of these, about PREDICTED images are predicted, and their tables joined. One JSON line.
"""

import hashlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from nucleus.data.images import encode_png
from nucleus.model.engines import OnnxEngine
from nucleus.predict.bucket_images import ImageListing, PredictionSettings
from nucleus.predict.image_parts import done_parts, parts_of_listing
from nucleus.predict.model import load_pulled
from nucleus.predict.part_prediction import PartPredictor
from nucleus.predict.part_tables import join_share, table_shares
from nucleus.registry.versions import read_included
from nucleus.storage import local_server as server
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import parse_uri
from tests.predict.test_predict import spots

__all__ = ["predict_prefix"]

KINDS = 16


def filled(folder: Path, images: int) -> None:
    """Put images into the folder of a store that does not run, as it stores them itself."""
    running = server.start(folder, 0)
    server.make_bucket(running)
    os.environ.update(server.environment(running))
    first = Bucket(parse_uri("s3://nucleus"))
    first.put("images/first.png", encode_png(spots(64, 64, 0, count=4)))
    server.stop(folder)
    (place,) = folder.rglob("first.png")
    about = json.loads(place.with_name("first.png.meta.json").read_text())
    bodies = [encode_png(spots(64, 64, seed, count=4)) for seed in range(KINDS)]
    for number in range(images):
        name, body = f"{number:07d}.png", bodies[number % KINDS]
        place.with_name(name).write_bytes(body)
        etag = f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
        known = about | {"key": f"images/{name}", "etag": etag, "size": len(body)}
        place.with_name(f"{name}.meta.json").write_text(json.dumps(known))
    place.unlink()
    place.with_name("first.png.meta.json").unlink()


class Clock:
    """CPU time of this process by term, and the requests of its clients."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()

    def during(self, term: str, work: Any) -> Any:
        """Return what some work returns; its time is added to a term."""
        started = time.process_time()
        try:
            return work()
        finally:
            self.seconds[term] += time.process_time() - started


def predict_prefix(listed: int = 100_000, predicted: int = 400) -> None:
    """Print the terms."""
    clock = Clock()
    with tempfile.TemporaryDirectory(prefix="nucleus-bench-") as temporary, ExitStack() as stack:
        folder = Path(temporary) / "store"
        filled(folder, listed)
        running = server.start(folder, 0)
        stack.callback(server.stop, folder)
        os.environ.update(server.environment(running), TF_NUM_INTRAOP_THREADS="1")
        places = {"images": "s3://nucleus/images", "out": "s3://nucleus/out", "registry": None}
        settings = PredictionSettings(model=str(read_included().reference), **places)
        model = load_pulled(read_included(), settings.options)
        compute = OnnxEngine.__call__
        OnnxEngine.__call__ = lambda self, *given: clock.during("network", lambda: compute(self, *given))  # type: ignore[method-assign]
        predictor = PartPredictor(settings, model)

        parts = clock.during("listing", lambda: list(parts_of_listing(ImageListing(settings))))
        predictor.predict(parts[0])  # what is done once
        clock.seconds["network"] = 0.0
        some, images = [], 0
        for part in islice(parts, 1, None):
            some.append(part)
            images += len(part.images)
            if images >= predicted:
                break
        outcomes = clock.during("predicting", lambda: [predictor.predict(part) for part in some])
        found = [(outcome.table, outcome.objects) for outcome in outcomes if outcome.table is not None]
        clock.during("joining", lambda: [join_share(settings, share) for share in table_shares(found)])
        clock.during("what is done", lambda: done_parts(settings))
    each = {
        "listing": clock.seconds["listing"] / listed,
        "network": clock.seconds["network"] / images,
        "predicting": (clock.seconds["predicting"] - clock.seconds["network"]) / images,
        "joining": clock.seconds["joining"] / images,
    }
    line = {
        "bench": "predict_prefix",
        "listed": listed,
        "parts": len(parts),
        "predicted": images,
        "nuclei": sum(image.nuclei or 0 for outcome in outcomes for image in outcome.images),
        **{f"{name}_ms_an_image": round(1e3 * seconds, 3) for name, seconds in each.items()},
        "tables_listed_seconds": round(clock.seconds["what is done"], 3),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    predict_prefix(*(int(text) for text in sys.argv[1:]))
