"""Tests of the reward reasoning_gym: what answers and datasets cannot execute, and what slow answers cost."""

import json
import os
import sys
import time

import pytest
from sandbox_cases import ISOLATIONS, in_namespaces

from sppo.data import load_prompts
from sppo.rewards import score
from sppo.rewards.sandbox import reasoning_gym, run
from sppo.rewards.sandbox.inside import reasoning_verifier

pytest.importorskip("reasoning_gym")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox requires Linux")

EVALUATED = ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens"]  # with eval
PARSED = ["countdown", "puzzle24", "polynomial_multiplication", "simple_integration", "intermediate_integration"]
QUEENS = "n_queens"  # evaluates any expression


def entry_of(task):
    return load_prompts(f"reasoning_gym:{task}?size=1&seed=5")["entry"][0]


def grade(entries, answers, **options):
    completions = [f"<answer>{answer}</answer>" for answer in answers]
    return reasoning_gym(["p"] * len(answers), completions, entry=entries, **options)


def right(entry):
    return json.loads(entry)["entry"]["answer"]


def writing(path):
    """Return Python that writes a secret of the environment into a file, as text of an answer."""
    return f"[open('{path}','w').write('x')]"


def test_entries_survive_json():
    entry = {"a": (1, [2, (3,)]), "b": {4: "x", (5, 6): None}, "c": "text"}
    packed = json.dumps(reasoning_verifier.pack(entry))
    assert json.loads(packed, object_hook=reasoning_verifier._unpack) == entry


@in_namespaces
def test_answers_cannot_write_files(tmp_path):
    """Each verifier that evaluates or parses an answer executes it, but not on this machine."""
    entries = [entry_of(task) for task in EVALUATED + PARSED]
    os.chmod(tmp_path, 0o777)
    paths = [tmp_path / task for task in EVALUATED + PARSED]
    for entry, path in zip(entries, paths, strict=True):
        reasoning_verifier.judge(entry, writing(path))
        assert path.exists(), f"{path.name} executes no answer; this test has no object"
        path.unlink()
    results = grade(entries, [writing(path) for path in paths])
    assert list(tmp_path.iterdir()) == []
    assert all(isinstance(result, Exception) or result < 0.1 for result in results)


@in_namespaces
def test_a_dataset_cannot_write_files(tmp_path):
    """The verifier of number_sorting evaluates the answer of its own entry."""
    record = json.loads(entry_of("number_sorting"))
    record["entry"]["answer"] = writing(tmp_path / "file")
    entry = json.dumps(record)
    os.chmod(tmp_path, 0o777)
    reasoning_verifier.judge(entry, "['1.0']")
    (tmp_path / "file").unlink()
    grade([entry], ["['1.0']"])
    assert list(tmp_path.iterdir()) == []


@in_namespaces
def test_answers_see_no_environment_no_network_and_no_processes(monkeypatch):
    """The answer is right where it sees none of them."""
    monkeypatch.setenv("SECRET", "secret")
    entry = entry_of(QUEENS)
    os_ = "__import__('os')"
    nothing = f"'SECRET' in {os_}.environ or {os_}.path.exists('/proc/self') or {os_}.path.exists('/sys/class/net')"
    board = [row.split() for row in right(entry).split("\n")]  # the verifier evaluates it, and it is worth a half
    seen = f"[] if {nothing} else {board}"
    assert reasoning_verifier.judge(entry, seen) == 0.0  # outside of the sandbox
    assert grade([entry], [seen]) == [0.5]


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_an_answer_without_limits_costs_only_itself(isolation):
    """Endless, too large, ending its process or all others: these score 0, and the others what they are worth."""
    entry = entry_of(QUEENS)
    bad = ["9**9**9**9", "'x'*(10**10)", "[__import__('os')._exit(0)]"]
    if isolation == "namespaces":
        bad.append("[__import__('os').kill(-1,9)]")
    answers = [right(entry), *[answer for each in bad for answer in (each, right(entry))]]
    start = time.monotonic()
    results = grade([entry] * len(answers), answers, isolation=isolation)
    assert results[::2] == [1.0] * (len(bad) + 1)
    assert results[1::2] == [0.0] * len(bad)
    assert time.monotonic() - start < 30


@in_namespaces
def test_an_answer_cannot_score_others():
    """It finds the pipe of its result and writes lines for others into it."""
    lines = r"b'1.0]\n[1, 1.0]\n[1, 1.0'"
    forge = f"[__import__('os').write(fd, {lines}) for fd in range(3, 9) if fd in " \
            "[f for f in range(3, 9) if __import__('select').select([], [f], [], 0)[1]]]"  # fmt: skip
    entry = entry_of(QUEENS)
    results = grade([entry] * 3, [forge, "no", right(entry)])
    assert results[1:] == [0.0, 1.0]


@in_namespaces
def test_an_error_of_the_verifier_is_that_of_its_sample():
    """An entry that the task does not have, and one that is no JSON."""
    good = entry_of("chain_sum")
    broken = json.dumps({"task": "no_such_task", "options": {}, "entry": {}})
    columns = {"entry": [good, broken, "{"]}
    scores = score(["reasoning_gym"], ["p"] * 3, [f"<answer>{right(good)}</answer>"] * 3, columns)
    assert scores.rewards == [1.0, None, None]
    assert "no_such_task" in scores.failures[0]
    assert "JSONDecodeError" in scores.failures[1]


def test_errors_name_the_remedy(monkeypatch):
    entry = entry_of("chain_sum")
    with pytest.raises(ValueError, match="isolation must be 'namespaces' or 'limits', got 'none'"):
        grade([entry], ["1"], isolation="none")
    monkeypatch.setattr(run, "_communicate", lambda *args: b"mount: Operation not permitted\n")
    with pytest.raises(RuntimeError, match=r"mount: Operation not permitted.*nothing was run.*isolation=limits"):
        grade([entry], ["1"])
    assert grade([entry] * 2, ["", ""]) == [0.0, 0.0]  # nothing to run
