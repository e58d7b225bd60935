"""Build the operations as a kernel of the Hugging Face hub, and load it with the library ``kernels``."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernels import Metadata
from kernels._rust import Digest, DigestAlgorithm

import sppo_kernels

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("kernel")
    subprocess.run([sys.executable, ROOT / "hub_kernel/build.py", out_dir], check=True, timeout=300)
    return out_dir


def run_python(code: str, built: Path) -> None:
    """Run ``code`` in a separate interpreter with the build in OUT_DIR, and check that it succeeds."""
    environment = {
        **os.environ,
        "OUT_DIR": str(built),
        "LOCAL_KERNELS": f"OWNER/sppo-kernels={built}",  # what get_kernel loads under this name
        "HF_HUB_OFFLINE": "1",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


def test_metadata_describes_the_files(built):
    variants = sorted((built / "build").glob("torch-*"))
    described = [Metadata.read_from_file(variant / "metadata.json") for variant in variants]
    assert [str(m.backend.backend_type).lower() for m in described] == ["cpu", "cuda", "rocm", "xpu"]
    assert len({m.id for m in described}) == 4
    for variant, m in zip(variants, described, strict=True):
        assert variant.name == f"torch-{str(m.backend.backend_type).lower()}"
        assert m.name.python_name == "sppo_kernels"
        assert m.version == int(sppo_kernels.__version__.split(".")[0])
        m.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))


def test_only_torch_and_triton_are_imported_absolutely(built):
    """The hub requires it: nothing else is installed where a kernel is loaded, and its module has another name."""
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in (built / "build/torch-cuda").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            else:
                continue
            assert {module.split(".")[0] for module in modules} <= allowed, f"{path}:{node.lineno}"


@pytest.mark.slow
def test_kernel_and_installed_package_coexist(built):
    """In one process both give the same bits, each through its own registered operations."""
    run_python(
        """
import os
from pathlib import Path

import torch
from kernels import get_local_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import sppo_kernels

hub = get_local_kernel(Path(os.environ["OUT_DIR"]))
assert Path(hub.__file__).is_relative_to(os.environ["OUT_DIR"])
assert not Path(sppo_kernels.__file__).is_relative_to(os.environ["OUT_DIR"])

torch.manual_seed(0)
n, vocabulary, width = 7, 33, 8
hidden, weight, value_weight = (torch.randn(*shape) for shape in ((n, width), (vocabulary, width), (1, width)))
labels = torch.randint(vocabulary, (n,))
old, advantages = -torch.rand(n), torch.tensor([0.5, -0.5])
cu_seqlens = torch.tensor([0, 4, n], dtype=torch.int32)
last, outcomes = torch.tensor([2, 6]), torch.tensor([1.0, 0.0])

CALLS = {
    "linear_logprobs": lambda f, h, w, v, **to: f(h, w, labels, **to),
    "linear_policy_loss": lambda f, h, w, v, **to: f(h, w, labels, old, advantages, cu_seqlens=cu_seqlens, **to),
    "selective_logprobs": lambda f, h, w, v, **to: f(h @ w.T, labels, **to),
    "policy_loss": lambda f, h, w, v, **to: f(h.sum(-1) / 9, old, advantages, cu_seqlens=cu_seqlens, **to),
    "prompt_value_loss": lambda f, h, w, v, **to: f(h, v, last, outcomes, **to),
}

class Namespaces(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen.add(func.namespace)
        return func(*args, **(kwargs or {}))

def run(package, name, backend):
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, value_weight)]
    first = CALLS[name](getattr(package, name), *leaves, backend=backend)[0]
    grads = torch.autograd.grad(first.sum(), leaves, allow_unused=True)
    return first.detach(), *(g for g in grads if g is not None)

for name in CALLS:
    for backend in ("torch", "triton"):
        results = {}
        for package in (sppo_kernels, hub):
            seen = set()
            with Namespaces():
                results[package] = run(package, name, backend)
            assert seen - {"aten", "prim"} == {package.__name__}, (name, backend, seen)
        installed, loaded = results[sppo_kernels], results[hub]
        assert len(installed) > 1
        assert all(map(torch.equal, installed, loaded)), (name, backend)
""",
        built,
    )


@pytest.mark.slow
def test_kernel_and_card_run_without_the_installed_package(built):
    card = (built / "build/CARD.md").read_text()
    example = card.split("```python\n")[1].split("```")[0]
    run_python(
        f"""
import sys

sys.modules["sppo_kernels"] = None  # importing it raises ImportError

{example}
import os
from pathlib import Path

from kernels import get_local_kernel

assert hidden.grad.abs().sum() > 0 and lm_head.grad.shape == lm_head.shape
variants = sorted((Path(os.environ["OUT_DIR"]) / "build").glob("torch-*"))
modules = [get_local_kernel(variant) for variant in variants]
assert [Path(module.__file__).parent for module in modules] == variants
assert sppo_kernels in modules
for module in modules:
    assert module.whiten(torch.randn(3), torch.ones(3)).shape == (3,)
    assert hasattr(getattr(torch.ops, module.__name__), "whiten")
assert not hasattr(torch.ops.sppo_kernels, "whiten")
""",
        built,
    )


def test_stray_files_are_left_out(tmp_path, monkeypatch):
    """The id is a hash of the files, so it must not depend on what an editor, a tool or an import left behind."""
    spec = importlib.util.spec_from_file_location("hub_kernel_build", ROOT / "hub_kernel/build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    package = tmp_path / "sppo_kernels"
    shutil.copytree(ROOT / "sppo_kernels", package, ignore=shutil.ignore_patterns("__pycache__", "integrations"))
    expected = sorted(path.relative_to(package) for path in package.rglob("*") if path.is_file())
    for stray in (
        ".DS_Store",
        "ops/.gae.py.swp",
        "ops/gae.py~",
        "__pycache__/x.pyc",
        ".ipynb_checkpoints/x.py",
        "x.so",
    ):
        (package / stray).parent.mkdir(exist_ok=True)
        (package / stray).write_text("")
    (package / "ops/.#gae.py").symlink_to("nowhere")
    monkeypatch.setattr(build, "PACKAGE", package)
    assert sorted(build.sources()) == expected


@pytest.mark.parametrize(("inside", "message"), [(False, "delete it"), (True, "outside the package")])
def test_invalid_folders_are_rejected(built, inside, message):
    folder = ROOT / "sppo_kernels/out" if inside else built
    command = [sys.executable, ROOT / "hub_kernel/build.py", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (ROOT / "sppo_kernels/out").exists()
