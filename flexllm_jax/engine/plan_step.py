"""Turns a step plan into the arrays of a step: the only per-token work of the host.

Tokens lie in the order decode, prefill, finetuning. The page table of every request row is kept
between steps, and only pages that are new are written to it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flexllm_jax.engine.device.runner import Runner
from flexllm_jax.engine.jobs.microbatch_work import MicrobatchInWork
from flexllm_jax.engine.memory.step_inputs import StepInputs, page_writes
from flexllm_jax.engine.request import RequestState
from flexllm_jax.engine.sampling.constraints import Constraint
from flexllm_jax.engine.sampling.params import BANNED, WANTED
from flexllm_jax.engine.sampling.sampler import SamplingRows, row_biases
from flexllm_jax.peft.dropout import JobDropout
from scheduler import request as planning
from scheduler.latency.model import Sampling
from scheduler.request import Chunk, Decode, FinetuneForward, StepPlan


@dataclass(frozen=True)
class PromptTargets:
    """Prompt tokens whose log-probabilities a step yields.

    tokens: the prompt's tokens from `position` on; the outputs that predict them are the step's
    from `first_output` on. others: more tokens at each of them.
    """

    state: RequestState
    position: int
    tokens: tuple[int, ...]
    first_output: int
    others: tuple[tuple[int, ...], ...] = ()


@dataclass
class PlannedStep:
    """A step ready to run: which forward program, its vector, and who is sampled how.

    sampling        the kind that does what all its requests need
    logprobs        whether any wants log-probabilities of what is sampled
    constraints     of outputs, with their rows of `rows`
    awaits_tokens   which tokens they allow depends on those of the step before
    drafts          by number of an output: the token that has to come, or those after it of the
                    same request are void
    wanted          by row, the tokens whose log-probabilities are asked for; None: of no row
    dropout         of the finetuning tokens; None: of nothing
    """

    variant: str
    vector: np.ndarray
    sampled: list[RequestState]
    rows: SamplingRows
    sampling: Sampling
    logprobs: bool
    prompt_targets: list[PromptTargets]
    constraints: list[tuple[Constraint, int]] = field(default_factory=list)
    awaits_tokens: bool = False
    drafts: dict[int, int] = field(default_factory=dict)
    wanted: np.ndarray | None = None
    dropout: JobDropout | None = None


class StepBuilder:
    """Builds the inputs of steps, and remembers the pages of each request row."""

    def __init__(self, runner: Runner):
        self._runner = runner
        self._tables = np.zeros((runner.sizes.rows, runner.sizes.pages_per_sequence), np.int32)
        # What the device's tables do not have yet: row, first column, pages.
        self._new_pages: list[tuple[int, int, Sequence[int]]] = []
        self._unfinished = 0  # slot of the state of the finetuning sequence that goes on

    def build(
        self,
        plan: StepPlan,
        requests: dict[str, RequestState],
        microbatch: MicrobatchInWork | None,
    ) -> PlannedStep:
        """The step of a plan; `microbatch` is the one whose tokens the plan's forward holds."""
        runner, page_size = self._runner, self._runner.sizes.page_size
        shape = runner.sizes.step_shapes[plan.token_bucket]
        inputs, vector = StepInputs.empty(
            shape, runner.num_pages * page_size, runner.sizes.finetune_slots
        )
        rows = SamplingRows.neutral(shape.samples, no_row=runner.sizes.rows)
        planned = PlannedStep("base", vector, [], rows, Sampling.GREEDY, False, [])
        self._add_decode(planned, inputs, plan.decode, requests)
        at = len(plan.decode)
        for s, chunk in enumerate(plan.prefill, start=at):
            sequence = chunk.sequence
            state = requests[sequence.request_id]
            start, stop, end = chunk.start, chunk.start + chunk.length, at + chunk.length
            where = slice(at, end)
            row = self._prepare_row(sequence, state)
            inputs.token[where] = [*sequence.tokens[start:stop], *chunk.drafts]
            self._want_prompt_logprobs(planned, state, chunk, at)
            position = np.arange(start, stop)
            inputs.position[where] = position + state.prefix_tokens
            inputs.kv_slot[where] = (
                self._tables[row, position // page_size] * page_size + position % page_size
            )
            if state.adapter:
                inputs.adapter[where] = state.bank_row
                planned.variant = "adapters"
            inputs.kv_lengths[s] = stop
            inputs.table[s] = row
            inputs.query_starts[s + 1 :] = end
            first = at if chunk.drafts else end - 1
            for token in range(first, end if chunk.samples else first):
                self._sample(planned, inputs, state, sequence, token, ahead=token - first)
            if chunk.drafts:
                # The next token is the host's to tell: which of these it is, is not known here.
                last = len(planned.sampled)
                planned.rows.row[last - chunk.length : last] = self._runner.sizes.rows
                planned.drafts.update(enumerate(chunk.drafts, start=last - chunk.length))
            at = end
        inputs.num_decode[...] = len(plan.decode)
        sequences = len(plan.decode) + len(plan.prefill)
        if plan.forward is not None and microbatch is not None:
            planned.variant, planned.dropout = "adapters", microbatch.dropout
            sequences = self._add_finetuning(plan.forward, inputs, microbatch, at, sequences)
        inputs.num_sequences[...] = sequences
        for places in page_writes(self._new_pages, runner.page_tables.shape):
            runner.write_pages(places)
        self._new_pages.clear()
        return planned

    def _add_decode(
        self,
        planned: PlannedStep,
        inputs: StepInputs,
        decode: Decode,
        requests: dict[str, RequestState],
    ) -> None:
        """The first tokens of the step: as there may be thousands, no array is made for one."""
        count, page_size = len(decode), self._runner.sizes.page_size
        if not count:
            return
        rows: list[int] = []
        tokens: list[int] = []
        adapters: list[int] = []
        prefixes: list[int] = []
        for at, sequence in enumerate(decode.sequences):
            state = requests[sequence.request.request_id]
            row, position = self._prepare_row(sequence, state), decode.positions[at]
            rows.append(row)
            known = position < len(sequence.tokens)
            tokens.append(sequence.tokens[position] if known else -1 - row)
            adapters.append(state.bank_row)
            prefixes.append(state.prefix_tokens)
            self._sample(planned, inputs, state, sequence, at)
        row, position = np.array(rows), np.array(decode.positions)
        inputs.token[:count] = tokens
        inputs.position[:count] = position + np.array(prefixes)
        inputs.kv_slot[:count] = (
            self._tables[row, position // page_size] * page_size + position % page_size
        )
        inputs.adapter[:count] = adapters
        if max(adapters) >= 0:
            planned.variant = "adapters"
        inputs.kv_lengths[:count] = position + 1
        inputs.table[:count] = row
        inputs.query_starts[1 : count + 1] = np.arange(1, count + 1)
        inputs.query_starts[count + 1 :] = count

    def _prepare_row(self, sequence: planning.Sequence, state: RequestState) -> int:
        """Bring the row's page table up to date; start its history if it is new in the row."""
        row = sequence.row
        if row is None:
            raise RuntimeError(f"request {state.request_id} is planned without a row")
        if state.row != row or state.preemptions != sequence.preemptions:
            state.row, state.preemptions, state.copied_pages = row, sequence.preemptions, 0
            if state.started_at is None:
                state.started_at, state.cached_tokens = time.monotonic(), sequence.cached_tokens
            if state.params.has_row_state:
                vocab_size = self._runner.model.vocab_size
                counts = np.bincount(np.array(state.output, np.int64), minlength=vocab_size)
                prompt = np.zeros(vocab_size, np.bool_)
                prompt[list(state.prompt)] = True
                biases = row_biases(state.params.logit_bias)
                self._runner.write_history(row, counts.astype(np.int32), prompt, biases)
        new = sequence.pages[state.copied_pages :]
        if new:
            self._tables[row, state.copied_pages : len(sequence.pages)] = new
            self._new_pages.append((row, state.copied_pages, new))
            state.copied_pages = len(sequence.pages)
        return row

    def _sample(
        self,
        planned: PlannedStep,
        inputs: StepInputs,
        state: RequestState,
        sequence: planning.Sequence,
        token: int,
        ahead: int = 0,
    ) -> None:
        """Sample from the output of the step's token number `token`, for the request's next token
        or the one `ahead` of it."""
        i = len(planned.sampled)
        planned.sampled.append(state)
        inputs.sample[i] = token
        # The plan has counted the next one.
        index = len(sequence.output) + sequence.in_flight - 1 + ahead
        rows, params = planned.rows, state.params
        rows.row[i], rows.adapter[i] = sequence.row, state.bank_row
        if params.logprobs is not None:
            planned.logprobs = True
            if params.logprobs_at_temperature:
                rows.scale[i] = params.temperature or 1.0
            if count := len(params.logprob_token_ids):
                if planned.wanted is None:
                    planned.wanted = np.zeros((len(rows.row), WANTED), np.int32)
                planned.wanted[i, :count] = params.logprob_token_ids
        kind = state.sampling(index)
        if kind == Sampling.GREEDY:
            return
        planned.sampling = max(planned.sampling, kind)
        if state.constraint:
            planned.constraints.append((state.constraint, i))
            planned.awaits_tokens |= state.constraint.reads_tokens and sequence.in_flight > 1
        rows.index[i], rows.biased[i] = index, bool(params.logit_bias)
        rows.seed[i], rows.seed_high[i] = state.seed_words
        rows.temperature[i], rows.top_k[i] = params.temperature, params.top_k
        rows.top_p[i], rows.min_p[i] = params.top_p, params.min_p
        rows.repetition[i] = params.repetition_penalty
        rows.presence[i], rows.frequency[i] = params.presence_penalty, params.frequency_penalty
        if index < params.held_back:
            banned = sorted(state.stop_ids)[:BANNED]
            rows.banned[i, : len(banned)] = banned

    def _want_prompt_logprobs(
        self, planned: PlannedStep, state: RequestState, chunk: Chunk, at: int
    ) -> None:
        if state.params.prompt_logprobs is None or chunk.start >= len(state.prompt) - 1:
            return
        first = chunk.start + 1
        tokens = state.prompt[first : first + chunk.length]
        others = state.params.prompt_logprob_token_ids[first - 1 : first - 1 + len(tokens)]
        planned.prompt_targets.append(PromptTargets(state, first, tokens, at, others))

    def _add_finetuning(
        self,
        forward: FinetuneForward,
        inputs: StepInputs,
        current: MicrobatchInWork,
        at: int,
        sequences: int,
    ) -> int:
        """Append a range of the microbatch's tokens; returns the number of sequences in use."""
        packed = current.packed
        tokens = slice(forward.start, forward.start + forward.length)
        where = slice(at, at + forward.length)
        inputs.token[where] = packed.token[tokens]
        inputs.position[where] = packed.position[tokens]
        inputs.kv_slot[where] = current.kv_slot[tokens]
        inputs.adapter[where] = current.job.bank_slot - 1
        inputs.saved_row[where] = forward.first_token_slot + np.arange(tokens.start, tokens.stop)
        start, row = 0, self._runner.sizes.rows
        for part, pages in zip(packed.parts, current.pages, strict=True):
            first, last = max(start, tokens.start), min(start + len(part), tokens.stop)
            if first < last:
                at += last - first
                inputs.query_starts[sequences + 1 :] = at
                inputs.kv_lengths[sequences] = part.start + last - start
                inputs.table[sequences] = row
                shared = () if part.shared is None else current.pages[part.shared]
                self._new_pages.append((row, 0, (*shared, *pages)))
                sequences, row = sequences + 1, row + 1
            start += len(part)
        inputs.unfinished[0] = self._unfinished
        # What one sequence is read from, another is not written to.
        if row > self._runner.sizes.rows + 1:
            self._unfinished = 1 - self._unfinished
        inputs.unfinished[1] = self._unfinished
        return sequences
