"""A scheduler that writes down every step: what it was told, and what it planned.

One JSON line a step, after a first one with the configuration. A scheduler decides from its calls
alone, so making the same calls again gives the same plans: `replay` does that, which shows
afterwards why a step looked as it did, or what another version would have done.
"""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from scheduler.config import SchedulerConfig
from scheduler.coserving import Scheduler
from scheduler.latency.model import LatencyModel
from scheduler.policies import make_policy
from scheduler.request import Microbatch, Request, Sequence, Slo, StepPlan


class LoggedScheduler(Scheduler):
    """A scheduler with the policy of that name that writes a line to `file` for every step."""

    def __init__(
        self, config: SchedulerConfig, latency: LatencyModel, policy: str, file: TextIO
    ) -> None:
        super().__init__(config, latency, make_policy(policy))
        self._file = file
        self._calls: list[list[Any]] = []  # since the last line
        self._write(
            {
                "config": dataclasses.asdict(config),
                "bases": latency.bases,
                "coefficients": latency.coefficients,
                "spread": latency.spread,
                "policy": policy,
            }
        )

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def plan(self, now: float) -> StepPlan | None:
        """See `Scheduler.plan`."""
        plan = super().plan(now)
        if plan is None:
            self._calls.append(["plan", now])
        else:
            self._write({"now": now, "calls": self._calls, "plan": describe(plan)})
            self._file.flush()
            self._calls = []
        return plan

    def reads_first(self) -> bool:
        """See `Scheduler.reads_first`."""
        if self.inference.drafting:
            self._calls.append(["reads_first"])
        return super().reads_first()

    def add(self, work: Request | Microbatch) -> None:
        """See `Scheduler.add`."""
        super().add(work)
        kind = "add_request" if isinstance(work, Request) else "add_microbatch"
        self._calls.append([kind, dataclasses.asdict(work)])

    def complete(
        self,
        plan: StepPlan,
        sampled: Mapping[str, int],
        stopped: Collection[str],
        now: float,
        measured_s: float | None = None,
        accepted: Mapping[str, list[int]] | None = None,
    ) -> list[Sequence]:
        """See `Scheduler.complete`."""
        # `measured_s` reaches `observe`, which writes it down.
        more = [None, dict(accepted)] if accepted else []
        self._calls.append(["complete", dict(sampled), sorted(stopped), now, *more])
        return super().complete(plan, sampled, stopped, now, measured_s, accepted)

    def observe(self, plan: StepPlan, measured_s: float) -> None:
        """See `Scheduler.observe`."""
        self._calls.append(["observe", plan.step, measured_s])
        super().observe(plan, measured_s)

    def cancel(self, request_id: str) -> bool:
        """See `Scheduler.cancel`."""
        self._calls.append(["cancel", request_id])
        return super().cancel(request_id)

    def forget_prefixes(self) -> None:
        """See `Scheduler.forget_prefixes`."""
        self._calls.append(["forget_prefixes"])
        super().forget_prefixes()

    def cancel_microbatch(self, microbatch_id: int) -> bool:
        """See `Scheduler.cancel_microbatch`."""
        self._calls.append(["cancel_microbatch", microbatch_id])
        return super().cancel_microbatch(microbatch_id)

    def add_job(self, job: str, weight: float = 1.0, priority: int = 0) -> None:
        """See `Scheduler.add_job`."""
        self._calls.append(["add_job", job, weight, priority])
        super().add_job(job, weight, priority)

    def remove_job(self, job: str) -> None:
        """See `Scheduler.remove_job`."""
        self._calls.append(["remove_job", job])
        super().remove_job(job)

    def pause_job(self, job: str) -> None:
        """See `Scheduler.pause_job`."""
        self._calls.append(["pause_job", job])
        super().pause_job(job)

    def resume_job(self, job: str) -> None:
        """See `Scheduler.resume_job`."""
        self._calls.append(["resume_job", job])
        super().resume_job(job)


def describe(plan: StepPlan) -> dict[str, Any]:
    """A plan as plain JSON data."""
    chunks = {
        part: [[c.sequence.request_id, c.start, c.length] for c in getattr(plan, part)]
        for part in ("decode", "prefill")
    }
    forward, backward = plan.forward, plan.backward
    copies = {"state_copies": [list(copy) for copy in plan.state_copies]}
    return {
        "step": plan.step,
        **(copies if plan.state_copies else {}),
        **chunks,
        "forward": forward
        and [
            forward.microbatch.microbatch_id,
            forward.start,
            forward.length,
            forward.first_token_slot,
        ],
        "backward": backward
        and [backward.microbatch.microbatch_id, backward.units.start, backward.units.stop],
        "token_bucket": plan.token_bucket,
        "preempted": list(plan.preempted),
        "parked": list(plan.parked),
        "predicted_s": plan.predicted_s,
    }


# Fields of `SchedulerConfig` and `Microbatch` under the names that earlier logs have.
_RENAMED = {"backward_window": "unit_tokens", "batch": "weights_version"}


def replay(path: Path | str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Plan a log's steps again; yields each plan as logged and as made now, both as `describe`d.

    ValueError, naming the line, if the file is not such a log.
    """
    number = 0
    with open(path, encoding="utf-8") as file:
        try:
            scheduler = _restore(json.loads(next(file, "")))
            plans: dict[int, StepPlan] = {}
            outstanding: deque[StepPlan] = deque()
            for line in file:
                number += 1
                logged = json.loads(line)
                for call in logged["calls"]:
                    _call(scheduler, plans, outstanding, *call)
                plan = scheduler.plan(logged["now"])
                if plan is not None:
                    plans[plan.step] = plan
                    outstanding.append(plan)
                yield logged["plan"], describe(plan) if plan else {}
        except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}:{number + 1}: not a log of plans ({error!r})") from error


def _restore(head: dict[str, Any]) -> Scheduler:
    fields = _renamed(head["config"]) | {
        "slo": Slo(**head["config"]["slo"]),
        "token_buckets": tuple(head["config"]["token_buckets"]),
    }
    bases = {int(bucket): seconds for bucket, seconds in head["bases"].items()}
    latency = LatencyModel(bases, head["coefficients"], spread=head["spread"])
    return Scheduler(SchedulerConfig(**fields), latency, make_policy(head["policy"]))


def _call(
    scheduler: Scheduler,
    plans: dict[int, StepPlan],
    outstanding: deque[StepPlan],
    name: str,
    *arguments: Any,
) -> None:
    """Make a logged call again."""
    if name == "add_request":
        fields: dict[str, Any] = _hashable(arguments[0])
        fields["slo"] = fields["slo"] and Slo(**fields["slo"])
        scheduler.add(Request(**fields))
    elif name == "add_microbatch":
        scheduler.add(Microbatch(**_renamed(_hashable(arguments[0]))))
    elif name == "complete":
        scheduler.complete(outstanding.popleft(), *arguments)
    elif name == "observe":
        step, measured_s = arguments
        scheduler.observe(plans.pop(step), measured_s)
    else:
        getattr(scheduler, name)(*arguments)


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    return {_RENAMED.get(name, name): value for name, value in fields.items()}


def _hashable(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as tuples."""

    def freeze(value: Any) -> Any:
        return tuple(map(freeze, value)) if isinstance(value, list) else value

    return {name: freeze(value) for name, value in fields.items()}
