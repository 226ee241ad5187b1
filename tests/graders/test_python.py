"""python graders: what a program may give back, and what it cannot do to anybody."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexllm_jax.config.sections.graders import GradersSection, read_grader
from flexllm_jax.errors import UserError
from flexllm_jax.graders import Grade, Sample, make_grader
from flexllm_jax.graders.confined.confinement import call_filter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="python graders need Linux")


def grader(source: str, **limits):
    settings = GradersSection(python=True, **{"timeout_s": 10.0, **limits})
    return make_grader(read_grader({"type": "python", "source": source}), settings=settings)


def _indented(lines: str) -> str:
    return "".join(f"    {line}\n" for line in lines.splitlines())


def grade_all(bodies, **limits) -> list[Grade]:
    """Of functions with these lines, in one process, one after the other."""
    functions = [f"def f{i}(sample, item):\n{_indented(body)}" for i, body in enumerate(bodies)]
    last = "def grade(sample, item):\n    return globals()[item['f']](sample, item)\n"
    samples = [Sample("text", {"x": 2, "f": f"f{i}"}) for i in range(len(bodies))]
    program = grader("\n".join([*functions, last]), processes=1, **limits)
    return program.grade(samples)


def grade(body: str, sample: Sample | None = None, **limits) -> Grade:
    """Of a program whose function has these lines."""
    sample = sample or Sample("text", {"x": 2})
    return grader(f"def grade(sample, item):\n{_indented(body)}", **limits).grade([sample])[0]


ALLOWED = {
    "return 1": 1,
    "return item['x'] / 8": 0.25,
    "return True": 1,
    "return sample['output_text'] == 'text'": 1,
    "return sample['choices'][0]['message']['content'] == 'text'": 1,
    "return sample['output_json'] is None and sample['output_tools'] is None": 1,
    "import numpy\nreturn numpy.float32(numpy.ones((9, 9)).sum())": 81,
    "import fractions\nreturn fractions.Fraction(1, 2)": 0.5,
    "import rapidfuzz\nreturn rapidfuzz.fuzz.ratio('a', 'a')": 100,
    "print('garbage', flush=True)\nimport os\nos.write(1, b'{}\\n')\nreturn 1": 1,
    "import sys\nsys.stderr.write('x' * 10**6)\nreturn len(sys.stdin.read())": 0,
    "return -1e300": -1e300,
}


def test_what_a_program_may_do():
    for (body, reward), result in zip(ALLOWED.items(), grade_all(list(ALLOWED)), strict=True):
        assert (result.reward, result.error) == (reward, None), body


def test_openais_names():
    tools = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    sample = Sample('{"name": "Sara"}', {"name": "Sara"}, tools)
    body = "return (sample['output_json']['name'] == item['name']) + len(sample['output_tools'])"
    assert grade(body, sample).reward == 2


WRONG = {
    "1 / 0": "line 2: ZeroDivisionError: division by zero",
    "return item['y']": "KeyError: 'y'",
    "return None": "grade returned a NoneType; it must return a number",
    "return '1'": "grade returned a str; it must return a number",
    "return [1]": "grade returned a list",
    "return 1j": "complex",
    "return float('nan')": "grade returned nan; it must return a finite number",
    "return float('inf')": "grade returned inf",
    "return 10 ** 400": "OverflowError",
    "import sys\nsys.exit('bye')": "SystemExit: bye",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "return grade(sample, item)": "RecursionError",
    "raise ValueError('a\\nb' + 'x' * 10**7)": "ValueError: a bx",
    "x = 'x' * 10**10": "MemoryError",
    "return len([0] * 10**9)": "MemoryError",
}


def test_what_goes_wrong_is_told_in_one_line():
    results = grade_all(list(WRONG), memory_mb=512)
    for (body, said), result in zip(WRONG.items(), results, strict=True):
        error = result.error or ""
        assert result.failed and error.startswith("grader.source: ") and said in error, body
        assert set(result.flags) == {"python_grader_runtime_error"}
        assert "\n" not in error and len(error) < 500


PREPARED = """
import os, ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    result = libc.syscall(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""


ATTEMPTS = (
    "os.fork()",
    "os.posix_spawn('/bin/true', ['true'], {})",
    "os.execv('/bin/true', ['true'])",
    "import subprocess; subprocess.run(['/bin/true'])",
    "import threading; threading.Thread(target=int).start()",
    "import socket; socket.socket()",
    "import socket; socket.socketpair()",
    "import asyncio; asyncio.run(asyncio.sleep(0))",
    "open('/etc/passwd')",
    "open('/proc/self/environ')",
    "open('/proc/self/mem', 'rb')",
    "open(f'/proc/{os.getppid()}/environ')",
    "open(SERVER)",
    "open(OUTSIDE)",
    "open(OUTSIDE, 'w')",
    "open('/dev/shm/grader', 'w')",
    "open(OUTSIDE + 'new', 'x')",
    "open(os.__file__, 'r+')",
    "os.open(OUTSIDE, os.O_RDONLY | os.O_TRUNC)",
    "open('/dev/null', 'w')",
    "os.listdir('/')",
    "os.listdir('/proc')",
    "os.remove(OUTSIDE)",
    "os.chmod(OUTSIDE, 0o777)",
    "os.rename(OUTSIDE, OUTSIDE + '2')",
    "os.symlink('/', OUTSIDE + 'link')",
    "os.mkdir(OUTSIDE + 'folder')",
    "os.chdir('/')",
    "os.chroot('/')",
    "os.truncate(OUTSIDE, 0)",
    "os.kill(os.getppid(), 0)",
    "os.kill(os.getpid(), 0)",
    "os.killpg(os.getppid(), 0)",
    "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "os.sched_setaffinity(os.getppid(), {0})",
    "os.setuid(65534)",
    "os.setsid()",
    "os.memfd_create('x')",
    "os.mkfifo(OUTSIDE + 'fifo')",
    "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (1, 1))",
    "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "import fcntl; fcntl.fcntl(0, fcntl.F_SETFL, os.O_ASYNC)",
    "import fcntl; fcntl.ioctl(0, 0x5412, b'x')  # TIOCSTI",
    "import signal; signal.setitimer(signal.ITIMER_REAL, 0)",
    "import mmap; mmap.mmap(os.open(os.__file__, os.O_RDWR), 10)",
    "call(101, 16, os.getppid(), 0, 0)  # ptrace",
    "call(310, os.getppid(), 0, 0, 0, 0, 0)  # process_vm_readv",
    "call(425, 8, bytes(120))  # io_uring_setup",
    "call(272, 0x40000000)  # unshare",
    "call(435, bytes(88), 88)  # clone3",
    "call(248, b'user', b'x', b'x', 1, -2)  # add_key",
    "call(29, 1, 4096, 0o1777)  # shmget",
    "call(157, 22, 0, 0, 0, 0)  # prctl: no filter can be taken away, and none be added",
)


def test_what_a_program_cannot_do(tmp_path):
    """It is refused, by the kernel, in the program's own terms, and the program goes on."""
    outside = tmp_path / "outside"
    outside.write_text("secret")
    attempts = [a for a in ATTEMPTS if "call(" not in a or os.uname().machine == "x86_64"]
    source = f"""{PREPARED}
OUTSIDE, SERVER = {str(outside)!r}, {os.path.abspath("flexllm_jax/server/app.py")!r}
def grade(sample, item):
    try:
        exec(item["attempt"], globals())
    except OSError as error:
        return error.errno
    except RuntimeError:  # threading's, which keeps no number
        return {errno.EPERM}
    except ValueError:  # resource's of EPERM
        return {errno.EPERM}
    return 0
"""
    program = grader(source, processes=1)
    results = program.grade([Sample("", {"attempt": attempt}) for attempt in attempts])
    for attempt, result in zip(attempts, results, strict=True):
        assert result.reward in (errno.EPERM, errno.EACCES, errno.ENOSYS), (attempt, result)
    assert outside.read_text() == "secret"


def test_it_knows_nothing_of_the_servers_environment(monkeypatch):
    monkeypatch.setenv("FLEXLLM_SECRET", "s3cret")
    assert grade("import os\nreturn 's3cret' in str(dict(os.environ))").reward == 0
    assert grade("import os\nreturn len(os.environ)").reward < 10


def test_other_interfaces_to_the_kernel_end_it():
    """The calls of x32 have the numbers of x86-64 and a bit more."""
    if os.uname().machine != "x86_64":
        pytest.skip("x86-64 has it")
    result = grade("import ctypes\nctypes.CDLL(None).syscall(0x40000000 + 41, 2, 1, 0)\nreturn 1")
    assert result.error == "grader: its process ended (signal 31)"


EVERYWHERE = "import os\nfor fd in range(3, 64):\n  try: os.write(fd, {!r})\n  except OSError: 0"
LOST = {
    "while True: pass": "it took over 0.7 s",
    "import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(60)": "took over 0.7 s",
    "import re\nre.match('(a+)+b', 'a' * 60)": "it took over 0.7 s",
    "class E(Exception):\n  def __str__(self):\n    while True: pass\nraise E": "took over 0.7 s",
    "import os\nos._exit(0)": "its process ended (status 0)",
    "import ctypes\nctypes.string_at(0)": "its process ended (signal 11)",
    "import os\n[os.close(fd) for fd in range(64) if fd > 2]": "its process ended",
    EVERYWHERE.format(b"x\n"): "it wrote what is no answer",
    EVERYWHERE.format(b"[" * 5000): "it wrote what is no answer",
    EVERYWHERE.format(b'{"id": 2, "reward": NaN}\n'): "it wrote what is no answer",
    EVERYWHERE.format(b'{"id": 2, "reward": true}\n'): "it wrote what is no answer",
    EVERYWHERE.format(b'{"id": 7, "reward": 1.0}\n'): "it wrote what is no answer",
    EVERYWHERE.format(b"\xff\n"): "it wrote what is no answer",
}


def test_one_that_is_lost_costs_its_sample_alone():
    """The samples around it have their rewards."""
    bodies = [body for lost in LOST for body in ("return 1", lost)] + ["return 1"]
    results = grade_all(bodies, timeout_s=0.7)
    assert [result.reward for result in results[::2]] == [1] * (len(LOST) + 1)
    for (body, said), result in zip(LOST.items(), results[1::2], strict=True):
        assert result.failed and said in (result.error or ""), (body, result)
        assert set(result.flags) == {"python_grader_server_error"}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def grade(sample, item)\n    return 1", "line 1: SyntaxError: "),
        ("x = 1", "it has no function `grade`; add `def grade(sample, item):`"),
        ("grade = 1", "it has no function `grade`"),
        ("def grade(sample): return 1", "grade does not take two arguments"),
        ("def grade(a, b, c): return 1", "grade does not take two arguments"),
        ("import no_such_module", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('é')", "line 1: RuntimeError: \\xe9"),
        ("import os; os._exit(3)", "it cannot be loaded: its process ended (status 3)"),
        ("while True: pass", "it cannot be loaded: it took over 0.5 s"),
        ("\0", "null byte"),
        ("(" * 10_000, "too many nested parentheses"),
        ("-" * 200_000 + "1", "grader.source: "),
        ("import socket\nsocket.socket()", "line 2: PermissionError"),
        ("", "it has no function `grade`"),
    ],
)
def test_a_program_that_cannot_be_used(source, said):
    with pytest.raises(UserError) as error:
        grader(source, timeout_s=0.5)
    message = str(error.value)
    assert message.startswith("grader.source: ") and said in message and "\n" not in message


def test_it_is_off_unless_it_is_turned_on():
    config = read_grader({"type": "python", "source": "def grade(sample, item): return 1"})
    for settings in (None, GradersSection()):
        with pytest.raises(UserError, match=r"^grader.type: python graders are off; .* true$"):
            make_grader(config, settings=settings)


def test_the_source_is_bounded():
    with pytest.raises(UserError, match=r"grader\.source: "):
        read_grader({"type": "python", "source": "#" * (256 * 1024 + 1)})


def test_samples_are_graded_side_by_side_and_in_their_order():
    source = "import time\ndef grade(sample, item):\n    time.sleep(0.05)\n    return item['i']"
    program = grader(source, processes=4)
    samples = [Sample("", {"i": i}) for i in range(20)]
    begin = time.perf_counter()
    assert [g.reward for g in program.grade(samples)] == list(range(20))
    assert time.perf_counter() - begin < 0.9  # one after the other it is 1 s at least
    assert program.grade([]) == []


def test_what_json_cannot_hold_is_told():
    (result,) = grader("def grade(sample, item): return 1").grade([Sample("", {"x": {1, 2}})])
    assert result.failed and "not JSON serializable" in (result.error or "")


def test_it_ends_with_the_process_that_started_it():
    """kill -9 of a server leaves nothing behind."""
    program = (
        "from tests.graders.test_python import grade\ngrade('while True: pass', timeout_s=600.0)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        looping = _wait_for(lambda: next(filter(_is_busy, _children(parent.pid)), None))
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    _wait_for(lambda: not _runs(looping) or None)


def _children(pid: int) -> list[int]:
    told = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for text in told for child in text.split()]


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["Z"] + ["0"] * 20


def _is_busy(pid: int) -> bool:
    return int(_stat(pid)[11]) > 20  # ticks of processor time


def _runs(pid: int) -> bool:
    return _stat(pid)[0] != "Z"


def _wait_for(what, seconds=20.0):
    end = time.monotonic() + seconds
    while (result := what()) is None:
        assert time.monotonic() < end
        time.sleep(0.02)
    return result


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_by_an_interpreter_of_its_own(machine):
    """What the kernel does with it, for the other architecture too."""
    numbers = {
        "x86_64": {"read": 0, "socket": 41, "execve": 59, "fork": 57, "clone": 56, "ioctl": 16},
        "aarch64": {"read": 63, "socket": 198, "execve": 221, "clone": 220, "ioctl": 29},
    }[machine]
    architecture = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    program = call_filter(machine)

    def verdict(number: int, argument: int = 0, arch: int = architecture) -> str:
        data, at, loaded = {0: number, 4: arch, 24: argument, 32: argument}, 0, 0
        while True:
            code, if_true, if_false, value = program[at]
            at += 1
            if code == 0x20:
                loaded = data[value]
            elif code == 0x06:
                return {0x7FFF0000: "allow", 0x80000000: "kill"}.get(
                    value, f"errno {value & 0xFFFF}"
                )
            else:
                holds = {0x15: loaded == value, 0x35: loaded >= value, 0x45: loaded & value}[code]
                at += if_true if holds else if_false

    assert verdict(numbers.pop("read")) == "allow"
    assert verdict(numbers["ioctl"], 0x5401) == "allow"
    for name, number in numbers.items():
        assert verdict(number) == "errno 1", name
    for opening in {"x86_64": (2, 257), "aarch64": (56,)}[machine]:
        assert verdict(opening, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY) == "allow"
        for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_TMPFILE | os.O_RDWR):
            assert verdict(opening, flag) == "errno 1"
    assert verdict(435) == "errno 38"
    assert verdict(0, arch=0x40000003) == "kill"  # i386
    assert verdict(10_000) == "errno 1"
    assert len(program) < 4096 and all(max(step[1:3]) < 256 for step in program)
