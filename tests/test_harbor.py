"""Harbor task folders: old and new schemas, what is refused and why, both kinds of verifiers, and exported tasks."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile

import pytest

from palaestra.environments import harbor_task
from palaestra.environments.harbor import Harbor, _packed, environment_class, image_of, verifier_image
from palaestra.environments.harbor_artifacts import after, crossing, ways
from palaestra.environments.harbor_export import export
from palaestra.environments.sandbox import dockerfile, images, native
from palaestra.environments.sandbox.backends import lacks_native
from palaestra.environments.sandbox.base import NAME
from palaestra.gym.agent import Loop
from palaestra.gym.environment import gold_of
from palaestra.gym.episode import run_episode
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.policies import Null
from palaestra.gym.policy import Replay
from palaestra.gym.registry import UsageError
from palaestra.gym.sandbox import Entry
from palaestra.gym.types import Message, Sampling, Unscored
from palaestra.tasks.terminal import FAMILIES, drawn, shell_tasks

BASE = list(images.store().glob("palaestra%2Fbase*"))
based = pytest.mark.skipif(bool(lacks_native()) or NAME not in images.names(), reason="no base image is stored")
NEW = 'schema_version = "1.4"\n'
OLD = 'version = "1.0"\n[environment]\nmemory = "1G"\nstorage = "10G"\nallow_internet = false\n'
SEPARATE = '[verifier]\nenvironment_mode = "separate"\n'
OWN = "FROM debian:12\nWORKDIR /judge\n"
TEST = '[ "$(cat /app/hello.txt)" = hello ] && n=1 || n=0; echo $n > /logs/verifier/reward.txt'
EXPECTED = "cmp /logs/artifacts/out /tests/expected && n=1 || n=0; echo $n > /logs/verifier/reward.txt"
TEMPLATES = [(family, template) for family, templates in FAMILIES.items() for template in templates]


def folder(path, toml=NEW, test=TEST, dockerfile="FROM debian:12\nENV GREETING=hello\nWORKDIR /app\n", **files):
    """A task that wants hello in /app/hello.txt; `files` in its folder tests, Dockerfile as `own`."""
    written = {
        "task.toml": toml, "instruction.md": "Write hello to /app/hello.txt.\n", "environment/Dockerfile": dockerfile,
        "tests/test.sh": f"#!/bin/bash\n{test}\n", "solution/solve.sh": "#!/bin/bash\necho $GREETING > /app/hello.txt\n",
        **{f"tests/{'Dockerfile' if name == 'own' else name}": text for name, text in files.items()},
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
        ("[environment]\ngpus = 1\n", "environment. asks for a GPU"),
        ("[verifier.environment]\ngpus = 1\n", "verifier.environment. asks for a GPU"),
        ('[environment]\nos = "windows"\n', "windows"),
        ('[environment]\nnetwork_mode = "allowlist"\n', "allowed hosts"),
        ('[[steps]]\nname = "one"\n', "several steps"),
        ('[agent]\nuser = "dev"\n', "agent.user is 'dev'; in boxes everything runs as root"),
        ("[verifier]\nuser = 1000\n", "verifier.user is 1000"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(tmp_path, toml, words):
    with pytest.raises(UsageError, match=words):
        harbor_task.load(folder(tmp_path / "t", toml))


@pytest.mark.parametrize("user", ['""', '"root"', "0", '"0"'])
def test_a_task_may_say_that_it_runs_as_root(tmp_path, user):
    task = harbor_task.load(folder(tmp_path / "t", f"[agent]\nuser = {user}\n[verifier]\nuser = {user}\n"))
    assert task.agent.user == task.verifier.user == json.loads(user)


def test_a_folder_that_is_no_task_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no task\.toml"):
        environment_class(str(tmp_path))
    folder(tmp_path / "t")
    (tmp_path / "t" / "tests" / "test.sh").unlink()
    with pytest.raises(UsageError, match=r"has no tests/test\.sh"):
        environment_class(str(tmp_path)).task_set(None)


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
    ("read", "words"),
    [
        ({}, "neither"),
        *(({"reward.txt": text}, "reward.txt holds no rewards") for text in (b"", b"one")),
        *(({"reward.txt": text}, "'reward' has no finite number") for text in (b"nan", b"1e309", b"9" * 400)),
        *(
            ({"reward.json": text}, "'a' has no finite number")
            for text in (b'{"a": "1"}', b'{"a": true}', b'{"a": NaN}')
        ),
        ({"reward.json": b'{"a": 1, "b": 1' + b"0" * 400 + b"}"}, "'b' has no finite number"),
        ({"reward.json": b"1" * 5000}, "reward.json holds no rewards: .*digits"),
        ({"reward.json": b"[1]"}, "'reward' has no finite number"),
        ({"reward.json": b"{}"}, "reward.json is empty"),
        ({"reward.json": b"{"}, "reward.json holds no rewards"),
        ({"reward.json": b"[" * 100_000}, "nested too deeply"),
        ({"reward.json": b"\xff1"}, "reward.json is not UTF-8"),
        ({"reward.txt": b"\xff1"}, "reward.txt is not UTF-8"),
    ],
)
def test_what_is_no_reward_is_none_and_said_to_be(read, words):
    with pytest.raises(ValueError, match=words):
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
@pytest.mark.hack
@pytest.mark.parametrize(
    "way",
    [
        "cd() { :; }; set -e; trap 'echo 1 > /logs/verifier/reward.txt' EXIT; export GREETING=spoiled",
        "builtin() { :; }; eval() { echo 1 > /logs/verifier/reward.txt; }",
        "shopt -s expand_aliases; alias builtin=: bash='echo 1 > /logs/verifier/reward.txt #'",
        "shopt -s extdebug; trap 'case $BASH_COMMAND in *kill*) false;; esac' DEBUG",
        "exec -a other bash --noprofile --norc -s",
    ],
)
async def test_a_shared_verifier_runs_in_a_shell_that_the_agent_did_not_prepare(play, tmp_path, way):
    spoiled = f"bash() {{ echo 1 > /logs/verifier/reward.txt; }}; {way}"
    path = folder(
        tmp_path / "t",
        'version = "1.0"\n[environment.env]\nGREETING = "hello"\n',
        test=TEST + "\n[ $GREETING = hello ]",
    )
    assert (await play(path, spoiled)).result.value == 0


@based
async def test_a_shell_that_was_begun_anew_has_the_tasks_variables_and_folder(play, tmp_path):
    toml = '[environment.env]\nX = "set"\n[environment.healthcheck]\ncommand = "[ $X = set ] && { mkdir /app/x || sleep 60; }"\n'
    toml += "timeout_sec = 0.5\ninterval_sec = 0\nretries = 2\n"
    path = folder(tmp_path / "t", toml.replace("mkdir", "! mkdir"))
    assert (
        await play(
            path,
            "kill -9 $$",
            '[ "$X" = set ] && echo hello > hello.txt; export X=changed',
            "[ $X = changed ] || rm hello.txt",
        )
    ).result.value == 1


@based
async def test_what_the_agent_removed_is_gone_for_the_verifier(play, tmp_path):
    toml = f'artifacts = ["/app/cache", "/app/file"]\n{SEPARATE}'
    test = "[ -e /app/cache ] || [ -e /app/file ] && n=0 || n=1; echo $n > /logs/verifier/reward.txt"
    begins = "FROM debian:12\nRUN mkdir -p /app/cache; touch /app/cache/old /app/file\nWORKDIR /app\n"
    path = folder(tmp_path / "t", toml, test, begins)
    assert (await play(path, "rm -r cache file")).result.value == 1
    assert (await play(path, "rm -r cache")).result.value == 0


@based
async def test_a_verifiers_own_healthcheck_is_run(play, tmp_path):
    toml = '[verifier.environment]\n[verifier.environment.healthcheck]\ncommand = "echo ready > /tmp/ready"\n'
    path = folder(tmp_path / "t", toml, "[ -e /tmp/ready ] && n=1 || n=0; echo $n > /logs/verifier/reward.txt")
    assert (await play(path, "true")).result.value == 1


@based
async def test_collectors_and_judges_get_shells_of_their_own(play, tmp_path):
    spoiled = "builtin() { :; }; kill() { :; }; date() { echo forged; }; cat() { echo forged; }; cd /; trap 'echo forged' EXIT"
    collect = (
        '[[verifier.collect]]\ncommand = "{ pwd; echo $X; date +%s; } > /app/collected; cd /; cat() { echo 1; }"\n'
    )
    test = "cat /app/collected | tr '\\n' ' ' | grep -qE '^/app set [0-9]+ $' && n=1 || n=0; cat - <<< $n > /logs/verifier/reward.txt"
    path = folder(tmp_path / "t", f'{collect}[environment.env]\nX = "set"\n', test)
    assert (await play(path, spoiled)).result.value == 1


@based
async def test_no_program_of_a_shared_box_makes_room_for_the_tests(play, tmp_path):
    trojan = "#!/bin/sh\n/bin/mkdir -p /tests /logs/verifier; echo > /tests/conftest.py; echo 1 > /logs/verifier/reward.json\n"
    plant = f"cd /usr/local/bin; printf '{trojan}' > rm; chmod 755 rm; cp rm mkdir; cp rm chmod; mkdir"
    test = "[ -e /tests/conftest.py ] && n=1 || n=0; echo $n > /logs/verifier/reward.txt"
    assert (await play(folder(tmp_path / "t", test=test), plant)).result.value == 0


@based
async def test_what_the_agent_just_started_runs_when_it_is_judged(play, tmp_path):
    test = "pgrep -fx 'sleep 99' && n=1 || n=0; echo $n > /logs/verifier/reward.txt"
    path = folder(tmp_path / "t", test=test)
    assert (await play(path, "(setsid sleep 99 > /dev/null 2>&1 &)")).result.value == 1


# -- a separate verifier: what crosses

FILE, FOLDER = Entry("file", 0o644, b"x"), Entry("directory", 0o755)


def link(target):
    return Entry("link", 0o777, target.encode())


@pytest.mark.parametrize("target", ["file", "./d/../file", "/out/file", "other", "/b/file", "../b/file", "d", "tod/f"])
def test_a_link_to_what_crosses_crosses(target):
    tree = {
        "/a": FOLDER, "/a/file": FILE, "/a/other": link("file"), "/a/d": FOLDER, "/a/d/f": FILE, "/a/tod": link("d"),
        "/b/file": FILE,
    }  # fmt: skip
    assert crossing({**tree, "/a/l": link(target)}, {"/a": "/out", "/b": "/b"})["/out/l"] == link(target)


@pytest.mark.parametrize(
    "target",
    [
        "/tests/expected", "../../tests/expected", "l", "nothing", "nothing/../file", "/", "..", "outside", "outside/x",
        "outside/../a/file", "sub/l", "/a/sock", "/logs/verifier/x", "/ab", "h0",
    ],
)  # fmt: skip
def test_a_link_that_leads_elsewhere_stays_behind(target):
    tree = {
        "/a": FOLDER, "/a/file": FILE, "/a/outside": link("/tests"), "/a/sub": link("."), "/a/sock": Entry("other", 0),
        "/ab": FILE, "/logs/verifier/x": FILE, "/tests/expected": FILE,
        **{f"/a/h{n}": link(f"h{n + 1}") for n in range(40)}, "/a/h40": link("file"),
    }  # fmt: skip
    found = crossing({**tree, "/a/l": link(target)}, {"/a": "/a", "/logs": "/logs", "/tests": "/tests"})
    assert "/a/l" not in found
    assert not {"/a/outside", "/a/sock", "/ab", "/logs/verifier/x", "/tests/expected"} & found.keys()
    assert {"/a", "/a/file", "/a/sub", "/a/h40"} <= found.keys()


def test_links_that_depend_on_one_another_are_judged_in_no_time():
    many = {f"/a/l{n}": link(f"l{n - 1}/../f") for n in range(20_000)}
    assert crossing({"/a/f": FILE, **many}, {"/a": "/a"}).keys() == {"/a/f"}
    tree, edits = ({f"/a/{name}{n}/f": FILE for n in range(20_000)} for name in "xy")
    assert after({**tree, **edits}, {**dict.fromkeys(tree), **edits}) == edits


def test_what_is_changed_goes_over_what_was_given():
    tree = {
        path: FOLDER if path in ("/a", "/a/d") else FILE for path in ("/a", "/a/x", "/a/y", "/a/d", "/a/d/z", "/a/dz")
    }
    changes = {"/a": Entry("directory", 0o700), "/a/x": None, "/a/new": FILE}
    assert after(tree, changes) == {
        "/a": Entry("directory", 0o700), "/a/y": FILE, "/a/d": FOLDER, "/a/d/z": FILE, "/a/dz": FILE, "/a/new": FILE,
    }  # fmt: skip
    for gone in (None, FILE, link("x"), Entry("other", 0)):
        assert "/a/d/z" not in after(tree, {"/a/d": gone})
        assert "/a/dz" in after(tree, {"/a/d": gone})


def test_artifacts_keep_their_places_and_links_of_the_image_lead_to_them(tmp_path):
    (tmp_path / "usr" / "bin").mkdir(parents=True)
    (tmp_path / "bin").symlink_to("/usr/bin")
    listed = [("out/", ""), ("/bin/tool", ""), ("/x", "/y/"), ("/z", "z"), ("//d", "")]
    found = ways([harbor_task.Artifact(source=source, destination=to) for source, to in listed], tmp_path, "/app")
    assert found == {
        "/logs/artifacts": "/logs/artifacts", "/app/out": "/app/out", "/usr/bin/tool": "/bin/tool", "/x": "/y", "/z": "/z",
        "/d": "/d",
    }  # fmt: skip
    with pytest.raises(UsageError, match="whole file system"):
        ways([harbor_task.Artifact(source="..")], tmp_path, "/app")


def test_an_image_is_read_as_data(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, beside = tmp_path / "root", tmp_path / "beside"
    (root / "usr" / "d").mkdir(parents=True)
    beside.mkdir()
    (beside / "secret").write_text("secret")
    (root / "usr" / "d" / "f").write_bytes(b"f")
    (root / "usr" / "d" / "f").chmod(0o4750)
    (root / "usr" / "out").symlink_to(beside)
    (root / "u").symlink_to("/usr")
    (root / "up").symlink_to("../../../..")
    images.import_image(root, "tiny")
    file, out = Entry("file", 0o4750, b"f"), Entry("link", 0o777, str(beside).encode())
    mode = (root / "usr").stat().st_mode & 0o7777
    for user in (os.geteuid(), 1000):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        found = {path: entry._replace(uid=0, gid=0) for path, entry in images.tree("tiny", "/usr").items()}
        assert found == {
            "/usr": Entry("directory", mode), "/usr/d": Entry("directory", mode), "/usr/d/f": file, "/usr/out": out,
        }  # fmt: skip
        assert list(images.tree("tiny", "/u/d/f")) == ["/usr/d/f"]
        assert list(images.tree("tiny", "/u")) == ["/u"]
        for path in ("/usr/out/secret", f"/up{beside}/secret", "/nothing", "/usr/d/f/x"):
            assert not images.tree("tiny", path)
        assert set(images.tree("tiny", "/")) == {"/", "/u", "/up", *found}
    place = images.find("tiny").root / "usr" / "d" / "f"
    os.chown(place, *((5, 6) if os.getuid() == 0 else (-1, -1)))
    assert images.tree("tiny", "/usr/d/f")["/usr/d/f"][3:] == (0, 0)  # to user 1000


@based
@pytest.mark.parametrize("own", [{}, {"own": OWN}], ids=["same image", "own image"])
@pytest.mark.parametrize(
    ("command", "value"),
    [
        ("echo hello > /logs/artifacts/out", 1),
        ("cd /logs/artifacts; mkdir d; echo hello > d/real; ln -s d e; ln -s /logs/artifacts/e/real out", 1),
        ("ln -s /tests/expected /logs/artifacts/out", 0),
        ("ln -s ../../tests/expected /logs/artifacts/out", 0),
        ("cd /logs/artifacts; ln -s /tests d; ln -s d/expected out", 0),
        ("ln -s /tests/expected /app/out; ln -s /app/out /logs/artifacts/out", 0),
        ("rmdir /logs/artifacts; ln -s /tests /logs/artifacts; ln -s expected /logs/artifacts/out", 0),
    ],
)
async def test_no_link_leads_to_what_the_verifier_brings(play, tmp_path, own, command, value):
    path = folder(tmp_path / "t", 'artifacts = ["/app"]\n' + SEPARATE, EXPECTED, expected="hello\n", **own)
    assert (await play(path, command)).result.value == value


GIVEN = "FROM debian:12\nRUN mkdir -p /app/d /app/e/f && cd /app && touch kept gone d/1 d/2 e/f/3 turned && ln -s kept l\nWORKDIR /app\n"


@based
@pytest.mark.parametrize("own", [{}, {"own": OWN + "RUN mkdir -p /app/d && touch /app/d/old /app/old\n"}], ids=["same image", "own image"])  # fmt: skip
@pytest.mark.parametrize(
    ("command", "left"),
    [
        ("true", "d d/1 d/2 e e/f e/f/3 gone kept l turned"),
        ("rm gone; touch new; chmod 600 kept", "d d/1 d/2 e e/f e/f/3 kept l new turned"),
        ("rm -r d e; mkdir d; touch d/new; rm turned; mkdir turned", "d d/new gone kept l turned"),
        ("rm -r d; touch d; rm -r e; ln -s turned e", "d e gone kept l turned"),
        ("rm kept; ln -s /etc/passwd kept", "d d/1 d/2 e e/f e/f/3 gone turned"),
    ],
)
async def test_what_the_agent_left_as_it_was_crosses_too(play, tmp_path, own, command, left):
    test = f'[ "$(cd /app && find * | LC_ALL=C sort | xargs)" = "{left}" ] && n=1 || n=0; echo $n > /logs/verifier/reward.txt'
    path = folder(tmp_path / "t", 'artifacts = ["/app"]\n' + SEPARATE, test, GIVEN, **own)
    assert (await play(path, command)).result.value == 1


@based
async def test_a_verifier_of_its_own_image_stands_in_its_own_folder_with_its_own_tests(play, tmp_path):
    own = OWN + "COPY . /tests\nRUN echo made > /tests/made && echo 'cd /; exit' > /tests/old\n"
    test = "[ $PWD = /judge ] && [ $X = own ] && [ -e /tests/made ] && n=1 || n=0; echo $n > /logs/verifier/reward.txt"
    toml = 'artifacts = ["/tests"]\n[verifier.environment]\nenv = {X = "own"}\n[environment]\nenv = {X = "agent"}\n'
    path = folder(tmp_path / "t", toml, test, own=own)
    hack = "mkdir -p /tests; echo 'echo 0 > /logs/verifier/reward.txt' > /tests/test.sh"
    assert (await play(path, hack)).result.value == 1


# -- whose doing it is


@based
@pytest.mark.parametrize("solved", [True, False])
@pytest.mark.parametrize(
    ("toml", "test"),
    [(NEW, "true"), (SEPARATE, "true"), ("[environment]\nmemory_mb = 64\n", "head -c 900M /dev/zero | tail -c 800M; kill -9 -1")],
)  # fmt: skip
async def test_a_verifier_that_never_gives_a_reward_leaves_the_episode_unscored(play, tmp_path, toml, test, solved):
    path = folder(tmp_path / "t", toml, test)
    if not solved:
        (path / "solution" / "solve.sh").unlink()
    episode = await play(path, policy=Null())
    assert isinstance(episode.result, Unscored)
    assert episode.outcome.cause is Cause.VERIFIER
    assert "neither reward.json nor reward.txt" in episode.outcome.detail


@based
@pytest.mark.parametrize("solved", [True, False])
@pytest.mark.parametrize(
    "command",
    [
        "head -c 100M /dev/zero > /app/fill",
        "(while :; do pkill -9 -f /tests/test.sh; done) > /dev/null 2>&1 &",
        "(while :; do rm -rf /logs; touch /logs; done) > /dev/null 2>&1 &",
        "mkdir -p /tests/$(printf 'd/%.0s' $(seq 1200))",
        "rm -f /bin/bash /usr/bin/bash /bin/sh /usr/bin/sh",
    ],
)
async def test_an_agent_that_breaks_a_shared_box_is_scored(play, tmp_path, command, solved):
    path = folder(tmp_path / "t", "[environment]\nstorage_mb = 32\n", f"sleep 0.2; {TEST}")
    if not solved:
        (path / "solution" / "solve.sh").unlink()
    episode = await play(path, command)
    assert episode.outcome.cause is Cause.POLICY_CRASH
    assert episode.result.value == 0


@based
async def test_what_a_verifier_cannot_take_in_is_the_agents_doing(play, tmp_path, monkeypatch):
    path = folder(tmp_path / "t", "[verifier.environment]\nstorage_mb = 16\n", EXPECTED, expected="hello\n")
    large = "echo hello > /logs/artifacts/out; head -c 32M /dev/zero > /logs/artifacts/large"
    episode = await play(path, large)
    assert (episode.outcome.cause, episode.result.value) == (Cause.POLICY_CRASH, 0)
    assert "No space left" in episode.outcome.detail
    monkeypatch.setattr(native, "COLLECTED", 1 << 20)
    episode = await play(path, "echo hello > /logs/artifacts/out; head -c 2M /dev/zero > /app/beside")
    assert (episode.outcome.cause, episode.result.value) == (Cause.POLICY_CRASH, 0)
    assert "more bytes than the limit" in episode.outcome.detail


@based
async def test_a_machine_that_makes_no_box_for_the_verifier_leaves_the_episode_unscored(play, tmp_path, monkeypatch):
    create, made = native.Native.create, []

    async def once(self, *given):
        made.append(given)
        if len(made) > 1:
            raise Failure(Cause.SANDBOX, "no more boxes")
        return await create(self, *given)

    path = folder(tmp_path / "t", SEPARATE)
    await image_of(path, harbor_task.load(path), True)
    monkeypatch.setattr(native.Native, "create", once)
    episode = await play(path, "true")
    assert episode.outcome.cause is Cause.SANDBOX
    assert isinstance(episode.result, Unscored)


# -- images


@based
@pytest.mark.parametrize(
    ("toml", "words"),
    [
        (
            '[verifier.environment]\ndocker_image = "no-such"\n',
            "no-such is not stored .*verifier.environment.docker_image",
        ),
        ('artifacts = ["/"]\n' + SEPARATE, "whole file system"),
        ('[verifier.env]\nX = "${NOT_SET_ANYWHERE}"\n', "NOT_SET_ANYWHERE"),
    ],
)
async def test_what_a_verifier_lacks_is_said_before_the_agent_works(play, tmp_path, toml, words):
    episode = await play(folder(tmp_path / "t", toml))
    assert not episode.turns
    assert re.search(words, episode.outcome.detail)


@based
async def test_a_verifier_has_the_image_that_its_task_names(tmp_path):
    async def of(toml, **files):
        path = folder(tmp_path / f"t{len(list(tmp_path.iterdir()))}", toml, **files)
        return await verifier_image(path, harbor_task.load(path), "agents", True)

    stored = f'[verifier.environment]\ndocker_image = "{NAME}"\n'
    assert await of(NEW, own=OWN) == "agents"
    assert await of(SEPARATE) == await of("[verifier.environment]\nmemory_mb = 64\n") == "agents"
    assert await of(stored) == await of(stored, own=OWN) == NAME
    assert (await of(SEPARATE, own=OWN)).startswith("harbor/")
    assert (await of(stored.replace(NAME, "no-such"), own=OWN)).startswith("harbor/")


@based
@pytest.mark.parametrize(
    ("toml", "key"),
    [
        ("[environment]\nbuild_timeout_sec = 0.5\n", "environment.build_timeout_sec"),
        ("[verifier.environment]\nbuild_timeout_sec = 0.5\n", "verifier.environment.build_timeout_sec"),
        (SEPARATE + "[environment]\nbuild_timeout_sec = 0.5\n", "environment.build_timeout_sec"),
    ],
)
async def test_a_dockerfile_has_the_time_that_its_task_gives_it(tmp_path, toml, key):
    slow = f"FROM debian:12\nRUN sleep 60 # {tmp_path}\n"
    path = folder(tmp_path / "t", toml, dockerfile=slow, own=slow)
    task = harbor_task.load(path)
    build = verifier_image(path, task, "agents", True) if task.verifier.separate else image_of(path, task, True)
    where = "tests" if task.verifier.separate else "environment"
    with pytest.raises(UsageError, match=rf"t/{where}: .* longer than 0.5 s \({key} in task.toml\)"):
        await build


def test_an_episode_has_the_time_that_its_task_asks_for(tmp_path):
    toml = (
        "[environment]\nbuild_timeout_sec = 900\n[environment.healthcheck]\ncommand = 'true'\nretries = 1\n"
        "[verifier]\ntimeout_sec = 1800\n[[verifier.collect]]\ncommand = 'true'\ntimeout_sec = 200\n"
    )
    environment = environment_class(str(folder(tmp_path / "t", toml)))
    (task,) = environment.task_set(None)
    needed = environment().deadlines(task)
    assert needed["tool"] > 60
    assert 2000 < needed["judge"] < 2300
    assert 970 <= needed["setup"] < 1000
    separate = environment_class(str(folder(tmp_path / "s", f"{toml}[verifier.environment]\nbuild_timeout_sec = 50\n")))
    assert 1020 <= separate().deadlines(next(iter(separate.task_set(None))))["setup"] < 1050


# -- exported tasks


def exported(folder, family, template):
    """A task of a template, and its Harbor folder."""
    tasks = shell_tasks((1,), (family,))
    tasks._make = lambda level, r: drawn(family, template, level, r)
    task = tasks.get("1-7")
    return task, export(task, folder)


@based
@pytest.mark.parametrize("family", list(FAMILIES))
async def test_the_gold_of_an_exported_task_earns_one(play, tmp_path, family):
    _, path = exported(tmp_path, family, FAMILIES[family][0])
    assert (await play(path)).result.value == 1


@based
@pytest.mark.slow
@pytest.mark.parametrize(("family", "template"), TEMPLATES, ids=[template.__name__ for _, template in TEMPLATES])
async def test_an_exported_task_gives_the_same_rewards(play, tmp_path, family, template):
    task, path = exported(tmp_path, family, template)
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
    (place / "tree" / "way").mkdir(parents=True)
    (place / "tree" / "way" / "more").write_text("more\n")
    (tmp_path / "secret").write_text("secret")
    good = (
        f'FROM {NAME}\nSHELL ["/bin/bash", "-c"]\nCOPY --chmod=755 --chown=7:8 /tool.sh /bin/tool\n'
        "RUN set -o pipefail; tool | grep tool > /said; stat -c '%a %u %g' /bin/tool >> /said\n"
        "RUN ln -s /bin /way\nCOPY tree/ /\nWORKDIR /way\nRUN ls tool; [ -L /way ] && cat /way/more >> /said\n"
    )
    (place / "Dockerfile").write_text(good)
    made = await dockerfile.build(place, "made")
    assert (made.root / "said").read_text() == "tool\n755 7 8\nmore\n"
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


def test_tasks_that_cannot_be_played_are_left_out_of_a_folder_of_many(tmp_path):
    folder(tmp_path / "many" / "good")
    folder(tmp_path / "many" / "gpu", "[environment]\ngpus = 1\n")
    folder(tmp_path / "many" / "later", 'schema_version = "9.0"\n')
    with pytest.warns(UserWarning, match=r"2 of 3 tasks are left out: .*asks for a GPU.*schema_version is '9.0'"):
        tasks = list(environment_class(str(tmp_path / "many")).task_set(None))
    assert [task.key for task in tasks] == ["good"]
    with pytest.raises(UsageError, match="asks for a GPU"):
        environment_class(str(tmp_path / "many" / "gpu")).task_set(None)


def test_a_task_whose_tests_changed_is_another(tmp_path):
    path = folder(tmp_path / "t")
    (before,) = environment_class(str(path)).task_set(None)
    (path / "tests" / "test.sh").write_text("true")
    (after_it,) = environment_class(str(path)).task_set(None)
    assert before.data["sha256"] != after_it.data["sha256"]


def test_a_solution_is_packed_as_roots(tmp_path):
    path = folder(tmp_path / "t")
    if os.geteuid() == 0:
        os.chown(path / "solution" / "solve.sh", 70000, 70000)
    with tarfile.open(fileobj=io.BytesIO(_packed(path / "solution"))) as archive:
        assert {(member.uid, member.gid) for member in archive} == {(0, 0)}
