"""Large numbers on paper and in simulation: `python -m tests.benchmarks.at_scale [WORKERS] [IMAGES] [BYTES]`.

What 1,000 workers on 100 million images of 250 kB would ask of the bucket, of each worker and of the driver. What can
be is computed by the code itself: the plan of an epoch and the shards that it needs (`nucleus.data.sampling`), the
parts of a listing (`nucleus.predict.image_parts`), what the driver of a prediction keeps of them. The rest is
arithmetic with the constants below. A JSON line for each part.
"""

import json
import math
import sys
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

from nucleus.data.sampling import SplitShare, epoch_plan, mixed_plan, shard_count
from nucleus.predict.bucket_images import BucketImage
from nucleus.predict.image_parts import PartName, parts_of_listing
from nucleus.predict.part_tables import table_shares

GETS, PUTS = 5500, 3500
"""Requests a second for each prefix of S3 (https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html)."""
PAGE = 1000
"""Keys of a page of a listing."""
ACTORS = 10_000
"""Actors of a cluster that Ray tests; of nodes, 250 (https://github.com/ray-project/ray/tree/master/release/benchmarks)."""
BATCH_A_WORKER = 32
STEP_SECONDS = 0.3
"""An assumption: a worker that trains 107 crops a second."""
WEIGHT_BYTES = 26 << 20
"""Weights of the shipped network in float32, which is what a step exchanges."""
CHECKPOINT_OBJECTS = 7
VERSION_OBJECTS = 10
"""A version's six files, its manifest, the claim of its number, and two writes of an alias."""
COLUMNS = {"split": 5, "kind": 12, "nuclei": 8, "height": 8, "width": 8, "name": 24}
"""Columns of the samples that a worker reads, with their bytes a sample; names of 24 letters are an assumption."""
SHARD_IN_MANIFEST = 190
"""Bytes of a shard in the manifest."""
SIMULATED = 100_000


def training(workers: int, images: int, size: int) -> dict[str, Any]:
    """Shards, bytes and requests of an epoch, and what a worker computes for its plan."""
    shards = shard_count(images, images * size)
    records = [images // shards + (number < images % shards) for number in range(shards)]
    common = {"seed": 1, "epoch": 0, "rank": workers // 3, "world": workers, "global_batch": BATCH_A_WORKER * workers}
    started = time.process_time()
    plan = epoch_plan(records, **common)
    seconds = time.process_time() - started
    steps = len(plan.positions) // BATCH_A_WORKER
    started = time.process_time()
    mixed_plan([SplitShare(records, 0.5), SplitShare(records, 0.5)], steps=steps, **common)
    mixed = time.process_time() - started
    blocks = range(0, len(plan.blocks), max(1, len(plan.blocks) // 50))
    needed = sum(len(plan.shards_of_block(block)) for block in blocks) / len(blocks) * len(plan.blocks)
    read = needed * images * size / shards
    epoch = steps * STEP_SECONDS
    return {
        "part": "training",
        "shards": shards,
        "blocks": len(plan.blocks),
        "plan_cpu_seconds": seconds,
        "plan_of_two_datasets_cpu_seconds": mixed,
        "steps": steps,
        "epoch_hours": epoch / 3600,
        "samples_a_worker": len(plan.positions),
        "shards_a_worker": needed,
        "read_a_worker_gb": read / 1e9,
        "read_over_dataset": workers * read / (images * size),
        "read_over_dataset_if_dealt_by_shards": workers * steps * (1 + (BATCH_A_WORKER - 1) * shards / images) / shards,
        "gets_a_second": workers * needed / epoch,
        "gbit_a_second_a_worker": 8 * read / epoch / 1e9,
        "exchanged_a_step_mb": 2 * WEIGHT_BYTES / 1e6,
        "puts_an_epoch": CHECKPOINT_OBJECTS + epoch / 60,
    }


def start(workers: int, images: int, size: int) -> dict[str, Any]:
    """Requests and bytes when all workers start at once, and the writes of a publication, which the driver makes."""
    requests = {
        "plan and dataset": 2,
        "manifest and columns": 1 + len(COLUMNS),
        "weights": 1,
        "checkpoint": CHECKPOINT_OBJECTS,
    }
    total = workers * sum(requests.values())
    return {
        "part": "start",
        "gets": total,
        "seconds_at_the_limit_of_a_prefix": total / GETS,
        "weights_gb": workers * WEIGHT_BYTES / 1e9,
        "columns_gb_a_worker": images * sum(COLUMNS.values()) / 1e9,
        "manifest_mb_a_worker": shard_count(images, images * size) * SHARD_IN_MANIFEST / 1e6,
        "puts_of_a_publication": VERSION_OBJECTS,
        "actors_of_those_that_ray_tests": workers / ACTORS,
    }


def prediction(workers: int, images: int) -> dict[str, Any]:
    """Requests, and what the driver keeps, of a prediction; the parts of 100,000 images are simulated."""
    tracemalloc.start()
    started = time.process_time()
    tables: dict[int, tuple[PartName, int]] = {}
    for number, part in enumerate(parts_of_listing(_listing())):
        tables[number] = PartName(part.place, part.content, 1), len(part.images)
    seconds = time.process_time() - started
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    share = len(tables) / SIMULATED
    tables_of_all = len(table_shares([tables[number] for number in sorted(tables)])) / SIMULATED
    per_image = {"images": 1.0, "labels": 1.0, "overlay": 1.0, "tables": share}
    return {
        "part": "prediction",
        "parts": round(share * images),
        "driver_cpu_ms_an_image": 1e3 * seconds / SIMULATED,
        "driver_bytes_an_image": kept / SIMULATED,
        "driver_gb": kept / SIMULATED * images / 1e9,
        "listing_requests": math.ceil(images / PAGE) + math.ceil(share * images / PAGE),
        "requests_an_image": sum(per_image.values()),
        "puts_an_image": sum(per_image.values()) - 1,
        "images_a_second_at_the_limit_of_a_prefix": PUTS / (sum(per_image.values()) - 1),
        "dealt_parts_a_second_there": PUTS / (sum(per_image.values()) - 1) * share,
        "items_in_flight": 2 * workers,
        "tables": round(tables_of_all * images),
        "join_gets": round(share * images),
    }


def _listing() -> Iterator[BucketImage]:
    return (BucketImage(f"plate/{number:09d}.png", f"{number:032x}", 4000) for number in range(SIMULATED))


def main() -> None:
    """Print the parts."""
    workers, images, size = (int(sys.argv[at]) if len(sys.argv) > at else usual for at, usual in USUAL)
    for part in (start(workers, images, size), training(workers, images, size), prediction(workers, images)):
        rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in part.items()}
        print(json.dumps({"bench": "at_scale", "workers": workers, "images": images, **rounded}), flush=True)


USUAL = ((1, 1000), (2, 100_000_000), (3, 250_000))

if __name__ == "__main__":
    main()
