"""Adapters in service: several in one batch, versions, the bank's slots, export and back."""

import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flexllm_jax import SamplingParams
from flexllm_jax.peft.adapter import AdapterError
from tests.checkpoints import make_llama
from tests.engines import (
    given_back,
    job_config,
    letter_rows,
    load_with_adapter,
    prompt_logprob_errors,
    random_prompts,
    reference_greedy,
    reference_logprobs,
    save_random_adapter,
    write_rows,
)

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
SCORES = SamplingParams(max_tokens=1, prompt_logprobs=5)
KINDS = {
    "seven": {},
    "rslora": {"r": 8, "lora_alpha": 3, "use_rslora": True, "target_modules": ["o_proj", "q_proj"]},
    "patterns": {
        "r": 2,
        "target_modules": ["down_proj", "k_proj", "v_proj"],
        "rank_pattern": {"down_proj": 5},
        "alpha_pattern": {"k_proj": 20},
    },
}


@pytest.fixture(scope="module")
def adapters(llama, tmp_path_factory):
    """{name: (folder, the model with it in peft)}, and the base model as None."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for seed, (name, options) in enumerate(KINDS.items()):
        path = save_random_adapter(llama, folder / name, seed, **options)
        found[name] = path, load_with_adapter(llama, path)
    return found


@pytest.fixture
def loaded(llm, adapters):
    for name, (path, _) in adapters.items():
        llm.load_adapter(name, path)
    return adapters


def submit(llm, prompt, params, adapter=None):
    return llm.submit(prompt, params, adapter)[0]


def test_many_adapters_in_one_batch_are_each_as_alone_in_peft(llm, loaded, llama_reference):
    models = {name: model for name, (_, model) in loaded.items()} | {None: llama_reference}
    prompts = random_prompts([9, 30, 55, 14, 21, 3, 40, 17])
    names = [*models, *models]
    futures = [submit(llm, p, GREEDY, n) for p, n in zip(prompts, names, strict=True)]
    for future, prompt, name in zip(futures, prompts, names, strict=True):
        assert future.result(60).output == reference_greedy(models[name], prompt, 24), name


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_peft(llm, loaded, name):
    for output in llm.generate(random_prompts([60, 7]), SCORES, adapter=name):
        expected = reference_logprobs(loaded[name][1], output.prompt_token_ids)
        assert prompt_logprob_errors(output, expected).max() < 1e-4 * np.abs(expected).max()


def test_steps_without_adapters_run_a_program_without_bypasses(llm, loaded, monkeypatch):
    variants = []
    forward = llm.engine.runner.forward

    def spy(variant, *arguments):
        variants.append(variant)
        return forward(variant, *arguments)

    monkeypatch.setattr(llm.engine.runner, "forward", spy)
    prompts = random_prompts([9, 30])
    llm.generate(prompts, GREEDY)
    assert set(variants) == {"base"}
    variants.clear()
    llm.generate(prompts, GREEDY, adapter="seven")
    assert set(variants) == {"adapters"}


def test_requests_finish_on_the_version_they_started_with(llm, llama, adapters, tmp_path):
    (old, old_model), new = adapters["seven"], save_random_adapter(llama, tmp_path / "new", seed=9)
    new_model = load_with_adapter(llama, new)
    directory = llm.engine.adapters.directory
    params = SamplingParams(max_tokens=110, ignore_eos=True)
    (prompt,) = random_prompts([20], seed=3)
    first = llm.load_adapter("live", old)
    future = submit(llm, prompt, params, "live")
    while not future.state.output:
        time.sleep(0.001)
    assert llm.load_adapter("live", new) == first + 1
    assert not future.done(), "the old request ended too soon: nothing is shown"
    assert [p.version for p in directory.retired] == [first]
    after = submit(llm, prompt, params, "live")
    assert future.result(60).output == reference_greedy(old_model, prompt, 110)
    assert after.result(60).output == reference_greedy(new_model, prompt, 110)
    assert not directory.retired


def test_an_unloaded_adapter_is_gone_for_new_requests_only(llm, loaded, adapters):
    llm.load_adapter("leaving", adapters["rslora"][0])
    (prompt,) = random_prompts([20], seed=4)
    params = SamplingParams(max_tokens=90, ignore_eos=True)
    future = submit(llm, prompt, params, "leaving")
    llm.unload_adapter("leaving")
    with pytest.raises(AdapterError, match=r"adapter 'leaving' is not loaded; loaded adapters: "):
        llm.generate([prompt], params, adapter="leaving")
    assert future.result(60).output == reference_greedy(loaded["rslora"][1], prompt, 90)


def test_a_full_bank_is_one_clear_line_and_unloading_makes_room(llm, adapters):
    path = adapters["patterns"][0]
    names = [f"tenant-{i}" for i in range(5)]
    for name in names:
        llm.load_adapter(name, path)
    with pytest.raises(AdapterError, match=r"no free slot for adapter 'more': all 5 .*slots") as e:
        llm.load_adapter("more", path)
    assert "\n" not in str(e.value)
    assert llm.adapters == names
    with pytest.raises(AdapterError, match="no free slot for job 'late' to train in"):
        llm.finetune(job_config("late", write_rows(path / "rows.jsonl", letter_rows(3))))
    llm.unload_adapter(names[0])
    llm.load_adapter("more", path)


class TestRefused:
    def test_an_adapter_of_another_base_model(self, llm, tmp_path):
        other = make_llama(tmp_path / "other", hidden_size=32, vocab=272)
        adapter = save_random_adapter(other, tmp_path / "adapter")
        with pytest.raises(AdapterError, match="base model") as error:
            llm.load_adapter("foreign", adapter)
        assert "\n" not in str(error.value)
        assert "foreign" not in llm.adapters

    def test_a_rank_beyond_the_bank(self, llm, llama, tmp_path):
        adapter = save_random_adapter(llama, tmp_path, r=9)
        with pytest.raises(
            AdapterError, match=r"has rank 9, the bank holds at most 8: raise adapters\.max_rank"
        ):
            llm.load_adapter("big", adapter)

    def test_what_cannot_be_served(self, llm, llama, tmp_path):
        adapter = save_random_adapter(llama, tmp_path, use_dora=True)
        with pytest.raises(AdapterError, match="use_dora"):
            llm.load_adapter("dora", adapter)


class TestExport:
    """What a job learnt is the same in peft and, merged, in transformers (invariant 5)."""

    @pytest.fixture(scope="class")
    @classmethod
    def trained(cls, llm, tmp_path_factory):
        rows = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", letter_rows(20))
        peft = {"r": 5, "alpha": 7.0, "target_modules": ("q_proj", "v_proj", "down_proj")}
        with given_back():
            job = llm.finetune(job_config("exported", rows, peft=peft)).wait(120)
            assert job.status == "succeeded", job.reason
            yield job

    def outputs(self, llm):
        return llm.generate(random_prompts([50, 8]), SCORES, adapter="exported")

    def assert_same_logits(self, model, base, outputs):
        for output in outputs:
            expected = reference_logprobs(model, output.prompt_token_ids)
            limit = 1e-4 * np.abs(expected).max()
            assert prompt_logprob_errors(output, expected).max() < limit
            without = reference_logprobs(base, output.prompt_token_ids)
            assert np.abs(expected - without).max() > 100 * limit, "it learnt nothing"

    def test_the_adapter_loads_in_peft(self, llm, llama, llama_reference, trained, tmp_path):
        llm.export_adapter("exported", tmp_path / "out")
        for path in (tmp_path / "out", trained.adapter_dir):
            model = load_with_adapter(llama, path)
            self.assert_same_logits(model, llama_reference, self.outputs(llm))

    def test_the_merged_model_loads_in_transformers(self, llm, llama_reference, trained, tmp_path):
        llm.export_merged("exported", tmp_path / "out")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        self.assert_same_logits(model, llama_reference, self.outputs(llm))

    def test_it_can_be_loaded_again(self, llm, trained):
        before = self.outputs(llm)
        llm.load_adapter("reloaded", trained.adapter_dir)
        after = llm.generate(random_prompts([50, 8]), SCORES, adapter="reloaded")
        assert [o.prompt_logprobs for o in before] == [o.prompt_logprobs for o in after]
