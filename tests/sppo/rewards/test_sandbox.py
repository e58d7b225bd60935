"""Tests of the reward unit_tests: its scores, its limits, and what a solution cannot do to the machine."""

import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from sandbox_cases import ISOLATIONS, in_namespaces

from sppo.rewards import score
from sppo.rewards.sandbox import run, unit_tests
from sppo.rewards.sandbox.asserts import last_code

TWICE = "\ndef twice(x):\n    return 2 * x\n"
TEST = "assert twice(2) == 4\nassert twice('a') == 'aa'"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox requires Linux")


def grade(code, tests=TEST, **options):
    (reward,) = unit_tests(["p"], [f"Here it is:\n```python\n{code}\n```\nDone."], tests=[tests], **options)
    return reward


@pytest.fixture(params=ISOLATIONS)
def isolation(request):
    return request.param


def test_solutions_are_graded(isolation):
    assert grade(TWICE, isolation=isolation) == 1.0
    for wrong in ("def twice(x): return 4", "def twice(x) return", "twice = None", "raise ValueError", "\ud800\0"):
        assert grade(wrong, isolation=isolation) == 0.0, wrong


@in_namespaces
def test_ordinary_programs_run():
    program = """
        from __future__ import annotations
        import collections, dataclasses, subprocess, sys, tempfile, threading, multiprocessing

        @dataclasses.dataclass
        class Pair:
            left: int
            right: int = 2

        def twice(x):
            with tempfile.TemporaryFile() as file:
                file.write(b"x")
            lock, results = multiprocessing.Lock(), []
            thread = threading.Thread(target=lambda: results.append(Pair(x).right * x))
            thread.start()
            thread.join()
            assert subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True).stdout == b"1\\n"
            return results[0]

        if __name__ == "__main__":
            print(twice(int(input())))
    """
    assert grade("\n".join(line[8:] for line in program.splitlines())) == 1.0


@in_namespaces
def test_partial_gives_the_fraction_of_passing_tests():
    tests = ["assert twice(1) == 2", "assert twice(1) == 3", "import sys; sys.exit(0)", "assert twice('a') == 'aa'"]
    assert grade(TWICE, tests) == 0.0
    assert grade(TWICE, tests, partial=True) == 0.5
    assert grade(TWICE, [tests[0], "while True: pass", tests[0]], partial=True, seconds=0.5) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os\nos.fork()",
        "import os\nwords = os.pread(3, 32, 0)\nos.write(3, words * 9)\nos._exit(0)",
        "import os\nos.ftruncate(3, 0)\nos._exit(0)",
        "print('passed'); print('1 passed', file=__import__('sys').stderr)",
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'passed' * 100)\n    except OSError: pass",
        "import os\ndef twice(x): os._exit(0)",
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None",
        "AssertionError = ValueError = KeyError\ndef twice(x): return 3",
        "def check(got, right): pass\ndef twice(x):\n    global check\n    check = lambda *a: None\n    return 3",
        "import sys\nsys.excepthook = lambda *a: None\nsys.settrace(lambda *a: sys.exit(0))",
        "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit",
        "import os, signal\nos.kill(0, signal.SIGKILL)",
    ],
)
@in_namespaces
def test_feigned_success_does_not_pass(code):
    tests = f"def check(got, right):\n    assert got == right\ncheck(twice(2), 4)\nassert all([twice(1) == 2])\n{TEST}"
    assert grade(TWICE, tests) == 1.0
    assert grade(code, tests) == 0.0


@in_namespaces
def test_tests_use_the_original_builtins():
    code = "import builtins\nbuiltins.all = lambda values: True\ndef twice(x): return 3"
    assert grade(code, "assert all([twice(1) == 2])") == 0.0


@pytest.mark.slow
def test_time_and_memory_are_limited(isolation):
    start = time.monotonic()
    assert grade("while True: pass", isolation=isolation, seconds=0.5) == 0.0
    assert grade("import time; time.sleep(60)", isolation=isolation, seconds=0.5) == 0.0
    assert grade("hog = bytearray(200 << 20)" + TWICE, isolation=isolation) == 1.0
    assert grade("hog = bytearray(200 << 20)" + TWICE, isolation=isolation, memory_mb=100) == 0.0
    assert time.monotonic() - start < 10


def test_output_and_files_are_limited(isolation):
    assert grade("print('x' * (100 << 20))" + TWICE, isolation=isolation) == 1.0, "output was not discarded"
    file = "with open('file', 'wb') as file:\n    for _ in range(65):\n        file.write(bytes(1 << 20))"
    assert grade(file + TWICE, isolation=isolation) == 0.0
    assert grade("files = [open('/dev/null') for _ in range(100)]" + TWICE, isolation=isolation) == 0.0


@pytest.mark.slow
def test_a_fork_bomb_is_bounded_and_ends(isolation):
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    start = time.monotonic()
    assert grade(bomb, isolation=isolation, seconds=0.5) == 0.0
    assert time.monotonic() - start < 15
    assert grade("import os\nif os.fork() == 0: os._exit(0)" + TWICE, isolation=isolation) == 1.0


def daemon(mark):
    """Return a solution that leaves a process behind in a separate session, with ``mark`` on its command line."""
    return f"""
import os, sys
r, w = os.pipe()
os.set_inheritable(w, True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        script = f"import os, time; os.write({{w}}, b'up'); time.sleep(60)  # {mark}"
        os.execv(sys.executable, [sys.executable, "-c", script])
    os._exit(0)
assert os.read(r, 2) == b"up"
"""


def is_running(mark):
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                return True
        except OSError:
            continue
    return False


@pytest.mark.slow
def test_no_process_outlives_its_sample(isolation):
    mark = uuid.uuid4().hex
    assert grade(daemon(mark) + TWICE, isolation=isolation) == 1.0
    assert not is_running(mark)
    assert grade(daemon(mark) + "while True: pass", isolation=isolation, seconds=1.5) == 0.0
    assert not is_running(mark)


@in_namespaces
def test_no_process_outlives_the_trainer():
    mark = uuid.uuid4().hex
    code = f"```python\n{daemon(mark)}\nwhile True: os.wait()\n```"
    script = f"from sppo.rewards.sandbox import unit_tests; unit_tests(['p'], [{code!r}], tests=['pass'], seconds=60)"
    with subprocess.Popen([sys.executable, "-c", script]) as trainer:
        try:
            wait_until(lambda: is_running(mark), 20)
        finally:
            trainer.kill()
    wait_until(lambda: not is_running(mark), 5)


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_sandbox_that_cannot_be_killed_is_given_up(monkeypatch, tmp_path):
    """As after a fault of the kernel, which then keeps the process in a system call."""
    jail = tmp_path / "jail.py"
    jail.write_text("import time\ntime.sleep(60)\n")
    started = []

    def ignore(process):
        started.append(process)

    monkeypatch.setattr(run, "_JAIL", jail)
    monkeypatch.setattr(run, "_STARTUP_SECONDS", 0.2)
    monkeypatch.setattr(run, "_KILL_SECONDS", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "kill", ignore)
        with pytest.raises(subprocess.TimeoutExpired):
            grade(TWICE, seconds=0.2)
    (process,) = started
    assert process.poll() is None
    process.kill()
    process.wait(timeout=10)


@in_namespaces
def test_network_files_processes_and_rights_are_denied(tmp_path):
    (tmp_path / "secret").write_text("key")
    server = socket.create_server(("127.0.0.1", 0))
    code = f"""
import ctypes, os, socket
tried = {{}}
def attempt(name, work):
    try:
        work()
        tried[name] = "done"
    except OSError as error:
        tried[name] = error.strerror or "refused"
libc = ctypes.CDLL(None)
attempt("connect", lambda: socket.create_connection({server.getsockname()}, 1))
attempt("look up", lambda: socket.getaddrinfo("localhost.example", 80))
attempt("read", lambda: open({str(tmp_path / "secret")!r}).read())
attempt("read home", lambda: os.listdir({str(Path.home() / ".ssh")!r}))
attempt("write", lambda: open("/usr/bin/written", "w"))
attempt("write to root", lambda: open("/written", "w"))
attempt("signal", lambda: os.kill({os.getpid()}, 0))
attempt("write here", lambda: (os.makedirs({str(tmp_path)!r}), open({str(tmp_path / "written")!r}, "w")))
mounted = libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None)
unshared = libc.unshare(0x10000000)  # a user namespace would give back all capabilities
"""
    denied = ["connect", "look up", "read", "read home", "write", "write to root", "signal"]
    tests = [f"assert tried[{name!r}] != 'done'" for name in denied]
    tests += ["assert mounted == unshared == -1", "assert os.getuid() != 0", "assert len(os.environ) <= 3"]
    with server:
        assert grade(code, tests, partial=True) == 1.0
    assert not (tmp_path / "written").exists(), "the solution wrote outside its own /tmp"


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("```python\na = 1\n```", "a = 1\n"),
        ("```python\na = 1\n```\nor\n  ```py\na = 2\n  ```", "a = 2\n"),
        ("```Python3\r\na = 1\r\n```\r\nwhich prints\n```\n5\n```", "\r\na = 1\r\n"),
        ("```python\na = 1\n```\n```python\na = 2", "a = 1\n"),
        ("```python\na = 1", None),
        ("```python\na = 1\n```python\na = 2\n```", "a = 2\n"),
        ("```json\n{}\n```", None),
        ("a = 1", None),
        ("", None),
        ("<think>```python\na = 1\n```", None),
        ("<think>\n```python\na = 1\n```\n</think>\n```python\na = 2\n```", "a = 2\n"),
        ("<think>\n```python\na = 1\n```\n</think>\nno code", None),
        ([{"role": "assistant", "content": "```python\na = 1\n```"}], "a = 1\n"),
    ],
)
def test_the_last_closed_python_block_is_the_solution(completion, code):
    found = last_code("question", completion)
    assert (found and found.strip()) == (code and code.strip())


def test_completions_without_code_are_wrong_and_fast():
    start = time.monotonic()
    for text in ("no code", "```python\n" * 8000, "```" + " " * 64000 + "x!", "`" * 64000, "```" + "a" * 64000 + "!"):
        assert unit_tests(["p"], [text], tests=["pass"]) == [0.0]
    assert time.monotonic() - start < 2


@in_namespaces
def test_errors_in_rows_and_options_are_reported():
    columns = {"tests": [[TEST], TEST, "", "assert ("], "seconds": [0] * 4}
    completions = [f"```python\n{TWICE}\n```", "```python\ntwice = abs\n```"] + ["```python\n1\n```"] * 2
    scores = score(["unit_tests?seconds=4&memory_mb=256"], ["p"] * 4, completions, columns)
    assert scores.rewards == [1.0, 0.0, None, None]
    assert "the column 'tests' is empty" in scores.failures[0]
    assert "the column 'tests' is not valid Python" in scores.failures[1]
    (failure,) = score(["unit_tests?isolation=none"], ["p"], ["c"], {"tests": ["pass"]}).failures
    assert "isolation must be 'namespaces' or 'limits', got 'none'" in failure


# Executes its second argument where the kernel grants no namespaces.
WITHOUT_NAMESPACES = f"""
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("jail", {str(run._JAIL)!r})
jail = importlib.util.module_from_spec(spec)
spec.loader.exec_module(jail)
jail._libc.prctl(jail._PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
jail.deny_system_calls()
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""
# Executes its second argument in a user namespace with one user, USER, as in a container without root.
WITH_ONE_USER = """
import ctypes, os, sys
user, group = os.getuid(), os.getgid()
assert ctypes.CDLL(None).unshare(0x10000000) == 0
for name, text in (("setgroups", "deny"), ("uid_map", f"USER {user} 1"), ("gid_map", f"USER {group} 1")):
    with open(f"/proc/self/{name}", "w") as file:
        file.write(text)
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""


def run_as(script, code, **environment):
    command = [sys.executable, "-c", script, code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def graded(code=TWICE, tests=TEST, options=""):
    return f"""
from sppo.rewards import score
columns = {{"tests": [{tests!r}]}}
scores = score(["unit_tests?partial=true{options}"], ["p"], ["```python\\n" + {code!r} + "\\n```"], columns)
print(scores.rewards, *scores.failures)
"""


@in_namespaces
def test_nothing_runs_without_isolation():
    found = run_as(WITHOUT_NAMESPACES, graded())
    assert (
        "cannot set up its sandbox on this machine (unshare: Operation not permitted); nothing was run" in found.stdout
    )
    assert "unit_tests?isolation=limits" in found.stdout


@in_namespaces
@pytest.mark.parametrize("user", ["0", "1000"])
def test_containers_with_one_user_have_the_sandbox(user):
    found = run_as(WITH_ONE_USER.replace("USER", user), graded())
    assert found.stdout == "[1.0]\n", found.stdout + found.stderr


@in_namespaces
@pytest.mark.parametrize("user", ["0", "1000"])
def test_limits_alone_do_not_run_code_as_the_own_user_unless_told(user):
    script = WITH_ONE_USER.replace("USER", user)
    found = run_as(script, graded(options="&isolation=limits"))
    assert found.stdout.startswith("[None]")
    assert f"isolation=limits would run code as user {user}, as you; permit it by same_user=true" in found.stdout
    found = run_as(script, graded(options="&isolation=limits&same_user=true"))
    assert found.stdout == "[1.0]\n", found.stdout + found.stderr


@in_namespaces
@pytest.mark.parametrize(
    "process", ["from sppo.rewards import score", "serve(die_with_parent"], ids=["trainer", "worker"]
)
def test_limits_hide_the_environment_from_the_own_user(process):
    code = f"""
import os
pid = os.getpid()
command = ""
while {process!r} not in command:
    with open(f"/proc/{{pid}}/stat") as file:
        pid = int(file.read().rpartition(")")[2].split()[1])
    with open(f"/proc/{{pid}}/cmdline") as file:
        command = file.read()
seen = "nothing"
try:
    with open(f"/proc/{{pid}}/environ") as file:
        seen = file.read()
except PermissionError:
    seen = "denied"
"""
    script = graded(code, ["assert command", "assert seen == 'denied'"], "&isolation=limits&same_user=true")
    found = run_as(WITH_ONE_USER.replace("USER", "1000"), script)
    assert found.stdout == "[1.0]\n", found.stdout + found.stderr


@in_namespaces
def test_memory_that_no_limit_counts_and_other_rights_are_denied():
    """Files of memfd_create and segments of shmget belong to no process."""
    code = """
import ctypes, os, platform
libc = ctypes.CDLL(None, use_errno=True)
tried = {}
try:
    tried["memfd_create"] = os.memfd_create("hog")
except PermissionError:
    tried["memfd_create"] = "denied"
tried["shmget"] = libc.shmget(0, 1 << 20, 0o1600), ctypes.get_errno()
tried["ptrace"] = libc.ptrace(16, os.getppid(), 0, 0), ctypes.get_errno()
tried["keyctl"] = libc.syscall(250 if platform.machine() == "x86_64" else 219, 0, -3, 0), ctypes.get_errno()
tried["io_uring"] = libc.syscall(425, 4, 0), ctypes.get_errno()
"""
    names = ["shmget", "ptrace", "keyctl", "io_uring"]
    tests = ["assert tried['memfd_create'] == 'denied'", *(f"assert tried[{name!r}] == (-1, 1)" for name in names)]
    assert grade(code, tests, partial=True) == 1.0
