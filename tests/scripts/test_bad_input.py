"""What is wrong is told in one line before anything is written."""

import importlib.util
import sys
from pathlib import Path

import pytest

from flexllm_jax.errors import UserError
from flexllm_jax.launch.replay import fit_prompt
from tests.scripts.workspace import SCRIPTS, TRACE, Workspace, make_workspace


@pytest.fixture
def workspace(tmp_path: Path, llama: Path) -> Workspace:
    return make_workspace(tmp_path, llama)


def error_of(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str
) -> str:
    """Message of the error that ends a script."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, SCRIPTS / script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", workspace.command(script, *arguments)[1:])
    monkeypatch.chdir(workspace.folder)
    before = sorted(workspace.folder.rglob("*"))
    with pytest.raises(UserError) as caught:
        module.main()
    assert sorted(workspace.folder.rglob("*")) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.pth=x", "did you mean model.path?"),
        ("model.path=nowhere", "model.path: nowhere does not exist"),
        ("scheduler.slo.tpot_ms=-1", "scheduler.slo.tpot_ms: got -1"),
        ("finetune.jobs.0.dataset=nowhere.jsonl", "finetune.jobs.0.dataset: nowhere.jsonl"),
        ("finetune.jobs.0.dataset=trace.csv", "trace.csv"),
        ("finetune.jobs.0.format=chat", "chat rows need a chat template"),
        ("workload.trace=rows.jsonl", "rows.jsonl:1: no column"),
        ("workload.prompts=trace.csv", 'trace.csv:1: must be a JSON object with a text "prompt"'),
        ("workload.adapter=other", "workload.adapter: 'other' is neither"),
        ("workload=null", "workload: required field"),
        ("output_dir=trace.csv", "trace.csv is a file"),
        ('adapters.preload=[{"name": "a", "path": "."}]', "adapter_config.json does not exist"),
    ],
)
def test_coserve_names_the_field(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, override: str, expected: str
) -> None:
    assert expected in error_of(workspace, monkeypatch, "coserve.py", "--set", override)


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("coserve.py", ["--ask", "x" * 200], "exceed the context of 160"),
        ("finetune.py", ["--set", "finetune.jobs=[]"], "finetune.jobs: there is no job"),
        ("generate.py", [], "--prompt or --prompts-file"),
        ("generate.py", ["--prompt", "a", "--top-p", "2"], "--top_p=2.0 must be"),
        ("generate.py", ["--prompt", "a", "--adapter", "b"], "--adapter: 'b' is neither"),
        ("generate.py", ["--prompt", "a" * 300], "the context of 160"),
        ("export_hf.py", ["--adapter", "b", "--out", "c"], "--adapter: 'b' is neither"),
    ],
)
def test_the_other_scripts_name_what_is_wrong(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    arguments: list[str],
    expected: str,
) -> None:
    assert expected in error_of(workspace, monkeypatch, script, *arguments)


def test_exit_status_and_stderr(workspace: Workspace) -> None:
    done = workspace.run("coserve.py", "--set", "model.pth=x")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("coserve.py: ") and "model.pth: unknown field" in line
    assert not workspace.output.exists()


def test_help_lists_every_field(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flexllm_jax.config.cli import make_parser

    with pytest.raises(SystemExit) as caught:
        make_parser("What it does.").parse_args(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for field in ("model.path", "finetune.jobs.N.optimizer.lr", "workload.time_scale"):
        assert field in shown
    with pytest.raises(SystemExit) as caught:
        make_parser("What it does.").parse_args(["--confg", "x"])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_prompt_is_cut_or_repeated_to_the_length_of_the_trace() -> None:
    assert fit_prompt([1, 2, 3], 2) == (2, 3)
    assert fit_prompt([1, 2, 3], 3) == (1, 2, 3)
    assert fit_prompt([1, 2, 3], 7) == (3, 1, 2, 3, 1, 2, 3)


def test_a_trace_that_goes_back_in_time(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(workspace.tree["workload"]["trace"]).write_text(TRACE + "1,2,3\n0,2,3\n")
    message = error_of(workspace, monkeypatch, "coserve.py")
    assert message.startswith("workload.trace: ") and "trace.csv:3" in message
