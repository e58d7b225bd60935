"""A script, started by ``sandbox.py``, that runs what a model wrote in a process that can only compute.

    this process   (root or the user)         creates the namespaces, waits, kills at the limit
    └─ its child   (no capabilities, limits)  runs the solution, then the tests; process 1 of its own process namespace

In place of a solution and tests a job may have a trusted program that judges samples. The child prepares it, and a
process of its own judges each sample.

The script reads one line of JSON from standard input. Its standard output is a file that the child hides from
``print``. For a solution the nonce is written to it once when the child is ready to start, and once more for each test
that passes; for samples, an empty line and then one of JSON for each.

With ``namespaces`` the child has no network and sees only its own processes. Its file system contains the interpreter
and the system's libraries, read-only, and an empty ``/tmp`` in memory. With ``limits`` it has only the limits. In both
cases all processes that it started end with it. This file imports nothing from the package: the interpreter runs it
isolated (``-I``) and without an environment.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import json
import math
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

_PROCESSES, _FILES, _FILE_BYTES = 256, 64, 64 << 20
_RESULT_BYTES, _ERROR_CHARS = 4096, 300
_NOBODY = 0x70000000 + os.getpid()  # a user id per process, because limits on processes count those of a user
_VISIBLE = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
# From <linux/sched.h>, <linux/mount.h>, <linux/prctl.h> and <linux/capability.h>; Python has unshare() since 3.12.
_NEW_USER = 0x10000000
_NEW_MOUNT_IPC_PID_NET = 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000
_MS_NOSUID, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4096, 16384, 1 << 18
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID = 442, -100, 0x8000, 1, 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Read the job, enter the sandbox, run the solution in a child process and wait for it."""
    job = json.load(sys.stdin)
    # A scheduler sends SIGTERM to all processes of a run, which goes on for a while. The child is the first process of
    # its namespace, which SIGTERM does not reach.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # adopt orphans of the child
    if job["isolation"] == "namespaces":
        enter_namespaces(job["folder"])
    else:
        os.chown(job["folder"], *_unprivileged_ids())
        os.chdir(job["folder"])
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        drop_privileges()
        set_limits(job["seconds"], job["memory_mb"])
        if "samples" in job:
            judge(job["program"], job["samples"], seconds=job["seconds_per_sample"], at_once=job["at_once"])
        run(job["solution"], job["tests"], job["nonce"].encode())
    supervise(child, job["seconds"])


def enter_namespaces(root: str) -> None:
    """Enter new namespaces without network, other processes or files; ``root`` becomes the root of the file system."""
    user, group = os.getuid(), os.getgid()
    _check(_libc.unshare(_NEW_MOUNT_IPC_PID_NET | (_NEW_USER if user else 0)), "unshare")
    if user:  # keep the user's id; root does not need a user namespace
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


def drop_privileges() -> None:
    """Become an unprivileged user that cannot regain capabilities, and that is killed with its parent."""
    user, group = _unprivileged_ids()
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(group, group, group)
        os.setresuid(user, user, user)
    none = (ctypes.c_uint32 * 6)()
    _check(_libc.capset((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), none), "capset")
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # again, as a change of user resets it
    os.setsid()
    if not os.access(os.__file__, os.R_OK):
        raise PermissionError(f"the unprivileged user that replaces root cannot read {os.__file__}")


def _unprivileged_ids() -> tuple[int, int]:
    return (_NOBODY, _NOBODY) if os.getuid() == 0 else (os.getuid(), os.getgid())


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


def run(solution: str, tests: list[str], nonce: bytes) -> None:
    """Run the solution, then the tests in a copy of its namespace, and report those that pass; does not return."""
    # Saved before the solution runs, which can replace anything in the modules.
    execute, write, leave, getpid, test_builtins = exec, os.write, os._exit, os.getpid, dict(vars(builtins))
    own_pid = getpid()  # a process that the solution forks must not report
    compiled = [compile(test, "<test>", "exec") for test in tests]
    module = ModuleType("solution")  # not __main__: code under `if __name__ == "__main__"` would wait for input
    sys.modules["solution"] = module
    verdict, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    write(verdict, nonce)
    try:
        execute(compile(solution, "<solution>", "exec"), vars(module))
        names: dict[str, Any] = {**vars(module), "__builtins__": test_builtins}
        for test in compiled:
            try:
                execute(test, names)
            except BaseException:
                continue
            if getpid() != own_pid:
                leave(0)
            write(verdict, nonce)
    finally:
        leave(0)


def judge(program: str, samples: list[list[Any]], *, seconds: float, at_once: int) -> None:
    """Call ``judge(*sample)`` of a program for each sample, several at once, and report the values; does not return.

    Each line has the index of a sample, and its value or the text of the error that it raised. A sample that ends its
    process or exceeds a limit has the value 0. It may have ended others, so those that ended beside it are repeated.
    """
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # no sample can trace this process, or another one
    names: dict[str, Any] = {}
    exec(compile(program, "<program>", "exec"), names)
    names["prepare"]()
    report, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    os.write(report, b"\n")
    waiting, alone = list(range(len(samples))), list[int]()
    running: dict[int, tuple[int, int, float]] = {}  # by the pipe of the result: process, sample, end of its time
    try:
        while waiting or alone or running:
            while (waiting and len(running) < at_once) or (alone and not running):
                index = waiting.pop(0) if waiting else alone.pop()
                result, pid = _start_sample(names["judge"], samples[index], seconds, report)
                running[result] = pid, index, time.monotonic() + seconds
            first_end = min(end for _, _, end in running.values())
            ready = select.select(list(running), [], [], max(0.0, first_end - time.monotonic()))[0]
            for result in ready or [pipe for pipe, (_, _, end) in running.items() if end == first_end]:
                pid, index, _ = running[result]
                text = os.read(result, _RESULT_BYTES) if ready else b"0.0"
                if text or len(running) == 1:
                    os.write(report, json.dumps([index, _value_or_error(text or b"0.0")]).encode() + b"\n")
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
    finally:
        os._exit(0)


def _value_or_error(text: bytes) -> float | str:
    """Read the result of a sample, which the sample may have written itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return "wrote no result"
    return value if type(value) in (float, str) else "wrote no number"


def _start_sample(judge_one: Callable[..., Any], sample: list[Any], seconds: float, report: int) -> tuple[int, int]:
    """Start the process of a sample, and return the pipe of its result and its id."""
    result, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(report)
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
