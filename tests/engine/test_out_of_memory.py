"""A device without memory left refuses what is between two steps, and ends what is in one; the
engine goes on."""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import pytest

from flexllm_jax import SamplingParams
from flexllm_jax.engine.device.out_of_memory import OutOfMemory, room_for
from flexllm_jax.engine.loop import EngineStopped
from tests.engines import job_config, letter_rows, random_prompts, start_engine, write_rows

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


@cache
def out_of_memory() -> Exception:
    """JAX's own."""
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jnp.zeros(1 << 50, jnp.int8)
    assert "RESOURCE_EXHAUSTED" in str(caught.value)
    return caught.value


@contextmanager
def failing(llm, program: str, times: int = 1):
    """A program that the device has no memory for; those after `times` calls run."""
    programs, left = llm.engine.runner.programs, [times]
    real = programs[program]

    def run(*arguments):
        if not left[0]:
            return real(*arguments)
        left[0] -= 1
        raise out_of_memory()

    programs[program] = run
    try:
        yield left
    finally:
        programs[program] = real
    assert left[0] <= 0, f"{program} was not called"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", letter_rows(20))


def generated(llm, **options):
    return [output.token_ids for output in llm.generate(random_prompts([5, 9]), PARAMS, **options)]


def test_other_errors_stay_as_they_are():
    error = jax.errors.JaxRuntimeError("INTERNAL: broken")
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"), room_for("nothing"):
        raise error


@pytest.mark.parametrize("program", ["forward/base/8", "sample/greedy/6"])
def test_the_requests_of_a_step_fail_and_others_go_on(llm, program):
    expected = generated(llm)
    with failing(llm, program):
        futures = [
            future for prompt in random_prompts([5, 9]) for future in llm.submit(prompt, PARAMS)
        ]
        states = [future.result(timeout=60) for future in futures]
    failed = [state for state in states if state.error]
    assert failed and all("no memory left for step" in state.error for state in failed)
    assert generated(llm) == expected
    assert llm.engine.scheduler.pool_usage == 0


def test_no_prefix_is_shared_that_a_failed_step_was_to_write(llm):
    prompts = random_prompts([30], seed=41)
    with failing(llm, "forward/base/48"):
        (future,) = llm.submit(prompts[0], PARAMS)
        assert future.result(timeout=60).error
    alone = replace(PARAMS, prompt_logprobs=0)  # shares nothing, as every token is to be computed
    given, expected = (llm.generate(prompts, params)[0].token_ids for params in (PARAMS, alone))
    assert given == expected


@pytest.mark.parametrize("program", ["forward/adapters/48", "unit/layer", "commit"])
def test_the_job_of_a_step_fails_and_requests_go_on(llm, rows, program):
    expected = generated(llm)
    with failing(llm, program):
        job = llm.finetune(job_config("poor", rows)).wait()
    assert job.status == "failed" and "no memory left for step" in job.reason
    assert generated(llm) == expected
    again = llm.finetune(job_config("poor", rows)).wait()
    assert again.status == "succeeded"
    assert llm.engine.scheduler.pool_usage == 0


def test_a_job_that_does_not_fit_is_refused(llm, rows):
    free = llm.engine.adapters.directory.num_free
    refused = pytest.raises(OutOfMemory, match=r"no memory left for job 'late': lower cache")
    zeros = (name for name in llm.engine.runner.programs if name.startswith("zeros/job_state/"))
    state = next(name for name in zeros if not name.endswith("master"))  # that is read in
    with failing(llm, state), refused:
        llm.finetune(job_config("late", rows))
    assert llm.engine.adapters.directory.num_free == free
    assert llm.finetune(job_config("late", rows, steps=1)).wait().status == "succeeded"


def test_a_checkpoint_without_memory_is_left_out(llm, rows):
    """The result is written all the same: of a job that has ended no copy is needed."""
    whole = llm.finetune(job_config("whole", rows, steps=6)).wait()
    with failing(llm, "copy_state", times=2):
        job = llm.finetune(job_config("poor", rows, steps=6)).wait()
    assert job.status == "succeeded" and job.losses == whole.losses
    told = [message for message in job.messages if "no memory left for a copy" in message]
    assert ["at step 4" in told[0], "at step 6" in told[1]] == [True, True]
    assert job.adapter_dir is not None and (job.adapter_dir / "adapter_config.json").exists()


def test_an_adapter_without_memory_is_not_served(llm, rows):
    job = llm.finetune(job_config("made", rows, steps=1)).wait()
    with failing(llm, "write_row"), pytest.raises(OutOfMemory, match="adapter 'given'"):
        llm.load_adapter("given", job.adapter_dir)
    assert "given" not in llm.adapters


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_arrays_that_are_lost_end_the_engine(llama, tmp_path):
    engine = start_engine(llama, tmp_path)
    for array in jax.tree.leaves(engine.engine.runner.pages[0]):
        array.delete()
    with failing(engine, "forward/base/48"), pytest.raises(EngineStopped, match="no mem"):
        engine.generate(random_prompts([12]), PARAMS)
    assert not engine.alive
