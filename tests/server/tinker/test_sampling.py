"""Sampling over the Tinker API, as bytes: no SDK."""

import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flexllm_jax.server.tinker.protocol import tinker_pb2 as pb
from tests.engines import reference_logprobs
from tests.server.tinker.conftest import KEYS
from tests.server.tinker.speaking import Failed, Refused, Speaker

PROMPT = [1, 5, 20, 33, 40, 12]


def tokens_of(sequence):
    return np.frombuffer(sequence.tokens, "<i4").tolist()


def logprobs_of(sequence):
    return np.frombuffer(sequence.logprobs, "<f4")


def test_sampled_and_computed_log_probabilities_agree(one):
    sampler = one.sampler(base_model="Qwen/Qwen3-8B")
    params = {"max_tokens": 8, "seed": 3, "temperature": 1.0}
    response = one.sample(sampler, PROMPT, 0, num_samples=3, params=params)
    assert len({tuple(tokens_of(s)) for s in response.sequences}) == 3
    for number, sequence in enumerate(response.sequences, 1):
        whole = PROMPT + tokens_of(sequence)
        scored = one.logprobs(sampler, whole, number)
        assert np.isnan(scored[0])
        np.testing.assert_allclose(scored[len(PROMPT) :], logprobs_of(sequence), atol=1e-5)
    again = one.sample(sampler, PROMPT, 9, num_samples=3, params=params)
    assert [s.tokens for s in again.sequences] == [s.tokens for s in response.sequences]
    last = one.sample(sampler, PROMPT, 10, params=params | {"seed": 5})
    assert last.sequences[0].tokens == response.sequences[2].tokens  # sample i has seed + i


def test_log_probabilities_are_those_at_the_temperature(one):
    sampler = one.sampler()
    params = {"max_tokens": 5, "seed": 3, "temperature": 2.0}
    sequence = one.sample(sampler, PROMPT, 0, params=params).sequences[0]
    tokens = tokens_of(sequence)
    # Of the whole vocabulary, which is small: 20 alternatives are not enough to know the sum, so
    # two tempered log-probabilities of one position are compared: their difference is halved.
    raw = one.sample(
        sampler, PROMPT, 1, params={"max_tokens": 1, "temperature": 0.0}, topk_sample_logprobs=20
    ).sequences[0]
    hot = one.sample(
        sampler, PROMPT, 2, params=params | {"max_tokens": 1}, topk_sample_logprobs=20
    ).sequences[0]
    known = dict(
        zip(
            np.frombuffer(raw.topk_sampled_logprobs.token_ids, "<i4").tolist(),
            np.frombuffer(raw.topk_sampled_logprobs.logprobs, "<f4").tolist(),
            strict=True,
        )
    )
    ids = np.frombuffer(hot.topk_sampled_logprobs.token_ids, "<i4").tolist()
    tempered = np.frombuffer(hot.topk_sampled_logprobs.logprobs, "<f4")
    cold = np.array([known[i] for i in ids])
    np.testing.assert_allclose(tempered - tempered[0], (cold - cold[0]) / 2.0, atol=1e-4)
    assert len(logprobs_of(sequence)) == len(tokens)


def test_a_prompt_is_scored_from_where_it_is_asked_for(one):
    sampler = one.sampler()
    everything = one.logprobs(sampler, PROMPT, 0)
    params = {"max_tokens": 1}
    last = one.sample(
        sampler, PROMPT, 1, params=params, prompt_logprobs=True, prompt_logprobs_last_n=2
    )
    part = np.frombuffer(last.prompt_logprobs, "<f4")
    assert np.isnan(part[:4]).all()
    np.testing.assert_allclose(part[4:], everything[4:], atol=1e-5)
    top = one.sample(sampler, PROMPT, 2, params=params, num_samples=2, topk_prompt_logprobs=3)
    assert (top.topk_prompt_logprobs.k, top.topk_prompt_logprobs.length) == (3, len(PROMPT))
    assert len(top.sequences) == 2
    single = one.sample(sampler, [7], 3, params=params, prompt_logprobs=True)
    assert np.isnan(np.frombuffer(single.prompt_logprobs, "<f4")).tolist() == [True]


def test_tokens_that_are_named_are_scored_at_every_place(one, chat_llama):
    """As transformers scores them; dense and sparse, beside what else is asked of the prompt."""
    model = AutoModelForCausalLM.from_pretrained(chat_llama, dtype=torch.float64)
    known = reference_logprobs(model, PROMPT)
    ids = np.array([[5, 9, -1], [-1, 7, 7], [-1, -1, -1], [0, 1, 2], [12, -1, 30]])
    expected = np.where(ids < 0, 0.0, np.take_along_axis(known[:5], np.maximum(ids, 0), 1))
    asked = {"data": ids.ravel().tolist(), "dtype": "int64", "shape": [5, 3]}
    params, sampler = {"max_tokens": 1}, one.sampler()
    for number, more in enumerate(({}, {"topk_prompt_logprobs": 2, "num_samples": 2})):
        told = one.sample(
            sampler, PROMPT, number, params=params, target_prompt_logprobs=asked, **more
        )
        tensor = told.target_prompt_logprobs
        found = np.frombuffer(tensor.dense, "<f4").reshape(tensor.shape)
        np.testing.assert_allclose(found, expected, atol=2e-5)
        assert told.HasField("prompt_logprobs") == bool(more)
    assert told.topk_prompt_logprobs.k == 2
    rows, columns = np.nonzero(ids >= 0)
    crow = np.searchsorted(rows, np.arange(6)).tolist()
    asked |= {"data": ids[rows, columns].tolist(), "sparse_crow_indices": crow}
    asked["sparse_col_indices"] = columns.tolist()
    told = one.sample(sampler, PROMPT, 2, params=params, target_prompt_logprobs=asked)
    csr = told.target_prompt_logprobs.sparse_csr
    assert np.frombuffer(csr.col_indices, "<i8").tolist() == columns.tolist()
    assert np.frombuffer(csr.crow_indices, "<i8").tolist() == crow
    np.testing.assert_allclose(np.frombuffer(csr.values, "<f4"), expected[rows, columns], atol=2e-5)


def test_what_ends_an_output_is_part_of_it(one, tokenizer):
    sampler = one.sampler()
    greedy = {"temperature": 0.0, "max_tokens": 12}
    free = tokens_of(one.sample(sampler, PROMPT, 0, params=greedy | {"stop": []}).sequences[0])
    assert len(free) == 12
    third = free[2]
    first = free.index(third)
    by_token = one.sample(sampler, PROMPT, 1, params=greedy | {"stop": [third]}).sequences[0]
    assert tokens_of(by_token) == free[: first + 1]
    assert by_token.stop_reason == pb.STOP_REASON_STOP
    text = tokenizer.decode(free[1:4])
    by_text = one.sample(sampler, PROMPT, 2, params=greedy | {"stop": text}).sequences[0]
    assert by_text.stop_reason == pb.STOP_REASON_STOP
    stopped = tokens_of(by_text)
    assert stopped == free[: len(stopped)] and text in tokenizer.decode(stopped)
    assert text not in tokenizer.decode(stopped[:-1])
    assert len(logprobs_of(by_text)) == len(stopped)
    assert one.sample(sampler, PROMPT, 3, params=greedy).sequences[0].stop_reason == (
        pb.STOP_REASON_LENGTH
    )


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"topk_prompt_logprobs": 21}, "topk_prompt_logprobs: got 21; must be between 0 and 20"),
        ({"num_samples": 0}, "num_samples: got 0"),
        ({"params": {"max_tokens": 1000}}, "exceeds the context of 160"),
        ({"params": {"temperature": -1.0}}, "temperature=-1.0 must be 0 or more"),
        ({"params": {"max_tokens": 1, "stop": [""]}}, "a stop string is empty"),
        ({"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k: is not supported"),
        ({"target_prompt_logprobs": {"data": [1], "shape": [1, 1]}}, r"must be \[5, K\]"),
        ({"target_prompt_logprobs": {"data": [1] * 4, "shape": [5, 1]}}, "4 values are not of"),
        ({"target_prompt_logprobs": {"data": [-1] * 5, "shape": [5, 1]}}, "names no token"),
        ({"target_prompt_logprobs": {"data": [0.5] * 5, "shape": [5, 1]}}, "whole numbers"),
        ({"target_prompt_logprobs": {"data": [10**6] * 5, "shape": [5, 1]}}, "token 1000000"),
        (
            {"target_prompt_logprobs": {"data": [*range(129)] * 5, "shape": [5, 129]}},
            "has 129 tokens, at most 128",
        ),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 9}, "must be between 1 and 5"),
    ],
)
def test_what_cannot_be_sampled_is_a_failed_future(one, asked, says):
    with pytest.raises(Failed, match=says) as error:
        one.sample(one.sampler(), PROMPT, 0, **asked)
    assert error.value.category == "user"


def test_tokens_outside_the_vocabulary_are_named(one):
    with pytest.raises(Failed, match="token 1000000 is not in the vocabulary"):
        one.sample(one.sampler(), [1, 1_000_000], 0)


def test_a_repeated_sample_runs_once(one):
    sampler = one.sampler()
    body = {
        "sampling_session_id": sampler,
        "seq_id": 10**12 + 5,  # of a copy of a client
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]},
        "sampling_params": {"max_tokens": 4},
        "num_samples": 2,
    }
    promises = [one.post("asample", **body) for _ in range(3)]
    assert len({p["request_id"] for p in promises}) == 1
    assert [len(p["sample_sequence_ids"]) for p in promises] == [2, 2, 2]
    first = one.result(promises[0])
    assert one.result(promises[1]) == first
    assert one.post("join_sampling_session", sampling_session_id=sampler)["client_counter"] == 1
    assert one.post("join_sampling_session", sampling_session_id=sampler)["client_counter"] == 2


def test_completions_of_a_sampler_come_in_one_poll(one):
    sampler = one.sampler()
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 0}
    assert one.post("retrieve_futures", target=target, timeout=0)["completions"] == []
    prompt = {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]}
    ids = set()
    for number in range(4):
        params = {"max_tokens": 3 if number else 10**6}  # the first one fails
        asked = {"prompt": prompt, "sampling_params": params}
        promise = one.post("asample", sampling_session_id=sampler, seq_id=number, **asked)
        ids.add(promise["request_id"])
    seen, cursor = {}, 0
    while len(seen) < 4:
        told = one.post("retrieve_futures", target=target, prev_cursor=cursor, timeout=5)
        assert told["cursor"] >= cursor
        cursor = told["cursor"]
        seen |= {c["request_id"]: c["state"] for c in told["completions"]}
    assert seen.keys() == ids and sorted(seen.values()).count("failed") == 1
    told = one.post(
        "retrieve_futures",
        target=target,
        prev_cursor=cursor,
        timeout=0,
        retrieved_request_ids=sorted(ids),
    )
    assert told == {"completions": [], "cursor": cursor}
    with pytest.raises(Refused) as error:
        one.result(min(ids))
    assert error.value.status == 410  # it was told to be forgotten


def test_a_large_result_is_announced_first(one):
    sampler = one.sampler()
    prompt = {"chunks": [{"type": "encoded_text", "tokens": PROMPT * 20}]}
    promise = one.post(
        "asample",
        sampling_session_id=sampler,
        seq_id=0,
        num_samples=1,
        prompt=prompt,
        sampling_params={"max_tokens": 30, "ignored": 1},
        topk_sample_logprobs=20,
        topk_prompt_logprobs=20,
        unknown_field=True,
    )
    whole = one.result(promise)
    asked = {"request_id": promise["request_id"], "allow_metadata_only": True}
    told = one.post("retrieve_future", **asked)
    if len(whole) > 64 * 1024:
        assert told == {"status": "complete_metadata", "response_payload_size": len(whole)}
    else:
        assert told == whole


def test_many_at_once_are_all_answered(one):
    """With the limits of the server: who gets 429 tries again with the same number."""
    sampler, done, count = one.sampler(), [], 60

    def ask(number):
        while True:
            try:
                done.append(one.sample(sampler, [1, 2, number + 3], number))
                return
            except Refused as error:
                assert error.status == 429

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(done) == count


def test_a_cancelled_sample_fails_and_frees_its_place(one):
    sampler = one.sampler()
    params = {"max_tokens": 150, "stop": []}
    promise = one.ask_sample(sampler, PROMPT, 0, num_samples=6, params=params)
    one.post("cancel_future", request_id=promise["request_id"])
    with pytest.raises(Failed, match="cancelled"):
        one.result(promise)


def test_another_key_sees_nothing(one, two, tinker_server):
    sampler = one.sampler()
    promise = one.ask_sample(sampler, PROMPT, 0, params={"max_tokens": 2})
    for ask in (
        lambda: two.sample(sampler, PROMPT),
        lambda: two.result(promise),
        lambda: two.get(f"samplers/{sampler}"),
        lambda: two.get(f"sessions/{one.session_id}"),
        lambda: two.post("session_heartbeat", session_id=one.session_id),
        lambda: two.post("join_sampling_session", sampling_session_id=sampler),
    ):
        with pytest.raises(Refused) as error:
            ask()
        assert error.value.status == 404
    assert one.get(f"samplers/{sampler}") == {"sampler_id": sampler, "base_model": "tiny"}
    assert sampler in one.get(f"sessions/{one.session_id}")["sampler_ids"]
    assert one.session_id not in two.get("sessions?limit=1000")["sessions"]
    boss = Speaker(tinker_server, KEYS["boss"])
    assert one.session_id in boss.get("sessions?limit=1000")["sessions"]
    for key in (None, "tml-nobody"):
        with pytest.raises(Refused) as error:
            Speaker(tinker_server, key).begin()
        assert error.value.status == 401


def test_a_finished_session_takes_nothing_more(one):
    sampler = one.sampler()
    one.post("session_heartbeat", session_id=one.session_id)
    one.post(f"sessions/{one.session_id}/finish", reason={"type": "success"})
    one.post(f"sessions/{one.session_id}/finish", reason={"type": "errored"})
    for ask in (
        lambda: one.post("session_heartbeat", session_id=one.session_id),
        lambda: one.sample(sampler, PROMPT),
    ):
        with pytest.raises(Refused) as error:
            ask()
        assert error.value.status == 410


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("asample", b"{"),
        ("asample", b'{"prompt": 1}'),
        ("create_session", b"[]"),
        ("create_model", b'{"session_id": "x"}'),
        ("optim_step", b'{"model_id": 5}'),
        ("forward_backward", b"\xff\xff"),
        ("forward_backward", b""),
        ("retrieve_futures", b"{}"),
    ],
)
def test_bodies_that_cannot_be_read_are_refused_with_a_reason(one, path, body):
    with pytest.raises(Refused) as error:
        one.ask("POST", path, body, Content_Type="application/json")
    assert error.value.status == 400
    assert len(error.value.body) > 20


def test_what_is_not_there_is_404(one):
    for path in ("copy_weights", "sessions/search", "no/such/thing"):
        with pytest.raises(Refused) as error:
            one.post(path)
        assert error.value.status in (404, 405)
    with pytest.raises(Refused) as error:
        one.result("nobody:sample:0:3")
    assert error.value.status == 404
    with pytest.raises(Refused, match="there is no checkpoint"):
        one.sampler(model_path="tinker://a/weights/b")
    with pytest.raises(Refused, match="this server has Qwen/Qwen3-8B, tiny"):
        one.sampler(base_model="Qwen/Qwen3-32B")


def test_the_server_says_what_it_has(one):
    told = one.get("get_server_capabilities")["supported_models"]
    assert [m["model_name"] for m in told] == ["Qwen/Qwen3-8B", "tiny"]
    assert all(m["max_context_length"] == 96 and m["trainable"] for m in told)
    assert one.get("healthz") == {"status": "ok"}
    assert one.post("telemetry", events=[], platform="x") == {"status": "accepted"}
    assert one.post("client/config", sdk_version="9.9")["pjwt_auth_enabled"] is False
