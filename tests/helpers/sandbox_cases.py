"""What this machine's sandbox can do, as parameters and marks of tests."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from sppo.rewards.sandbox import unit_tests

_PROBE = ["unshare", "--mount", "--ipc", "--pid", "--net", "--fork", *["--map-root-user"] * (os.getuid() != 0)]
_PROBE += ["mount", "-t", "tmpfs", "tmpfs", "/mnt"]
HAS_NAMESPACES = bool(shutil.which("unshare")) and subprocess.run(_PROBE, stderr=subprocess.DEVNULL).returncode == 0
# Root becomes an unprivileged user, who cannot read an interpreter that is installed in root's home.
_HIDDEN_PYTHON = os.getuid() == 0 and not all(p.stat().st_mode & 1 for p in Path(os.__file__).parents)

in_namespaces = pytest.mark.skipif(not HAS_NAMESPACES, reason="needs root or unprivileged user namespaces")
ISOLATIONS = [
    pytest.param("namespaces", marks=in_namespaces),
    pytest.param("limits", marks=pytest.mark.skipif(_HIDDEN_PYTHON, reason="needs an interpreter outside root's home")),
]


def share_passed(code, *tests, **options):
    """Return the share of tests that a solution passes."""
    (score,) = unit_tests(["p"], [f"```python\n{code}\n```"], tests=[list(tests)], partial=True, **options)
    return score
