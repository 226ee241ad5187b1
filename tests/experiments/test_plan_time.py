"""The benchmark of planning measures steps in which every request decodes."""

from flexllm_jax.experiments.plan_time import plan_ms


def test_planning_is_timed() -> None:
    plan, complete = plan_ms(8, steps=5)
    assert complete > 0 and 0 < plan < 100
