"""A run that is killed, ended by SIGTERM or finds its disk full at a random moment resumes to the same bits.

``pytest tests/sppo/test_random_moments.py --moments 20`` tries 20 moments of each kind.
"""

import random
import shutil
import signal
import subprocess

import pytest
from interrupted_runs import MIDWAY, Uninterrupted, check_same, in_process, preload

RUNS = {
    "sppo": MIDWAY,
    "grpo": MIDWAY | {"algorithm": "grpo", "num_generations": 3},
    "sppo, adapters": MIDWAY | {"lora": True},
    "grpo, adapters": MIDWAY | {"lora": True, "algorithm": "grpo", "num_generations": 3},
}


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("moments")))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    preload()
    return Uninterrupted(tmp_path_factory.mktemp("uninterrupted"), RUNS)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def random_moment(uninterrupted, name, seed):
    return random.Random(f"{name} {seed}").uniform(0, uninterrupted.seconds[name])


def resume(out, name):
    assert in_process(out, RUNS[name], resume=any(out.glob("checkpoint-*"))) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_signal(uninterrupted, name, number, seed, tmp_path):
    expected = uninterrupted(name)
    ended = in_process(tmp_path, RUNS[name], after=random_moment(uninterrupted, name, seed), do=number)
    assert ended in (0, -number, 143)  # done; at once; after a checkpoint, with SIGTERM
    resume(tmp_path, name)
    check_same(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_full_disk(uninterrupted, name, seed, small_disk):
    expected = uninterrupted(name)
    other = small_disk / "other"

    def fill(pid):
        with other.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 12))
            except OSError:
                pass

    moment = 0.7 * random_moment(uninterrupted, name, seed)  # in memory a run takes less time
    assert in_process(small_disk, RUNS[name], after=moment, do=fill) in (0, 1)
    assert not (small_disk / ".staging").exists()
    other.unlink(missing_ok=True)
    resume(small_disk, name)
    check_same(small_disk, expected)
