"""Trackers of an engine's jobs: what their own readers find is what the job reports."""

import json
import shutil
import subprocess
import time

import pytest

from flexllm_jax import LLM
from flexllm_jax.config import ConfigError, build_config
from flexllm_jax.errors import UserError
from flexllm_jax.trackers import kinds
from flexllm_jax.trackers.feed import Feed, Progress
from flexllm_jax.trackers.tracker import Logged, Run
from tests.engines import job_config, letter_rows, start_engine, write_rows
from tests.scripts.workspace import make_workspace
from tests.trackers.readers import read_mlflow, read_tensorboard, read_wandb


def expected(job) -> dict[str, list[tuple[int, float]]]:
    """What a tracker is to know of a job."""
    series: dict[str, list[tuple[int, float]]] = {}
    of_job = job._job
    for group, steps in (
        ("train", enumerate(of_job.metrics, 1)),
        ("validation", of_job.validations),
    ):
        for step, metrics in steps:
            for name, value in metrics.items():
                series.setdefault(f"{group}/{name}", []).append((step, value))
    return series


def assert_same(series, wanted):
    assert series.keys() == wanted.keys()
    for key, points in wanted.items():
        assert [step for step, _ in series[key]] == [step for step, _ in points], key
        values = [value for _, value in points]
        assert [value for _, value in series[key]] == pytest.approx(values, rel=1e-6), key


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", letter_rows(20))


def held_out(folder):
    return write_rows(folder / "held_out.jsonl", letter_rows(9, seed=77))


def tracked_llm(llama, folder, **trackers) -> LLM:
    return start_engine(llama, folder, trackers=trackers, finetune={"checkpoint_every": 20})


def train_in_two_parts(llama, folder, rows, kind, **trackers):
    """A job that goes on in another engine, with the files as they were in the middle of it: the
    checkpoint is older than what the tracker knows. Returns it and its output folder."""
    first, second = folder / "first", folder / "second"
    fields = {"steps": 70, "seed": 2, "resume": True}
    fields |= {"validation": held_out(folder), "validation_every": 8}
    llm = tracked_llm(llama, first, **trackers)
    job = llm.finetune(job_config("tracked", rows, **fields))
    checkpoint = first / "tracked/checkpoints/20"
    while not checkpoint.exists() or (steps_told(first, kind) <= 20 and kind != "wandb"):
        assert job.status == "running"
        time.sleep(0.01)
    if kind == "wandb":  # whose process writes a file when it is closed, a little later
        llm.close()
        end = time.monotonic() + 10
        while steps_told(first, kind) <= 20:
            assert time.monotonic() < end
            time.sleep(0.05)
    shutil.copytree(first, second)  # what a kill leaves
    llm.close()
    known = steps_told(second, kind)
    llm = tracked_llm(llama, second, **trackers)
    job = llm.finetune(job_config("tracked", rows, **fields)).wait(60)
    llm.close()
    assert job.status == "succeeded", job.reason
    assert job.messages == []
    assert job._job.resumed_from >= 20
    assert job._job.resumed_from < known or kind == "wandb"
    return job, second


def test_tensorboard(llama, rows, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is in the extra test")
    trackers = {"tensorboard": {}, "samples": 2, "sample_tokens": 5}
    job, folder = train_in_two_parts(llama, tmp_path, rows, "tensorboard", **trackers)
    (run,) = (folder / "tensorboard").iterdir()
    assert len(list(run.glob("events.out.tfevents.*"))) == 2
    scalars, texts = read_tensorboard(run)
    assert_same(scalars, expected(job))
    config = json.loads(texts["configuration"].strip("`"))
    assert config["optimizer"]["lr"] == job._job.config.optimizer.lr
    first = json.loads(held_out(tmp_path).read_text().splitlines()[0])
    _, _, *samples = texts["samples"].splitlines()
    assert len(samples) == 2
    assert samples[0].startswith(f"| {first['prompt']} | {first['completion']}</s> | ")


def test_what_is_learnt_from_rewards_is_tracked(llama, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is in the extra test")
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "abc"[:n]} for n in (1, 2, 3)])
    method = {"type": "reinforcement", "batch_size": 2, "num_generations": 3, "max_tokens": 4}
    fields = {"method": method | {"kl_coef": 0.1}, "validation": rows, "validation_every": 2}
    with tracked_llm(llama, tmp_path, tensorboard={}) as llm:
        config = job_config("learnt", rows, steps=3, **fields)
        job = llm.finetune(config, reward=lambda samples: [len(s.text) / 9 for s in samples])
        assert job.wait(60).status == "succeeded", job.reason
    (run,) = (tmp_path / "tensorboard").iterdir()
    scalars, _ = read_tensorboard(run)
    assert_same(scalars, expected(job))
    measured = {"reward", "kl", "kl_sampler", "length", "clipped", "grader_errors"}
    assert {f"train/{name}" for name in (*measured, "dropped_groups")} <= scalars.keys()
    assert {f"validation/{name}" for name in ("reward", "length")} <= scalars.keys()


def test_wandb_offline(llama, rows, tmp_path):
    pytest.importorskip("wandb", reason="wandb is in the extra test-clients")
    section = {"project": "letters", "tags": ["mine"], "mode": "offline"}
    job, folder = train_in_two_parts(llama, tmp_path, rows, "wandb", wandb=section)
    runs, series = read_wandb(folder / "wandb")
    assert_same(series, expected(job))
    run_id = json.loads((folder / "tracked/tracked.json").read_text())["run"]
    assert len(runs) == 2
    for run in runs:
        assert (run.run_id, run.project, run.display_name) == (run_id, "letters", "tracked")
        assert list(run.tags) == ["mine"]


def test_mlflow_in_a_folder(llama, rows, tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is in the extra test-clients")
    section = {"experiment": "letters"}
    job, folder = train_in_two_parts(llama, tmp_path, rows, "mlflow", mlflow=section, samples=1)
    ((run, series),) = read_mlflow((folder / "mlruns").as_uri(), "letters")
    assert_same(series, expected(job))
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.lr"] == str(job._job.config.optimizer.lr)
    assert run.data.tags["samples"] == "70"


def steps_told(folder, kind):
    """How many steps a tracker knows."""
    if kind == "wandb":  # its file is whole when it is closed
        series = read_wandb(folder / "wandb")[1]
        return len(series.get("train/loss", []))
    if kind == "mlflow":
        files = folder.glob("mlruns/*/*/metrics/train/loss")
        return sum(len(file.read_text().splitlines()) for file in files)
    scalars = [read_tensorboard(run)[0] for run in (folder / "tensorboard").glob("*")]
    return max((step for series in scalars for step, _ in series.get("train/loss", [])), default=0)


def test_a_killed_process_costs_wandb_no_step(llama, tmp_path, monkeypatch):
    """A real one: W&B's own process may end with it before it has written what it was told."""
    pytest.importorskip("wandb", reason="wandb is in the extra test-clients")
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # that of these tests
    workspace = make_workspace(tmp_path, llama, steps=150, validation=None)
    workspace.tree["finetune"]["checkpoint_every"] = 20
    workspace.tree["trackers"] = {"wandb": {"mode": "offline"}}
    process = subprocess.Popen(workspace.command("finetune.py"), cwd=tmp_path)
    end = time.monotonic() + 60
    while not (workspace.output / "mine/checkpoints/40").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.wait()
    finished = workspace.run("finetune.py")
    assert finished.returncode == 0, finished.stderr
    assert len(list((workspace.output / "wandb").glob("offline-run-*"))) == 2
    steps = [step for step, _ in read_wandb(workspace.output / "wandb")[1]["train/loss"]]
    assert steps == list(range(1, 151))


def test_what_is_not_installed_is_one_line_before_anything_starts(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    monkeypatch.delitem(__import__("sys").modules, "flexllm_jax.trackers.wandb_runs", raising=False)
    with pytest.raises(UserError, match=r"trackers\.wandb: .*pip install 'flexllm_jax\[wandb\]'"):
        LLM(llama, trackers={"wandb": {}}, output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_wrong_field_is_named():
    with pytest.raises(ConfigError, match=r"trackers\.wandb\.projekt.*trackers\.wandb\.project\?"):
        build_config({"model": {"path": "x"}, "trackers": {"wandb": {"projekt": "x"}}})
    with pytest.raises(ConfigError, match=r"trackers\.wandb\.mode"):
        build_config({"model": {"path": "x"}, "trackers": {"wandb": {"mode": "disabled"}}})


class Recorder:
    """A tracker that keeps what it is told, and fails or hangs when asked to."""

    where = "here"

    def __init__(self, fails=0, hangs=0.0):
        self.told, self.starts, self.finished = [], 0, []
        self._fails, self._hangs = fails, hangs

    def start(self, run):
        self.starts += 1
        time.sleep(self._hangs)
        return Logged(max((step for step in self.told), default=0))

    def log(self, step, metrics):
        if step == 3 and self._fails:
            self._fails -= 1
            raise OSError("no route to host")
        self.told.append(step)

    validation = samples = log

    def flush(self):
        pass

    def finish(self, status):
        self.finished.append(status)


def feed(tracker, steps, ended, notes, tmp_path):
    def read(logged):
        done = steps()
        return Progress([(step, {"loss": 1.0}) for step in range(1, done + 1)], [], None, ended())

    return Feed(
        "recorder",
        tracker,
        Run("id", "name", {}, tmp_path),
        read,
        lambda *note: notes.append(note),
        print,
    )


def test_a_tracker_that_fails_is_told_once_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("flexllm_jax.trackers.feed._AGAIN_S", 0.05)
    tracker, notes = Recorder(fails=2), []
    fed = feed(
        tracker, lambda: 5, lambda: "succeeded" if tracker.starts > 2 else None, notes, tmp_path
    )
    fed.join(time.monotonic() + 10)
    assert tracker.told == [1, 2, 3, 4, 5]
    assert tracker.finished[-1] == "succeeded" and fed.complete
    text = "tracker recorder failed; the job goes on without it"
    assert notes == [(text, "no route to host")]


def test_a_tracker_that_hangs_costs_a_message(tmp_path):
    tracker, notes = Recorder(hangs=3.0), []
    fed = feed(tracker, lambda: 5, lambda: "succeeded", notes, tmp_path)
    begun = time.monotonic()
    fed.close(begun + 0.2)
    assert time.monotonic() - begun < 1
    assert notes == [("tracker recorder does not answer; the job goes on without it", "it hangs")]


def test_every_kind_of_the_configuration_has_a_module():
    section = build_config(
        {"model": {"path": "x"}, "trackers": {"tensorboard": {}, "wandb": {}, "mlflow": {}}}
    ).trackers
    assert {name for name, _ in section.chosen()} == set(kinds._CLASSES)
