"""Takes from this process, for good, what a grading function does not need. Standard library only.

- Memory, files' sizes and core dumps by resource limits.
- Files by Landlock: those of Python and of the system's libraries can be read, no other can be
  opened, and nothing can be written.
- System calls by a seccomp filter, a list of what may be done: no sockets, no processes or threads,
  no programs, no signals, no debugging of others.

Both are the kernel's own and need no root. Linux 5.13 has them; `confine` says so where they are
not, and nothing is run there.
"""

import ctypes
import os
import platform
import resource
import signal
import site
import sys
import sysconfig

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38

# --- Landlock: numbers of linux/landlock.h, which are those of every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_ALL_OF_FILES = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # rights that a version knows; later ones as 5
_O_PATH = 0o10000000
_READABLE = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo"),
    *("/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom", "/dev/zero"),
    *("/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"),
)

# --- seccomp: numbers of linux/seccomp.h and linux/bpf_common.h.
_MODE_FILTER = 2
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_IF_ANY_BIT = 0x45
_AT_NUMBER, _AT_ARCHITECTURE, _AT_SECOND_ARGUMENT, _AT_THIRD_ARGUMENT = 0, 4, 24, 32
_EPERM, _ENOSYS = 1, 38
_X32 = 0x40000000  # calls of another interface of x86-64
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH
_CLONE3 = 435
# What may be called: numbers on x86-64 and on arm64, where it is there.
_CALLS = {
    "access": (21, None),
    "brk": (12, 214),
    "clock_getres": (229, 114),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "close": (3, 57),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "fstat": (5, 80),
    "futex": (202, 98),
    "getcpu": (309, 168),
    "getcwd": (79, 17),
    "getdents64": (217, 61),
    "getegid": (108, 177),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getrandom": (318, 278),
    "getrusage": (98, 165),
    "gettid": (186, 178),
    "gettimeofday": (96, 169),
    "getuid": (102, 174),
    "lseek": (8, 62),
    "lstat": (6, None),
    "madvise": (28, 233),
    "membarrier": (324, 283),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "munmap": (11, 215),
    "nanosleep": (35, 101),
    "newfstatat": (262, 79),
    "pipe2": (293, 59),
    "poll": (7, None),
    "ppoll": (271, 73),
    "pread64": (17, 67),
    "pselect6": (270, 72),
    "read": (0, 63),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "readv": (19, 65),
    "restart_syscall": (219, 128),
    "rseq": (334, 293),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_getaffinity": (204, 123),
    "sched_yield": (24, 124),
    "select": (23, None),
    "set_robust_list": (273, 99),
    "sigaltstack": (131, 132),
    "stat": (4, None),
    "statx": (332, 291),
    "sysinfo": (99, 179),
    "time": (201, None),
    "times": (100, 153),
    "uname": (63, 160),
    "write": (1, 64),
    "writev": (20, 66),
}
# Calls that do many things: what their second argument may be. Neither lets a file send signals.
_CALLS_BY_ARGUMENT = {
    "fcntl": ((72, 25), (0, 1, 2, 3, 1030)),  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
    "ioctl": ((16, 29), (0x5401, 0x5413, 0x5450, 0x5451)),  # TCGETS, TIOCGWINSZ, FIONCLEX, FIOCLEX
}
# Calls that open files, and where their flags are: for reading alone. Landlock of Linux before 6.2
# lets a file be emptied that may be read.
_OPENING = (((2, None), _AT_SECOND_ARGUMENT), ((257, 56), _AT_THIRD_ARGUMENT))
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Unsupported(Exception):
    """This system cannot confine a process."""


def limit(memory_mb: int) -> None:
    """Limit what this process takes of the machine."""
    os.nice(10)
    _set_limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":
        _set_limit(resource.RLIMIT_AS, memory_mb * 2**20)


def confine() -> None:
    """Confine this process, which has one thread. Raises Unsupported."""
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES:
        raise Unsupported(f"they need Linux on x86-64 or arm64; this is {platform.platform()}")
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # when the thread that started it ends
    _set_limit(resource.RLIMIT_FSIZE, 0)
    _set_limit(resource.RLIMIT_NOFILE, 64)
    _set_limit(resource.RLIMIT_NPROC, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _confine_files()
    _confine_calls()


def _set_limit(what: int, most: int) -> None:
    resource.setrlimit(what, (most, most))


def _prctl(*arguments: int) -> None:
    padded = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:5]]
    if _LIBC.prctl(*padded):
        raise Unsupported(f"prctl({arguments[0]}): {os.strerror(ctypes.get_errno())}")


# --- files


def packages() -> list[str]:
    """Where Python's own modules and installed ones are."""
    return [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), *site.getsitepackages()]


def _confine_files() -> None:
    version = _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(_VERSION_FLAG))
    if version < 1:
        reason = os.strerror(ctypes.get_errno())
        raise Unsupported(f"they need Landlock, which this kernel has not or forbids ({reason})")
    handled = (1 << _ALL_OF_FILES[min(version, max(_ALL_OF_FILES))]) - 1
    rules = ctypes.c_uint64(handled)
    ruleset = _LIBC.syscall(
        _CREATE_RULESET,
        ctypes.byref(rules),
        ctypes.c_size_t(ctypes.sizeof(rules)),
        ctypes.c_uint(0),
    )
    if ruleset < 0:
        raise Unsupported(f"Landlock: {os.strerror(ctypes.get_errno())}")
    for path in {*_READABLE, *packages(), os.path.join(sys.base_prefix, "lib")}:
        if os.path.exists(path):
            _let_read(ruleset, path)
    if _LIBC.syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint(0)):
        raise Unsupported(f"Landlock: {os.strerror(ctypes.get_errno())}")
    os.close(ruleset)


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def _let_read(ruleset: int, path: str) -> None:
    folder = os.open(path, _O_PATH | os.O_CLOEXEC)
    rule = _PathBeneath(_READ_FILE | (_READ_DIR if os.path.isdir(path) else 0), folder)
    wrong = _LIBC.syscall(
        _ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_PATH_BENEATH), ctypes.byref(rule), 0
    )
    os.close(folder)
    if wrong:
        raise Unsupported(f"Landlock: {path}: {os.strerror(ctypes.get_errno())}")


# --- system calls


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def call_filter(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter, as (code, steps to skip if true, if false, value)."""
    column, architecture = _ARCHITECTURES[machine]
    program = [
        (_LOAD, 0, 0, _AT_ARCHITECTURE),
        (_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _AT_NUMBER),
        (_IF_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
        # The C library then tries clone, whose arguments can be seen and are refused below.
        (_IF_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
    ]
    for numbers in _CALLS.values():
        if (number := numbers[column]) is not None:
            program += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for numbers, values in _CALLS_BY_ARGUMENT.values():
        program.append((_IF_EQUAL, 0, 2 * len(values) + 2, numbers[column]))
        program.append((_LOAD, 0, 0, _AT_SECOND_ARGUMENT))
        for value in values:
            program += [(_IF_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
        program.append((_RETURN, 0, 0, _ERRNO | _EPERM))
    for numbers, flags in _OPENING:
        if (number := numbers[column]) is not None:
            program += [
                (_IF_EQUAL, 0, 3, number),
                (_LOAD, 0, 0, flags),
                (_IF_ANY_BIT, 1, 0, _TO_WRITE),
                (_RETURN, 0, 0, _ALLOW),
                (_LOAD, 0, 0, _AT_NUMBER),
            ]
    program.append((_RETURN, 0, 0, _ERRNO | _EPERM))
    return program


def _confine_calls() -> None:
    program = call_filter(platform.machine())
    instructions = (_Instruction * len(program))(*[_Instruction(*step) for step in program])
    filter_ = _Program(len(program), instructions)
    if _LIBC.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(filter_), 0, 0):
        reason = os.strerror(ctypes.get_errno())
        raise Unsupported(f"they need seccomp, which this kernel has not or forbids ({reason})")
