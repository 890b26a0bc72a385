import numpy as np
import pytest

from nucleus.data.sampling import EpochPlan, epoch_plan, shard_count, shards_of_worker


def records(total: int, shards: int) -> list[int]:
    return [len(range(number, total, shards)) for number in range(shards)]


def plan(total: int, shards: int, rank: int, world: int, batch: int, epoch: int = 0, seed: int = 3) -> EpochPlan:
    return epoch_plan(records(total, shards), seed=seed, epoch=epoch, rank=rank, world=world, global_batch=batch)


def seen(p: EpochPlan) -> list[tuple[int, int]]:
    return list(zip(p.shards.tolist(), p.records.tolist(), strict=True))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize(("total", "shards"), [(423, 24), (50, 24), (13, 12), (7, 6)])
def test_each_sample_once_and_the_rest_is_counted(total: int, shards: int, world: int) -> None:
    batch = 2 * world if 2 * world <= total else world
    if batch > total:
        pytest.skip("no whole batch")
    plans = [plan(total, shards, rank, world, batch) for rank in range(world)]
    everything = [sample for p in plans for sample in seen(p)]
    assert len(everything) == len(set(everything)) == total - total % batch
    assert all(p.dropped == total % batch for p in plans)
    for rank, p in enumerate(plans):
        assert set(p.shards.tolist()) <= set(shards_of_worker(shards, rank, world))


@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_global_batches_do_not_depend_on_the_number_of_workers(world: int) -> None:
    batch = 12
    alone = seen(plan(423, 24, 0, 1, batch))
    shared = [seen(plan(423, 24, rank, world, batch)) for rank in range(world)]
    each = batch // world
    for step in range(423 // batch):
        together = {sample for part in shared for sample in part[step * each : (step + 1) * each]}
        assert together == set(alone[step * batch : (step + 1) * batch])


def test_order_follows_from_seed_and_epoch_alone() -> None:
    first = seen(plan(423, 24, 0, 2, 8))
    assert first == seen(plan(423, 24, 0, 2, 8))
    assert first != seen(plan(423, 24, 0, 2, 8, epoch=1))
    assert first != seen(plan(423, 24, 0, 2, 8, seed=4))


def test_nothing_is_dropped_without_batches() -> None:
    plans = [
        epoch_plan(records(10, 8), seed=0, epoch=0, rank=r, world=3, global_batch=0, shuffle=False) for r in range(3)
    ]
    assert sorted(np.concatenate([p.positions for p in plans]).tolist()) == list(range(10))


@pytest.mark.parametrize(
    ("samples", "size", "expected"),
    [(1, 10, 1), (3, 10, 2), (7, 10, 6), (23, 10, 12), (24, 10, 24), (5000, 10, 24), (5000, 24 * 65 << 20, 48)],
)
def test_shard_counts(samples: int, size: int, expected: int) -> None:
    assert shard_count(samples, size) == expected


def test_workers_take_only_their_shards() -> None:
    assert shards_of_worker(24, 1, 2) == list(range(1, 24, 2))
    assert shards_of_worker(6, 2, 4) == [0, 2, 4]  # 4 does not divide 6: workers share by their common divisor
    assert shards_of_worker(7, 3, 5) == list(range(7))
