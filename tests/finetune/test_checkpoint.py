"""A job's checkpoints come back bit for bit, and survive full disks, damage and SIGKILL."""

import logging
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import optax
import pytest

from flexllm_jax.finetune.checkpoint import CheckpointError, JobCheckpoints

COMPILED = "/jax/core/compile/backend_compile_duration"


def state(step: int, size: int = 1000) -> dict:
    """A job's state in miniature: weights and an optax state, all values derived from `step`."""
    values = np.random.default_rng(step)
    master = [{"q": {"a": values.standard_normal((size, 4)).astype(np.float32)}} for _ in range(2)]
    zeros = jax.tree.map(np.zeros_like, master)
    adam = optax.ScaleByAdamState(count=np.asarray(step, np.int32), mu=zeros, nu=master)
    return {"master": master, "optimizer": (adam, optax.EmptyState()), "totals": np.ones(2)}


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(got, np.ndarray)
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert got.tobytes() == want.tobytes()


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 10 and 20."""
    checkpoints = JobCheckpoints(tmp_path / "job")
    for step in (10, 20):
        checkpoints.save(step, state(step), {"losses": [1.0 / step]})
    return checkpoints


def restored(checkpoints: JobCheckpoints):
    """The newest checkpoint, which must be what was saved at its step."""
    checkpoint = checkpoints.restore_latest(shapes(state(0)))
    assert checkpoint is not None
    assert_same_bits(checkpoint.arrays, state(checkpoint.step))
    return checkpoint


class TestRoundTrip:
    def test_every_bit_comes_back_and_nothing_compiles(self, tmp_path):
        bits = np.array([0x7FC12345, 0xFFC00001, 0x80000000, 0x00000001, 0x7F800000], np.uint32)
        arrays = state(3) | {
            "odd floats: NaN payloads, -0, subnormal": bits.view(np.float32),
            "a/b.c": [np.asarray(7, np.int32), np.zeros((0, 3), np.float32)],
            "half": np.arange(-5, 5).astype(ml_dtypes.bfloat16).reshape(2, 5),
            "transposed": np.arange(6, dtype=np.int32).reshape(2, 3).T,
            "zeros": np.zeros((3, 3), ml_dtypes.bfloat16),
        }
        info = {
            "step": 3,
            "losses": [0.1, 1e-300, 3.0],
            "data": {"epoch": 1, "index": 5},
            "n": None,
        }
        compilations, results = [], []

        def listen(event: str, duration_secs: float, **kwargs):
            compilations.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)

        def work():  # as the engine does: in a thread of its own
            checkpoints = JobCheckpoints(tmp_path / "a job, 100%")
            checkpoints.save(3, arrays, info)
            results.append(checkpoints.restore_latest(shapes(arrays)))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        jax.monitoring.unregister_event_duration_listener(listen)
        assert COMPILED not in compilations
        (checkpoint,) = results
        assert checkpoint.step == 3
        assert checkpoint.info == info
        assert_same_bits(checkpoint.arrays, arrays)

    def test_a_job_without_checkpoints_has_none(self, tmp_path):
        checkpoints = JobCheckpoints(tmp_path / "new")
        assert checkpoints.restore_latest(shapes(state(0))) is None
        assert checkpoints.steps() == []
        assert not (tmp_path / "new").exists()

    def test_info_that_is_not_json_is_refused_before_anything_is_written(self, tmp_path):
        with pytest.raises(TypeError):
            JobCheckpoints(tmp_path / "new").save(1, state(1), {"x": object()})
        assert not (tmp_path / "new").exists()


class TestWhatIsKept:
    def test_the_newest_two(self, saved):
        saved.save(30, state(30), {})
        assert saved.steps() == [20, 30]
        assert sorted(p.name for p in saved.directory.iterdir()) == ["20", "30"]

    def test_a_step_saved_again_is_replaced(self, saved):
        for note in ("second", "third"):
            saved.save(20, state(20), {"note": note})
        assert saved.steps() == [10, 20]
        assert restored(saved).info == {"note": "third"}
        assert len(list(saved.directory.iterdir())) == 2

    def test_going_back_removes_later_steps(self, saved):
        saved.save(15, state(15), {})
        assert saved.steps() == [10, 15]
        assert restored(saved).step == 15

    def test_leftovers_of_interrupted_saves_go_and_other_files_stay(self, saved):
        for name in ("30.orbax-checkpoint-tmp", "30.orbax-checkpoint-tmp-17", "5.removed"):
            (saved.directory / name / "arrays").mkdir(parents=True)
        (saved.directory / "notes.txt").write_text("mine")
        assert saved.steps() == [10, 20]
        saved.save(30, state(30), {})
        assert sorted(p.name for p in saved.directory.iterdir()) == ["20", "30", "notes.txt"]

    def test_keep_is_at_least_one(self, tmp_path):
        with pytest.raises(CheckpointError, match="keep is 0"):
            JobCheckpoints(tmp_path, keep=0)


class TestAnotherJob:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda s: s | {"totals": np.ones(3)},
                r"\['totals'\] is float64\[2\].* float64\[3\]",
            ),
            (
                lambda s: s | {"totals": np.ones(2, np.int32)},
                r"\['totals'\] is float64.* int32\[2\]",
            ),
            (lambda s: s | {"more": np.ones(2)}, r"it has no array \['more'\]"),
            (lambda s: {"master": s["master"]}, r"the job has no array \['optimizer'\]"),
        ],
    )
    def test_arrays_that_do_not_match_are_named(self, saved, change, message):
        with pytest.raises(CheckpointError, match=message) as error:
            saved.restore_latest(shapes(change(state(0))))
        assert str(saved.directory) in str(error.value)
        assert "\n" not in str(error.value)

    def test_a_path_that_is_no_directory(self, tmp_path):
        (tmp_path / "file").write_text("")
        for use in (
            lambda c: c.restore_latest(shapes(state(0))),
            lambda c: c.save(1, state(1), {}),
            lambda c: c.steps(),
        ):
            with pytest.raises(CheckpointError, match=r"file cannot be read as a directory") as e:
                use(JobCheckpoints(tmp_path / "file"))
            assert "\n" not in str(e.value)


def biggest(directory: Path) -> Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# Reads that orbax gives up report to an event loop that is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestDamage:
    @pytest.mark.parametrize(
        "damage",
        [
            lambda step: truncate(biggest(step / "arrays")),
            lambda step: flip_a_bit(biggest(step / "arrays")),
            lambda step: biggest(step / "arrays").unlink(),
            lambda step: (step / "arrays" / "manifest.ocdbt").unlink(),
            lambda step: truncate(step / "info" / "metadata"),
            lambda step: (step / "info" / "metadata").write_bytes(b"{}"),
        ],
        ids=["truncated", "one bit", "missing", "no manifest", "half the info", "empty info"],
    )
    def test_a_damaged_checkpoint_gives_way_to_the_one_before(self, saved, damage, caplog):
        damage(saved.directory / "20")
        with caplog.at_level(logging.WARNING, "flexllm_jax"):
            assert restored(saved).step == 10
        assert f"{saved.directory / '20'} is damaged and passed over" in caplog.text
        saved.save(20, state(20), {})
        assert restored(saved).step == 20

    def test_a_job_whose_checkpoints_are_all_damaged_does_not_silently_start_over(self, saved):
        for step in ("10", "20"):
            truncate(biggest(saved.directory / step / "arrays"))
        with pytest.raises(CheckpointError, match="none of its 2 checkpoints can be read"):
            saved.restore_latest(shapes(state(0)))


def start(function: str, *arguments) -> subprocess.Popen:
    """Run a function of this module in a process of its own."""
    code = "import sys; from tests.finetune import test_checkpoint as t; "
    return subprocess.Popen(
        [sys.executable, "-c", code + f"t.{function}(*sys.argv[1:])", *map(str, arguments)],
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def save_where_files_stay_small(directory: str):
    """Save a checkpoint in a process whose files cannot grow beyond 64 KiB."""
    import resource
    import signal

    checkpoints = JobCheckpoints(directory)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes fail instead of killing the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    try:
        checkpoints.save(30, state(30, size=100_000), {})
    except CheckpointError as error:
        print(error)


def test_a_full_disk_is_one_clear_line_and_leaves_the_earlier_checkpoints(saved):
    process = start("save_where_files_stay_small", saved.directory)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert len(output.splitlines()) == 1
    assert f"{saved.directory}: step 30 could not be saved (File too large)" in output
    assert "SignalingThread" not in errors
    assert "free space on the disk" in output
    assert saved.steps() == [10, 20]
    assert restored(saved).step == 20
    saved.save(30, state(30), {})
    assert sorted(p.name for p in saved.directory.iterdir()) == ["20", "30"]


def save_until_killed(directory: str):
    """For each line "step seconds": save from that step on in a child, and kill it after that
    time."""
    import os
    import signal
    import time

    for line in sys.stdin:
        step, seconds = line.split()
        child = os.fork()
        if child == 0:
            checkpoints = JobCheckpoints(directory)
            for at in range(int(step), sys.maxsize):
                checkpoints.save(at, state(at), {"losses": [float(at)]})
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print("killed", flush=True)


def test_what_cannot_fit_is_not_begun(saved, monkeypatch):
    """The disk has a byte less than the arrays need."""
    arrays = {"a": np.zeros(1000, np.float32)}
    usage = shutil.disk_usage(saved.directory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3999))
    before = sorted(saved.directory.iterdir())
    with pytest.raises(CheckpointError, match="could not be saved \\(No space left on device\\)"):
        saved.save(99, arrays, {})
    assert sorted(saved.directory.iterdir()) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4000))
    saved.save(99, arrays, {})
    assert saved.steps()[-1] == 99


def test_killed_at_any_moment_the_newest_checkpoint_is_complete(tmp_path):
    directory = tmp_path / "job"
    checkpoints = JobCheckpoints(directory)
    checkpoints.save(0, state(0), {"losses": [0.0]})
    saver = start("save_until_killed", directory)
    assert saver.stdin and saver.stdout
    times, patience, newest, interrupted = random.Random(0), 0.4, 0, 0
    try:
        for _ in range(12):
            saver.stdin.write(f"{newest + 1} {times.uniform(0.0, patience)}\n")
            saver.stdin.flush()
            assert saver.stdout.readline() == "killed\n"
            interrupted += any("tmp" in p.name or "removed" in p.name for p in directory.iterdir())
            checkpoint = restored(checkpoints)
            assert checkpoint.step >= newest
            assert checkpoint.info == {"losses": [float(checkpoint.step)]}
            patience *= 1.0 if checkpoint.step > newest else 1.5  # for a slow machine
            newest = checkpoint.step
    finally:
        saver.kill()
        saver.communicate()
    assert interrupted, "no save was interrupted: the test proves nothing"
    assert newest, "no save was completed: the test proves nothing"
    checkpoints.save(newest + 1, state(newest + 1), {})
    assert sorted(int(p.name) for p in directory.iterdir()) == [newest, newest + 1]
