"""What is wrong with a request is said in one line, with the right status, and harms nobody."""

import json
import urllib.error
import urllib.request

import openai
import pytest

from tests.server.running import KEY, LIMITED_KEY

GOOD = {"model": "tiny", "prompt": "abc", "max_tokens": 2}
BAD = {
    "max_tokens": (-1, "max_tokens"),
    "temperature": (-1, "temperature"),
    "top_p": (0, "top_p"),
    "n": (0, "n"),
    "prompt": ([], "prompt"),
    "stop": ([""], "stop"),
    "seed": (2**70, "seed"),
    "logprobs": (21, "logprobs"),
    "slo": ("unheard-of", "slo"),
    "min_tokens": (3, "min_tokens"),
    "best_of": (3, "best_of"),
    "logit_bias": ({"1": 200.0}, "logit_bias"),
    "guided_json": ({"type": "object"}, "guided_json"),
    "suffix": ("after", "suffix"),
    "stop_token_ids": ([-1], "stop_token_ids"),
    "repetition_penalty": (0, "repetition_penalty"),
    "stop_regex": ("a+", "stop_regex"),
    "regex": ("a(", "structured_outputs"),
    "cache_salt": ("mine", "cache_salt"),
    "priority": (1, "priority"),
    "thinking_token_budget": (0, "thinking_token_budget"),
    "prompt_logprobs": (21, "prompt_logprobs"),
    "logprob_token_ids": ([1], "logprob_token_ids"),
    "stream_options": ({"include_usage": True}, "stream_options"),
    "messages": ([{"role": "user", "content": "a"}], "messages"),
    "continue_final_message": (True, "continue_final_message"),
    "documents": ([{"text": "a"}], "documents"),
    "chat_template": ("{{ 1 }}", "chat_template"),
}
QUESTION = {"role": "user", "content": "a"}
# In chat and, but for the sampling, in /tokenize.
BAD_CHAT = {
    "stop_regex": ("a+", "stop_regex"),
    "cache_salt": ("mine", "cache_salt"),
    "priority": (-1, "priority"),
    "thinking_token_budget": (64, "thinking_token_budget"),
    "truncate_prompt_tokens": (0, "truncate_prompt_tokens"),
    "mm_processor_kwargs": ({"a": 1}, "mm_processor_kwargs"),
    "chat_template": ("{{ 1 }}", "chat_template"),
    "chat_template_kwargs": ({"chat_template": "{{ 1 }}"}, "chat_template_kwargs"),
    "documents": ([{"text": "a"}], "documents"),
    "reasoning_effort": ("high", "reasoning_effort"),
    "messages": ([{"role": "robot", "content": "a"}], "messages"),
}


def check_error(body: str, param: str | None = None) -> str:
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert "\n" not in error["message"]
    return error["message"]


@pytest.mark.parametrize("field", BAD)
def test_a_bad_value_names_its_field(server, field):
    value, param = BAD[field]
    status, _, body = server.post("/v1/completions", json.dumps(GOOD | {field: value}).encode())
    assert status == 400, body
    message = check_error(body, param)
    assert field in message


@pytest.mark.parametrize("field", BAD_CHAT)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_a_bad_value_of_a_conversation_names_its_field(server, path, field):
    value, param = BAD_CHAT[field]
    body = {"model": "tiny", "messages": [QUESTION], field: value}
    status, _, answer = server.post(path, json.dumps(body).encode())
    assert status == 400, answer
    check_error(answer, param)


def test_fields_of_a_conversation_are_none_of_a_prompt(server):
    body = {"model": "tiny", "prompt": "a", "add_generation_prompt": False}
    status, _, answer = server.post("/tokenize", json.dumps(body).encode())
    assert status == 400
    check_error(answer, "add_generation_prompt")


@pytest.mark.parametrize("field", ["echo", "best_of", "suffix", "prompt"])
def test_fields_of_completions_are_none_of_a_chat(server, field):
    body = {"model": "tiny", "messages": [QUESTION], field: {"best_of": 2}.get(field, "a")}
    status, _, answer = server.post("/v1/chat/completions", json.dumps(body).encode())
    assert status == 400, answer
    check_error(answer, field)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"model": "tiny", "prompt": ', "not JSON"),
        (b'{"model": "tiny", "prompt": "\xff\xfe"}', "body"),
        (b"[" * 100_000, "body"),
        (b"null", "body"),
        (b'{"model": "tiny", "prompt": "abc", "temperature": NaN}', "temperature"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "prompt"),
        (b'{"model": "tiny", "prompt": [1, 99999999]}', "token id 99999999"),
        (b'{"model": "tiny", "prompt": [1, 2], "max_tokens": 159}', "max_model_len=160"),
        (b'{"model": "tiny"}', "prompt"),
    ],
)
def test_bodies_that_make_no_sense(server, body, says):
    status, _, answer = server.post("/v1/completions", body)
    assert status == 400, answer
    message = json.loads(answer)["error"]["message"]
    assert says in message


def test_what_asks_for_nothing_is_let_through(server):
    nothing = {"logit_bias": {}, "suffix": None, "guided_json": None, "skip_special_tokens": True}
    nothing |= {"priority": 0, "length_penalty": 1.0, "user": "me", "metadata": {"a": "b"}}
    status, _, body = server.post("/v1/completions", json.dumps(GOOD | nothing).encode())
    assert status == 200, body


def test_other_bad_requests(server):
    def refused(path, body, **headers):
        status, _, answer = server.post(path, body, **headers)
        assert status == 400
        return json.loads(answer)["error"]["message"]

    form = {"Content-Type": "application/x-www-form-urlencoded"}  # curl's, unless it is told
    said = refused("/v1/completions", json.dumps(GOOD).encode(), **form)
    assert "Content-Type: application/json" in said
    assert "ids 0 to 271" in refused("/detokenize", b'{"tokens": [272]}')
    assert server.get("/v1/files?order=sideways", KEY)[0] == 400


def test_a_prompt_of_megabytes_is_refused(server):
    status, _, body = server.post(
        "/v1/completions", json.dumps(GOOD | {"prompt": "a" * 10_000_000}).encode()
    )
    assert status == 413
    assert "100000 bytes" in check_error(body)
    status, _, body = server.post(
        "/v1/completions", json.dumps(GOOD | {"prompt": "a" * 90_000}).encode()
    )
    assert status == 400
    assert "max_model_len" in check_error(body, "prompt")


def test_unknown_models_and_paths(server, client):
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="absent", prompt="a")
    assert error.value.code == "model_not_found"
    status, _, body = server.post("/v1/unheard-of", b"{}")
    assert (status, check_error(body)) == (404, "no such path: /v1/unheard-of")
    assert server.get("/v1/completions")[0] == 405
    status, body = server.get("/v1/models/two%0Alines", KEY)
    assert status == 404 and check_error(body)


def test_a_method_that_is_not_for_a_path_is_told_those_that_are(server):
    status, headers, _ = server.post("/v1/models/tiny", b"{}")
    assert (status, headers["allow"]) == (405, "DELETE, GET")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{server.url}/v1/responses/input_tokens")  # no response's name
    assert (error.value.code, error.value.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_texts_of_an_unknown_model(server, path):
    body = {"model": "absent", "prompt": "a", "tokens": [1]}
    status, _, answer = server.post(path, json.dumps(body).encode())
    assert (status, json.loads(answer)["error"]["param"]) == (404, "model")


def test_whole_numbers_may_have_a_point(server):
    status, _, body = server.post("/v1/completions", json.dumps(GOOD | {"n": 2.0}).encode())
    assert status == 200 and len(json.loads(body)["choices"]) == 2, body
    status, _, body = server.post("/v1/completions", json.dumps(GOOD | {"n": 2.5}).encode())
    assert status == 400, body
    check_error(body, "n")


def test_an_adapter_path_that_no_file_can_have(server):
    body = {"lora_name": "long", "lora_path": "a" * 4000}
    status, _, answer = server.post("/v1/load_lora_adapter", json.dumps(body).encode())
    assert status == 404, answer
    check_error(answer, "lora_path")


@pytest.mark.parametrize("key", [None, "", "Bearer", "Bearer wrong", "Basic key-of-the-tests"])
def test_without_a_valid_key_nothing_is_served(server, key):
    status, headers, body = server.post(
        "/v1/completions", json.dumps(GOOD).encode(), Authorization=key or ""
    )
    assert status == 401
    assert headers["www-authenticate"] == "Bearer"
    assert "API key" in check_error(body)
    assert server.get("/v1/models")[0] == 401
    assert server.get("/health")[0] == 200


def test_a_key_has_limits_of_its_own(server):
    limited = server.client(LIMITED_KEY)
    with pytest.raises(openai.RateLimitError) as error:
        limited.completions.create(model="tiny", prompt="abc", n=3, max_tokens=1)
    assert "may have 2" in error.value.message
    with pytest.raises(openai.BadRequestError, match="200 a minute"):
        limited.completions.create(model="tiny", prompt=[5] * 80, max_tokens=70, n=2)
    limited.completions.create(model="tiny", prompt=[5] * 90, max_tokens=1)
    limited.completions.create(model="tiny", prompt=[5] * 90, max_tokens=1)
    with pytest.raises(openai.RateLimitError, match="tokens a minute") as error:
        limited.completions.create(model="tiny", prompt=[5] * 90, max_tokens=1)
    assert 5 < int(error.value.response.headers["Retry-After"]) <= 60


def test_tokens_asked_for_and_not_used_are_given_back(server, client):
    answer = client.completions.create(model="tiny", prompt="still served", max_tokens=2)
    assert answer.usage.completion_tokens == 2


def test_pages_of_allowed_origins_may_call(server):
    def preflight(origin):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        headers["Access-Control-Request-Headers"] = "authorization,content-type"
        url = f"{server.url}/v1/chat/completions"
        request = urllib.request.Request(url, headers=headers, method="OPTIONS")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.headers["Access-Control-Allow-Origin"]
        except urllib.error.HTTPError as error:
            return error.code, error.headers["Access-Control-Allow-Origin"]

    allowed = "https://pages.example"
    assert preflight(allowed) == (200, allowed)
    assert preflight("https://elsewhere.example") == (400, None)
    for body, status in ((json.dumps(GOOD).encode(), 200), (b"{}", 400), (b"x" * 200_000, 413)):
        answer = server.post("/v1/completions", body, Origin=allowed)
        assert (answer[0], answer[1]["access-control-allow-origin"]) == (status, allowed)
