"""Pages are owned exactly, and the prefix cache agrees with a brute-force search."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.cache.pages import PagePool

token_lists = st.lists(st.integers(0, 1), min_size=1, max_size=12)
salts = st.sampled_from([None, "a", ("a", 2)])


def take(pool: PagePool, count: int) -> list[int]:
    pages = pool.allocate(count)
    assert pages is not None
    return pages


def longest_prefix(published, tokens, salt, size):
    """Brute force: how many pages of `tokens` are in `published`, a set of (salt, tokens)."""
    count = 0
    while (count + 1) * size < len(tokens):
        if (salt, tuple(tokens[: (count + 1) * size])) not in published:
            break
        count += 1
    return count


@settings(deadline=None)
@given(st.integers(1, 4), st.lists(st.tuples(token_lists, salts, st.booleans()), max_size=12))
def test_match_is_the_longest_published_prefix(size, sequences):
    pool = PagePool(400, size)
    published, content = set(), {}
    for tokens, salt, stays in sequences:
        found = pool.find_prefix(tokens, salt)
        assert len(found) == longest_prefix(published, tokens, salt, size)
        for index, page in enumerate(found):
            assert content[page] == (salt, tuple(tokens[: (index + 1) * size]))
        pool.share(found, queried=len(found))
        pages = found + take(pool, pool.pages_for(len(tokens)) - len(found))
        full = len(tokens) // size
        pool.publish(tokens, salt, pages, full)
        for index in range(full):
            prefix = (salt, tuple(tokens[: (index + 1) * size]))
            published.add(prefix)
            content[pages[index]] = prefix
        if not stays:
            pool.release(pages)
    assert pool.num_cached == len(published)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 3),
    st.integers(2, 8),
    st.lists(st.tuples(token_lists, salts, st.integers(0, 3)), max_size=30),
)
def test_eviction_never_serves_other_tokens(size, num_pages, sequences):
    pool = PagePool(num_pages, size)
    content, held = {}, []
    for tokens, salt, keep in sequences:
        while len(held) > keep:
            pool.release(held.pop(0))
        found = pool.find_prefix(tokens, salt)
        for index, page in enumerate(found):
            assert content[page] == (salt, tuple(tokens[: (index + 1) * size]))
        missing = pool.pages_for(len(tokens)) - len(found)
        free = pool.num_free_beside(found)
        pool.share(found, queried=len(found))
        assert pool.num_free == free
        fresh = pool.allocate(missing)
        assert (fresh is None) == (missing > free)
        if fresh is None:
            pool.release(found)
            continue
        assert not {page for pages in held for page in pages} & set(fresh)
        pages = found + fresh
        for page in fresh:
            content.pop(page, None)
        held.append(pages)
        full = len(tokens) // size
        # Token by token, as decoding does.
        for count in range(full + 1):
            pool.publish(tokens, salt, pages, count)
        for index in range(full):
            content[pages[index]] = (salt, tuple(tokens[: (index + 1) * size]))
    for pages in held:
        pool.release(pages)
    assert pool.num_free == num_pages


def test_the_whole_prompt_is_never_matched():
    pool = PagePool(8, 2)
    pages = take(pool, 2)
    pool.publish([1, 2, 3, 4], None, pages, 2)
    assert pool.find_prefix([1, 2, 3, 4], None) == pages[:1]
    assert pool.find_prefix([1, 2, 3, 4, 5], None) == pages


def test_a_reused_page_is_not_taken_for_the_parent_it_was():
    pool = PagePool(2, 1)
    pages = take(pool, 2)
    pool.publish([7, 8], None, pages, 2)
    pool.release(pages[:1])
    (again,) = take(pool, 1)
    assert again == pages[0]
    pool.publish([9], None, [again], 1)
    assert pool.find_prefix([9, 8, 0], None) == [again]


def test_the_end_of_a_prefix_is_evicted_first_and_free_pages_before_it():
    pool = PagePool(4, 1)
    pages = take(pool, 3)
    pool.publish([1, 2, 3], None, pages, 3)
    pool.release(pages)
    assert pool.num_free == 4 and pool.num_cached == 3
    pool.allocate(1)
    assert pool.num_cached == 3
    assert pool.allocate(1) == pages[2:]
    assert pool.find_prefix([1, 2, 3, 4], None) == pages[:2]


def test_allocation_takes_all_or_nothing():
    pool = PagePool(3, 1)
    assert pool.allocate(4) is None and pool.num_free == 3
    assert sorted(pool.allocate(3) or []) == [0, 1, 2]


def test_without_prefix_caching_nothing_is_kept():
    pool = PagePool(2, 1, prefix_caching=False)
    pages = take(pool, 2)
    pool.publish([1, 2], None, pages, 2)
    assert pool.find_prefix([1, 2, 3], None) == [] and pool.num_cached == 0


def test_what_was_not_computed_after_all_is_forgotten():
    pool = PagePool(4, 1)
    held, released = take(pool, 2), take(pool, 2)
    pool.publish([1, 2], None, held, 2)
    pool.publish([3, 4], None, released, 2)
    pool.release(released)
    pool.forget()
    assert pool.find_prefix([1, 2, 0], None) == pool.find_prefix([3, 4, 0], None) == []
    assert pool.num_free == 2 and pool.num_cached == 0
    pool.publish([1, 2], None, held, 2)  # it goes on, and is computed by now
    assert pool.find_prefix([1, 2, 0], None) == held
    pool.release(held)
    assert sorted(pool.allocate(4) or []) == [0, 1, 2, 3]


def test_a_page_released_twice_is_an_error():
    pool = PagePool(1, 1)
    pages = take(pool, 1)
    pool.release(pages)
    with pytest.raises(RuntimeError, match="page 0 was released more often"):
        pool.release(pages)
