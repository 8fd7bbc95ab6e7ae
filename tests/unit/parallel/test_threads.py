"""Results made ahead by threads: the same as without, in order, no more at a time than asked for."""

import threading

import pytest

from megatron_cocoa.parallel.threads import map_ahead


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("num_items", [0, 1, 2, 50])
def test_results_are_those_of_map(num_workers, num_items):
    """Claim: every result once, in the order of the items."""
    found = map_ahead(lambda x: x * x, iter(range(num_items)), num_workers=num_workers, num_ahead=4)
    assert list(found) == [x * x for x in range(num_items)]


def numbers(taken: list[int]):
    """0, 1, 2 and so on, each noted when it is taken."""
    for number in range(1000):
        taken.append(number)
        yield number


def test_a_result_is_made_while_the_one_before_is_in_use():
    """Claim: the next result does not wait for the caller, and no more than num_ahead are begun."""
    taken, second = [], threading.Event()

    def make(x):
        if x == 1:
            second.set()
        return x

    results = map_ahead(make, numbers(taken), num_workers=1, num_ahead=2)
    assert next(results) == 0
    assert second.wait(timeout=60)
    assert taken == [0, 1]
    assert next(results) == 1 and taken == [0, 1, 2]
    results.close()
    assert taken == [0, 1, 2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_comes_in_its_place_and_ends_the_work(num_workers):
    """Claim: results before a failure arrive, the failure is raised as it is, later items are left alone."""

    def make(x):
        if x == 3:
            raise KeyError("item 3")
        return x

    taken = []
    results = map_ahead(make, numbers(taken), num_workers=num_workers, num_ahead=5)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="item 3"):
        next(results)
    assert len(taken) == (8 if num_workers else 4)
    assert list(results) == []


def test_an_iterator_that_fails_ends_the_work():
    """Claim: what the items themselves raise comes out, and nothing goes on behind it."""

    def failing():
        yield from range(3)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        list(map_ahead(abs, failing(), num_workers=2, num_ahead=10))
