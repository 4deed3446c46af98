"""The command line, as a newcomer uses it, with torch and Ray out of reach."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer
from loopback import Server, adds

from palaestra.gym import cli
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.registry import UsageError, spec

COMMAND = Path(sys.executable).with_name("palaestra")
CORE_ONLY = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "ray", "transformers", "tokenizers"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
from palaestra.gym.cli import main
main()
"""


def core(*arguments, folder) -> subprocess.CompletedProcess:
    """`palaestra ARGUMENTS` in a process that has neither torch nor Ray."""
    command = [sys.executable, "-P", "-c", CORE_ONLY, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)


def run(*arguments) -> None:
    """`palaestra ARGUMENTS` in this process."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        if end.code:
            raise


@pytest.fixture
def server():
    """An endpoint that adds by calling the tool, then says what the tool said."""
    with Server(adds) as server:
        yield server.url


def test_new_check_score_and_eval_work_on_the_core_install_alone(tmp_path, server):
    done = core("env", "new", "sums", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [len((tmp_path / name).read_text().splitlines()) for name in ("sums.py", "test_sums.py")]
    assert sum(lines) < 40
    done = core("env", "check", "sums.py:Sums", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "rows.jsonl").write_text('{"answer": "5", "reply": "5"}\n{"answer": "5", "reply": "6", "key": "k"}\n')
    done = core("env", "score", "sums.py", "--input", "rows.jsonl", "--output", "out.jsonl", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    verdicts = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [verdict["reward"] for verdict in verdicts] == [1.0, 0.0]
    policy = f"openai:m@{server}"
    evaluate = ("eval", "--policy", policy, "--policy", "null", "--env", "sums.py", "-n", 6, "-k", 2, "--out", "out")
    done = core(*evaluate, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (first["policy"], first["reward"]["mean"], first["tool_calls"], first["turns"]) == (policy, 1.0, 1.0, 2.0)
    assert (first["prompt_tokens"], first["completion_tokens"]) == (40.0, 10.0)
    assert second["reward"]["mean"] == 0.0


def test_the_scaffolds_test_passes(tmp_path):
    run("env", "new", "sums", "--folder", tmp_path)
    pytest_command = [str(Path(sys.executable).parent / "pytest"), "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(pytest_command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_env_list_imports_no_environment(tmp_path):
    done = core("env", "list", folder=tmp_path)
    assert done.returncode == 0
    assert {"math", "code", "search"} <= {line.split()[0] for line in done.stdout.splitlines()}
    loaded = subprocess.run(
        [sys.executable, "-P", "-X", "importtime", COMMAND, "env", "list"], capture_output=True, text=True, timeout=100
    ).stderr
    assert "palaestra.gym.cli" in loaded
    assert "palaestra.environments.math" not in loaded


def test_shell_tasks_are_written_as_harbor_folders_that_are_read_back(tmp_path):
    run("tasks", "export", "terminal", "--output", tmp_path / "out", "--count", 3)
    folders = sorted((tmp_path / "out").iterdir())
    assert len(folders) == 3
    assert {"task.toml", "instruction.md", "environment", "tests", "solution"} <= {p.name for p in folders[0].iterdir()}
    assert [task.key for task in spec(f"harbor:{tmp_path / 'out'}").environment().task_set(None)] == [
        folder.name for folder in folders
    ]


FORTY = """import asyncio
from palaestra.gym.environment import Environment
from palaestra.gym.tasksets import rows


class Forty(Environment):
    '''Wait.'''

    tasks = rows([{"q": str(n)} for n in range(40)], prompt="q")

    async def setup(self, task):
        print("plays", flush=True)
        await asyncio.sleep(60)
"""


def test_all_of_a_finite_set_may_be_asked_for(tmp_path):
    (tmp_path / "forty.py").write_text(FORTY)
    forty = spec(f"{tmp_path / 'forty.py'}")
    counts = {split: len(list(forty.tasks(split, 0))) for split in ("train", "held-out", "all")}
    assert counts["all"] == 40 == counts["train"] + counts["held-out"]
    assert counts["held-out"]


def test_an_evaluation_of_fewer_tasks_than_were_asked_for_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("forty.py").write_text(FORTY.replace("await asyncio.sleep(60)", "return"))
    count = len(list(spec("forty.py").tasks("held-out", 0)))
    run("eval", "--policy", "null", "--env", "forty.py", "-n", 30)
    assert f"forty has {count} tasks in the split 'held-out'; 30 were asked for" in capsys.readouterr().out


def test_ctrl_c_says_that_it_goes_on(tmp_path):
    (tmp_path / "forty.py").write_text(FORTY)
    command = [COMMAND, "eval", "--policy", "null", "--env", "forty.py", "--split", "all"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background may have it ignored
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, text=True, preexec_fn=heard, **pipes) as process:
        assert process.stdout.readline() == "plays\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read().splitlines()[-1].startswith("palaestra: interrupted; eval and train go on")


def test_an_environment_that_builds_no_tasks_says_so(capsys):
    with pytest.raises(SystemExit):
        run("tasks", "build", "math")
    assert capsys.readouterr().err.strip() == "palaestra: Math makes no tasks from outside material"


@pytest.fixture
def sums(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("env", "new", "sums")
    return tmp_path / "sums.py"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["env", "check", "mth"], "did you mean 'math'"),
        (["env", "check", "sums.py", "config.size=3"], "no config key 'size'"),
        (["env", "check", "sums.py", "size=3"], "write config.KEY=VALUE"),
        (["env", "check", "sums.py", "size"], "is no override"),
        (["env", "new", "1x"], "not a Python name"),
        (["tasks", "export", "math", "-o", "folder"], "Math writes no tasks for other tools"),
        (["env", "new", "random"], "a module random of its own"),
        (["env", "new", "sums"], "exists; choose another name"),
        (["env", "score", "sums.py", "--input", "no.jsonl", "--output", "o"], "there is no data file no.jsonl"),
        (["tasks", "show", "sums.py", "nokey"], "no task has the key 'nokey'"),
        (["eval", "--policy", "nul", "--env", "sums.py"], "did you mean 'null'"),
        (["eval", "--policy", "null", "--env", "sums.py", "environments.x.config.a=1"], "ALIAS of ['sums']"),
        (
            ["eval", "--policy", "null", "--env", "sums.py", "--split", "nowhere"],
            "no tasks in split 'nowhere'; there are",
        ),
        (["eval", "--policy", "null", "--env", "math", "--split", "test"], "have the splits train and held-out"),
        (["eval", "--policy", "null", "--env", "no.py"], "no.py is looked for in the working folder"),
    ],
)
def test_an_error_is_one_clear_line_and_a_status(arguments, text, sums, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("episodes ")]
    assert end.value.code == 1
    assert len(errors) == 1
    assert text in errors[0]
    assert not (sums.parent / "o").exists()


def test_a_faulty_environment_fails_the_check_with_a_status(sums, capsys):
    sums.write_text(sums.read_text().replace("answer.strip() ==", "answer.strip() !="))
    with pytest.raises(SystemExit) as end:
        cli.main(["env", "check", "sums.py", "--tasks", "2", "--seconds", "2"])
    out, err = capsys.readouterr()
    assert end.value.code == 1
    assert "FAIL gold: task" in out
    assert "found" in err


def test_too_many_unscored_rows_or_episodes_fail_with_a_status(sums, capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"answer": "5"}\n')
    with pytest.raises(SystemExit) as end:
        cli.main(["env", "score", "sums.py", "--input", "rows.jsonl", "--output", "out.jsonl"])
    assert end.value.code == 1
    assert json.loads((tmp_path / "out.jsonl").read_text())["outcome"] == "refused"
    sums.write_text(sums.read_text().replace("return float(", "raise OSError("))
    with pytest.raises(SystemExit) as end:
        cli.main(["eval", "--policy", "null", "--env", "sums.py", "-n", "2"])
    assert end.value.code == 1
    assert "2 of 2 episodes are unscored" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["env", "play"], ["eval", "--env"]])
def test_a_solution_that_is_a_number_is_named(command, sums, capsys):
    sums.write_text(sums.read_text().replace('return task.data["answer"]', 'return int(task.data["answer"])'))
    with pytest.raises(SystemExit):
        cli.main([*command, "sums.py", "--policy", "scripted:gold"])
    text = capsys.readouterr().err.splitlines()[-1]
    assert text.startswith("palaestra: Sums: solution(task) returned ")
    assert text.endswith(" (int); return a str, a Message, or a list of them")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Failure(Cause.TOOLS, "the index\nis gone"), "tools: the index is gone"),
        (PermissionError(13, "Permission denied", "a/b"), "a/b: Permission denied (PALAESTRA_TRACEBACK=1 shows where)"),
        (FileNotFoundError("no file x"), "no file x (PALAESTRA_TRACEBACK=1 shows where)"),
        (ZeroDivisionError("by\nzero"), "ZeroDivisionError: by zero (PALAESTRA_TRACEBACK=1 shows where)"),
    ],
)
def test_our_own_and_the_systems_errors_are_told_without_a_type(error, text):
    assert cli.told(error) == text


def test_tasks_are_listed_shown_and_played(sums, capsys):
    capsys.readouterr()
    run("tasks", "list", sums, "-n", 3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    key = lines[1].split("\t")[0]
    run("tasks", "show", sums, key)
    task = json.loads(capsys.readouterr().out)
    assert (task["key"], task["environment"]) == (key, "sums")
    run("env", "play", sums, "--key", key, "--policy", "scripted:gold")
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"[user] {task['prompt']}"
    assert json.loads(out[-1])["reward"] == 1.0


def test_configuration_reaches_the_environment_from_the_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("env", "play", "gymnasium:CartPole-v1", "config.steps=1", "--policy", "null")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["outcome"] == "limit:turns"
    run("eval", "--policy", "null", "--env", "c=gymnasium:FrozenLake-v1", "environments.c.config.steps=1", "-n", 1)
    assert "c " in capsys.readouterr().out


def test_overrides_are_toml_or_a_bare_word():
    assert cli.override("a.b=3") == (["a", "b"], 3)
    assert cli.override("a=[1, 2]") == (["a"], [1, 2])
    assert cli.override("a=word") == (["a"], "word")
    assert cli.config_of(["config.a.b=true"]) == {"a": {"b": True}}


def test_other_folders_commands_are_imported_only_when_called(monkeypatch, capsys):
    app = typer.Typer()

    @app.command("make")
    def make() -> None:
        typer.echo("made")

    @app.command("other")
    def other() -> None:
        """Another."""

    def hello(name: str) -> None:
        if name == "error":
            raise UsageError("a clear line")
        if name == "bug":
            raise ZeroDivisionError("by\nzero")
        typer.echo(f"hello {name}")

    monkeypatch.setitem(globals(), "app", app)
    monkeypatch.setitem(globals(), "hello", hello)
    monkeypatch.setitem(sys.modules, "palaestra_test_commands", sys.modules[__name__])
    found = {
        "group": EntryPoint("group", "palaestra_test_commands:app", cli.COMMANDS),
        "hello": EntryPoint("hello", "palaestra_test_commands:hello", cli.COMMANDS),
        "absent": EntryPoint("absent", "no_such_module:command", cli.COMMANDS),
    }
    monkeypatch.setattr(cli, "points", lambda group: found)
    run("hello", "you")
    run("group", "make")
    run("--help")
    out = capsys.readouterr().out
    assert "hello you" in out
    assert "made" in out
    assert "absent" in out
    for arguments, text in (
        (["hello", "error"], "palaestra: a clear line"),
        (["hello", "bug"], "palaestra: ZeroDivisionError: by zero (PALAESTRA_TRACEBACK=1 shows where)"),
        (["absent"], "palaestra absent: No module named 'no_such_module'; pip install 'palaestra[train]'"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 1
        assert text in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        cli.main(["hello"])
    assert end.value.code == 2
