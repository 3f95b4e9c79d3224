"""What keeps a process of untrusted code in: namespaces, landlock, seccomp and resource limits.

Linux system calls by ctypes, for `rewards.sandbox_server` alone. Every function raises OSError
where the kernel refuses, so that the server can say which level was reached.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

NOBODY = 65534

CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000
CLONE_NEWIPC = 0x08000000
APART = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | 0x10000000 | 0x40000000 | 0x04000000
"""With a user, a network and a host name namespace."""

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 22, 38, 47
SIGKILL = 9

_LIBC = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, *values: object) -> None:
    arguments = [ctypes.c_ulong(v) if isinstance(v, int) else v for v in (*values, 0, 0, 0, 0)[:4]]
    _checked(_LIBC.prctl(option, *arguments), f"prctl {option}")


def die_with_parent() -> None:
    """SIGKILL when the parent ends; a change of user clears it."""
    _prctl(PR_SET_PDEATHSIG, SIGKILL)


def unshare(flags: int) -> None:
    """Leave namespaces; of the process id's, the next child is the first in a new one."""
    _checked(_LIBC.unshare(flags), "unshare")


def back_to(pid_namespace: int) -> None:
    """Let further children be of this process id namespace (a descriptor) again."""
    _checked(_LIBC.setns(pid_namespace, CLONE_NEWPID), "setns")


def map_users(pid: int) -> None:
    """The users of another process's new namespace: root and nobody if we are root, else nobody,
    who is this user outside."""
    uid, gid = os.geteuid(), os.getegid()
    own, groups = ("0 0 1\n", "0 0 1\n") if uid == 0 else ("", "")
    outside = (NOBODY, NOBODY) if uid == 0 else (uid, gid)
    folder = Path(f"/proc/{pid}")
    if uid:
        (folder / "setgroups").write_text("deny")
    (folder / "uid_map").write_text(f"{own}{NOBODY} {outside[0]} 1\n")
    (folder / "gid_map").write_text(f"{groups}{NOBODY} {outside[1]} 1\n")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    words = [word.encode() if word else None for word in (source, target, kind, options)]
    _checked(_LIBC.mount(*words[:3], ctypes.c_ulong(flags), words[3]), f"mount {target}")


def _read_only(path: str) -> None:
    """The mount at `path` and those below, also without set-user-id programs."""
    attributes = struct.pack("QQQQ", 1 | 2, 0, 0, 0)
    at_fdcwd, at_recursive, mount_setattr = -100, 0x8000, 442
    call = _LIBC.syscall(
        mount_setattr, at_fdcwd, path.encode(), at_recursive, attributes, len(attributes)
    )
    _checked(call, f"mount_setattr {path}")


def readable() -> list[Path]:
    """What Python needs to import its standard library: its folder, and the system's libraries."""
    places = [Path(sys.base_prefix) / "lib", Path("/lib"), Path("/lib64"), Path("/usr/lib")]
    return [place for place in [*places, Path("/usr/lib64")] if place.exists()]


DEVICES = [Path("/dev") / name for name in ("null", "zero", "random", "urandom")]
INSTALLED = ("site-packages", "dist-packages")


def enter_empty_root() -> None:
    """A root that holds `readable()` and DEVICES, read-only, an empty /tmp, and nothing else."""
    mount("", "/", "", MS_PRIVATE | MS_REC)
    root = "/tmp"  # hidden by the new root, in this namespace alone
    sources = [(path, os.open(path, os.O_PATH)) for path in [*readable(), *DEVICES, Path("/tmp")]]
    mount("sandbox", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path, descriptor in sources[:-1]:
        _bind(path, descriptor, Path(root + str(path)))
    Path(root, "tmp").mkdir(mode=0o700)
    os.chown(Path(root, "tmp"), NOBODY, NOBODY)
    for _, descriptor in sources:
        os.close(descriptor)
    os.chdir(root)
    _checked(_LIBC.pivot_root(b".", b"."), "pivot_root")
    _checked(_LIBC.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/")
    _read_only("/")


def _bind(path: Path, descriptor: int, target: Path) -> None:
    if path.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path.readlink())
        return
    if path.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount(f"/proc/self/fd/{descriptor}", str(target), "", MS_BIND | MS_REC)
    if path.is_dir():
        _read_only(str(target))
        for name in INSTALLED:  # others' packages are not the program's business
            for folder in {*target.glob(name), *target.glob(f"python3*/{name}")}:
                mount("hidden", str(folder), "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k")


def private_tmp(size_mb: int) -> None:
    """An empty /tmp of this process and its children, writable by nobody (the user)."""
    unshare(CLONE_NEWNS | CLONE_NEWIPC)
    options = f"size={size_mb}m,nr_inodes=1k,mode=700,uid={NOBODY},gid={NOBODY}"
    mount("tmp", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, options)


def limit(**limits: int) -> None:
    """Soft and hard resource limits: `limit(CPU=2, NOFILE=64)`; a lower hard one stays."""
    for name, value in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(which)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def drop_privileges() -> None:
    """No capability is left and none can come back; whoever may become nobody is nobody."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    version_3 = struct.pack("II", 0x20080522, 0)
    _checked(_LIBC.capset(version_3, struct.pack("6I", *[0] * 6)), "capset")
    _prctl(PR_CAP_AMBIENT, 4)  # clear all
    _prctl(PR_SET_NO_NEW_PRIVS, 1)


def read_only_rules() -> int:
    """A landlock rule set (a descriptor): `readable()` and DEVICES to read, nothing to write."""
    abi = _checked(_LIBC.syscall(444, None, 0, 1), "landlock")
    num_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)
    handled = struct.pack("Q", (1 << num_rights) - 1)
    rules = _checked(_LIBC.syscall(444, handled, len(handled), 0), "landlock_create_ruleset")
    read_file, read_folder = 1 << 2, 1 << 3
    for path in [*readable(), *DEVICES]:
        descriptor = os.open(path, os.O_PATH)
        rights = read_file | read_folder if path.is_dir() else read_file
        rule = struct.pack("=Qi", rights, descriptor)
        _checked(_LIBC.syscall(445, rules, 1, rule, 0), f"landlock_add_rule {path}")
        os.close(descriptor)
    return rules


def obey(rules: int) -> None:
    """From here on this process is bound by a landlock rule set."""
    _checked(_LIBC.syscall(446, rules, 0), "landlock_restrict_self")
    os.close(rules)


MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of REFUSED, and what the kernel calls the architecture."""

REFUSED: dict[str, tuple[int, int]] = {
    **{"fork": (57, -1), "vfork": (58, -1), "execve": (59, 221), "execveat": (322, 281)},
    **{"kill": (62, 129), "tkill": (200, 130), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438)},
    **{"pidfd_send_signal": (424, 424), "rt_sigqueueinfo": (129, 138)},
    **{"rt_tgsigqueueinfo": (297, 240), "ptrace": (101, 117), "kcmp": (312, 272)},
    **{"process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    **{"process_madvise": (440, 440), "process_mrelease": (448, 448)},
    **{"socket": (41, 198), "connect": (42, 203), "bind": (49, 200)},
    **{"mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51)},
    **{"move_mount": (429, 429), "open_tree": (428, 428), "fsopen": (430, 430)},
    **{"fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433)},
    **{"mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268)},
    **{"open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264)},
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282)},
    **{"io_uring_setup": (425, 425), "io_uring_enter": (426, 426)},
    **{"io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217)},
    **{"request_key": (249, 218), "memfd_create": (319, 279), "memfd_secret": (447, 447)},
    **{"shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180)},
    **{"chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452)},
    **{"chown": (92, -1), "fchown": (93, 55), "lchown": (94, -1), "fchownat": (260, 54)},
    **{"setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7)},
    **{"utime": (132, -1), "utimes": (235, -1), "utimensat": (280, 88), "futimesat": (261, -1)},
    **{"mknod": (133, -1), "mknodat": (259, 33), "init_module": (175, 105)},
    **{"finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104)},
    **{"kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224)},
    **{"swapoff": (168, 225), "quotactl": (179, 60), "acct": (163, 89), "syslog": (103, 116)},
    **{"settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171)},
    **{"clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162)},
    **{"personality": (135, 92), "fanotify_init": (300, 262), "inotify_init": (253, -1)},
    **{"inotify_init1": (294, 26), "iopl": (172, -1), "ioperm": (173, -1)},
    **{"modify_ldt": (154, -1), "vhangup": (153, 58), "lookup_dcookie": (212, 18)},
    **{"setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122)},
    **{"sched_setscheduler": (144, 119), "sched_setattr": (314, 274)},
    **{"sched_setparam": (142, 118), "mbind": (237, 235), "migrate_pages": (256, 238)},
    **{"move_pages": (279, 239), "set_mempolicy": (238, 237)},
}
"""System calls of x86-64 and of aarch64 (-1: it has none) that fail with EPERM."""

CLONE3 = (435, 435)
CLONE = (56, 220)
TGKILL = (234, 131)
PRLIMIT = (302, 261)

LOAD, JUMP_EQUAL, JUMP_FROM, JUMP_ANY, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL = 0x7FFF0000, 0x80000000
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
CLONE_THREAD = 0x10000


def _refuse(number: int) -> int:
    return 0x00050000 | number


@cache
def filter_program(pid: int) -> bytes:
    """The filter for a process that may signal itself alone.

    Classic BPF: instructions of (code, jump if true, jump if false, value).
    """
    column, architecture = MACHINES.get(platform.machine(), (-1, 0))
    if column < 0:
        raise OSError(errno.ENOSYS, f"no seccomp filter for {platform.machine()}")
    rules: list[tuple[int, int, int, int]] = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (JUMP_FROM, 0, 1, 0x40000000),  # x86-64's x32 numbers, which name the same calls
        (RETURN, 0, 0, KILL),
    ]
    special: Iterable[tuple[int, int, int]] = (
        (CLONE[column], JUMP_ANY, CLONE_THREAD),  # a thread, and no process
        (TGKILL[column], JUMP_EQUAL, pid),
        (PRLIMIT[column], JUMP_EQUAL, 0),
    )
    for number, test, value in special:
        rules += [
            (JUMP_EQUAL, 0, 4, number),
            (LOAD, 0, 0, FIRST_ARGUMENT),
            (test, 0, 1, value),
            (RETURN, 0, 0, ALLOW),
            (RETURN, 0, 0, _refuse(errno.EPERM)),
        ]
    refusals = [(CLONE3[column], errno.ENOSYS)]  # libc then takes clone
    refusals += [(numbers[column], errno.EPERM) for numbers in REFUSED.values()]
    for number, error in refusals:
        if number >= 0:
            rules += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, _refuse(error))]
    return b"".join(struct.pack("HBBI", *rule) for rule in [*rules, (RETURN, 0, 0, ALLOW)])


def seccomp() -> None:
    """From here on REFUSED fails, and no process can be started or signalled."""
    program = filter_program(os.getpid())
    kept = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(kept))
    _prctl(PR_SET_SECCOMP, 2, ctypes.c_char_p(header))


def refuses(action: Callable[[], object]) -> str:
    """Why the kernel refuses `action`; empty if it does not. For saying which level was reached."""
    try:
        action()
    except OSError as error:
        return str(error.strerror or error)
    return ""
