"""What hostile code tries in a box, and that it comes to nothing. docs/sandbox.md lists the same attacks by name.

Traffic goes only to listeners that the tests open on the loopback of this machine.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from boxes import IMAGES, ISOLATING, SMALL, call, enforcing, python

from palaestra.environments.sandbox import docker, processes
from palaestra.environments.sandbox.backends import open_backend
from palaestra.gym.outcome import Failure
from palaestra.gym.sandbox import Destroyed

pytestmark = pytest.mark.skipif(not ISOLATING, reason="no isolating sandbox backend on this machine")
SECRET = "hunter2-only-the-parent-knows"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=ISOLATING)
async def backend(request, monkeypatch):
    monkeypatch.setenv("PALAESTRA_TEST_SECRET", SECRET)
    opened = open_backend(request.param)
    opened.image = IMAGES[request.param]
    yield opened
    await opened.close()


@pytest.fixture
async def box(backend):
    box = await backend.create(backend.image, SMALL)
    yield box
    await box.destroy()


async def said(box, command, seconds=10.0):
    """What a command printed, as text."""
    return (await box.exec(command, seconds)).output.decode(errors="replace")


INIT_MEMORY = """
address = int(open('/proc/1/maps').readline().partition('-')[0], 16)
for path in ('/proc/1/mem', '/proc/1/task/1/mem'):
    try:
        memory = open(path, 'r+b', 0)
        memory.seek(address)
        print('broke', memory.read(4))
    except OSError:
        pass
"""


class Attempt(NamedTuple):
    """A command that must not print `broke`, in a box that must live on."""

    name: str
    command: str
    stopped: Callable[[str], bool] = lambda text: "broke" not in text
    backends: tuple[str, ...] = ("native", "docker")


def refused(number: int, *arguments: str, by=(errno.EPERM, errno.ENOSYS)) -> tuple[str, Callable[[str], bool]]:
    """A system call that must fail with one of the errors."""
    return call(number, *arguments), lambda text: any(f"result -1 errno {error}" in text for error in by)


def write(path: str) -> str:
    return f"(echo 1 > {path}) 2>/dev/null && echo broke; true"


def unreadable(path: str) -> str:
    return f"(head -c 1 {path} | grep -q .) 2>/dev/null && echo broke; true"


ATTEMPTS = [
    # the kernel's files
    Attempt("core_pattern", write("/proc/sys/kernel/core_pattern")),
    Attempt("drop_caches", write("/proc/sys/vm/drop_caches")),
    Attempt("sysrq", write("/proc/sysrq-trigger")),
    Attempt("hostname file", write("/proc/sys/kernel/hostname")),
    Attempt("kcore", unreadable("/proc/kcore")),
    Attempt("kernel log", unreadable("/dev/kmsg")),
    Attempt("control groups", "for file in $(find /sys/fs/cgroup -type f 2>/dev/null); do (echo 1 > $file) 2>/dev/null && echo broke; done; true"),
    Attempt("sysfs", write("/sys/power/state")),
    Attempt("memory of init", python(INIT_MEMORY), backends=("native",)),  # docker: the box's own processes
    # namespaces and mounts
    Attempt("nested user namespace", "unshare -U true 2>/dev/null && echo broke; true"),
    Attempt("nested mount namespace", "unshare -m true 2>/dev/null && echo broke; true"),
    Attempt("mount tmpfs", "mkdir -p m; mount -t tmpfs none m 2>/dev/null && echo broke; true"),
    Attempt("mount over proc", "mount -t proc none /proc 2>/dev/null && echo broke; true"),
    Attempt("remount /usr writable", "mount -o remount,rw,bind /usr 2>/dev/null && echo broke; true"),
    Attempt("write /usr", write("/usr/bin/broken"), backends=("native",)),  # docker: the image's own
    Attempt("unmount /proc/sys", "umount -l /proc 2>/dev/null && echo broke; true"),
    Attempt("chroot out", python("import os\nos.mkdir('c')\ntry: os.chroot('c'); print('broke')\nexcept OSError: pass")),
    Attempt("device node", "mknod disk b 8 0 2>/dev/null && echo broke; mknod mem c 1 1 2>/dev/null && echo broke; true"),
    Attempt("host devices", "ls /dev/sda /dev/vda /dev/mem /dev/kvm /dev/loop-control /dev/fuse /dev/net/tun 2>/dev/null | grep -q . && echo broke; true"),
    # system calls
    Attempt("ptrace", *refused(101, "16", "1", "0", "0"), backends=("native",)),  # docker: the box's own processes
    Attempt("process_vm_readv", *refused(310, "1", "0", "0", "0", "0", "0")),
    Attempt("io_uring", *refused(425, "8", "0")),
    Attempt("bpf", *refused(321, "0", "0", "0")),
    Attempt("perf_event_open", *refused(298, "0", "0", "0", "-1", "0")),
    Attempt("userfaultfd", *refused(323, "0")),
    Attempt("keyctl", *refused(250, "0", "-3", "1")),
    Attempt("add_key", *refused(248, "b'user'", "b'k'", "b'v'", "1", "-3")),
    Attempt("clone with namespaces", *refused(56, "0x10000011", "0", "0", "0", "0")),
    Attempt("clone3", *refused(435, "0", "0")),
    Attempt("setns", *refused(308, "0", "0")),
    Attempt("open_by_handle_at", *refused(304, "-100", "0", "0")),
    Attempt("new mount api", *refused(430, "b'tmpfs'", "0")),
    Attempt("kexec", *refused(246, "0", "0", "0", "0")),
    Attempt("module", *refused(313, "0", "b''", "0")),
    Attempt("kernel log by a call", *refused(103, "3", "0", "0")),
    Attempt("clock", *refused(227, "0", "b'0' * 16")),
    Attempt("vsock", *refused(41, "40", "1", "0", by=(errno.EPERM, errno.EAFNOSUPPORT)), backends=("native",)),  # docker: its own filter lets it be made
    Attempt("another's limits", "prlimit --pid 1 --nproc=0:0 2>/dev/null && echo broke; true", backends=("native",)),
    Attempt("the machine's command line", "head -c 1 /proc/cmdline | grep -q . && echo broke; true", backends=("native",)),
    Attempt("hostname", *refused(170, "b'evil'", "4")),
    Attempt("reboot", *refused(169, "0xfee1dead", "672274793", "0", "0")),
    Attempt("personality", *refused(135, "0x0040000")),
    Attempt("x32 calls", *refused(0x40000000 + 39)),
    Attempt("terminal input", python("import fcntl, os\nmaster, slave = os.openpty()\ntry: fcntl.ioctl(slave, 0x5412, b'x'); print('broke')\nexcept OSError: pass")),
    # identities
    Attempt("raise a limit", python("import resource\ntry: resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 20, 1 << 20)); print('broke')\nexcept (OSError, ValueError): pass")),
    Attempt("gain by setuid", "cp $(command -v id) as-root; chmod 4755 as-root; chmod 755 .; " + python("import os\ntry: os.setgid(1000); os.setuid(1000)\nexcept OSError: os._exit(0)\nos.execv('./as-root', ['id', '-u'])") + " | grep -qx 0 && echo broke; true"),
    Attempt("capabilities", "grep CapEff /proc/self/status | cut -f2 | python3 -c \"print('broke' if int(input(), 16) & ~0x4eb else '')\"; true"),
    # what is not for it
    Attempt("parent's environment", f"cat /proc/*/environ 2>/dev/null | grep -qa {SECRET} && echo broke; env | grep -q {SECRET} && echo broke; true"),
    Attempt("homes and projects", f"ls /root/.ssh /home/* {ROOT} /mnt/* /media/* 2>/dev/null | grep -q . && echo broke; true"),
    Attempt("password file", unreadable("/etc/shadow"), backends=("native",)),  # docker: the image's own
    Attempt("open descriptors", "ls /proc/self/fd | grep -vE '^[0-3]$' | grep -q . && echo broke; true"),
    Attempt("the host's sockets", "ls /run/docker.sock /var/run/docker.sock /run/dbus 2>/dev/null | grep -q . && echo broke; true"),
    # network
    Attempt("interfaces", "tail -n +3 /proc/net/dev | grep -v ' lo:' | grep -q : && echo broke; true"),
    Attempt("routes", "tail -n +2 /proc/net/route | grep -q . && echo broke; true"),
]  # fmt: skip


CASES = [(name, attempt) for attempt in ATTEMPTS for name in ISOLATING if name in attempt.backends]


@pytest.mark.parametrize(
    ("backend", "attempt"), CASES, ids=lambda case: getattr(case, "name", case), indirect=["backend"]
)
async def test_an_attempt_comes_to_nothing(box, attempt):
    text = await said(box, attempt.command)
    assert attempt.stopped(text), text
    assert "Traceback" not in text
    assert await said(box, "echo alive") == "alive\n"


# -- resources


async def test_a_fork_bomb_stays_in_its_box_and_dies_with_its_command(box):
    done = await box.exec("b() { b | b & }; b; sleep 30", 2.0)
    assert done.stopped
    assert await said(box, "echo alive") == "alive\n"


async def test_a_bomb_never_has_more_processes_than_the_box_may(box):
    task = asyncio.create_task(
        box.exec(python("import os, time\nwhile True:\n    try: os.fork()\n    except OSError: time.sleep(1)"), 1.5)
    )
    most = 0
    while not task.done():
        most = max(most, len(list(processes.inside(processes.namespace(box.init)))))
        await asyncio.sleep(0.05)
    assert 20 < most <= SMALL.processes + 1
    assert (await task).stopped


async def test_a_thread_bomb_is_held(box):
    code = "import threading, time\nn = 0\ntry:\n    while True: threading.Thread(target=time.sleep, args=(5,), daemon=True).start(); n += 1\nexcept RuntimeError: print('threads', n, flush=True); import os; os._exit(0)"
    count = int((await said(box, python(code))).split()[-1])
    assert 10 < count < SMALL.processes


@pytest.mark.parametrize("place", ["/work", "/tmp", "/root"])
@pytest.mark.parametrize("backend", enforcing("disk_quota"), indirect=True)
async def test_a_full_disk_is_the_boxs_own(box, place):
    text = await said(box, f"head -c 200M /dev/zero > {place}/full; stat -c %s {place}/full; rm {place}/full")
    assert "No space left" in text or "killed" in text.lower(), text
    assert int(text.split()[-1]) <= 64 << 20
    assert await said(box, "echo alive") == "alive\n"


async def test_shared_memory_has_an_end(box):
    text = await said(box, "head -c 200M /dev/zero > /dev/shm/full; stat -c %s /dev/shm/full; rm /dev/shm/full")
    assert int(text.split()[-1]) <= 64 << 20


async def test_dev_takes_no_more_than_memory(box):
    done = await box.exec("head -c 300M /dev/zero > /dev/full-of-it && echo broke", 20)
    assert b"broke" not in done.output


@pytest.mark.parametrize("backend", enforcing("disk_quota"), indirect=True)
async def test_inodes_run_out_for_the_box_alone(box):
    code = "import itertools\ntry:\n    for n in itertools.count(): open(f'/tmp/{n}', 'w').close()\nexcept OSError as error: print(n, error.errno)"
    count, number = map(int, (await said(box, python(code), 30)).split())
    assert count < SMALL.inodes
    assert number == errno.ENOSPC


async def test_a_memory_hog_is_killed_and_the_box_lives(box):
    done = await box.exec(python("x = bytearray(600 << 20); print('bro' + 'ke')"), 20)
    assert done.status == 137
    assert b"broke" not in done.output
    assert await said(box, "echo alive") == "alive\n"


@pytest.mark.parametrize("backend", enforcing("disk_quota"), indirect=True)
async def test_memory_files_count_as_memory(backend):
    box = await backend.create(backend.image, SMALL.model_copy(update={"disk": 1 << 30}))

    async def fill():
        while True:
            assert "broke" not in await said(box, "head -c 400M /dev/zero > /work/hog && echo broke", 20)

    try:
        with pytest.raises(Destroyed):
            await fill()
    finally:
        await box.destroy()


async def test_the_cpu_share_is_kept(backend):
    box = await backend.create(backend.image, SMALL.model_copy(update={"cpus": 0.25}))
    try:
        code = (
            "import time\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass\nprint(time.process_time())"
        )
        assert float(await said(box, python(code))) < 0.75
    finally:
        await box.destroy()


async def test_a_flood_of_output_is_cut_and_stopped(box):
    started = time.monotonic()
    done = await box.exec("yes flood", 20)
    assert done.stopped
    assert len(done.output) < 2 * SMALL.output
    assert b"bytes left out" in done.output
    assert time.monotonic() - started < 10
    assert await said(box, "echo alive") == "alive\n"


async def test_a_flood_without_a_line_end_and_of_no_text_is_taken_as_it_is(box):
    done = await box.exec("head -c 3000 /dev/urandom | tee bytes; printf '\\0\\033[31m\\377'", 10)
    assert len(done.output) == 3000 + 7
    assert done.output.endswith(b"\0\x1b[31m\xff")


async def test_a_drip_of_output_does_not_move_the_time_limit(box):
    started = time.monotonic()
    done = await box.exec("while :; do printf x; sleep 0.05; done", 1.0)
    assert done.stopped
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "command",
    ["trap '' TERM INT HUP; sleep 60", "while :; do :; done", "python3 -c 'import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; time.sleep(60)'", "(setsid sleep 60 &) ; sleep 60", "cat /dev/zero > /dev/null", "kill -STOP $$; sleep 60"],
)  # fmt: skip
async def test_a_command_that_ignores_its_time_limit_is_stopped_and_the_box_lives(box, command):
    started = time.monotonic()
    done = await box.exec(command, 0.5)
    assert done.stopped
    assert time.monotonic() - started < 5
    assert await said(box, "echo alive") == "alive\n"
    assert "sleep 60" not in await said(box, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")


# -- the shell


async def test_a_shell_that_is_killed_from_inside_is_followed_by_another(box):
    await box.exec("cd /tmp; X=1", 5)
    for end in ("kill -9 $$", "kill -9 -1", "exit 3", "exec true", "exec >&-; exit 4", "set -e; false", "set -u; echo $nothing", "kill -9 1 2>/dev/null; kill -9 $PPID; exit 5"):  # fmt: skip
        await box.exec(end, 5)
        assert await said(box, "pwd") == "/work\n", end


async def test_no_command_reads_what_is_meant_for_the_shell(box):
    assert await said(box, 'cat; read line; echo "[$line]"') == "[]\n"
    assert await said(box, "python3 -c 'import sys; print(len(sys.stdin.read()))'") == "0\n"
    assert await said(box, "echo alive") == "alive\n"


async def test_a_command_may_be_any_text(box):
    assert await said(box, "echo 'a\nb'\necho \"c'd\" # '") == "a\nb\nc'd\n"
    assert "syntax error" in await said(box, "if ( ; then")
    assert await said(box, "}; echo out; {") != "out\n"
    assert await said(box, "cat <<END\n$(echo x)\nEND\n") == "x\n"
    assert len(await said(box, "echo " + "y" * 100_000)) > 60_000
    assert await said(box, "echo alive") == "alive\n"


async def test_what_a_background_process_holds_open_holds_nobody_up(box):
    started = time.monotonic()
    assert await said(box, "sleep 30 & echo begun") == "begun\n"
    assert time.monotonic() - started < 2


async def test_a_guessed_status_ends_no_command(box):
    guess = "for fd in 3 4 5; do echo 'feedbeef 0' >&$fd; echo 'feedbeef 0' > /proc/1/fd/$fd; done 2>/dev/null"
    text = await said(box, f"{guess}; sleep 0.3; echo last")
    assert text.endswith("last\n")
    assert await said(box, "echo alive") == "alive\n"


async def test_orphans_are_reaped(box):
    await box.exec("for i in $(seq 200); do (sleep 0.01 & exec true) ; done; sleep 0.5", 20)
    assert "Z" not in (await said(box, "cut -d' ' -f3 /proc/[0-9]*/stat"))


# -- other boxes and this machine


async def test_boxes_do_not_see_one_another(backend):
    one, other = await backend.create(backend.image, SMALL), await backend.create(backend.image, SMALL)
    try:
        await one.exec("echo secret > /dev/shm/s; echo secret > /tmp/s; sleep 4242 & sleep 0.1", 5)
        await one.exec(
            python(
                "import socket, time, os\ns = socket.socket(socket.AF_UNIX); s.bind('\\0rendezvous'); s.listen()\nif os.fork() == 0: time.sleep(60)"
            ),
            5,
        )
        assert await said(other, "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -o '[4]242'") == ""
        assert await said(other, "cat /dev/shm/s /tmp/s 2>/dev/null") == ""
        connect = "import socket\ntry: socket.socket(socket.AF_UNIX).connect('\\0rendezvous'); print('broke')\nexcept OSError: pass"
        assert await said(other, python(connect)) == ""
        assert await said(one, "ipcmk -M 1024 > /dev/null; ipcs -m | wc -l") != await said(other, "ipcs -m | wc -l")
        assert await said(other, f"kill -9 {one.init} 2>/dev/null && echo broke; true") == ""
    finally:
        await one.destroy()
        await other.destroy()


@pytest.mark.parametrize(("family", "kind", "address"), [(socket.AF_INET, socket.SOCK_STREAM, "127.0.0.1"), (socket.AF_INET6, socket.SOCK_STREAM, "::1"), (socket.AF_INET, socket.SOCK_DGRAM, "127.0.0.1")])  # fmt: skip
async def test_nothing_reaches_a_listener_on_this_machine(box, family, kind, address):
    with socket.socket(family, kind) as listener:
        listener.bind((address, 0))
        listener.settimeout(0.3)
        port = listener.getsockname()[1]
        if kind == socket.SOCK_STREAM:
            listener.listen()
        code = f"import socket\ns = socket.socket({int(family)}, {int(kind)}); s.settimeout(1)\ntry: s.connect(('{address}', {port})); s.send(b'x')\nexcept OSError as e: print(e.errno)"
        await box.exec(python(code), 5)
        with pytest.raises(TimeoutError):
            listener.accept() if kind == socket.SOCK_STREAM else listener.recv(10)


async def test_an_abstract_socket_of_this_machine_is_out_of_reach(box):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0palaestra-test")
        listener.listen()
        code = "import socket\ntry: socket.socket(socket.AF_UNIX).connect('\\0palaestra-test'); print('broke')\nexcept OSError: pass"
        assert await said(box, python(code)) == ""


async def test_a_boxs_own_loopback_works(box):
    code = "import socket\ns = socket.create_server(('127.0.0.1', 80)); c = socket.create_connection(('127.0.0.1', 80)); print('met')"
    assert await said(box, python(code)) == "met\n"


async def vanish(pids):
    """Wait until the processes are gone, their entries in the table of processes included."""
    async with asyncio.timeout(3):
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            await asyncio.sleep(0.01)


async def test_a_daemon_dies_with_its_box(backend):
    box = await backend.create(backend.image, SMALL)
    await box.exec("for i in 1 2 3; do (setsid nohup sleep 4711 > /dev/null 2>&1 &); done", 5)
    inside = list(processes.inside(processes.namespace(box.init)))
    assert len(inside) > 3
    await box.destroy()
    await vanish(inside)


# -- files on their way out


async def test_the_collector_follows_no_link_waits_for_no_fifo_and_swallows_no_hole(box):
    await box.exec(
        "ln -s /nowhere out; ln -s /proc/1/environ env; ln -s ../../../../etc/shadow up; mkfifo fifo; truncate -s 10G hole; ln -s loop loop; mkdir dir; python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('sock')\"",
        5,
    )
    for name in ("out", "fifo", "hole", "loop", "dir", "sock"):
        with pytest.raises(OSError):  # noqa: PT011 (which one differs)
            await asyncio.wait_for(box.read(f"/work/{name}"), 5)
    with suppress(OSError):
        assert SECRET.encode() not in await box.read("/work/env")
    with suppress(OSError):
        assert await box.read("/work/up") != Path("/etc/shadow").read_bytes()
    with pytest.raises(OSError, match="limit"):
        await box.diff()
    await box.exec("rm hole; printf x > 'new\nline'; printf y > -- \"$(printf 'bad\\377')\"", 5)
    found = await box.diff()
    assert found["/work/out"].kind == "link"
    assert found["/work/fifo"].kind == "other"
    assert found["/work/new\nline"].content == b"x"


async def test_what_is_put_lands_in_the_box_whatever_links_stand_there(box, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("whole")
    await box.exec(f"mkdir -p {tmp_path.parent} 2>/dev/null; ln -s {tmp_path} into; ln -s {victim} file", 5)
    await box.write("/work/file", "new")
    await box.write("/work/into/victim", "broke")
    assert victim.read_text() == "whole"
    assert await box.read("/work/file") == b"new"


# -- what stays


def held() -> dict[str, set[str]]:
    """Mounts, control groups and temporary folders of boxes on this machine."""
    mounts = set(Path("/proc/self/mountinfo").read_text().splitlines())
    groups = {str(path) for path in Path("/sys/fs/cgroup").glob("**/palaestra-*/*/")}
    folders = {str(path) for path in Path("/tmp").glob("palaestra-box*")}
    return {"mounts": mounts, "groups": groups, "folders": folders, "containers": containers()}


def containers() -> set[str]:
    """Containers that some backend made."""
    if "docker" not in ISOLATING:
        return set()
    api = docker._connect()
    found = {container["Id"] for container in api.containers(all=True, filters={"label": docker.LABEL})}
    api.close()
    return found


@pytest.mark.parametrize("name", ISOLATING)
async def test_this_machine_is_as_before(name):
    before, threads = held(), threading.active_count()
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    backend = open_backend(name)
    backend.image = IMAGES[name]
    for _ in range(10):
        box = await backend.create(backend.image, SMALL)
        await box.exec("head -c 1M /dev/zero > f; (setsid sleep 99 &)", 5)
        await box.destroy()
        await box.destroy()
    await backend.close()
    assert held() == before
    assert Path("/proc/sys/kernel/core_pattern").read_text() == pattern
    assert threading.active_count() < threads + 10


@pytest.mark.parametrize("name", ISOLATING)
async def test_a_backend_that_is_closed_takes_its_boxes_along(name):
    backend = open_backend(name)
    backend.image = IMAGES[name]
    boxes = [await backend.create(backend.image, SMALL) for _ in range(3)]
    await backend.close()
    await vanish([box.init for box in boxes])
    for _ in range(2):
        with pytest.raises(Failure):
            await boxes[0].exec("true", 2)
        await boxes[0].destroy()
