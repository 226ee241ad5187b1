"""What a checkpoint keeps of answers comes back as it was, and nothing else does."""

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flexllm_jax.finetune.reinforcement.episodes import Episode, Group
from flexllm_jax.finetune.reinforcement.kept import Kept, keep, shapes
from flexllm_jax.finetune.reinforcement.prompts import Prompt

COMPARED = ("tokens", "said", "logprob", "reference", "turns", "cut", "reward", "error", "scores")
number = st.floats(-20, 0, width=32)


@st.composite
def episodes(draw):
    length = draw(st.integers(0, 5))

    def each(of):
        return draw(st.lists(of, min_size=length, max_size=length))

    episode = Episode(draw(st.integers(0, 2**31 - 1)), each(st.integers(0, 2**31 - 1)))
    episode.logprob, episode.said = each(number), each(st.booleans())
    episode.turns, episode.over = draw(st.integers(0, 3)), draw(st.booleans())
    if episode.over and draw(st.booleans()):
        episode.reward, episode.text = (
            draw(st.floats(-1, 1)),
            draw(st.sampled_from(["", "a\n", "größer"])),
        )
        episode.scores = {"close": episode.reward}
        episode.reference = each(number) if draw(st.booleans()) else None
        episode.error = draw(st.sampled_from([None, "why"]))
    return episode


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(episodes(), min_size=2, max_size=2), max_size=3))
def test_what_is_over_comes_back(drawn):
    groups = []
    for i, own in enumerate(drawn):
        done = all(e.reward is not None for e in own)
        groups.append(Group(Prompt(i, (), {}), own, (7, 0, i), done))
    told, arrays = keep(groups, lambda episode: "said")
    told = json.loads(json.dumps(told))
    like = shapes(told)
    assert {n: (x.shape, x.dtype) for n, x in like.items()} == {
        n: (x.shape, x.dtype) for n, x in arrays.items()
    }
    kept = Kept(told, arrays)
    for group in groups:
        fresh = Group.of(group.prompt, 2, group.key)
        seeds = [episode.seed for episode in fresh.episodes]
        kept.fill(fresh)
        assert fresh.done == group.done
        for own, was, seed in zip(fresh.episodes, group.episodes, seeds, strict=True):
            if was.over:
                assert own.over and own.seed == was.seed
                assert all(getattr(own, name) == getattr(was, name) for name in COMPARED)
                assert own.text == (was.text if was.reward is not None else "said")
            else:
                assert not own.over and own.seed == seed and own.tokens == []
    other = Group.of(Prompt(9, (), {}), 2, (7, 0, 99))
    kept.fill(other)
    assert not other.done and not any(episode.over for episode in other.episodes)


def test_nothing_is_kept_twice():
    episode = Episode(1, [3], [-0.5], [True], over=True, reward=1.0)
    group = Group(Prompt(0, (), {}), [episode], (7, 0, 0), done=True)
    told, arrays = keep([group], lambda episode: "")
    assert arrays["logprob"].dtype == np.float32
    kept = Kept(told, arrays)
    for expected in (True, False):
        again = Group(group.prompt, [Episode(1)], group.key)
        kept.fill(again)
        assert again.done == expected
