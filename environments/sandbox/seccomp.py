"""The system-call filter of a box: a classic BPF program that refuses what no task needs and every break-out tries.

Source: Linux kernel documentation, userspace-api/seccomp_filter; numbers from the kernel's syscall tables.
"""

from __future__ import annotations

import errno
import platform
import struct

# number on x86_64, number on aarch64 (None: there is no such call)
REFUSED: dict[str, tuple[int, int | None]] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "settimeofday": (164, 170),
    "adjtimex": (159, 171),
    "syslog": (103, 116),
    "personality": (135, 92),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "quotactl": (179, 60),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "fanotify_init": (300, 262),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
}
CLONE, CLONE3, IOCTL = (56, 220), (435, 435), (16, 29)
SOCKET, SOCKETPAIR, PRLIMIT = (41, 198), (53, 199), (302, 261)
FAMILIES = (1, 2, 10, 16)
"""AF_UNIX, AF_INET, AF_INET6, AF_NETLINK: those that the network namespace bounds (AF_VSOCK it does not)."""
NEW_NAMESPACES = 0x7E020080
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME."""
TERMINAL_INPUT = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX put characters into a terminal's input."""

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
X32 = 0x40000000

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENT_0, _ARGUMENT_1, _ARGUMENT_2 = 0, 4, 16, 24, 32


def program(machine: str = "") -> bytes:
    """The filter as an array of struct sock_filter, for `machine` (default: this one). Raises KeyError for another."""
    column, architecture = ARCHITECTURES[machine or platform.machine()]
    numbers = [call[column] for call in REFUSED.values()]
    code = [
        *_load(_ARCHITECTURE),
        *_refuse_unless(_EQUAL, architecture, _KILL),
        *_load(_NUMBER),
        *(_refuse_if(_AT_LEAST, X32, errno.EPERM) if column == 0 else []),
        *_refuse_if(_EQUAL, CLONE3[column], errno.ENOSYS),
    ]
    for number in numbers:
        code += _refuse_if(_EQUAL, number, errno.EPERM) if number is not None else []
    code += _when(CLONE[column], [*_load(_ARGUMENT_0), *_refuse_if(_ANY_BIT, NEW_NAMESPACES, errno.EPERM)])
    terminal = [line for request in TERMINAL_INPUT for line in _refuse_if(_EQUAL, request, errno.EPERM)]
    code += _when(IOCTL[column], [*_load(_ARGUMENT_1), *terminal])
    for call in (SOCKET, SOCKETPAIR):
        known = [line for family in FAMILIES for line in _allow_if(family)]
        code += _when(call[column], [*_load(_ARGUMENT_0), *known, (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT)])
    own = [*_load(_ARGUMENT_0), *_allow_if(0)]
    only_asked = [*_load(_ARGUMENT_2), *_refuse_if(_AT_LEAST, 1, errno.EPERM)]
    high = [*_load(_ARGUMENT_2 + 4), *_refuse_if(_AT_LEAST, 1, errno.EPERM)]
    code += _when(PRLIMIT[column], [*own, *only_asked, *high])  # another process's limits may be read
    code += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *line) for line in code)


_Line = tuple[int, int, int, int]


def _load(offset: int) -> list[_Line]:
    return [(_LOAD, 0, 0, offset)]


def _refuse_if(test: int, value: int, error: int) -> list[_Line]:
    return [(test, 0, 1, value), (_RETURN, 0, 0, _ERRNO | error)]


def _allow_if(value: int) -> list[_Line]:
    return [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]


def _refuse_unless(test: int, value: int, verdict: int) -> list[_Line]:
    return [(test, 1, 0, value), (_RETURN, 0, 0, verdict)]


def _when(number: int, block: list[_Line]) -> list[_Line]:
    """The block for one call; whatever it does not refuse is allowed, as the loaded number is gone by then."""
    block = [*block, (_RETURN, 0, 0, _ALLOW)]
    return [(_EQUAL, 0, len(block), number), *block]
