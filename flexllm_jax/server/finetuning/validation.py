"""What a job's files hold: read row by row, in threads of their own, before it is queued."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy.orm import Session

from flexllm_jax.config import METHODS, Config, ReinforcementConfig
from flexllm_jax.config.sections.graders import asked_models
from flexllm_jax.finetune.data import Dataset, DatasetError, load_dataset
from flexllm_jax.finetune.data.questions import questions
from flexllm_jax.finetune.data.rows import BadRow, read_rows
from flexllm_jax.finetune.reinforcement.prompts import (
    PromptDataset,
    PromptReader,
    load_prompts,
    reader_of,
)
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.server.database import Database, JobRow
from flexllm_jax.server.engines.registry import ModelRegistry
from flexllm_jax.server.finetuning.files import FileStore
from flexllm_jax.server.finetuning.records import SHOWN_ROWS, tell_row
from flexllm_jax.server.finetuning.schema import CreateJob

_AT_ONCE = 4  # jobs whose files are read

log = logging.getLogger(__name__)


class UnusableFiles(Exception):
    """A job cannot run with its files; `code` and `param` are those of the job's error."""

    def __init__(self, code: str, message: str, param: str | None = None):
        super().__init__(message)
        self.code, self.param = code, param


@dataclass(frozen=True)
class ValidatedJob:
    """What a job's files hold, by kind ("training", "validation"), and what follows from them: the
    tree of its FinetuneConfig, the hyperparameters that were left to choose, and the first
    questions that are asked there."""

    datasets: dict[str, Dataset | PromptDataset]
    config: dict[str, Any]
    hyperparameters: dict[str, Any]
    questions: list[dict[str, Any]]


class FileValidation:
    """Reads the files of jobs, of each of `turns` (by the job's owner) one job after the other."""

    def __init__(
        self,
        config: Config,
        database: Database,
        files: FileStore,
        models: ModelRegistry,
        tokenizer: Any,
    ):
        self._config, self._database, self._files = config, database, files
        self._models = models
        self._tokenizer = tokenizer  # of which only what many threads may use at once is used
        self._model = ModelConfig.from_hf(config.model.path, config.model.max_model_len)
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="validation")
        self._stopping: dict[str, threading.Event] = {}  # by job whose files are being read
        self.turns: defaultdict[str | None, asyncio.Lock] = defaultdict(asyncio.Lock)

    def stop(self, job_id: str) -> None:
        """Read no further, if a job's files are being read."""
        if (event := self._stopping.get(job_id)) is not None:
            event.set()

    def close(self) -> None:
        """Drop what has not begun, and end the rest at its next row."""
        for job_id in self._stopping:
            self.stop(job_id)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def read(self, job: JobRow) -> ValidatedJob:
        """Read a job's files row by row. Raises UnusableFiles."""
        body = CreateJob.model_validate(job.request)
        limit = self._config.finetune.max_tokens
        loop = asyncio.get_running_loop()
        files = {"training": job.training_file, "validation": job.validation_file}
        loaded: dict[str, Dataset | PromptDataset] = {}
        stopping = self._stopping[job.id] = threading.Event()
        try:
            for kind, file_id in files.items():
                if file_id is not None:
                    loaded[kind] = await loop.run_in_executor(
                        self._threads, self._load, file_id, limit, body, stopping
                    )
        except DatasetError as error:
            reason = str(error).replace(f"{self._files.folder}/", "")
            if not stopping.is_set():
                await self._tell_bad_rows(job.id, files)
            raise UnusableFiles("invalid_training_file", reason, "training_file") from None
        except Exception as error:
            log.exception("validation of %s", job.id)
            message = f"the files could not be read: {error!r}"
            raise UnusableFiles("server_error", message) from error
        finally:
            stopping.set()  # where it is cancelled the thread goes on
            del self._stopping[job.id]
        data = loaded["training"]
        tree, shown = body.tree(self._config, job.id, job.request["seed"], data.tokens / len(data))
        if (grader := tree["method"].get("grader")) is not None:
            tree["method"]["grader"] = self._for_engine(grader)
        tree["dataset"] = str(self._files.path(job.training_file))
        if job.validation_file is not None:
            tree["validation"] = str(self._files.path(job.validation_file))
        if job.init_adapter is not None:  # what the name meant when the job was created
            tree["init_adapter"] = job.init_adapter
        return ValidatedJob(loaded, tree, shown, self._questions(loaded))

    def _questions(self, loaded: dict[str, Dataset | PromptDataset]) -> list[dict[str, Any]]:
        section = self._config.trackers
        context = self._model.context_length(self._config.model.max_model_len)
        rows = loaded.get("validation", loaded["training"]).items
        found = questions(rows, section.samples, context - section.sample_tokens)
        return [question._asdict() for question in found]

    def _for_engine(self, grader: dict[str, Any]) -> dict[str, Any]:
        """The same grader; adapters that it asks have the names that engines know."""
        grader = copy.deepcopy(grader)
        for _, part in asked_models(grader):
            if (adapter := self._models.adapters.get(part["model"])) is not None:
                part["model"] = adapter.engine_name
        return grader

    def _prompt_reader(self, body: CreateJob, limit: int) -> PromptReader:
        method = ReinforcementConfig.model_validate(body.settings)
        context = self._model.context_length(self._config.model.max_model_len)
        return reader_of(method, self._tokenizer, self._model.vocab_size, min(limit, context))

    async def _tell_bad_rows(self, job_id: str, files: dict[str, str | None]) -> None:
        """Add events on the first rows that cannot be read, of files that cannot be used."""
        loop = asyncio.get_running_loop()
        bad = await loop.run_in_executor(self._threads, self._bad_rows, files)

        def tell(session: Session) -> None:
            for kind, line, reason in bad:
                tell_row(session, job_id, kind, line, reason)

        await self._database.until_written(tell)

    def _bad_rows(self, files: dict[str, str | None]) -> list[tuple[str, int, str]]:
        """In the thread that validates, as the database's serves everybody: kind of the file, line
        and reason. Of rows without end the first are enough."""
        found: list[tuple[str, int, str]] = []
        for kind, file_id in files.items():
            rows = read_rows(self._files.path(file_id)) if file_id else iter(())
            bad = ((kind, line, row.reason) for line, row in rows if isinstance(row, BadRow))
            with contextlib.suppress(DatasetError):  # the error that failed the job says it
                found += islice(bad, SHOWN_ROWS)
        return found

    def _load(
        self, file_id: str, limit: int, body: CreateJob, stopping: threading.Event
    ) -> Dataset | PromptDataset:
        path = self._files.path(file_id)
        if (rewards := body.rewards) is not None:
            return load_prompts(
                path,
                self._prompt_reader(body, limit),
                body.grader_of(rewards, self._config).reads,
                go_on=lambda: not stopping.is_set(),
            )
        return load_dataset(
            path,
            self._tokenizer,
            max_seq_len=limit,
            train_on=body.train_on,
            vocab_size=self._model.vocab_size,
            eos_token_ids=self._model.eos_token_ids,
            pairs=METHODS[body.method_type].pairs,
            max_pair_tokens=limit,
            go_on=lambda: not stopping.is_set(),
        )
