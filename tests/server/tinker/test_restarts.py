"""What a Tinker client sees when a process is killed under it, or when it is silent for long."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from tests.server.running import RunningServer
from tests.server.tinker.conftest import KEYS, tinker_config
from tests.server.tinker.speaking import Model, Refused, Speaker, next_tokens

DATA = [next_tokens(text) for text in ([1, 5, 20, 33, 40, 12], [1, 7, 9, 11])]
STEPS = 12


class Patient(Speaker):
    """As the SDK: connections that fail are tried again."""

    def ask(self, method, path, body=None, **headers):
        end = time.monotonic() + 120
        while True:
            try:
                return super().ask(method, path, body, **headers)
            except Refused as error:
                if error.status < 500 or time.monotonic() > end:
                    raise
            except OSError:
                if time.monotonic() > end:
                    raise
            time.sleep(0.2)


def train(model, during=lambda: None):
    """Losses of steps that are sent back to back; `during` is called in the middle."""
    promises = []
    for step in range(STEPS):
        promises.append(model.send(DATA))
        model.call("optim_step", adam_params={"learning_rate": 1e-2})
        if step == STEPS // 2:
            model.output(promises[1])  # some are done, others are not
            during()
    return [model.output(promise).metrics["loss:sum"] for promise in promises]


def test_killed_processes_change_no_number(chat_llama, tmp_path):
    """First the engine, then the HTTP process, in the middle of steps; a sampler that was saved
    before them gives what it gave, and a sample in flight is told to be asked for anew."""
    config = tinker_config(chat_llama, tmp_path)
    with RunningServer(config) as server:
        server.wait_ready()
        speaker = Patient(server, KEYS["one"]).begin()
        expected = train(Model.make(speaker))
        model = Model.make(speaker)
        before = model.sampler()
        scored = speaker.logprobs(before, [1, 5, 20, 33], 0)
        path = model.save("start")
        killed = threading.Event()

        def kill_engine():
            os.kill(server.engine_pid, signal.SIGKILL)
            killed.set()

        losses = train(model, kill_engine)
        assert killed.is_set()
        np.testing.assert_allclose(losses, expected, rtol=1e-6)
        np.testing.assert_allclose(speaker.logprobs(before, [1, 5, 20, 33], 1), scored, atol=1e-6)

        promise = speaker.post(
            "asample",
            sampling_session_id=before,
            seq_id=7,
            num_samples=6,
            prompt={"chunks": [{"type": "encoded_text", "tokens": [1, 5]}]},
            sampling_params={"max_tokens": 150, "stop": []},
        )
        kill_engine()
        with pytest.raises(Refused) as error:
            speaker.result(promise)
        assert error.value.status == 410

        second = Model.load(speaker, path, optimizer=True)
        port = int(server.url.rsplit(":", 1)[1])
        config["server"]["port"] = port
        started = []

        def kill_server():
            engine = server.engine_pid
            server.process.kill()
            server.process.wait()
            os.kill(engine, signal.SIGKILL)
            started.append(RunningServer(config))

        try:
            losses = train(second, kill_server)
            np.testing.assert_allclose(losses, expected, rtol=1e-6)
            np.testing.assert_allclose(
                speaker.logprobs(before, [1, 5, 20, 33], 2), scored, atol=1e-6
            )
            told = speaker.get(f"sessions/{speaker.session_id}")
            assert len(told["training_run_ids"]) == 3
            with pytest.raises(Refused) as error:
                speaker.result(f"{before}:7")  # of the process that was killed
            assert error.value.status == 410
        finally:
            for each in started:
                each.stop()


def test_a_silent_client_frees_the_engine_and_comes_back(chat_llama, tmp_path):
    config = tinker_config(chat_llama, tmp_path, tinker={"session_timeout_s": 1.0})
    with RunningServer(config) as server:
        server.wait_ready()
        speaker = Speaker(server, KEYS["one"]).begin()
        steady = Model.make(speaker)
        expected = [train(steady), train(steady)]
        model = Model.make(speaker)
        first = train(model)
        half = model.send(DATA)  # half of a step, which is not in the snapshot
        model.output(half)
        server.wait(lambda: server.metric('flexllm:tinker_models{state="on_engine"}') == 0, 30)
        server.wait(lambda: server.metric("flexllm:tinker_sessions") == 0, 30)
        model.call("optim_step", adam_params={"learning_rate": 1e-2})
        second = train(model)
        np.testing.assert_allclose(first, expected[0], rtol=1e-6)
        np.testing.assert_allclose(second[0], expected[1][1], rtol=1e-6)
        folders = {p.name for p in (tmp_path / "tinker").iterdir()}
        assert 1 <= len(folders) <= 6  # snapshots of each model, the newest and one to be removed
        speaker.post(f"sessions/{speaker.session_id}/finish", reason={"type": "success"})
        server.wait(lambda: server.metric('flexllm:tinker_models{state="on_engine"}') == 0, 30)
