"""A process ends by its deadline, whatever hangs in it."""

import subprocess
import sys
import time

import pytest

HANGS = {
    "a thread that holds the interpreter": "re.match(r'(a+)+$', 'a' * 60 + 'b')",
    "a system call": "open(fifo)",
    "a lock": "threading.Lock().__enter__(); l = threading.Lock(); l.acquire(); l.acquire()",
    "a signal handler that never returns": "signal.signal(15, lambda *_: time.sleep(99)); "
    "os.kill(os.getpid(), 15)",
}


@pytest.mark.parametrize("hang", HANGS)
def test_whatever_hangs(hang, tmp_path):
    program = (
        "import os, re, signal, threading, time\n"
        "from flexllm_jax.server.engines.watchdog import end_within\n"
        f"fifo = {str(tmp_path / 'fifo')!r}; os.mkfifo(fifo)\n"
        "end_within(60)\n"
        "end_within(0.3)  # the last counts\n"
        f"{HANGS[hang]}\n"
    )
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30)
    assert ended.returncode == 1
    assert time.monotonic() - began < 20
    assert b"Timeout" in ended.stderr and b'File "<string>", line 6' in ended.stderr


def test_one_that_ends_in_time_is_left_alone():
    program = (
        "import time\n"
        "from flexllm_jax.server.engines.watchdog import end_within, stand_down\n"
        "end_within(0.2); stand_down(); time.sleep(0.4)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=30).returncode == 0
