"""What happens when the device has no memory left, although everything was planned (`memory`).

What is allocated between two steps (a job's state, a checkpoint's copy, an adapter) is refused, and
nothing else is touched. In a step, its requests and jobs fail and the engine goes on, if the arrays
that programs update in place are still there. If one of them went down with the program that was to
update it, so does the engine.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from flexllm_jax.engine.device.runner import Runner
from flexllm_jax.errors import UserError
from flexllm_jax.finetune.job import FinetuneJob

_REMEDY = (
    "lower cache.memory_fraction or finetune.max_tokens, or plan for more jobs with "
    "server.max_running_jobs"
)


class OutOfMemory(UserError):
    """The device has no memory left for something; one line."""


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """OutOfMemory, naming `what`, in the place of JAX's error."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        raise OutOfMemory(f"the device has no memory left for {what}: {_REMEDY}") from error


def copy_if_room(job: FinetuneJob, copy: Callable[[FinetuneJob], dict]) -> dict | None:
    """A copy of a job's state; None, and the job is told, when there is no memory left for it."""
    try:
        with room_for(f"a copy of job {job.name!r} at step {job.dispatched}"):
            return copy(job)
    except OutOfMemory as error:
        job.note(str(error))
        return None


def is_intact(runner: Runner) -> bool:
    """Whether all arrays that programs update are there. Of several processes nobody knows."""
    if jax.process_count() > 1:
        return False
    updated = (runner.pages, runner.bank, runner.finetune, runner.pending)
    arrays = jax.tree.leaves((*updated, runner.last_tokens, runner.history, runner.page_tables))
    return not any(array.is_deleted() for array in arrays)
