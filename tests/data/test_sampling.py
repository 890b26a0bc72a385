import numpy as np
import pytest

from nucleus.data import sampling
from nucleus.data.sampling import EpochPlan, SplitShare, epoch_plan, mixed_plan, shard_count, stored_order


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


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_was_read_before_is_left_out(world: int) -> None:
    batch, steps = 12, 5
    for rank in range(world):
        whole = plan(423, 24, rank, world, batch)
        rest = epoch_plan(
            records(423, 24), seed=3, epoch=0, rank=rank, world=world, global_batch=batch, done=steps * batch
        )
        assert seen(rest) == seen(whole)[steps * batch // world :]
        assert [rest.positions[rows].tolist() for rows in rest.blocks if rows.start < rows.stop]


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


def test_workers_need_only_their_shards_of_a_block_at_a_time() -> None:
    total, world = 24 * 7 + 24 * 7 + 50, 4  # three blocks; the last has shards of 2 and 3 records
    counts = [7] * 48 + [3] * 2 + [2] * 22
    assert sum(counts) == total
    for epoch in range(4):
        plans = [
            epoch_plan(counts, seed=1, epoch=epoch, rank=r, world=world, global_batch=8, shuffle=True)
            for r in range(world)
        ]
        everything = [sample for p in plans for sample in seen(p)]
        assert len(set(everything)) == len(everything) == total - total % 8
        for rank, p in enumerate(plans):
            blocks = [p.shards_of_block(i) for i in range(len(p.blocks))]
            assert all(shard % world == rank for block in blocks for shard in block)
            assert sorted({shard // 24 for block in blocks for shard in block}) == [0, 1, 2]
            assert all(len({shard // 24 for shard in block}) == 1 for block in blocks)
            assert blocks[-1][0] // 24 == 2  # the ragged one is last
            assert [p.shards[s].size for s in p.blocks] == [42, 42, sum(p.shards >= 48)]
    orders = {
        epoch_plan(counts, seed=1, epoch=e, rank=0, world=1, global_batch=8).shards_of_block(0)[0] for e in range(8)
    }
    assert orders == {0, 24}


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_global_batches_over_blocks(world: int) -> None:
    counts, batch = [2] * 24 + [1] * 24, 30
    alone = seen(epoch_plan(counts, seed=1, epoch=3, rank=0, world=1, global_batch=batch))
    shared = [seen(epoch_plan(counts, seed=1, epoch=3, rank=r, world=world, global_batch=batch)) for r in range(world)]
    each = batch // world
    for step in range(72 // batch):
        together = {sample for part in shared for sample in part[step * each : (step + 1) * each]}
        assert together == set(alone[step * batch : (step + 1) * batch])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_weights_change_how_often_and_nothing_else(world: int) -> None:
    """The first third of the samples, in stored order, counts threefold."""
    total, shards, epochs = 480, 24, 30
    weights = [3.0 if i < total // 3 else 1.0 for i in range(total)]
    drawn = np.zeros(total)
    for epoch in range(epochs):
        plans = [
            epoch_plan(
                records(total, shards), seed=1, epoch=epoch, rank=r, world=world, global_batch=12, weights=weights
            )
            for r in range(world)
        ]
        even = [plan(total, shards, r, world, 12, epoch=epoch, seed=1) for r in range(world)]
        for p, e in zip(plans, even, strict=True):
            assert (p.positions == e.positions).all()
            assert (p.shards == e.shards).all()
            np.add.at(drawn, p.records * shards + p.shards, 1)
    assert drawn.sum() == total * epochs
    assert drawn[: total // 3].mean() / drawn[total // 3 :].mean() == pytest.approx(3, rel=0.03)
    assert drawn.max() <= 2 * epochs, "each at most the ceiling of its expected 1.8 times an epoch"
    alone = epoch_plan(records(total, shards), seed=1, epoch=0, rank=0, world=1, global_batch=12, weights=weights)
    parts = [
        epoch_plan(records(total, shards), seed=1, epoch=0, rank=r, world=world, global_batch=12, weights=weights)
        for r in range(world)
    ]
    together = sorted(item for p in parts for item in zip(p.positions.tolist(), seen(p), strict=True))
    assert [sample for _, sample in together] == seen(alone)


def test_stored_order_is_a_permutation() -> None:
    assert sorted(stored_order(50).tolist()) == list(range(50))
    assert (stored_order(50) == stored_order(50)).all()


TEN = SplitShare(records(10, 8), 0.5)
OLD = SplitShare(records(200, 72), 0.3, [3.0 if i < 100 else 1.0 for i in range(200)])
OTHER = SplitShare(records(50, 24), 0.2)
SPLITS = (TEN, OLD, OTHER)


def mixed(rank: int, world: int, epoch: int, batch: int = 12, steps: int = 7, done: int = 0) -> EpochPlan:
    return mixed_plan(
        SPLITS, steps=steps, seed=3, epoch=epoch, rank=rank, world=world, global_batch=batch, done=done * batch
    )


def owner(shard: int) -> int:
    return 0 if shard < 8 else 1 if shard < 80 else 2


@pytest.mark.parametrize("epoch", [0, 5])
@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_mixed_batches_do_not_depend_on_the_number_of_workers(world: int, epoch: int) -> None:
    alone, shared = mixed(0, 1, epoch), [mixed(rank, world, epoch) for rank in range(world)]
    together = sorted(item for p in shared for item in zip(p.positions.tolist(), seen(p), strict=True))
    assert together == list(zip(alone.positions.tolist(), seen(alone), strict=True))
    assert all(np.diff(p.positions).tolist() == [world] * (84 // world - 1) for p in shared)


@pytest.mark.parametrize("world", [1, 3])
def test_a_mixed_epoch_goes_on_where_it_stopped(world: int) -> None:
    for rank in range(world):
        whole, rest = mixed(rank, world, 2), mixed(rank, world, 2, done=3)
        assert seen(rest) == seen(whole)[3 * 12 // world :]
        assert [place for rows in rest.blocks for place in rest.positions[rows]] == rest.positions.tolist()


def test_each_split_has_its_share_of_every_epoch_and_of_every_few_batches() -> None:
    for epoch in range(5):
        owners = [owner(shard) for shard, _ in seen(mixed(0, 1, epoch))]
        assert [owners.count(number) for number in range(3)] == [42, 25, 17]
        for start in range(0, 84, 12):
            assert all(
                abs(owners[start : start + 12].count(number) - 12 * split.share) <= 2
                for number, split in enumerate(SPLITS)
            )


def test_a_split_is_read_pass_by_pass_over_the_epochs() -> None:
    """Every image of a split is read n times before any is read n + 1 times; with weights, about by these."""
    found = [sample for epoch in range(10) for sample in seen(mixed(0, 1, epoch))]
    ten, other = ([sample for sample in found if owner(sample[0]) == number] for number in (0, 2))
    for samples, size in ((ten, 10), (other, 50)):
        passes = [samples[start : start + size] for start in range(0, len(samples) - size + 1, size)]
        assert all(len(set(each)) == size for each in passes)
        assert len(passes) < 3 or passes[0] != passes[1]
    often = np.zeros(200)
    for shard, record in (sample for epoch in range(160) for sample in seen(mixed(0, 1, epoch))):
        if owner(shard) == 1:
            often[record * 72 + shard - 8] += 1
    assert often[:100].mean() / often[100:].mean() == pytest.approx(3, rel=0.25)


def test_a_worker_needs_one_block_of_each_split_at_a_time() -> None:
    for p in (mixed(rank, 4, epoch, steps=60) for rank in range(4) for epoch in range(3)):
        assert [rows.start for rows in p.blocks] == [0, *(rows.stop for rows in p.blocks[:-1])]
        assert p.blocks[-1].stop == len(p.positions)
        for number in range(len(p.blocks)):
            shards = p.shards_of_block(number)
            assert len({(owner(shard), (shard - 8) // 24 if owner(shard) == 1 else 0) for shard in shards}) <= 3
    assert any(len(mixed(0, 1, epoch, steps=60).blocks) > 1 for epoch in range(3))


def test_more_steps_than_images_read_each_image_several_times() -> None:
    p = mixed_plan([SplitShare(records(3, 2))], steps=5, seed=1, epoch=0, rank=0, world=1, global_batch=4)
    assert sorted(seen(p).count(sample) for sample in set(seen(p))) == [6, 7, 7]


@pytest.mark.parametrize("near", [0.01, 7])
@pytest.mark.parametrize("ratio", [sampling._GOLDEN_RATIO, 0.125])
def test_positions_are_dealt_by_the_order_of_their_points(
    ratio: float, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts, without sorting all; also where points are equal, as those of a hundred million positions may be."""
    monkeypatch.setattr(sampling, "_GOLDEN_RATIO", ratio)
    monkeypatch.setattr(sampling, "_POINTS_AT_ONCE", 101)
    monkeypatch.setattr(sampling, "_NEAR", near)
    for number, shares in enumerate([(1.0,), (0.25, 0.75), (0.1, 0.0, 0.6, 0.3), (0.0, 1.0)]):
        total, seeds = 1000 + number, (number, 2)
        points = (np.arange(total) * ratio + np.random.default_rng(seeds).random()) % 1
        ends = np.rint(np.cumsum(shares) * total).astype(np.int64)
        expected = np.empty(total, np.int64)
        expected[np.argsort(points, kind="stable")] = np.searchsorted(ends[:-1], np.arange(total), side="right")
        mine = np.arange(3, total, 7)
        owners, counts = sampling._dealt(shares, total, seeds, mine)
        assert (owners == expected[mine]).all()
        for split in range(len(shares)):
            before = np.concatenate([[0], np.cumsum(expected == split)])
            assert (counts.before[split] == before[mine]).all()
            assert counts.totals[split] == before[-1]
