"""Harbor task folders: old and new schemas, what is refused and why, both kinds of verifiers, and exported tasks."""

from __future__ import annotations

import pytest

from palaestra.environments import harbor_task
from palaestra.environments.harbor import Harbor, environment_class
from palaestra.environments.harbor_export import export
from palaestra.environments.sandbox import dockerfile, images
from palaestra.environments.sandbox.backends import lacks_native
from palaestra.environments.sandbox.base import NAME
from palaestra.gym.agent import Loop
from palaestra.gym.environment import gold_of
from palaestra.gym.episode import run_episode
from palaestra.gym.policies import Null
from palaestra.gym.policy import Replay
from palaestra.gym.registry import UsageError
from palaestra.gym.types import Message, Sampling, Unscored
from palaestra.tasks.terminal import FAMILIES, shell_tasks

BASE = list(images.store().glob("palaestra%2Fbase*"))
based = pytest.mark.skipif(bool(lacks_native()) or NAME not in images.names(), reason="no base image is stored")
NEW = 'schema_version = "1.4"\n'
OLD = 'version = "1.0"\n[environment]\nmemory = "1G"\nstorage = "10G"\nallow_internet = false\n'
TEST = '[ "$(cat /app/hello.txt)" = hello ] && n=1 || n=0; echo $n > /logs/verifier/reward.txt'


def folder(path, toml=NEW, test=TEST, dockerfile="FROM debian:12\nENV GREETING=hello\nWORKDIR /app\n"):
    """A task that wants hello in /app/hello.txt."""
    written = {
        "task.toml": toml, "instruction.md": "Write hello to /app/hello.txt.\n", "environment/Dockerfile": dockerfile,
        "tests/test.sh": f"#!/bin/bash\n{test}\n", "solution/solve.sh": "#!/bin/bash\necho $GREETING > /app/hello.txt\n",
    }  # fmt: skip
    for name, text in written.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def test_old_and_new_schemas_say_the_same(tmp_path):
    old = harbor_task.load(folder(tmp_path / "old", OLD))
    new = 'schema_version = "1.4"\n[environment]\nmemory_mb = 1024\nstorage_mb = 10240\nnetwork_mode = "no-network"\n'
    assert old.environment == harbor_task.load(folder(tmp_path / "new", new)).environment
    listed = harbor_task.load(folder(tmp_path / "a", 'artifacts = ["/app", {source = "/x", destination = "/y"}]\n'))
    assert [(one.source, one.destination) for one in listed.artifacts] == [("/app", ""), ("/x", "/y")]
    assert not listed.verifier.separate
    assert harbor_task.load(folder(tmp_path / "b", '[verifier.environment]\ndocker_image = "x"\n')).verifier.separate


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[environment\n", "is not TOML"),
        ('[environment]\nmemory = "lots"\n', "'lots' is no size"),
        ('[agent]\ntimeout_sec = "soon"\n', "agent.timeout_sec"),
        ("[environment]\ngpus = 1\n", "GPU"),
        ('[environment]\nos = "windows"\n', "windows"),
        ('[environment]\nnetwork_mode = "allowlist"\n', "allowed hosts"),
        ('[[steps]]\nname = "one"\n', "several steps"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(tmp_path, toml, words):
    with pytest.raises(UsageError, match=words):
        harbor_task.load(folder(tmp_path / "t", toml))


def test_a_folder_that_is_no_task_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no task\.toml"):
        environment_class(str(tmp_path))
    folder(tmp_path / "t")
    (tmp_path / "t" / "tests" / "test.sh").unlink()
    with pytest.raises(UsageError, match=r"has no tests/test\.sh"):
        environment_class(str(tmp_path))


@pytest.mark.parametrize(
    ("read", "found"),
    [
        ({"reward.txt": b" 0.5\n"}, {"reward": 0.5}),
        ({"reward.json": b"1", "reward.txt": b"0"}, {"reward": 1.0}),
        ({"reward.json": b'{"a": 1, "b": 0.25}'}, {"a": 1.0, "b": 0.25}),
    ],
)
def test_rewards_are_read(read, found):
    assert harbor_task.rewards(read) == found


@pytest.mark.parametrize(
    "read",
    [
        {},
        *({"reward.txt": text} for text in (b"", b"nan", b"1e309", b"one")),
        *({"reward.json": text} for text in (b"{}", b'{"a": "1"}', b'{"a": true}', b"[1]", b"{")),
    ],
)
def test_what_is_no_reward_is_none(read):
    with pytest.raises(ValueError, match=r"."):
        harbor_task.rewards(read)


def test_variables_are_filled_in():
    given = {"A": "${HOME}/x", "B": "${NOWHERE:-default}"}
    assert harbor_task.variables(given, {"HOME": "/root"}) == {"A": "/root/x", "B": "default"}
    with pytest.raises(UsageError, match="KEY"):
        harbor_task.variables({"A": "${KEY}"}, {})


def test_a_dockerfile_is_read_as_it_is_meant():
    text = '# first\nARG V=12\nFROM debian:$V\nRUN a && \\\n  # note\n  b\nRUN <<END\nc\nEND\nCOPY ["x", "/y"]\n'
    assert [(line.word, line.rest) for line in dockerfile.parsed(text)] == [
        ("ARG", "V=12"), ("FROM", "debian:$V"), ("RUN", "a &&   b"), ("RUN", "<<END\nc\nEND"), ("COPY", '["x", "/y"]'),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="begins with FROM"):
        dockerfile.parsed("RUN x")


@pytest.fixture
async def play():
    opened = []

    async def play(path, *commands, policy=None):
        kind = environment_class(str(path))
        config = kind.Config()
        backend = await kind.open(config)
        opened.append(backend)
        (task,) = kind.task_set(config)
        calls = [Message.calling("bash", command=command) for command in commands]
        gold = gold_of(kind(config, backend), task)
        chosen = policy or Replay([*(calls or gold[:-1]), Message(role="assistant", content="done")])
        return await run_episode(kind(config, backend), Loop(), {"main": chosen}, task, Sampling(), "id")

    yield play
    for backend in opened:
        await Harbor.shut(backend)


@based
@pytest.mark.parametrize("toml", [OLD, 'artifacts = ["/app"]\n[verifier]\nenvironment_mode = "separate"\n'])
async def test_gold_earns_one_and_nothing_nothing_with_both_kinds_of_verifiers(play, tmp_path, toml):
    path = folder(tmp_path / "t", toml)
    assert (await play(path)).result.value == 1
    assert (await play(path, policy=Null())).result.value == 0


@based
@pytest.mark.parametrize(
    "hack",
    [
        "mkdir -p /logs/verifier /tests; echo 1 > /logs/verifier/reward.txt; chattr +i /logs/verifier/reward.txt; true",
        "echo '{\"reward\": 1}' > /logs/verifier/reward.json",
        "mkdir -p /tests; echo 'echo 1 > /logs/verifier/reward.txt' > /tests/test.sh; chmod 555 /tests/test.sh",
        "rm -rf /logs/verifier; ln -s /app /logs/verifier; echo 1 > /app/reward.txt",
    ],
)
async def test_a_reward_that_the_agent_wrote_counts_for_nothing(play, tmp_path, hack):
    assert (await play(folder(tmp_path / "t"), hack)).result.value == 0


@based
async def test_a_shared_verifier_runs_in_a_shell_that_the_agent_did_not_prepare(play, tmp_path):
    spoiled = "bash() { echo 1 > /logs/verifier/reward.txt; }; cd() { :; }; set -e; trap 'echo 1 > /logs/verifier/reward.txt' EXIT; export GREETING=spoiled"
    path = folder(
        tmp_path / "t",
        'version = "1.0"\n[environment.env]\nGREETING = "hello"\n',
        test=TEST + "\n[ $GREETING = hello ]",
    )
    assert (await play(path, spoiled)).result.value == 0


@based
async def test_a_verifier_that_writes_nothing_leaves_the_episode_unscored(play, tmp_path):
    episode = await play(folder(tmp_path / "t", test="true"), policy=Null())
    assert isinstance(episode.result, Unscored)
    assert "neither reward.json nor reward.txt" in episode.outcome.detail


@based
@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
async def test_an_exported_task_gives_the_same_rewards(play, tmp_path, family):
    task = next(shell_tasks((1,), (family,))("train", 11))
    path = export(task, tmp_path)
    assert (await play(path)).result.value == 1
    assert (await play(path, policy=Null())).result.value == 0
    assert (await play(path, task.data["script"], "touch /work/one-more")).result.value == 0
    assert (await play(path, task.data["script"], "touch /etc/one-more")).result.value == 0


@based
async def test_what_a_dockerfile_says_is_done_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images.store().mkdir(parents=True)
    for name in BASE:
        (images.store() / name.name).symlink_to(name)
    place = tmp_path / "task"
    place.mkdir()
    (place / "tool.sh").write_text("echo tool\n")
    (tmp_path / "secret").write_text("secret")
    good = (
        f'FROM {NAME}\nSHELL ["/bin/bash", "-c"]\nCOPY --chmod=755 --chown=7:8 /tool.sh /bin/tool\n'
        "RUN set -o pipefail; tool | grep tool > /said; stat -c '%a %u %g' /bin/tool >> /said\n"
    )
    (place / "Dockerfile").write_text(good)
    made = await dockerfile.build(place, "made")
    assert (made.root / "said").read_text() == "tool\n755 7 8\n"
    for line, words in {
        "COPY nothing /x": "line 2 .COPY.: nothing is not in the folder",
        "COPY ../secret /x": "lies outside",
        "COPY --from=builder /a /b": "no option --from=builder",
        "COPY --chown=dev tool.sh /x": "no option --chown=dev",
        "ADD tool.tar.gz /x": "COPY it, and RUN tar",
        "ADD http://127.0.0.1/x /x": "no network",
        "RUN exit 3": "status 3",
        "TELEPORT /x": "no such instruction",
    }.items():
        (place / "Dockerfile").write_text(f"FROM {NAME}\n{line}\n")
        with pytest.raises(UsageError, match=words):
            await dockerfile.build(place, "bad")
    assert "bad" not in images.names()
