"""Sequences that begin alike share rows: whatever is read of a microbatch, each has all its own."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flexllm_jax.finetune.buffers import MicrobatchTable
from flexllm_jax.finetune.data import pack
from flexllm_jax.finetune.losses import Loss
from flexllm_jax.finetune.microbatch import Datum, PackedMicrobatch

PAGE, FIRST, SLOTS = 4, 8, 512


@st.composite
def groups(draw):
    """Answers to a few prompts, in any order; some prompts begin like others, or are the same."""
    prompts = draw(st.lists(st.lists(st.integers(0, 1), max_size=11), min_size=1, max_size=3))
    data = []
    for which in draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=7)):
        answer = draw(st.lists(st.integers(0, 3), min_size=1, max_size=9))
        token = np.array([*prompts[which], *answer])
        weight = np.repeat([0.0, 1.0], [len(prompts[which]), len(answer)])
        data.append(Datum.following(token, weight.astype(np.float32)))
    return data


def brute_force_rows(data):
    """Rows that a microbatch needs: the whole pages before what is trained, once for all that have
    the same."""
    heads, rows = {}, 0
    for datum in data:
        trained = np.flatnonzero(datum.weight)
        silent = min([*trained, len(datum) - 1]) // PAGE * PAGE
        head = tuple(datum.token[:silent])
        rows += len(datum) - (silent if head in heads else 0)
        heads[head] = True
    return rows


@given(data=groups())
def test_every_sequence_has_its_tokens_and_those_before_and_no_others(data):
    packed = PackedMicrobatch(tuple(data), Loss.of(), page=PAGE)
    assert packed.tokens == brute_force_rows(data)
    planned = packed.as_planned(0, "job", 0)
    assert sum(planned.lengths) == packed.tokens
    # Pages in the order of their parts; every sequence reads those of its table.
    pages, count = [], 0
    for length in planned.lengths:
        needed = -(-length // PAGE)
        pages.append(tuple(range(count, count + needed)))
        count += needed
    kv_slot = packed.kv_slots(pages, PAGE)
    assert len(set(kv_slot)) == packed.tokens, "two tokens have one place"
    whole = packed.table(SLOTS, FIRST, kv_slot)
    table = MicrobatchTable(*(np.array(x) for x in MicrobatchTable.unpack(whole)))
    row_of = dict(zip(kv_slot, FIRST + np.arange(packed.tokens), strict=True))
    for part, own in zip(packed.parts, pages, strict=True):
        before = () if part.shared is None else pages[part.shared]
        assert part.start == len(before) * PAGE
        places = [page * PAGE + i for page in (*before, *own) for i in range(PAGE)]
        for at in range(part.start, part.stop):
            row = FIRST + part.row + at - part.start
            sees = [*range(table.shared_start[row], table.shared_end[row])]
            sees += range(table.sequence_start[row], row + 1)
            expected = data[part.sequence].token[: at + 1]
            assert [packed.token[r - FIRST] for r in sees] == list(expected)
            assert [row_of[place] for place in places[: at + 1]] == sees
            assert table.position[row] == at
    # What comes back is that of each sequence, whole.
    for name in ("token", "label", "weight"):
        rows = packed.token if name == "token" else getattr(table, name)[FIRST:][: packed.tokens]
        for own, datum in zip(packed.split(packed.of_data(rows)), data, strict=True):
            np.testing.assert_array_equal(own, getattr(datum, name))
    loss = table.weight[FIRST : FIRST + packed.tokens]
    assert loss.sum() == sum(datum.weight.sum() for datum in data), "a token counts twice"


@given(data=groups(), target=st.integers(20, 60))
def test_what_is_shared_makes_room_for_more(data, target):
    loss = Loss.of()
    heads = lambda datum: [datum.head(loss, PAGE)]  # noqa: E731
    packs = pack(data, 64, target, heads=heads)
    rows = [PackedMicrobatch(tuple(own), loss, page=PAGE).tokens for own in packs]
    assert all(count <= target or len(own) == 1 for count, own in zip(rows, packs, strict=True))
    first, *others = data
    begun = [first]
    for datum in others:  # what fits beside the first goes to the first microbatch
        if brute_force_rows([*begun, datum]) <= target:
            begun.append(datum)
    if len(first) <= target:
        assert [id(datum) for datum in packs[0]] == [id(datum) for datum in begun]
