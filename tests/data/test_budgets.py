import numpy as np
import pytest

from siglip2.data.budgets import Budgets, attention_tokens
from siglip2.errors import DataError

PUBLISHED = (128, 256, 576, 784, 1024)


def make(mode="mixed", world_size=4, batch_size=16, **options):
    return Budgets(PUBLISHED, mode=mode, batch_size=batch_size, world_size=world_size, **options)


def shares(budgets, number):
    return [budgets.of_rank(number, rank) for rank in range(budgets.world_size)]


def test_a_batch_has_one_budget_the_same_on_every_rank():
    budgets = make("batch")
    drawn = [np.unique(np.concatenate(shares(budgets, number))) for number in range(500)]
    assert all(len(sizes) == 1 for sizes in drawn)
    counts = np.bincount([PUBLISHED.index(sizes[0]) for sizes in drawn])
    assert counts.min() > 60  # uniform: 100 of each, deviation 9


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_mixed_ranks_have_equal_counts_and_nearly_equal_work(world_size):
    budgets = make(world_size=world_size, batch_size=64)
    for number in range(50):
        of_ranks = shares(budgets, number)
        assert {len(sizes) for sizes in of_ranks} == {64}
        work = [float((n + n * n / 4608.0).sum()) for n in of_ranks]
        assert budgets.balance(number) == pytest.approx(max(work) / np.mean(work))
        assert budgets.balance(number) < 1.06  # one image of 64 * W is what cannot be split


def test_mixed_draws_every_size_as_often():
    budgets = make(batch_size=250)
    drawn = np.concatenate(shares(budgets, 0) + shares(budgets, 1))
    assert all(abs((drawn == size).mean() - 0.2) < 0.05 for size in PUBLISHED)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_mixed_batches_stay_under_max_tokens(world_size):
    budgets = make(world_size=world_size, max_tokens=6_000)
    free = make(world_size=world_size)
    over = 0
    for number in range(100):
        for mine, drawn in zip(shares(budgets, number), shares(free, number), strict=True):
            assert len(mine) == 16
            assert mine.sum() <= 6_000
            over += drawn.sum() > 6_000
            if drawn.sum() <= 6_000:
                assert sorted(mine) == sorted(drawn)
    assert over > 50  # the bound did something


def test_large_batches_are_computed_in_parts_the_same_on_every_rank():
    budgets = make("batch", max_tokens=8_192)
    for number in range(20):
        size = int(budgets.of_rank(number, 0)[0])
        assert budgets.parts(number) == -(-16 * size // 8_192)
    assert make("batch", max_tokens=128).parts(0) == 16
    assert make("batch").parts(0) == make("mixed", max_tokens=6_000).parts(0) == 1


def test_a_batch_is_a_function_of_its_number_and_the_seed():
    first, again, other = make(), make(), make(seed=1)
    for number in (0, 7, 10**9):
        assert np.array_equal(first.of_rank(number, 2), again.of_rank(number, 2))
    assert any((first.of_rank(n, 0) != other.of_rank(n, 0)).any() for n in range(5))
    assert any((first.of_rank(n, 0) != first.of_rank(n + 1, 0)).any() for n in range(5))


def test_images_take_their_budgets_in_random_order():
    assert any((np.diff(make().of_rank(n, 0)) < 0).any() for n in range(3))


@pytest.mark.parametrize("sizes", [(), (0, 4), (-1,)])
def test_rejects_budgets_below_one(sizes):
    with pytest.raises(DataError, match="need patch budgets of at least 1; got"):
        Budgets(sizes, mode="batch", batch_size=2)


def test_rejects_too_few_tokens():
    with pytest.raises(DataError, match="at least 2048, 16 images of 128; got 2047"):
        make(max_tokens=2047)
    with pytest.raises(DataError, match="at least 128, the smallest image; got 127"):
        make("batch", max_tokens=127)


def test_attention_costs_as_much_as_the_rest_at_4608_tokens_of_b16():
    D, M, n = 768, 3072, 4608
    assert attention_tokens(D, M) == n
    assert 4 * D * n == 2 * (4 * D * D + 2 * D * M)
