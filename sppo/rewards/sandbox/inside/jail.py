"""A script, started by ``run.py``, that runs a program in a process that can only compute.

    this process   (root or the user)         creates the namespaces, waits, kills at the limit
    └─ its child   (no capabilities, limits)  runs the program; process 1 of its own process namespace

The program is one of the files beside this one. It is trusted; what it executes is not. It may have a function ``run``,
or functions ``prepare`` and ``judge``: then the child prepares it, and a process of its own judges each sample.

The script reads one line of JSON from standard input. Its standard output is a file that the child hides from all
processes that it starts. An empty line is written to it once when the child is ready, and then a line for each report.
Lines begin with a word that the trainer chose.

With ``namespaces`` the child has no network and sees only its own processes. Its file system contains the interpreter
and the system's libraries, read-only, and an empty ``/tmp`` in memory. With ``limits`` it has only the limits. In both
cases it cannot make the system calls in ``_DENIED``, and all processes that it started end with it. This file imports
nothing from the package: the interpreter runs it isolated (``-I``) and without an environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

_PROCESSES, _FILES, _FILE_BYTES = 256, 64, 64 << 20
_RESULT_BYTES, _ERROR_CHARS = 4096, 300
# A user id per process, because limits on processes count those of a user; then the usual id of "nobody".
_UNPRIVILEGED = (0x70000000 + os.getpid(), 65534)
_VISIBLE = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
# From <linux/sched.h>, <linux/mount.h>, <linux/prctl.h> and <linux/capability.h>; Python has unshare() since 3.12.
_NEW_USER = 0x10000000
_NEW_MOUNT_IPC_PID_NET = 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000
_MS_NOSUID, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4096, 16384, 1 << 18
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID = 442, -100, 0x8000, 1, 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
_CAPABILITY_VERSION_3 = 0x20080522
_SECCOMP_FILTER, _SECCOMP_ALLOW, _SECCOMP_DENY = 2, 0x7FFF0000, 0x00050001  # the last: an error, EPERM
# System calls that take memory which no limit counts, that reach other processes, or large parts of the kernel that
# programs do not need. Numbers on x86-64 and ARM64, from <asm/unistd.h> and <asm-generic/unistd.h>.
_DENIED = {
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH of <linux/audit.h>, in this order

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Read the job, enter the sandbox, run the program in a child process and wait for it."""
    job = json.load(sys.stdin)
    # A scheduler sends SIGTERM to all processes of a run, which goes on for a while. The child is the first process of
    # its namespace, which SIGTERM does not reach.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # adopt orphans of the child
    user, group = unprivileged_ids()
    if job["isolation"] == "namespaces":
        user, group = enter_namespaces(job["folder"], user, group)
    else:
        if user == os.getuid() and not job["same_user"]:
            raise OSError(
                errno.EPERM, f"isolation=limits would run code as user {user}, as you; permit it by same_user=true"
            )
        os.chown(job["folder"], user, group)
        os.chdir(job["folder"])
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        drop_privileges(user, group)
        set_limits(job["seconds"], job["memory_mb"])
        deny_system_calls()
        run(job)
    supervise(child, job["seconds"])


def enter_namespaces(root: str, user: int, group: int) -> tuple[int, int]:
    """Enter new namespaces without network, other processes or files; ``root`` becomes the root of the file system.

    Returns:
        The user and group that the child is to become: those that were given, or its own in a new user namespace.
    """
    own_user, own_group = os.getuid(), os.getgid()
    # Root needs no user namespace, unless it is a container's and may not mount.
    if own_user or _libc.unshare(_NEW_MOUNT_IPC_PID_NET):
        user, group = own_user, own_group
        _check(_libc.unshare(_NEW_MOUNT_IPC_PID_NET | _NEW_USER), "unshare")
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _mount(None, "/", _MS_REC | _MS_PRIVATE)
    _mount_memory(root, "mode=755")
    scratch = [f"{root}/tmp", f"{root}/dev/shm"]
    for folder in scratch:
        os.makedirs(folder)
        _mount_memory(folder, f"mode=1777,size={_FILE_BYTES}")
    for path in (*_VISIBLE, sys.prefix, sys.base_prefix):
        for source in (path, os.path.realpath(path)):
            _bind(source, root + source)
    _set_attributes(root, _AT_RECURSIVE, _ATTR_RDONLY | _ATTR_NOSUID, 0)
    for folder in scratch:  # not recursive: an interpreter installed in /tmp stays read-only
        _set_attributes(folder, 0, 0, _ATTR_RDONLY)
    os.chroot(root)
    os.chdir("/tmp")
    return user, group


def _bind(source: str, target: str) -> None:
    if os.path.lexists(target) or not os.path.lexists(source):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.mkdir(target)
    else:
        open(target, "w").close()
    _mount(source, target, _MS_BIND | _MS_REC)


def _mount_memory(target: str, options: str) -> None:
    _mount("tmpfs", target, _MS_NOSUID, "tmpfs", options)


def _mount(source: str | None, target: str, flags: int, kind: str | None = None, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _check(_libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]), f"mount on {target}")


def _set_attributes(path: str, flags: int, add: int, remove: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(add, remove)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _check(_libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, attributes, size), "mount_setattr")


def drop_privileges(user: int, group: int) -> None:
    """Become a user who cannot regain capabilities, and who is killed with its parent."""
    if user != os.getuid():
        os.setgroups([])
        os.setresgid(group, group, group)
        os.setresuid(user, user, user)
    none = (ctypes.c_uint32 * 6)()
    _check(_libc.capset((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), none), "capset")
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # again, as a change of user resets it
    os.setsid()
    if not os.access(os.__file__, os.R_OK):
        raise PermissionError(f"user {user}, who replaces root, cannot read {os.__file__}")


def unprivileged_ids() -> tuple[int, int]:
    """Return the user and group that the child becomes: its own, if it is not root or a container has no others."""
    user, group = os.getuid(), os.getgid()
    if user == 0:
        for other in _UNPRIVILEGED:
            if _exists(other, "uid_map") and _exists(other, "gid_map"):
                return other, other
    return user, group


def _exists(number: int, table: str) -> bool:
    """Whether a user or group exists in this user namespace; a rootless container has few."""
    with open(f"/proc/self/{table}") as file:
        ranges = [[int(field) for field in line.split()] for line in file]
    return any(first <= number < first + count for first, _, count in ranges)


def deny_system_calls() -> None:
    """Let the system calls in ``_DENIED`` fail with EPERM, in this process and all that it starts."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        known = " and ".join(_ARCHITECTURES)
        raise OSError(errno.ENOSYS, f"the numbers of system calls are known for {known}, not for {machine}")
    architecture = _ARCHITECTURES[machine]
    numbers = [each[list(_ARCHITECTURES).index(machine)] for each in _DENIED.values()]
    load, equal, at_least, leave = 0x20, 0x15, 0x35, 0x06  # instructions of <linux/bpf_common.h>
    tests = [(equal, number) for number in numbers]
    if machine == "x86_64":
        tests.append((at_least, 0x40000000))  # x32
    count = len(tests)
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (leave, 0, 0, _SECCOMP_DENY), (load, 0, 0, 0)]
    program += [(code, count - i, 0, value) for i, (code, value) in enumerate(tests)]
    program += [(leave, 0, 0, _SECCOMP_ALLOW), (leave, 0, 0, _SECCOMP_DENY)]
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    filters = struct.pack("HxxxxxxP", len(program), ctypes.addressof(text))
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, filters, 0, 0), "seccomp")


def set_limits(seconds: float, memory_mb: int) -> None:
    """Set the resource limits of this process: address space in MiB, CPU seconds, files, processes."""
    for kind, limit in (
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_CPU, math.ceil(seconds)),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_NPROC, _PROCESSES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))


def run(job: dict[str, Any]) -> None:
    """Run the job's program, whose reports go to standard output; does not return."""
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # nothing that it starts can trace this process or open its files
    names: dict[str, Any] = {"__name__": "program"}
    for text in job["program"]:
        exec(compile(text, "<program>", "exec", dont_inherit=True), names)
    if "samples" in job:
        names["prepare"]()
    output, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)

    def report(text: str = "") -> None:
        os.write(output, f"{job['word']}{text}\n".encode())

    report()
    try:
        if "samples" in job:
            limits = {"seconds": job["seconds_per_sample"], "at_once": job["at_once"]}
            judge(names["judge"], job["samples"], report=report, output=output, **limits)
        else:
            names["run"](report, **job["arguments"])
    finally:
        os._exit(0)


def judge(
    judge_one: Callable[..., Any],
    samples: list[list[Any]],
    *,
    report: Callable[[str], None],
    output: int,
    seconds: float,
    at_once: int,
) -> None:
    """Call ``judge_one(*sample)`` for each sample, several at once, and report the values.

    Each report has the index of a sample, and its value or the text of the error that it raised. A sample that ends its
    process or exceeds a limit has the value 0. It may have ended others, so those that ended beside it are repeated.
    """
    waiting, alone = list(range(len(samples))), list[int]()
    running: dict[int, tuple[int, int, float]] = {}  # by the pipe of the result: process, sample, end of its time
    while waiting or alone or running:
        while (waiting and len(running) < at_once) or (alone and not running):
            index = waiting.pop(0) if waiting else alone.pop()
            result, pid = _start_sample(judge_one, samples[index], seconds, output)
            running[result] = pid, index, time.monotonic() + seconds
        first_end = min(end for _, _, end in running.values())
        ready = select.select(list(running), [], [], max(0.0, first_end - time.monotonic()))[0]
        for result in ready or [pipe for pipe, (_, _, end) in running.items() if end == first_end]:
            pid, index, _ = running[result]
            text = os.read(result, _RESULT_BYTES) if ready else b"0.0"
            if text or len(running) == 1:
                report(json.dumps([index, _value_or_error(text or b"0.0")]))
            else:
                alone.append(index)
            del running[result]
            os.close(result)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
                while os.waitpid(-1, os.WNOHANG)[0]:  # what others left counts as a process until then
                    pass


def _value_or_error(text: bytes) -> float | str:
    """Read the result of a sample, which the sample may have written itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return "wrote no result"
    return value if type(value) in (float, str) else "wrote no number"


def _start_sample(judge_one: Callable[..., Any], sample: list[Any], seconds: float, output: int) -> tuple[int, int]:
    """Start the process of a sample, and return the pipe of its result and its id."""
    result, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(output)
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds),) * 2)
            try:
                text = json.dumps(float(judge_one(*sample)))
            except MemoryError:
                text = "0.0"
            except BaseException as error:
                text = json.dumps(f"{type(error).__name__}: {error}"[:_ERROR_CHARS])
            os.write(end, text.encode())
        finally:
            os._exit(0)
    os.close(end)
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpgid(pid, pid)  # whoever is first, so that it can be killed
    return result, pid


def supervise(child: int, seconds: float) -> None:
    """Wait at most ``seconds`` for the child, then kill it and all processes that it started."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    # Not reaped before the timer is off, so that the timer cannot kill another process with the same id.
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    signal.setitimer(signal.ITIMER_REAL, 0)
    # A process namespace ends with its first process. Without one, kill the session, then processes that left it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for orphan in iter(_next_orphan, None):
        os.kill(orphan, signal.SIGKILL)
        os.waitpid(orphan, 0)


def _next_orphan() -> int | None:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return int(file.read().split()[0])
    except (FileNotFoundError, IndexError):
        return None


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(str(error.strerror or error))
