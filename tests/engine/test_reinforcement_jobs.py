"""Jobs that learn from rewards: their first steps against TRL's formulas on torch and PEFT, what is
learnt beside requests, what a checkpoint keeps, and what stops them.

The formulas (`trl_loss`) are those of GRPOTrainer in TRL 1.16, and were compared with it.
"""

import math
import shutil
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from flexllm_jax import ReinforcementConfig, SamplingParams
from flexllm_jax.finetune.checkpoint import JobCheckpoints
from flexllm_jax.finetune.create import create_job
from flexllm_jax.finetune.reinforcement.make import Play
from flexllm_jax.peft.directory import NoFreeSlot
from tests.engine.test_out_of_memory import failing
from tests.engines import (
    job_config,
    letter_rows,
    load_with_adapter,
    random_prompts,
    save_random_adapter,
    write_rows,
)

LETTERS = "abcdefghijklmnop"


def prompt_rows(count, seed=0, longest=20):
    random = np.random.default_rng(seed)
    return [
        {"prompt": "".join(random.choice(list(LETTERS), random.integers(3, longest))), "number": i}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", prompt_rows(40))


@pytest.fixture(scope="module")
def start(llama, tmp_path_factory):
    return save_random_adapter(llama, tmp_path_factory.mktemp("start"))


def small_letters(samples):
    """The share of an answer's characters that are small letters."""
    return [sum(c.islower() for c in s.text) / max(1, len(s.text)) for s in samples]


def uneven(samples):
    """Rewards that differ, and depend on nothing but the sample."""
    return [(hash_of(s.text) + s.item["number"]) % 7 / 3 - 1 for s in samples]


def hash_of(text):
    return sum((i + 1) * ord(c) for i, c in enumerate(text))


def reinforcement(name, rows, method=(), **fields):
    defaults = {"batch_size": 4, "num_generations": 4, "max_tokens": 10}
    return job_config(name, rows, method=ReinforcementConfig(**(defaults | dict(method))), **fields)


def start_watched(llm, config, play):
    """A job, and the groups that each of its batches is trained on. `play`: a reward function, or a
    `Play`; None: the configuration has a grader."""
    play = play if isinstance(play, Play) else Play(play)
    runner = llm.engine.runner
    job = create_job(
        config,
        runner.model,
        llm.config.model.path,
        llm.tokenizer,
        llm.config.finetune,
        runner.sizes.max_model_len,
        play,
    )
    batches, data = [], job.source._data

    def keep(groups):
        batches.append(list(groups))
        return data(groups)

    job.source._data = keep
    return llm.start_job(job), batches


# -- against TRL ---------------------------------------------------------------------------------


def trl_advantages(rewards, scale):
    """GRPOTrainer._generate_and_score_completions; rewards [P, G]."""
    advantages = rewards - rewards.mean(1, keepdims=True)
    if scale == "group":
        advantages /= rewards.std(1, ddof=1, keepdims=True) + 1e-4
    elif scale == "batch":
        advantages /= rewards.std(ddof=1) + 1e-4
    return advantages


def trl_loss(logps, old, advantages, method):
    """GRPOTrainer._compute_loss, of completions without padding."""
    low, high = (method.clip_low, method.clip_high)
    per_answer = []
    for lp, q, advantage in zip(logps, old, advantages, strict=True):
        log_ratio = lp - q
        if method.loss == "gspo":
            log_ratio = log_ratio.mean().expand_as(lp)
        ratio = torch.exp(log_ratio)
        if method.loss == "cispo":
            loss = -ratio.clamp(max=high).detach() * advantage * lp
        elif method.loss == "importance_sampling":
            truncated = ratio.detach().clamp(max=2.0)  # as its correction for vLLM's samples
            loss = -truncated * torch.exp(lp - lp.detach()) * advantage
        else:
            loss = -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
        per_answer.append(loss)
    if method.normalization == "grpo":
        return torch.stack([loss.mean() for loss in per_answer]).mean()
    total = torch.cat(per_answer).sum()
    if method.normalization == "dr_grpo":
        return total / (len(per_answer) * method.max_tokens)
    return total / sum(map(len, per_answer))


def answer_logprobs(model, episode):
    tokens = torch.tensor(episode.tokens)
    logits = model(input_ids=tokens[None]).logits[0, :-1]
    of_each = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    return of_each[torch.tensor(episode.said[1:])]


@pytest.mark.parametrize(
    "method",
    [
        {"loss": "importance_sampling"},
        {"loss": "ppo", "normalization": "grpo", "scale_rewards": "group"},
        {"loss": "cispo", "scale_rewards": "batch", "clip_low": 0.0, "clip_high": 1.01},
        {"loss": "gspo", "normalization": "dr_grpo"},
    ],
    ids=lambda m: m["loss"],
)
def test_steps_on_a_batch_are_those_of_trl(llm, llama, start, rows, method):
    """Advantages, losses and gradients of three steps on the same answers, the second and third
    with ratios that are not 1; and the weights that the three lead to."""
    method = {"num_iterations": 3, "clip_low": 0.98, "clip_high": 1.02} | method
    if method["loss"] == "importance_sampling":
        del method["clip_low"], method["clip_high"]
    lr = 4e-4
    config = reinforcement(
        f"trl-{method['loss']}",
        rows,
        method,
        steps=3,
        init_adapter=start,
        optimizer={"lr": lr, "schedule": "constant", "clip": None},
    )
    job, batches = start_watched(llm, config, uneven)
    assert job.wait(60).status == "succeeded", job.reason
    (groups,) = batches
    rewards = np.array([group.rewards for group in groups])
    advantages = trl_advantages(rewards, config.method.scale_rewards).reshape(-1)
    episodes = [episode for group in groups for episode in group.episodes]
    assert len({episode.length for episode in episodes}) > 1, "all are of one length"

    model = load_with_adapter(llama, start, is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    with torch.no_grad():
        old = [answer_logprobs(model, episode) for episode in episodes]
    for episode, known in zip(episodes, old, strict=True):
        sampled = np.array(episode.logprob)[episode.said]
        np.testing.assert_allclose(sampled, known, atol=1e-4)
    for metrics in job.metrics:
        adam.zero_grad()
        own = [answer_logprobs(model, episode) for episode in episodes]
        loss = trl_loss(own, old, advantages.tolist(), config.method)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf)
        assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert metrics["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)
        adam.step()
    if config.method.loss != "importance_sampling":
        assert job.metrics[0]["clipped"] == 0 < job.metrics[2]["clipped"] < 1
    ours = load_file(job.adapter_dir / "adapter_model.safetensors")
    before = load_file(start / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.replace(".default", "")
            moved = np.abs(parameter.detach().numpy() - before[name]).max()
            np.testing.assert_allclose(ours[name], parameter.detach(), atol=0.02 * moved)


def test_answers_come_from_the_weights_that_they_train(llm, rows):
    """Sampled beside other requests, whatever the steps' sizes: no divergence."""
    config = reinforcement("on-policy", rows, {"max_tokens": 40}, steps=4)
    job, batches = start_watched(llm, config, uneven)
    served = 0
    while job.status == "running":
        llm.generate(random_prompts([9, 30, 14], seed=served), SamplingParams(max_tokens=10))
        served += 1
    assert job.wait(60).status == "succeeded", job.reason
    assert served > 1
    assert max(abs(m["kl_sampler"]) for m in job.metrics) < 1e-6
    assert all(m["clipped"] == 0 for m in job.metrics)
    assert len(batches) == 4 and min(m["gradient_norm"] for m in job.metrics) > 0


@pytest.mark.parametrize("fresh", [True, False], ids=["from nothing", "from an adapter"])
def test_the_divergence_from_the_start_is_taken_off(llm, llama, rows, start, fresh):
    """Of the third batch: log-probabilities under the start's weights, and what a token counts."""
    method = {"kl_coef": 0.5, "normalization": "dr_grpo"}
    fields = {"steps": 3, "optimizer": {"lr": 1e-2}} | ({} if fresh else {"init_adapter": start})
    job, batches = start_watched(llm, reinforcement("kl", rows, method, **fields), uneven)
    assert job.wait(60).status == "succeeded", job.reason
    assert abs(job.metrics[0]["kl"]) < 1e-6 < 1e-4 < job.metrics[2]["kl"]

    model = load_with_adapter(llama, start)
    episodes = [episode for group in batches[2] for episode in group.episodes]
    drifts = []
    for episode in episodes:
        with torch.no_grad(), model.disable_adapter() if fresh else nullcontext():
            known = answer_logprobs(model, episode).numpy()
        said = np.array(episode.said)
        np.testing.assert_allclose(np.array(episode.reference)[said], known, atol=1e-4)
        drifts.append(np.array(episode.logprob)[said] - known)
    joined = np.concatenate(drifts)
    mean = joined.mean()
    estimate = (np.exp(-joined) + joined - 1).mean()  # TRL's
    assert job.metrics[2]["kl"] == pytest.approx(estimate, abs=1e-5)
    data, divisor = job._job.source._data(batches[2])
    assert divisor == 16 * 10 and len(data) == 16
    advantages = trl_advantages(np.array([group.rewards for group in batches[2]]), "none")
    for own, drift, advantage in zip(data, drifts, advantages.reshape(-1), strict=True):
        expected = advantage - 0.5 * (drift - mean)
        np.testing.assert_allclose(own.advantage[own.label >= 0], expected, atol=1e-4)


@pytest.mark.parametrize("equal_groups", ["keep", "drop", "refill"])
def test_equal_rewards_give_no_gradient(llm, rows, start, equal_groups):
    method = {"equal_groups": equal_groups, "scale_rewards": "group"}
    config = reinforcement("equal", rows, method, steps=2, init_adapter=start)
    job = llm.finetune(config, reward=lambda samples: [0.3] * len(samples)).wait(60)
    assert job.status == "succeeded", job.reason
    assert [m["gradient_norm"] for m in job.metrics] == [0, 0]
    assert [m["loss"] for m in job.metrics] == [0, 0]
    ours, before = (
        load_file(path / "adapter_model.safetensors") for path in (job.adapter_dir, start)
    )
    for name, value in before.items():
        np.testing.assert_array_equal(ours[name], value)
    tried = {"keep": 4, "drop": 4, "refill": 36}[equal_groups]  # rounds of four
    dropped = 0 if equal_groups == "keep" else tried
    assert [m["dropped_groups"] for m in job.metrics] == [dropped, dropped]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rewards_rise(llm, rows, seed):
    held_out = write_rows(Path(rows).parent / "held_out.jsonl", prompt_rows(8, seed=9))
    config = reinforcement(
        f"rises-{seed}",
        rows,
        {"num_generations": 8, "max_tokens": 3, "scale_rewards": "group"},
        validation=held_out,
        validation_every=7,
        steps=14,
        seed=seed,
        optimizer={"lr": 3e-2, "schedule": "constant"},
    )
    job = llm.finetune(config, reward=small_letters).wait(120)
    assert job.status == "succeeded", job.reason
    rewards = [m["reward"] for m in job.metrics]
    assert np.mean(rewards[-3:]) > 2 * np.mean(rewards[:3])
    (first, before), (last, after) = job.validations
    assert (first, last) == (7, 14) and after["reward"] > before["reward"]
    (sample, *_), prompts = job.samples, [row["prompt"] for row in prompt_rows(40)]
    assert sample["item"]["prompt"] in prompts and sample["reward"] == small_letters_of(sample)


def small_letters_of(sample):
    text = sample["text"]
    return sum(c.islower() for c in text) / max(1, len(text))


def test_a_grader_of_the_configuration(llm, tmp_path):
    grader = {
        "type": "string_check",
        "input": "{{ sample.output_text }}",
        "reference": "{{ item.letter }}",
        "operation": "like",
    }
    given = [{"prompt": row["prompt"], "letter": row["prompt"][0]} for row in prompt_rows(8)]
    rows = write_rows(tmp_path / "rows.jsonl", [*given, {"prompt": "a"}])
    method = {"grader": grader, "num_generations": 8, "max_tokens": 30}
    job, batches = start_watched(llm, reinforcement("graded", rows, method, steps=2), None)
    assert job.wait(60).status == "succeeded", job.reason
    assert "line 9: no field `letter`, which the grader reads" in job.messages[0]
    rewards = [(g, e) for groups in batches for g in groups for e in g.episodes]
    for group, episode in rewards:
        assert episode.reward == float(group.prompt.item["letter"] in episode.text)
    assert 0 < sum(e.reward for _, e in rewards) < len(rewards), "nothing to tell apart"
    unknown = grader | {"reference": "{{ item.word }}"}
    config = reinforcement("graded", rows, method | {"grader": unknown})
    assert "line 1: no field `word`, which the grader reads" in refused(llm, config)


# -- environments --------------------------------------------------------------------------------


class Echo:
    """Two turns: what was said is said back in brackets, and then the letters of both count."""

    def __init__(self, item):
        self.item, self.turns = item, 0

    def reset(self):
        return self.item["question"]

    def step(self, text):
        self.turns += 1
        return f"[{self.item['question']}]", float(sum(map(str.islower, text))), self.turns == 2


def test_what_an_environment_says_is_not_trained(llm, tmp_path):
    questions = [{"question": row["prompt"]} for row in prompt_rows(12)]
    rows = write_rows(tmp_path / "questions.jsonl", questions)
    config = reinforcement("echo", rows, steps=2, max_seq_len=90)
    handle, batches = start_watched(llm, config, Play(environment=Echo))
    handle.wait(60)
    assert handle.status == "succeeded", handle.reason
    assert max(abs(m["kl_sampler"]) for m in handle.metrics) < 1e-6
    for group in batches[0]:
        for episode in group.episodes:
            assert episode.turns == 2
            question = llm.encode(group.prompt.item["question"])
            asked, back = len(question), llm.encode(f"[{group.prompt.item['question']}]")
            assert episode.tokens[:asked] == question
            heard = [t for t, said in zip(episode.tokens, episode.said, strict=True) if not said]
            assert heard == question + back[-len(heard) + asked :]
            datum = episode.datum(1.0)
            trained, said = np.flatnonzero(datum.label >= 0), np.flatnonzero(episode.said)
            assert trained.tolist() == (said - 1).tolist()
            assert (datum.label[trained] == np.array(episode.tokens)[said]).all()
            assert len(datum) == said[-1], "what comes after the last label is read by nobody"
            assert (datum.weight[trained] == 1).all() and datum.weight.sum() == len(trained)


class Calculator:
    """The documentation's, filled in: what is asked for first is calculated, and then answered."""

    def __init__(self, item):
        self.item, self.asked = item, None

    def reset(self):
        return self.item["question"]

    def step(self, text):
        if self.asked is None:
            self.asked = text
            return f" = {sum(map(ord, text)) % 10}", 0.0, False
        return "", float(text.startswith(self.item["answer"])), True


def test_a_tool_answers_between_two_turns(llm, tmp_path):
    """The tool's output follows what asked for it, and no token of it is trained; rewards are those
    of the last turn."""
    questions = [{"question": row["prompt"], "answer": "a"} for row in prompt_rows(8)]
    rows = write_rows(tmp_path / "questions.jsonl", questions)
    config = reinforcement("calculator", rows, {"max_tokens": 6}, steps=1, max_seq_len=90)
    job, batches = start_watched(llm, config, Play(environment=Calculator))
    assert job.wait(60).status == "succeeded", job.reason
    for group in batches[0]:
        for episode in group.episodes:
            asked = episode.environment.asked
            result = llm.encode(f" = {sum(map(ord, asked)) % 10}")[-4:]
            heard = [t for t, said in zip(episode.tokens, episode.said, strict=True) if not said]
            assert episode.turns == 2 and heard[-4:] == result
            datum = episode.datum(1.0)
            trained = [int(label) for label in datum.label if label >= 0]
            spoken = [t for t, said in zip(episode.tokens, episode.said, strict=True) if said]
            assert trained == spoken and datum.weight.sum() == len(spoken)
            assert episode.reward == float(episode.text.startswith("a"))


def test_an_environment_that_raises_costs_its_episode(llm, tmp_path):
    class Moody(Echo):
        def step(self, text):
            if self.item["question"].startswith("a"):
                raise ValueError("not an a!")
            return super().step(text)

    questions = [{"question": ("a" if i % 4 == 0 else "b") + "cd"} for i in range(8)]
    rows = write_rows(tmp_path / "questions.jsonl", questions)
    config = reinforcement("moody", rows, {"batch_size": 8}, steps=1)
    job = llm.finetune(config, environment=Moody).wait(60)
    assert job.status == "succeeded", job.reason
    assert job.metrics[0]["grader_errors"] == 0.25
    (error,) = {sample["error"] for sample in job.samples if "error" in sample}
    assert error == "step: ValueError: not an a!"


# -- what stops a job ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (lambda samples: [math.nan] * len(samples), "reward nan is not finite"),
        (lambda samples: [1.0], "returned 1 rewards for 4 samples"),
        (lambda samples: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda samples: ["good"] * len(samples), "reward 'good' is no number"),
    ],
    ids=["nan", "too few", "raises", "text"],
)
def test_a_grader_that_fails_on_most_answers_fails_the_job(llm, rows, reward, reason):
    job = llm.finetune(reinforcement("ungraded", rows), reward=reward).wait(60)
    assert job.status == "failed"
    assert "16 of 16 answers of batch 1 could not be graded" in job.reason
    assert reason in job.reason and "\n" not in job.reason
    llm.generate(random_prompts([9]), SamplingParams(max_tokens=2))  # and nothing else


def test_an_answer_that_cannot_be_graded_is_counted(llm, rows):
    def one_in_four(samples):
        return [math.inf, *small_letters(samples[1:])]

    job = llm.finetune(reinforcement("one-in-four", rows, steps=2), reward=one_in_four).wait(60)
    assert job.status == "succeeded", job.reason
    assert [m["grader_errors"] for m in job.metrics] == [0.25, 0.25]
    assert sum("error" in sample for sample in job.samples) == 4


def refused(llm, *jobs, **play):
    with pytest.raises(ValueError) as error:
        llm.finetune(*jobs, **play)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_input_is_told_in_a_line(llm, rows, tmp_path):
    assert "nothing gives them" in refused(llm, reinforcement("bad", rows))
    both = {"reward": small_letters, "environment": Echo}
    assert "several of" in refused(llm, reinforcement("bad", rows), **both)
    long = reinforcement("bad", rows, {"max_tokens": 96})
    assert "method.max_tokens=96" in refused(llm, long, reward=small_letters)
    with pytest.raises(ValueError, match="num_generations"):
        ReinforcementConfig(num_generations=1)
    with pytest.raises(ValueError, match="is more than clip_high 1"):
        ReinforcementConfig(loss="ppo", clip_low=2.0, clip_high=1.5)

    bad = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"text": "a"},
        {"prompt": "a" * 90},
        {"prompt": ""},
        {"prompt": 3},
    ]
    told = ["the assistant's", "no field `messages`", "90 tokens", "empty", "list of messages"]
    for row, reason in zip(bad, told, strict=True):
        path = write_rows(tmp_path / "bad.jsonl", [row])
        refusal = refused(llm, reinforcement("bad", path), reward=small_letters)
        assert "none of its 1 rows" in refusal and reason in refusal
    path = write_rows(tmp_path / "mixed.jsonl", [*bad, {"prompt": "a"}])
    job = llm.finetune(reinforcement("mixed", path, steps=1), reward=small_letters).wait(60)
    assert job.status == "succeeded", job.reason
    assert "5 rows skipped" in job.messages[0]


# -- going on ------------------------------------------------------------------------------------

TIMED = ("rollout_tokens_per_s", "train_tokens_per_s")


def without_times(metrics):
    return {name: value for name, value in metrics.items() if name not in TIMED}


def killed_behind(folder, whole, step, name):
    """What a kill behind a step leaves of the job `whole`."""
    checkpoints = folder / name / "checkpoints"
    shutil.copytree(folder / whole / "checkpoints", checkpoints)
    for path in checkpoints.iterdir():
        if path.name.split("-")[0] != str(step):
            shutil.rmtree(path)
    assert JobCheckpoints(checkpoints).steps() == [step]


@pytest.mark.parametrize(
    "method",
    [
        {},
        {"steps_ahead": 1},
        {"steps_ahead": 2},
        {"num_iterations": 3, "loss": "ppo", "equal_groups": "refill"},
        {"num_iterations": 3, "steps_ahead": 1, "loss": "gspo"},
    ],
    ids=["on-policy", "ahead", "two ahead", "iterations", "iterations ahead"],
)
def test_resumed_samples_what_it_would_have(llm, rows, start, method):
    """From a checkpoint after step 4 of 7: between two batches, or amid one."""
    held_out = write_rows(Path(rows).parent / "held_out.jsonl", prompt_rows(3, seed=9))
    fields = {"validation": held_out, "validation_every": 4, "steps": 7, "init_adapter": start}
    fields["optimizer"] = {"lr": 1e-3}
    name = "-".join(map(str, ["whole", *method.values()]))
    job, batches = start_watched(llm, reinforcement(name, rows, method, **fields), uneven)
    assert job.wait(60).status == "succeeded", job.reason
    killed_behind(Path(llm.config.output_dir), name, 4, f"{name}-killed")
    resumed, again = start_watched(
        llm, reinforcement(f"{name}-killed", rows, method, resume=True, **fields), uneven
    )
    assert resumed.wait(60).status == "succeeded", resumed.reason
    assert resumed._job.resumed_from == 4
    for mine, expected in zip(resumed.metrics, job.metrics, strict=True):
        assert without_times(mine) == pytest.approx(without_times(expected), rel=1e-3, abs=1e-5)
    validated = [6, 7] if "num_iterations" in method else [4, 7]  # between two batches
    assert [at for at, _ in resumed.validations] == [at for at, _ in job.validations] == validated
    assert resumed.validations[1][1] == pytest.approx(job.validations[1][1])
    for mine, expected in zip(again, batches[-len(again) :], strict=True):
        for own, other in zip(mine, expected, strict=True):
            assert [e.tokens for e in own.episodes] == [e.tokens for e in other.episodes]
    ours, theirs = (load_file(j.adapter_dir / "adapter_model.safetensors") for j in (resumed, job))
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, atol=1e-4)
    stale = max(abs(m["kl_sampler"]) for m in job.metrics)
    assert (stale < 1e-6) == (not method), "what was to be sampled from earlier weights was not"


def test_answers_that_are_complete_are_kept(llm, rows, start):
    """After step 4 the fifth batch is said, and graded but for one prompt: nothing of it is sampled
    again after a kill, and only that prompt graded."""
    fields = {"steps": 6, "init_adapter": start, "optimizer": {"lr": 1e-3}}
    method = {"steps_ahead": 1}
    whole, batches = start_watched(llm, reinforcement("kept", rows, method, **fields), uneven)
    assert whole.wait(60).status == "succeeded", whole.reason
    fourth, fifth = ([g.prompt.item["prompt"] for g in batches[i]] for i in (3, 4))
    graded, said, leave = [], threading.Event(), threading.Event()

    def slow(samples):
        prompt = samples[0].item["prompt"]
        graded.append(prompt)
        if set(fifth) <= set(graded):
            said.set()
        if prompt == fourth[-1]:
            assert said.wait(60)
        elif prompt == fifth[-1]:
            assert leave.wait(60)
        return uneven(samples)

    killed, _ = start_watched(llm, reinforcement("kept-killed", rows, method, **fields), slow)
    checkpoints = JobCheckpoints(Path(llm.config.output_dir) / "kept-killed" / "checkpoints")
    while not checkpoints.steps():
        assert killed.status == "running", killed.reason
        time.sleep(0.01)
    killed.cancel()
    leave.set()
    assert checkpoints.steps() == [4]

    graded.clear()
    config = reinforcement("kept-killed", rows, method, resume=True, **fields)
    resumed, again = start_watched(llm, config, slow)
    assert resumed.wait(60).status == "succeeded", resumed.reason
    assert not set(fifth[:-1]) & set(graded) and fifth[-1] in graded
    sixth = [e for group in batches[5] for e in group.episodes]
    assert resumed._job.sampled_tokens == sum(e.length for e in sixth)
    for mine, expected in zip(again, batches[4:], strict=True):
        for own, other in zip(mine, expected, strict=True):
            assert [e.tokens for e in own.episodes] == [e.tokens for e in other.episodes]
            assert [e.text for e in own.episodes] == [e.text for e in other.episodes]
            assert own.rewards == other.rewards
    ours, theirs = (
        load_file(j.adapter_dir / "adapter_model.safetensors") for j in (resumed, whole)
    )
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, atol=1e-4)


def test_pause_drops_what_is_under_way_and_resume_samples_the_same(llm, rows, start):
    def go(name, *, pauses):
        fields = {"steps": 3, "init_adapter": start}
        config = reinforcement(name, rows, {"max_tokens": 40}, **fields)
        job, batches = start_watched(llm, config, uneven)
        for _ in range(pauses):
            while not llm._loop.call(lambda: job._job.sampler._running) and job.steps < 3:
                time.sleep(0.001)
            job.pause()
            assert not llm._loop.call(lambda: llm.engine.scheduler.has_work)
            assert job.status == "paused" or job.steps == 3
            job.resume()
        assert job.wait(60).status == "succeeded", job.reason
        return job, [[e.tokens for g in groups for e in g.episodes] for groups in batches]

    undisturbed, expected = go("undisturbed", pauses=0)
    paused, tokens = go("paused", pauses=5)
    assert tokens == expected
    for mine, other in zip(paused.metrics, undisturbed.metrics, strict=True):
        assert without_times(mine) == pytest.approx(without_times(other), rel=1e-3, abs=1e-5)


def test_versions_take_turns_where_slots_are_short(llm, rows, start):
    """One slot for three versions: of a job that is ahead, and of its start. The others wait on the
    host, and what is trained is what is trained with a slot for each."""
    directory, versions = llm.engine.adapters.directory, llm.engine.versions
    fields = {"steps": 3, "init_adapter": start, "optimizer": {"lr": 1e-3}}

    def trained(name, taken):
        for i in range(taken):
            llm._loop.call(directory.start_training, f"taken-{i}")
        before = versions.spilled, versions.returned
        config = reinforcement(name, rows, {"steps_ahead": 1, "kl_coef": 0.1}, **fields)
        job, batches = start_watched(llm, config, uneven)
        job.wait(60)
        for i in range(taken):
            llm._loop.call(directory.stop_training, f"taken-{i}")
        assert job.status == "succeeded", job.reason
        moved = versions.spilled - before[0], versions.returned - before[1]
        told = any("adapters.slots are short" in message for message in job.messages)
        assert told == bool(moved[1]) and not directory.held and not versions.num_on_host
        return moved, [[e.tokens for g in groups for e in g.episodes] for groups in batches]

    (spilled, _), expected = trained("enough", 0)
    assert not spilled
    (spilled, returned), tokens = trained("short", directory.num_free - 2)
    assert spilled >= returned > 0
    assert tokens == expected


def test_one_slot_is_left_to_answer_from(llm, rows, start):
    """Neither jobs nor adapters that graders ask take the last."""
    directory = llm.engine.adapters.directory
    job = llm.finetune(reinforcement("answers", rows, steps=10_000), reward=uneven)
    llm.load_adapter("judge", start)
    judge = llm._loop.call(directory.pin, "judge")
    for i in range(directory.num_slots - 4):
        llm._loop.call(directory.start_training, f"taken-{i}")
    with pytest.raises(NoFreeSlot, match="one is left to what jobs that learn from rewards"):
        llm._loop.call(directory.start_training, "late")
    steps = job.steps
    while job.steps < steps + 2:
        assert job.status == "running", job.reason
        time.sleep(0.001)
    job.cancel()
    llm._loop.call(directory.start_training, "late")
    llm._loop.call(directory.unpin, judge)
    for name in list(directory.training):
        llm._loop.call(directory.stop_training, name)


def test_cancel_ends_at_once_and_leaves_nothing(llm, rows):
    directory = llm.engine.adapters.directory
    before = directory.num_free
    entered, leave = threading.Event(), threading.Event()

    def slow(samples):
        entered.set()
        leave.wait(60)
        return small_letters(samples)

    job = llm.finetune(reinforcement("cancelled", rows, {"steps_ahead": 2}), reward=slow)
    assert entered.wait(60)
    while not llm._loop.idle:  # the engine waits for the grader and does not spin
        time.sleep(0.001)
    llm.generate(random_prompts([9]), SamplingParams(max_tokens=2))  # but is there for others
    job.cancel()
    assert job.status == "cancelled"
    assert not llm._loop.call(lambda: llm.engine.scheduler.has_work)
    assert llm._loop.call(lambda: directory.num_free) == before
    leave.set()


def test_a_prompt_goes_through_once_for_its_group(llm, tmp_path):
    rows = write_rows(tmp_path / "long.jsonl", [{"prompt": c * 50} for c in "abcd"])
    pool = llm.engine.scheduler.pool
    before = pool.hits
    config = reinforcement("shared", rows, {"num_generations": 5, "max_tokens": 4}, steps=2)
    job = llm.finetune(config, reward=small_letters).wait(60)
    assert job.status == "succeeded", job.reason
    # 2 batches x 4 prompts x 4 answers that find 6 pages of 8 tokens, in the batch's version.
    assert pool.hits - before == 2 * 4 * 4 * 6


def test_an_answer_that_the_engine_gave_up_is_sampled_again(llm, rows):
    """The device has no memory left for one step: what is trained is what would have been."""

    def trained(name):
        config = reinforcement(name, rows, {"batch_size": 2}, steps=1)
        job, batches = start_watched(llm, config, uneven)
        job.wait()
        llm.unload_adapter(name)
        return sorted(tuple(e.tokens) for group in batches[0] for e in group.episodes)

    expected = trained("undisturbed")
    name = next(n for n in llm.engine.runner.programs if n.startswith("sample/drawn/"))
    with failing(llm, name):
        assert trained("disturbed") == expected


def test_jobs_share_the_rows_that_they_leave_to_others(llm, rows):
    """Of 6 rows one is left to others, and two jobs have 2 each."""
    jobs = [
        llm.finetune(reinforcement(f"sharing-{i}", rows, {"max_tokens": 40}), reward=uneven)
        for i in range(2)
    ]

    def running():
        return [len(job._job.sampler._running) for job in jobs]

    while 0 in llm._loop.call(running) or max(llm._loop.call(running)) > 2:
        llm.generate(random_prompts([9]), SamplingParams(max_tokens=1))
    seen = []
    for _ in range(20):
        llm.generate(random_prompts([9]), SamplingParams(max_tokens=1))
        seen.append(llm._loop.call(running))
    assert all(job.status == "running" for job in jobs), "one ended before the other"
    assert max(map(max, seen)) == 2
    for job in jobs:
        job.cancel()


def test_jobs_share_tokens_and_answers_count(llm, rows, tmp_path):
    """Two jobs that learn from rewards and one from rows, which has work at any time: each has a
    third of the tokens."""
    sharing = {"batch_size": 2, "max_tokens": 20}
    texts = write_rows(tmp_path / "texts.jsonl", letter_rows(20))
    jobs = [llm.finetune(job_config("of-rows", texts, steps=10_000))]
    for i in range(2):
        config = reinforcement(f"of-rewards-{i}", rows, sharing, steps=10_000)
        jobs.append(llm.finetune(config, reward=uneven))

    def given():
        answers = [job._job.sampler.computed if job._job.sampler else 0 for job in jobs]
        return np.array([job._job.forwarded for job in jobs]) + answers

    before = given()
    while (had := given() - before).sum() < 12_000:
        llm.generate(random_prompts([9]), SamplingParams(max_tokens=4))
    assert all(job.status == "running" for job in jobs), [job.reason for job in jobs]
    assert had.min() > 0.85 * had.max()
    for job in jobs:
        job.cancel()
