"""Boxes as their users meet them: files in and out, images, backends by name, the commands."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from boxes import IMAGES, ISOLATING, SMALL, python
from typer.testing import CliRunner

from palaestra.environments.sandbox import archives, cgroups, images, launching, seccomp
from palaestra.environments.sandbox.backends import BACKENDS, open_backend, refuse
from palaestra.environments.sandbox.cli import app, limits_of, unenforced
from palaestra.environments.sandbox.warm import Warm
from palaestra.gym.outcome import Failure
from palaestra.gym.registry import UsageError
from palaestra.gym.sandbox import BoxLimits, Capabilities, Destroyed, Entry

ALL = [*ISOLATING, "process"]
IMAGE = {**IMAGES, "process": images.HOST}


def end(init: int) -> None:
    """Kill a box's first process, and wait until it is dead, and with it all others."""
    os.kill(init, 9)
    deadline = time.monotonic() + 10
    with suppress(FileNotFoundError):
        while Path(f"/proc/{init}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture(params=ALL)
async def backend(request):
    with pytest.warns(UserWarning, match="isolates nothing") if request.param == "process" else nullcontext():
        opened = open_backend(request.param)
    opened.image = IMAGE[request.param]
    yield opened
    await opened.close()


@pytest.fixture
async def box(backend):
    box = await backend.create(backend.image, SMALL.model_copy(update={"memory": 512 << 20}))
    yield box
    await box.destroy()


async def test_a_shell_keeps_its_folder_and_variables(box):
    assert (await box.exec('mkdir in; cd in; export X=1; f() { echo "$X$1"; }', 5)).status == 0
    assert (await box.exec("f 2; basename $PWD", 5)).output == b"12\nin\n"
    done = await box.exec("echo out; echo err >&2; (exit 7)", 5)
    assert (done.status, done.output, done.stopped) == (7, b"out\nerr\n", False)


@pytest.mark.parametrize("backend", ISOLATING, indirect=True)
async def test_boxes_start_where_more_files_are_open_than_select_knows(backend):
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        box = await backend.create(backend.image, SMALL)
        assert (await box.exec("echo here", 5)).output == b"here\n"
        await box.write("/tmp/file", "text")
        assert await box.read("/tmp/file") == b"text"
        await box.destroy()
    finally:
        for descriptor in opened:
            os.close(descriptor)


@pytest.mark.skipif("native" not in ISOLATING, reason="no native backend")
def test_ctrl_c_reaches_no_box(tmp_path):
    program = (
        "import asyncio, os, signal\nfrom palaestra.environments.sandbox.backends import open_backend\n"
        "from palaestra.gym.sandbox import BoxLimits\n"
        "async def main():\n    backend = open_backend('native')\n    box = await backend.create('host', BoxLimits())\n"
        "    signal.signal(signal.SIGINT, signal.SIG_IGN)\n    os.killpg(0, signal.SIGINT)\n    await asyncio.sleep(0.3)\n"
        "    print((await box.exec('echo whole', 5)).output)\n    await box.destroy()\n    await backend.close()\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert done.stdout == "b'whole\\n'\n", done.stderr


@pytest.mark.skipif("native" not in ISOLATING, reason="no native backend")
def test_who_waits_for_a_command_of_a_box_costs_no_processor(tmp_path):
    command = [str(Path(sys.executable).with_name("palaestra")), "sandbox", "run", "--", "sleep", "4"]
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert used.ru_utime + used.ru_stime < 3


def test_limits_that_a_backend_does_not_enforce_are_named():
    given = Capabilities(isolation=True, memory=False, disk_quota=True, processes=False, no_network=True)
    assert unenforced(given, ["memory=64M", "disk=1G", "processes=4", "loopback=no"]) == ["memory", "processes"]


async def test_a_renewed_shell_knows_nothing_and_what_runs_goes_on(box):
    await box.exec("X=1; cd /; builtin() { :; }; exec 2>&1; sleep 300 & mkdir -p /tmp/x", 5)
    await box.renew()
    done = await box.exec('echo "X$X"; type builtin; [ $PWD = / ] || echo elsewhere', 5)
    assert b"function" not in done.output
    assert (done.output[:2], done.output[-10:]) == (b"X\n", b"elsewhere\n")
    assert sum("300" in process.arguments for process in await box.processes()) == 1
    await asyncio.gather(box.renew(), box.renew())
    assert (await box.exec("echo again", 5)).output == b"again\n"


async def test_what_is_put_comes_back(box):
    entries = {
        "/work/deep/er/file": Entry("file", 0o640, b"\0\xff\n"),
        "/work/folder": Entry("directory", 0o750),
        "/work/link": Entry("link", 0o777, b"deep/er/file"),
    }
    await box.put(entries)
    await box.write("/work/text", "grüße\n")
    assert await box.read("/work/link") == b"\0\xff\n"
    assert (await box.exec("cat text; stat -c %a deep/er/file folder; readlink link", 5)).output.decode() == (
        "grüße\n640\n750\ndeep/er/file\n"
    )
    found = await box.diff()
    for path, entry in entries.items():
        assert (found[path].kind, found[path].content) == (entry.kind, entry.content)
    assert found["/work/deep/er/file"].mode == 0o640
    with pytest.raises(OSError, match="no regular file"):
        await box.read("/work/folder")
    with pytest.raises(OSError, match="nothing"):
        await box.read("/work/nothing")
    await box.exec("head -c 10485761 /dev/zero > large", 5)
    with pytest.raises(OSError, match="the limit is"):
        await box.read("/work/large")


STANDING = {
    "nothing": "true", "file": "echo old > at", "folder": "mkdir -p at/a/b; touch at/a/b/c; chmod 0 at/a",
    "pipe": "mkfifo at", "dangling link": "ln -s nowhere at", "loop": "ln -s at at", "link to a file": "ln -s kept/file at",
    "link to a folder": "ln -s kept at", "link to /": "ln -s / at",
}  # fmt: skip


@pytest.mark.parametrize("backend", ISOLATING, indirect=True)
@pytest.mark.parametrize("standing", STANDING)
@pytest.mark.parametrize("entry", [Entry("file", 0o640, b"new"), Entry("directory", 0o750), Entry("link", 0o777, b"x")], ids=lambda it: it.kind)  # fmt: skip
async def test_what_is_put_replaces_whatever_stands_there(box, standing, entry):
    await box.exec(f"mkdir kept; echo whole > kept/file; {STANDING[standing]}", 5)
    await box.put({"/work/at": entry})
    found = await box.diff()
    assert found["/work/at"] == entry
    below = {path for path in found if path.startswith("/work/at/") and found[path] is not None}
    assert len(below) == (3 if (standing, entry.kind) == ("folder", "directory") else 0)
    assert found["/work/kept/file"].content == b"whole\n"
    assert (await box.exec("ls -A; ls kept", 5)).output == b"at\nkept\nfile\n"


@pytest.mark.parametrize("backend", ISOLATING, indirect=True)
@pytest.mark.parametrize("standing", STANDING)
async def test_above_what_is_put_links_to_folders_are_followed_and_the_rest_gives_way(box, standing):
    await box.exec(f"mkdir kept; echo whole > kept/file; {STANDING[standing]}", 5)
    await box.put({"/work/at/in/new": Entry("file", 0o644, b"new")})
    assert await box.read("/work/at/in/new") == b"new"
    followed = {"link to a folder": "/work/kept/in/new", "link to /": "/in/new"}
    found = await box.diff()
    assert found[followed.get(standing, "/work/at/in/new")].content == b"new"
    assert found["/work/at"].kind == ("link" if standing in followed else "directory")
    assert found["/work/kept/file"].content == b"whole\n"


@pytest.mark.parametrize("backend", ISOLATING, indirect=True)
async def test_what_is_put_may_not_replace_the_whole_file_system(box):
    with pytest.raises(OSError, match=r"."):
        await box.put({"/": Entry("file", 0o644, b"x")})
    assert (await box.exec("echo alive", 5)).output == b"alive\n"


@pytest.mark.parametrize("backend", ISOLATING, indirect=True)
async def test_a_difference_names_what_is_gone_and_what_is_changed(box):
    await box.exec("rm -r /root; chmod 700 /work; echo x > /etc/new", 5)
    found = await box.diff()
    assert found["/root"] is None
    assert found["/work"].mode == 0o700
    assert found["/etc/new"].content == b"x\n"
    assert not [path for path in found if path.startswith(("/usr", "/proc", "/dev"))]


@pytest.mark.parametrize("backend", ISOLATING, indirect=True)
async def test_a_fresh_box_differs_in_nothing(box):
    assert not {path: entry for path, entry in (await box.diff()).items() if entry is None or entry.kind != "directory"}


async def test_many_boxes_live_at_once_and_work_side_by_side(backend):
    boxes = await asyncio.gather(*(backend.create(backend.image, SMALL) for _ in range(8)))
    started = time.monotonic()
    done = await asyncio.gather(*(box.exec(f"sleep 0.5; echo {number}", 10) for number, box in enumerate(boxes)))
    assert [result.output for result in done] == [f"{number}\n".encode() for number in range(8)]
    assert time.monotonic() - started < 3
    await asyncio.gather(*(box.destroy() for box in boxes))


async def test_commands_of_one_box_wait_for_one_another(box):
    done = await asyncio.gather(*(box.exec(f"X={n}; sleep 0.05; echo $X", 10) for n in range(4)))
    assert [result.output for result in done] == [b"0\n", b"1\n", b"2\n", b"3\n"]


async def test_an_image_that_is_not_there_is_named(backend):
    with pytest.raises((UsageError, Failure), match="no-such"):
        await backend.create("no-such", SMALL)


# -- which backend


def test_a_backend_that_gives_less_than_is_needed_is_refused():
    with pytest.raises(UsageError, match=r"process does not enforce isolation, disk_quota"):
        refuse("process", Capabilities(), Capabilities(isolation=True, disk_quota=True))
    with pytest.raises(UsageError, match="no sandbox backend 'podman'"):
        open_backend("podman")


def test_a_machine_without_bubblewrap_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere")
    with pytest.raises(UsageError, match="apt-get install bubblewrap"):
        open_backend("native")
    with pytest.raises(UsageError, match=r"apt-get install bubblewrap.*backend docker"):
        open_backend()


@pytest.mark.skipif("docker" not in ISOLATING, reason="no Docker")
async def test_docker_stands_in_where_native_cannot_be_had(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    opened = open_backend()
    await opened.close()
    assert isinstance(opened, BACKENDS["docker"])


@pytest.mark.parametrize("backend", ISOLATING, indirect=True)
async def test_a_box_may_be_without_a_loopback(backend):
    box = await backend.create(backend.image, SMALL.model_copy(update={"loopback": False}))
    code = (
        "import socket\nserver = socket.create_server(('127.0.0.1', 99))\n"
        "try: socket.create_connection(('127.0.0.1', 99), 0.5); print('met')\nexcept OSError: print('alone')"
    )
    assert (await box.exec(python(code), 5)).output == b"alone\n"
    assert (
        await box.exec(
            "ip link set lo up 2>/dev/null || ifconfig lo up 2>/dev/null; cat /sys/class/net/lo/flags 2>/dev/null", 5
        )
    ).output in (b"", b"0x8\n")
    await box.destroy()


@pytest.mark.parametrize("backend", ISOLATING, indirect=True)
async def test_a_box_does_not_see_what_is_hidden(backend):
    code = "import json, this; print(json.__file__, this.__file__)"
    box = await backend.create(backend.image, SMALL)
    shown = (await box.exec(python(code), 5)).output.decode().split()
    folder, file = str(Path(shown[-2]).parent), shown[-1]
    await box.destroy()
    box = await backend.create(backend.image, SMALL.model_copy(update={"hidden": (f"{folder}/", file, "/nowhere/")}))
    found = await box.exec(
        f"ls {folder}; cat {file}; touch {folder}/x {file}; mv {folder} /tmp; rm -r {folder} {file}", 5
    )
    assert b"__init__" not in found.output
    assert b"Zen" not in found.output
    assert found.status
    assert not {path for path, entry in (await box.diff()).items() if path.startswith("/usr")}
    await box.destroy()


@pytest.mark.skipif("native" not in ISOLATING, reason="no native backend")
async def test_of_this_machines_python_a_box_has_the_standard_library(native):
    box = await native.create(images.HOST, SMALL)
    code = "import site, os\nprint([os.listdir(d) for d in site.getsitepackages() if os.path.isdir(d)])"
    listed = (await box.exec(python(code), 5)).output.decode()
    assert not listed.replace("[", "").replace("]", "").replace(",", "").strip(), listed
    await box.destroy()


@pytest.mark.parametrize("backend", ISOLATING, indirect=True)
async def test_boxes_made_ahead_are_fresh_and_end_with_the_backend(backend):
    warm = Warm(backend, 2)
    first = await warm.create(backend.image, SMALL)
    ahead = [await making for making in warm._ready]
    assert len({id(box) for box in (first, *ahead)}) == 3
    assert await warm.create(backend.image, SMALL) is ahead[0]
    os.kill(ahead[1].init, 9)  # what died while it waited is not handed out
    await asyncio.sleep(0.1)
    third = await warm.create(backend.image, SMALL)
    assert third is not ahead[1]
    assert (await third.exec("echo alive", 5)).output == b"alive\n"
    wider = SMALL.model_copy(update={"processes": 70})
    await warm.create(backend.image, wider)
    waiting = [await making for making in warm._ready]
    await warm.close()
    for box in (first, third, *waiting):
        with pytest.raises(Failure):
            await box.exec("true", 2)


# -- images


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return images.store()


def layer(entries) -> bytes:
    """A tar of (name, content): None is a folder, a text a link's target, bytes a file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.mode = 0o755
            if content is None:
                member.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content if isinstance(content, bytes) else b""))
    return out.getvalue()


LOWER = [("a", None), ("a/x", b"1"), ("a/y", b"2"), ("abs", "/a"), ("b", None), ("b/z", b"3")]
UPPER = [
    ("a/.wh.x", b""), ("abs/new", b"n"), ("b/.wh..wh..opq", b""), ("b/w", b"4"), ("evil", "/etc"), ("evil/pwn", b"x"),
    ("../../up", b"u"),
]  # fmt: skip
FOUND = {"a/new": b"n", "a/y": b"2", "b/w": b"4", "etc/pwn": b"x", "up": b"u"}


def saved(path: Path) -> None:
    """What `docker save` writes."""
    manifest = [{"Config": "c.json", "Layers": ["1/layer.tar", "2/layer.tar"]}]
    config = {"config": {"Env": ["A=b=c"], "WorkingDir": "/a"}}
    parts = [("1/layer.tar", layer(LOWER)), ("2/layer.tar", layer(UPPER)), ("c.json", json.dumps(config).encode())]
    path.write_bytes(layer([*parts, ("manifest.json", json.dumps(manifest).encode())]))


def layout(path: Path) -> None:
    """An OCI layout in a folder."""
    blobs = path / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(name: str, content: bytes) -> dict[str, str]:
        (blobs / name).write_bytes(content)
        return {"digest": f"sha256:{name}"}

    layers = [blob("l1", layer(LOWER)), blob("l2", layer(UPPER))]
    config = blob("c", json.dumps({"config": {"Env": ["A=b=c"], "WorkingDir": "/a"}}).encode())
    manifest = blob("m", json.dumps({"config": config, "layers": layers}).encode())
    (path / "index.json").write_text(json.dumps({"manifests": [manifest]}))
    (path / "oci-layout").write_text("{}")


@pytest.mark.parametrize("write", [saved, layout])
def test_layers_are_applied_in_order_and_never_beside_the_image(store, tmp_path, write):
    write(tmp_path / "source")
    found = images.import_image(tmp_path / "source", "team/tools:1")
    assert {
        str(p.relative_to(found.root)): p.read_bytes()
        for p in found.root.rglob("*")
        if p.is_file() and "abs" not in p.parts and "evil" not in p.parts
    } == FOUND
    assert found.config.environment["A"] == "b=c"
    assert found.config.workdir == "/a"
    assert images.names() == ["team/tools:1"]
    assert not Path("/etc/pwn").exists()


def test_a_folder_and_its_tar_are_the_same_image(store, tmp_path):
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "tool").write_text("x")
    (root / "bin" / "tool").chmod(0o4755)
    os.link(root / "bin" / "tool", root / "bin" / "twin")
    subprocess.run(["tar", "-C", root, "-czf", tmp_path / "root.tgz", "."], check=True)
    for source, name in ((root, "folder"), (tmp_path / "root.tgz", "packed")):
        found = images.import_image(source, name).root
        assert (found / "bin" / "tool").stat().st_mode & 0o7777 == 0o4755
        assert (found / "bin" / "tool").stat().st_nlink == 2


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (b"no archive", "x", "cannot import"),
        (layer([("a", "b"), ("b", "a"), ("a/c", b"")]), "x", "links without end"),
        (b"", "Bad Name", "is no name"),
        (b"", "host", "is no name"),
    ],
)
def test_what_cannot_be_imported_leaves_nothing(store, tmp_path, content, name, words):
    (tmp_path / "source").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        images.import_image(tmp_path / "source", name)
    assert images.names() == []
    assert not store.exists() or not list(store.iterdir())


def test_an_empty_folder_is_no_image(store, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="it holds nothing"):
        images.import_image(tmp_path / "empty", "x")


def test_images_are_removed_by_name_or_pattern_and_harbors_are_summed_up(store, tmp_path):
    (tmp_path / "root" / "bin").mkdir(parents=True)
    for name in ("team/one", "harbor/a", "harbor/b"):
        images.import_image(tmp_path / "root", name)
    assert images.summary() == "host, team/one, 2 of harbor/..."
    done = CliRunner().invoke(app, ["image", "remove", "harbor/*"])
    assert (done.exit_code, images.names()) == (0, ["team/one"]), done.output
    with pytest.raises(UsageError, match="no sandbox image matches 'harbor/a'"):
        images.forget("harbor/a")


@pytest.mark.skipif("native" not in ISOLATING or os.geteuid() != 0, reason="root's native backend")
async def test_a_box_whose_shell_is_removed_says_so_at_once(store, tmp_path):
    root = tmp_path / "root"
    for program in ("/bin/sh", "/usr/bin/rm"):
        _with_libraries(Path(program).resolve(), root, program)
    images.import_image(root, "tiny")
    backend = open_backend("native")
    box = await backend.create("tiny", SMALL)
    try:
        started, statuses = time.monotonic(), []
        with suppress(Destroyed):
            for _ in range(10):
                statuses.append((await box.exec("rm -f /bin/sh; kill -9 $$", 20)).status)
        assert statuses[0] == 137
        assert set(statuses[1:]) <= {127}
        assert time.monotonic() - started < 15
    finally:
        await box.destroy()
        await backend.close()


@pytest.mark.skipif("native" not in ISOLATING or os.geteuid() != 0, reason="root's native backend")
async def test_a_box_of_an_image_writes_beside_it(store, tmp_path):
    root = tmp_path / "root"
    for program in ("/bin/sh", "/usr/bin/cat", "/usr/bin/rm", "/usr/bin/id", "/usr/bin/mkdir"):
        _with_libraries(Path(program).resolve(), root, program)
    (root / "etc").mkdir()
    (root / "etc" / "secret").write_text("for root")
    (root / "etc" / "secret").chmod(0o600)
    (root / "etc" / "old").write_text("old")
    (root / "opt" / "kept" / "deep").mkdir(parents=True)
    for name in ("opt/kept/deep/file", "opt/kept/other"):
        (root / name).write_text("old")
    (root / "way").symlink_to("/usr")
    images.import_image(root, "tiny")
    backend = open_backend("native")
    box = await backend.create("tiny", SMALL)
    try:
        assert (await box.exec("id -u; cat /etc/secret; rm /etc/old; echo new > /etc/new", 5)).output == b"0\nfor root"
        found = await box.diff()
        assert found["/etc/old"] is None
        assert found["/etc/new"].content == b"new\n"
        await box.exec("rm -r /opt/kept; mkdir -p /opt/kept/deep; echo new > /opt/kept/deep/more", 5)
        below = {path: entry for path, entry in (await box.diff()).items() if path.startswith("/opt/kept/")}
        assert below.pop("/opt/kept/deep/more").content == b"new\n"
        assert below.pop("/opt/kept/deep").kind == "directory"
        assert below == {"/opt/kept/deep/file": None, "/opt/kept/other": None}
        await box.exec("rm /way; mkdir /way; echo new > /way/new", 5)
        assert [path for path in await box.diff() if path.startswith("/way/")] == ["/way/new"]
    finally:
        await box.destroy()
        await backend.close()
    assert sorted(path.name for path in (images.find("tiny").root / "etc").iterdir()) == ["old", "secret"]


@pytest.mark.skipif("native" not in ISOLATING, reason="no native backend")
async def test_backends_of_one_process_leave_each_others_boxes_alone():
    first, second = open_backend("native"), open_backend("native")
    box = await first.create("host", SMALL)
    try:
        await second.create("host", SMALL)
        await second.close()
        assert (await box.exec("echo here", 5)).output == b"here\n"
    finally:
        await box.destroy()
        await first.close()
    assert not (cgroups.ROOT / "pids" / cgroups.owner_name()).exists()


def _with_libraries(program: Path, root: Path, name: str) -> None:
    """Copy a program and what it is linked to."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    libraries = [word for word in listed.split() if word.startswith("/")]
    for source, target in ((program, name), *((Path(library), library) for library in libraries)):
        place = root / target.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(source.read_bytes())
        place.chmod(0o755)


# -- pieces


def test_what_is_packed_is_found_again():
    entries = {
        "/a": Entry("directory", 0o711, b"", 5, 6),
        "/a/f": Entry("file", 0o4750, b"x" * 5000, 1, 2),
        "/a/l": Entry("link", 0o777, b"../f"),
    }
    assert archives.changes(archives.packed(entries)) == entries
    with pytest.raises(ValueError, match="cannot make an entry of kind 'other'"):
        archives.packed({"/x": Entry("other", 0)})


def test_what_lies_beyond_a_baseline():
    one, two = Entry("file", 0o644, b"1"), Entry("file", 0o644, b"2")
    assert archives.beyond({"/a": one, "/b": one, "/c": None}, {"/a": one, "/b": two, "/d": one, "/c": None}) == {
        "/b": two,
        "/d": one,
    }
    assert archives.beyond({"/a": one}, {}) == {"/a": None}


def test_the_filter_is_whole_on_both_machines():
    for machine in seccomp.ARCHITECTURES:
        program = seccomp.program(machine)
        assert len(program) % 8 == 0
        assert len(program) // 8 < 4096


@pytest.mark.skipif(not cgroups.parents(), reason="no control group may be made here")
def test_what_a_killed_owner_left_is_swept(tmp_path):
    code = (
        "from palaestra.environments.sandbox.cgroups import Group; from palaestra.gym.sandbox import BoxLimits; "
        "import os, signal; print(Group('left', BoxLimits()).folders[0]); import sys; sys.stdout.flush(); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    left = Path(done.stdout.strip())
    assert left.exists(), done.stderr
    cgroups.sweep()
    assert not left.exists()
    assert not left.parent.exists()


class Kernel(type(Path())):
    """Paths of a control group file system, version 2: a new folder has its files, and goes with them."""

    def mkdir(self, *arguments, **named):
        super().mkdir(*arguments, **named)
        for name in ("cgroup.procs", "cgroup.subtree_control", "memory.max", "memory.swap.max", "pids.max", "cpu.max"):
            (self / name).touch()
        (self / "cgroup.controllers").write_text("cpu memory pids io")
        (self / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")

    def rmdir(self):
        shutil.rmtree(self)

    def write_text(self, text):
        """Controllers that are switched on add up."""
        with self.open("a" if self.name == "cgroup.subtree_control" else "w") as file:
            return file.write(text.replace("+", " "))


def test_limits_are_written_as_version_2_of_control_groups_wants_them(tmp_path, monkeypatch):
    root = Kernel(tmp_path / "cgroup")
    root.mkdir()
    monkeypatch.setattr(cgroups, "ROOT", root)
    group = cgroups.Group("box", BoxLimits(memory=1 << 20, processes=7, cpus=0.5))
    (folder,) = group.folders
    assert folder == root / cgroups.owner_name() / "box"
    written = {name: (folder / name).read_text() for name in ("memory.max", "memory.swap.max", "pids.max", "cpu.max")}
    assert written == {"memory.max": "1048576", "memory.swap.max": "0", "pids.max": "7", "cpu.max": "50000 100000"}
    for level in (root, folder.parent):
        assert set((level / "cgroup.subtree_control").read_text().split()) == {"cpu", "memory", "pids"}
    assert group.kills() == 2
    group.remove()
    assert not folder.exists()


def test_a_root_that_gives_its_groups_no_controller_enforces_nothing(tmp_path, monkeypatch):
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids")
    (tmp_path / "cgroup.subtree_control").mkdir()  # writing to it fails, as where other processes are in the root
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(Path, "read_text", lambda path: "" if path.is_dir() else "cpu memory pids")
    assert cgroups.parents() == {}


@pytest.mark.skipif("native" not in ISOLATING, reason="no native backend")
def test_boxes_end_with_their_owner_however_it_ends():
    code = """
import asyncio, os, signal
from palaestra.environments.sandbox.native import Native
from palaestra.gym.sandbox import BoxLimits
async def main():
    native = Native()
    boxes = [await native.create("host", BoxLimits()) for _ in range(3)]
    for box in boxes:
        await box.exec("setsid sleep 600 & sleep 0.1", 5)
    print(os.getpid(), *(box.init for box in boxes), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    owner, *inits = done.stdout.split()
    assert len(inits) == 3, done.stderr
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{init}").exists() for init in inits):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cgroups.sweep()
    launching.sweep()
    assert not list(Path("/tmp").glob(f"{launching.STAGE}{owner}-*"))


@pytest.mark.slow
@pytest.mark.skipif("native" not in ISOLATING, reason="no native backend")
def test_no_box_outlives_an_owner_that_is_killed_while_boxes_start():
    """A bubblewrap killed between starting its child and releasing it left the child behind, two times in twelve."""
    code = """
import asyncio
from palaestra.environments.sandbox.native import Native
from palaestra.gym.sandbox import BoxLimits
async def one(native):
    while True:
        box = await native.create("host", BoxLimits())
        print("made", flush=True)
        await box.destroy()
async def main():
    native = Native()
    await asyncio.gather(*(one(native) for _ in range(6)))
asyncio.run(main())
"""
    before = bubblewraps()
    for turn in range(20):
        owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        with owner:
            assert owner.stdout.readline() == b"made\n"
            time.sleep(turn * 0.01)
            owner.kill()
        deadline = time.monotonic() + 10
        while bubblewraps() - before:
            assert time.monotonic() < deadline, f"turn {turn}: {bubblewraps() - before}"
            time.sleep(0.05)


def bubblewraps() -> set[int]:
    """The processes that run, or were started by, bubblewrap and have not become something else."""
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if place.joinpath("comm").read_text() == "bwrap\n":
                found.add(int(place.name))
    return found


# -- commands


@pytest.mark.parametrize(
    ("text", "words"), [("mem=1", "no limit 'mem'"), ("memory=lots", "memory=lots"), ("cpus=-1", "cpus=-1")]
)
def test_a_bad_limit_is_named(text, words):
    with pytest.raises(UsageError, match=words):
        limits_of([text])
    assert limits_of(["memory=64M", "cpus=0.5", "processes=9"]) == BoxLimits(memory=64 << 20, cpus=0.5, processes=9)


@pytest.mark.skipif("native" not in ISOLATING, reason="no native backend")
def test_run_passes_streams_and_status_through():
    command = [
        sys.executable,
        "-c",
        "from palaestra.environments.sandbox.cli import app; app()",
        "run",
        "--limit",
        "memory=64M",
        "--",
        "sh",
        "-c",
        "cat; echo err >&2; id -u; exit 7",
    ]
    done = subprocess.run(command, input="in\n", capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (7, "in\n0\n", "err\n")


def test_the_doctor_says_what_works():
    done = CliRunner().invoke(app, ["doctor"])
    assert "backend native" in done.output
    assert ("ok  backend native" in done.output) == ("native" in ISOLATING)
    assert done.exit_code == (0 if ISOLATING else 1)


# -- what goes wrong


@pytest.fixture
async def native():
    if "native" not in ISOLATING:
        pytest.skip("no native backend")
    opened = open_backend("native")
    yield opened
    await opened.close()


async def test_a_launcher_that_is_killed_takes_its_boxes_along_and_is_followed_by_another(native):
    box = await native.create(images.HOST, SMALL)
    native._launching._process.kill()
    with pytest.raises(Failure, match="launcher ended"):
        await box.exec("sleep 5", 10)
    with pytest.raises(Failure, match="launcher ended"):
        await box.read("/work/x")
    await box.destroy()
    other = await native.create(images.HOST, SMALL)
    assert (await other.exec("echo again", 5)).output == b"again\n"
    await other.destroy()


async def test_a_request_that_is_too_long_is_refused_and_harms_nobody(native):
    box = await native.create(images.HOST, SMALL)
    for path in ("/" + "x" * 70_000, "/" + "ü" * 20_000):
        with pytest.raises(OSError, match="too long"):
            await box.read(path)
    assert (await box.exec("echo alive", 5)).output == b"alive\n"
    await box.destroy()


@pytest.mark.parametrize("how", ["prlimit --pid 1 --nproc=0:0; kill -9 $$", "kill -9 $$; kill -9 $PPID", "python3 -c 'x = open(\"/proc/1/mem\", \"r+b\", 0)'"])  # fmt: skip
async def test_init_is_not_ended_from_inside(native, how):
    box = await native.create(images.HOST, SMALL)
    await box.exec(how, 10)
    assert (await box.exec("echo alive", 10)).output == b"alive\n"
    await box.destroy()


async def test_a_box_that_this_machine_kills_is_its_failure(native):
    box = await native.create(images.HOST, SMALL)
    end(box.init)
    with pytest.raises(Failure, match="killed from outside"):
        await box.exec("echo alive", 10)
    with pytest.raises(Failure, match="killed from outside"):
        await box.diff()
    await box.destroy()


async def test_a_box_whose_init_is_broken_from_inside_is_its_own_doing(native):
    box = await native.create(images.HOST, SMALL)
    code = "maps = open('/proc/1/maps').read().splitlines(); mem = open('/proc/1/mem', 'r+b', 0)\nfor line in maps:\n    if 'r-xp' in line and '[v' not in line:\n        start, end = (int(x, 16) for x in line.split()[0].split('-')); mem.seek(start); mem.write(b'\\xcc' * (end - start))"
    with suppress(Destroyed):  # any other Failure would be this machine's
        await box.exec(f"python3 -c {shlex.quote(code)}; kill -9 $$; kill -9 $PPID", 5)
        await box.exec("echo alive", 10)
    await box.destroy()


async def test_destroying_a_box_ends_its_command_and_disturbs_no_other(native):
    box = await native.create(images.HOST, SMALL)
    running = asyncio.create_task(box.exec("sleep 30", 60))
    await asyncio.sleep(0.1)
    await box.destroy()
    with pytest.raises(Failure, match="destroyed"):
        await running
    other = await native.create(images.HOST, SMALL)
    assert (await other.exec("echo fine", 5)).output == b"fine\n"
    await other.destroy()


async def test_a_creation_that_is_cancelled_leaves_nothing(native):
    await (await native.create(images.HOST, SMALL)).destroy()
    before = len(os.listdir("/proc/self/fd"))
    groups = sorted(Path("/sys/fs/cgroup").glob(f"*/{cgroups.owner_name()}/*/"))
    for seconds in (0.001, 0.003, 0.006, 0.01, 0.015, 0.02):
        with suppress(TimeoutError):
            await (await asyncio.wait_for(native.create(images.HOST, SMALL), seconds)).destroy()
    await asyncio.sleep(0.3)
    assert len(os.listdir("/proc/self/fd")) <= before  # fewer, where what an earlier test left was collected meanwhile
    left = sorted(Path("/sys/fs/cgroup").glob(f"*/{cgroups.owner_name()}/*/"))
    assert len(left) <= len(groups)  # the spare ones
    assert not any((group / "cgroup.procs").read_text() for group in left)


async def test_a_group_that_is_used_again_excuses_nobody_and_harbours_nobody(native):
    box = await native.create(images.HOST, SMALL)
    first = box._group
    await box.exec("head -c 300M /dev/zero | tail -c 200M > /dev/null; setsid sleep 99 &", 10)
    assert first.kills()
    await box.destroy()
    box = await native.create(images.HOST, SMALL)
    assert box._group is first
    assert len(await box.processes()) <= 3
    end(box.init)
    with pytest.raises(Failure, match="killed from outside"):
        await box.exec("true", 5)
    await box.destroy()


async def test_a_cancelled_command_is_stopped_and_the_next_one_is_not_mixed_with_it(native):
    box = await native.create(images.HOST, SMALL)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(box.exec("echo A1; sleep 1; echo A2; touch /work/A3; sleep 9", 60), 0.3)
    assert (await box.exec("echo B", 5)).output == b"B\n"
    await asyncio.sleep(1)
    assert (await box.exec("ls", 5)).output == b""
    await box.destroy()


async def test_a_shell_that_is_ended_from_behind_never_runs_a_command_without_its_limit(native):
    box = await native.create(images.HOST, SMALL)
    await box.exec("(sleep 0.2; kill -9 $$) > /dev/null 2>&1 &", 5)
    done = await box.exec("sleep 3; touch over", 1)
    assert done.status != 0
    await asyncio.sleep(3)
    assert (await box.exec("ls; echo next", 5)).output == b"next\n"
    await box.exec("kill -STOP $$", 0.5)
    assert (await box.exec("echo once", 5)).output == b"once\n"
    await box.exec("echo ended 0 >&15; sleep 0.5; echo late", 5)
    assert (await box.exec("echo B", 5)).output == b"B\n"
    await box.destroy()


async def test_an_image_without_a_shell_says_so(native, store, tmp_path):
    (tmp_path / "root" / "etc").mkdir(parents=True)
    images.import_image(tmp_path / "root", "empty")
    with pytest.raises(Failure, match="/bin/sh"):
        await native.create("empty", SMALL)


async def test_a_full_disk_is_told_as_it_is(native):
    box = await native.create(images.HOST, SMALL)
    await box.exec("head -c 100M /dev/zero > fill", 5)
    for size in (9, 30_000, 3_000_000):
        with pytest.raises(OSError, match="No space left"):
            await box.write("/work/new", b"x" * size)
    assert await box.exec("ls -A", 5) == (0, b"fill\n", False)
    await box.destroy()


async def test_what_changes_while_it_is_collected_hides_nothing(native):
    box = await native.create(images.HOST, SMALL)
    await box.exec("(while :; do for i in 1 2 3; do echo x >> log$i; rm -f gone; touch gone; done; done) > /dev/null 2>&1 & touch zz", 5)  # fmt: skip
    for _ in range(10):
        assert "/work/zz" in await box.diff()
    await box.destroy()


async def test_a_link_that_is_swapped_in_meanwhile_leads_nowhere(native, tmp_path):
    (tmp_path / "secret").write_text("secret of this machine")
    box = await native.create(images.HOST, SMALL)
    swap = f"import os\nopen('a', 'w').write('x')\nwhile True:\n    os.symlink('{tmp_path}/secret', 'l'); os.rename('l', 'a'); open('f', 'w').write('x'); os.rename('f', 'a')"
    await box.exec(f"python3 -c {shlex.quote(swap)} > /dev/null 2>&1 & sleep 0.2", 5)
    for _ in range(20):
        entry = (await box.diff()).get("/work/a")
        assert entry is None or b"secret of" not in entry.content
    await box.destroy()


async def test_a_service_that_drips_is_given_up(native):
    box = await native.create(images.HOST, SMALL)
    serve = "import socket, time\ns = socket.create_server(('127.0.0.1', 99)); c, _ = s.accept()\nwhile True: c.send(b'x'); time.sleep(0.2)"
    await box.exec(f"python3 -c {shlex.quote(serve)} > /dev/null 2>&1 & sleep 0.3", 5)
    with pytest.raises(OSError, match=r"not ended after 1 s|timed out"):
        await box.ask(99, b"", 1.0)
    await box.destroy()


def test_a_layer_moves_nothing_beside_its_image(store, tmp_path):
    victim = tmp_path / "victim"
    (victim / "shadow").mkdir(parents=True)
    victim.chmod(0o700)
    for number, entries in enumerate(
        ([("e", None), ("e/shadow", None), ("e", str(victim))], [("d", None), ("d", str(victim))])
    ):
        (tmp_path / f"{number}.tar").write_bytes(layer(entries))
        images.import_image(tmp_path / f"{number}.tar", f"evil{number}")
    assert victim.stat().st_mode & 0o777 == 0o700
    assert (victim / "shadow").stat().st_mode & 0o777 == 0o755 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
