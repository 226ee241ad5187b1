"""What a job may go on from: every field that its checkpoint depends on is checked by name, and the
rest of the data is taken whatever batches it is cut into."""

import json

import numpy as np
import pytest

from flexllm_jax.config import DpoConfig, FinetuneConfig
from flexllm_jax.finetune.data import Dataset, DatasetError, TrainingSequence
from flexllm_jax.finetune.dataset import DatasetSource, Supervised
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.finetune.resume import made_with, refusal
from flexllm_jax.finetune.source import Step
from flexllm_jax.peft.adapter import Adapter, LoraConfig
from flexllm_jax.peft.bank import BankShape
from flexllm_jax.peft.bottleneck import BottleneckConfig
from flexllm_jax.peft.ia3 import Ia3Config
from flexllm_jax.peft.prefix import PrefixConfig

BANK = BankShape(3, 8, ("q", "v"))
LORA = {"r": 4, "alpha": 8.0, "target_modules": ("q_proj",)}


def rows(count=20, length=10, offset=0):
    sequences = [
        TrainingSequence(np.full(length, row + offset, np.int32), np.arange(length) > 0)
        for row in range(count)
    ]
    return Dataset(None, "text", count, tuple(sequences), (), 0)  # type: ignore[arg-type]


def make_job(peft=None, bank=BANK, data=None, start=None, weights="1a2b3c4d", **fields):
    fields = {"name": "j", "dataset": "rows.jsonl", "epochs": 2, "batch_tokens": 40} | fields
    if "steps" in fields:
        del fields["epochs"]
    config = peft or LoraConfig(**LORA)
    adapter = Adapter(config, start or {(0, "q"): {"a": np.ones((2, 4), np.float32)}})
    fields = FinetuneConfig(**fields)
    source = DatasetSource(fields, Supervised(), data or rows(), None, 96, 40)
    job = FinetuneJob(fields, config, adapter, source)
    job.made_with = made_with(job, job.config, bank, weights)
    return job


def trained(job, steps):
    """Rows that the next `steps` batches hold."""
    seen = []
    while steps and (item := job.next()):
        if isinstance(item, Step):
            job.step_dispatched(item)
            steps -= 1
        else:
            seen += item.token[::10].tolist()
    return seen


def info_of(job):
    """What a checkpoint keeps, as it comes back from disk."""
    return json.loads(json.dumps(job.checkpoint_info(job.position)))


def test_another_beta_is_refused_by_name():
    stronger, before = (make_job(method=DpoConfig(beta=beta)) for beta in (0.2, 0.1))
    reason = refusal(stronger, info_of(before))
    assert reason is not None and "method.beta=0.1 (now 0.2)" in reason


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("model.path", {"weights": "5e6f7a8b"}),
        ("peft.r", {"peft": LoraConfig(**LORA | {"r": 8})}),
        ("peft.alpha", {"peft": LoraConfig(**LORA | {"alpha": 16.0})}),
        ("peft.use_rslora", {"peft": LoraConfig(**LORA, use_rslora=True)}),
        ("peft.target_modules", {"peft": LoraConfig(**LORA | {"target_modules": ("v_proj",)})}),
        ("peft.layers_to_transform", {"peft": LoraConfig(**LORA, layers_to_transform=(0,))}),
        ("peft.rank_pattern", {"peft": LoraConfig(**LORA, rank_pattern={"q_proj": 2})}),
        ("peft.alpha_pattern", {"peft": LoraConfig(**LORA, alpha_pattern={"q_proj": 2.0})}),
        ("peft.init", {"peft": LoraConfig(**LORA, init="olora")}),
        ("peft.type", {"peft": Ia3Config()}),
        ("seed", {"seed": 1}),
        ("adapters.max_rank", {"bank": BankShape(3, 16, ("q", "v"))}),
        ("adapters.target_modules", {"bank": BankShape(3, 8, ("q",))}),
        ("adapters.kinds", {"bank": BankShape(3, 8, ("q", "v"), ("lora", "ia3"))}),
        ("method.type", {"method": DpoConfig()}),
        ("train_on", {"train_on": "all", "data": rows(offset=1)}),
        ("max_seq_len", {"max_seq_len": 8, "data": rows(length=8)}),
        ("format", {"format": "text", "data": rows(offset=1)}),
        ("dataset", {"dataset": "others.jsonl", "data": rows(offset=1)}),
    ],
)
def test_what_a_checkpoint_depends_on_is_refused_by_name(field, change):
    reason = refusal(make_job(**change), info_of(make_job()))
    assert reason is not None and f"{field}=" in reason and "resume: false" in reason
    assert refusal(make_job(**change), info_of(make_job(**change))) is None


@pytest.mark.parametrize(
    ("field", "before", "now"),
    [
        ("peft.bottleneck_size", BottleneckConfig(8), BottleneckConfig(4)),
        ("peft.num_virtual_tokens", PrefixConfig(8), PrefixConfig(4)),
    ],
)
def test_the_sizes_of_other_kinds(field, before, now):
    reason = refusal(make_job(now), info_of(make_job(before)))
    assert reason is not None and f"{field}=8 (now 4)" in reason


def test_the_order_of_patterns_counts():
    """Of two that match, the first does."""
    patterns = {"q_proj": 2, ".*proj": 4}
    one = LoraConfig(**LORA, rank_pattern=patterns)
    other = LoraConfig(**LORA, rank_pattern=dict(reversed(patterns.items())))
    reason = refusal(make_job(other), info_of(make_job(one)))
    assert reason is not None and "peft.rank_pattern" in reason


def test_another_adapter_to_start_from():
    def job(value):
        start = {(0, "q"): {"a": np.full((2, 4), value, np.float32)}}
        return make_job(init_adapter="folder", start=start)

    assert refusal(job(1.0), info_of(job(1.0))) is None
    for other in (job(2.0), make_job()):
        reason = refusal(other, info_of(job(1.0)))
        assert reason is not None and "init_adapter" in reason


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": {"lr": 1e-3}},
        {"weight": 2.0, "priority": 3},
        {"batch_tokens": 100},
        {"epochs": 5},
        {"steps": 7},
        {"validation_every": 2},
        {"dataset": "moved.jsonl", "max_seq_len": 64},
    ],
    ids=str,
)
def test_what_only_says_how_to_go_on_may_change(change):
    assert refusal(make_job(**change), info_of(make_job())) is None


def test_a_checkpoint_that_does_not_say_what_it_was_made_with():
    info = info_of(make_job())
    del info["made_with"]
    assert refusal(make_job(LoraConfig(**LORA | {"alpha": 1.0})), info) is None


def test_a_checkpoint_that_keeps_losses_alone():
    """As versions wrote it that had one loss."""
    job = make_job()
    trained(job, 2)
    info = info_of(job)
    del info["metrics"], info["validations"], info["references"], info["validation"]
    info |= {"losses": [2.0, 1.5], "gradient_norms": [0.3, 0.2], "validation_losses": [[2, 1.6]]}
    later = make_job()
    later.restore(2, info)
    assert (later.losses, later.gradient_norms) == ([2.0, 1.5], [0.3, 0.2])
    assert later.validation_losses == [(2, 1.6)]


class TestTheRestOfTheData:
    """20 rows of 10 tokens; the first run does 3 steps of 4 rows."""

    def first(self, steps=3):
        job = make_job()
        seen = trained(job, steps)
        return seen, steps, info_of(job)

    @pytest.mark.parametrize("batch_tokens", [10, 40, 70, 500])
    def test_in_other_batches(self, batch_tokens):
        seen, step, info = self.first()
        job = make_job(batch_tokens=batch_tokens)
        job.restore(step, info)
        seen += trained(job, job.total_steps - step)
        assert sorted(seen) == sorted(2 * list(range(20)))
        assert sorted(seen[:20]) == list(range(20)), "one epoch after the other"

    def test_the_same_configuration_has_as_many_steps_as_it_had(self):
        _, step, info = self.first()
        job = make_job()
        job.restore(step, info)
        assert job.total_steps == make_job().total_steps == 10

    @pytest.mark.parametrize(
        ("change", "total"), [({"epochs": 1}, 5), ({"epochs": 4}, 20), ({"steps": 7}, 7)]
    )
    def test_epochs_against_steps(self, change, total):
        _, step, info = self.first()
        job = make_job(**change)
        job.restore(step, info)
        assert job.total_steps == total

    def test_from_steps_to_epochs(self):
        first = make_job(steps=6)
        seen = trained(first, 6)  # 20 rows and 4 of the next epoch
        job = make_job(epochs=2, batch_tokens=80)
        job.restore(6, info_of(first))
        assert job.total_steps == 6 + 2
        assert sorted(seen + trained(job, 2)) == sorted(2 * list(range(20)))

    def test_exactly_at_the_end(self):
        _, step, info = self.first(5)
        job = make_job(epochs=1)
        job.restore(step, info)
        assert job.total_steps == 5

    def test_past_the_end_is_refused(self):
        _, step, info = self.first(7)
        with pytest.raises(ValueError, match=r"steps=6: .* has done 7 steps; raise steps"):
            make_job(steps=6).restore(step, info)
        with pytest.raises(DatasetError, match="epochs=1, but the checkpoint is in epoch 2"):
            make_job(epochs=1).restore(step, info)
