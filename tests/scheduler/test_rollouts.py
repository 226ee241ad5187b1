"""Answers of a job as load: in which order they, and what they train, go through an engine."""

from dataclasses import replace

import pytest

from scheduler.coserving import Scheduler
from scheduler.policies import make_policy
from scheduler.request import Slo
from scheduler.simulation.engine import SimulatedEngine, replay, report
from scheduler.simulation.rollouts import RolloutBatch, RolloutSupply
from tests.scheduler.test_simulator import SLO, arrivals, make

BATCH = RolloutBatch.of([(100, [20, 60, 40]), (90, [50, 10, 30])], 512, 16)


def rollouts(batches=(BATCH,), **fields):
    return RolloutSupply(list(batches), **{"most": 96, "slo": Slo(1.0, 60.0, 0.5), **fields})


def engine_with(supply):
    engine = make(finetune=False)
    limits = replace(engine.scheduler.config, prefix_caching=True)
    scheduler = Scheduler(limits, engine.device.copy(), make_policy("coserving"))
    return SimulatedEngine(scheduler, engine.device, supply, noise=0.03)


def test_a_batch_is_trained_when_all_of_it_is_answered_and_then_the_next_begins():
    """With k steps ahead batch m is answered by weights that m - k batches trained."""
    for ahead in (0, 2):
        supply = rollouts(steps_ahead=ahead)
        engine, seen = engine_with(supply), {}
        add = engine.scheduler.add

        def watch(item, seen=seen, supply=supply, add=add):
            if hasattr(item, "request_id"):
                batch = int(item.request_id.split("/")[1])
                seen.setdefault(batch, set()).add(item.cache_salt[1])
            else:
                assert item.weights_version == supply.trained
                assert supply._unanswered.get(supply.trained, 0) == 0
            add(item)

        engine.scheduler.add = watch
        engine.advance(20.0)
        assert supply.trained > 3
        assert all(versions == {max(0, m - ahead)} for m, versions in seen.items())
        per_batch = sum(sum(own) for _, own in BATCH.groups)
        begun = len(seen) * per_batch
        assert supply.trained * per_batch <= engine.answered_tokens <= begun
        trained = sum(own.tokens for own in BATCH.microbatches)
        assert engine.finetune_tokens // trained == supply.trained


def test_of_a_group_one_goes_ahead_and_the_others_find_its_prompt():
    engine = engine_with(rollouts())
    engine.advance(10.0)
    # Of each group two find what whole pages hold of its prompt, of 100 or 90 tokens.
    trained, batch = engine.supply.trained, 2 * (96 // 16 + 80 // 16)
    assert trained > 1
    assert trained * batch <= engine.scheduler.pool.hits <= (trained + 1) * batch


def test_a_step_ahead_answers_more_and_requests_are_served_as_without():
    found = {}
    for name, supply in (
        ("none", None),
        ("on-policy", rollouts()),
        ("ahead", rollouts(steps_ahead=1)),
    ):
        engine = engine_with(supply)
        replay(engine, arrivals(rate=1.0, duration_s=20.0), deadline_s=100)
        made = report([engine], SLO, engine.now)
        assert engine.unfinished == 0 and made["inference"]["requests"] == len(engine.timings)
        found[name] = made
    tokens = [found[n]["finetune"]["finetune"]["sampled_tokens_per_s"] for n in found]
    assert tokens[0] == 0 < tokens[1] < tokens[2]
    attained = [found[n]["inference"]["slo_attainment"] for n in found]
    assert min(attained) > attained[0] - 0.02


def test_what_cannot_be_a_job_is_refused():
    with pytest.raises(ValueError, match="without prompts"):
        rollouts(batches=[RolloutBatch((), ())])
    with pytest.raises(ValueError, match="nothing to train"):
        rollouts(batches=[RolloutBatch(BATCH.groups, ())])
