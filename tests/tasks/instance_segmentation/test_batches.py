"""Which images make a batch: of one shape, in an order that seed and epoch determine, shared between processes."""

from itertools import chain

import numpy as np
import pytest
from torch.utils.data import Dataset

from lineara.tasks.instance_segmentation.batches import AspectRatioBatches, BrokenImage, ImageLoader

WIDE = np.random.default_rng(0).random(101) < 0.7


def sampler(batch_size=7, *, wide=WIDE, epoch=0, **options):
    made = AspectRatioBatches(wide, batch_size, **{"shuffle": True, **options})
    made.set_epoch(epoch)
    return made


def indices(batches):
    return [[index for index, _ in batch] for batch in batches]


def test_an_epoch_has_every_image_once_and_no_batch_of_both_shapes():
    batches = indices(sampler())
    assert sorted(chain(*batches)) == list(range(101))
    assert all(len(set(WIDE[batch])) == 1 for batch in batches)
    num_wide = int(WIDE.sum())
    expected = [7] * (num_wide // 7 + (101 - num_wide) // 7) + [num_wide % 7, (101 - num_wide) % 7]
    assert sorted(map(len, batches)) == sorted(expected)
    assert len(sampler()) == len(batches)


def test_the_order_depends_on_seed_and_epoch_alone():
    first = list(sampler(seed=3, epoch=5))
    again = sampler(seed=3)
    list(again)
    again.set_epoch(5)
    assert list(again) == first  # whatever it did before
    for other in ({"seed": 3, "epoch": 6}, {"seed": 4, "epoch": 5}):
        assert indices(sampler(**other)) != indices(first)
        assert {frozenset(batch) for batch in indices(sampler(**other))} != {frozenset(b) for b in indices(first)}


def test_an_image_has_another_random_seed_in_every_epoch():
    seeds = [dict(chain(*sampler(epoch=epoch))) for epoch in range(3)]
    assert len(set(chain(*(each.values() for each in seeds)))) == 3 * 101


def test_batches_of_both_shapes_are_mixed():
    is_wide = np.array([WIDE[batch[0]] for batch in indices(sampler(2))])
    assert (is_wide[1:] != is_wide[:-1]).sum() > 4


def test_smaller_batches_are_not_always_the_last_ones():
    ends = [len(indices(sampler(epoch=epoch))[-1]) for epoch in range(10)]
    assert ends.count(7) > 4


@pytest.mark.parametrize("start", [0, 1, 9, 16, 50])
@pytest.mark.parametrize("processes", [1, 3])
def test_it_goes_on_where_a_stopped_epoch_was_and_only_once(start, processes):
    shared = {"num_processes": processes, "rank": processes - 1}
    resumed = sampler(epoch=2, start=start, **shared)
    assert list(resumed) == list(sampler(epoch=2, **shared))[start:]
    resumed.set_epoch(3)
    assert list(resumed) == list(sampler(epoch=3, **shared))


@pytest.mark.parametrize("processes", [2, 3, 4, 20])
def test_processes_share_an_epoch_of_training_and_have_equally_many_batches(processes):
    whole = indices(sampler(epoch=1, seed=5))
    shares = [sampler(epoch=1, seed=5, num_processes=processes, rank=rank) for rank in range(processes)]
    batches = [indices(share) for share in shares]
    assert {len(part) for part in batches} == {len(share) for share in shares} == {-(-len(whole) // processes)}
    taken = [batch for turn in zip(*batches) for batch in turn]
    assert taken[: len(whole)] == whole
    assert taken[len(whole) :] == [whole[i % len(whole)] for i in range(len(taken) - len(whole))]


def test_unshuffled_a_process_without_a_batch_of_its_own_is_given_anothers():
    batches = [indices(sampler(shuffle=False, num_processes=40, rank=rank)) for rank in range(40)]
    assert [len(part) for part in batches] == [1] * 40
    assert sorted({index for part in batches for index in part[0]}) == list(range(101))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_unshuffled_every_image_comes_once_in_all_processes_together(processes):
    shares = [sampler(shuffle=False, num_processes=processes, rank=rank) for rank in range(processes)]
    batches = [indices(share) for share in shares]
    assert [len(part) for part in batches] == [len(share) for share in shares]
    assert sorted(chain(*chain(*batches))) == list(range(101))


def test_unshuffled_images_come_in_the_order_of_the_set():
    batches = list(sampler(40, shuffle=False, seed=9, epoch=4))
    assert indices(batches) == [list(range(40)), list(range(40, 80)), list(range(80, 101))]


@pytest.mark.parametrize("wide", [np.zeros(5, bool), np.ones(5, bool)])
def test_images_of_one_shape_alone_are_batches_too(wide):
    batches = indices(sampler(2, wide=wide))
    assert sorted(map(len, batches)) == [1, 2, 2]
    assert len(sampler(2, wide=wide)) == 3


@pytest.mark.parametrize("shuffle", [False, True])
def test_no_images_are_no_batches(shuffle):
    empty = sampler(wide=np.zeros(0, bool), shuffle=shuffle, num_processes=2)
    assert (len(empty), list(empty)) == (0, [])


class Broken(Dataset):
    def __getitem__(self, items):
        return BrokenImage("image 5: broken") if items == [(2, 0)] else {"first": items[0][0]}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_refused_where_the_loader_is_used(num_workers):
    loader = ImageLoader(
        Broken(), sampler=sampler(1, wide=WIDE[:4], shuffle=False), batch_size=None, num_workers=num_workers
    )
    batches = iter(loader)
    assert [next(batches), next(batches)] == [{"first": 0}, {"first": 1}]
    with pytest.raises(ValueError, match=r"^image 5: broken$"):
        next(batches)
    assert len(loader) == 4
