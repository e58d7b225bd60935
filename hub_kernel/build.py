"""Build the operations as a kernel of the Hugging Face hub, which its library ``kernels`` can load.

OUT_DIR/build contains one folder per backend of torch, with the package's files and their metadata, and the card of the
repository. ``integrations`` is left out: it patches trainers, which import the installed package.
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
PACKAGE = ROOT / "sppo_kernels"
VERSION = re.search(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(), re.M).group(1)
BACKENDS = ("cpu", "cuda", "rocm", "xpu")


def build(out_dir: Path) -> None:
    """Write one folder per backend and the card."""
    if (out_dir / "build").exists():
        raise SystemExit(f"OUT_DIR must not contain a folder named build, got {out_dir}: choose another, or delete it")
    if out_dir.resolve().is_relative_to(PACKAGE):
        raise SystemExit(f"OUT_DIR must be outside the package, got {out_dir}")
    for backend in BACKENDS:
        variant = out_dir / "build" / f"torch-{backend}"
        for path in sources():
            (variant / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PACKAGE / path, variant / path)
        shutil.copy(ROOT / "LICENSE", variant)
        (variant / "metadata.json").write_text(json.dumps(metadata(variant, backend), indent=2) + "\n")
    card = (HERE / "CARD.md").read_text().replace("{version}", str(major_version()))
    (out_dir / "build/CARD.md").write_text(card)


def sources() -> list[Path]:
    """List the package's modules, without files that an editor or a tool left next to them."""
    found = [path.relative_to(PACKAGE) for path in [*PACKAGE.rglob("*.py"), PACKAGE / "py.typed"]]
    return [path for path in found if path.parts[0] != "integrations" and not any(n[0] == "." for n in path.parts)]


def metadata(variant: Path, backend: str) -> dict[str, object]:
    """Return the metadata that ``kernels`` requires for the files in ``variant``."""
    files = {
        path.relative_to(variant).as_posix(): sha256(path) for path in sorted(variant.rglob("*")) if path.is_file()
    }
    content = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return {
        "name": "sppo-kernels",
        # Name of the module and namespace of its operations, which must be unique among the builds in one process.
        "id": f"_sppo_kernels_{backend}_{content[:7]}",
        "version": major_version(),
        "kernels-minver": "0.14.0",  # the first that names the module after the id
        "license": "Apache-2.0",
        "python-depends": [],  # none beyond torch and its triton
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }


def major_version() -> int:
    """Return the version on the hub, which counts only incompatible changes; with 0 the interface may still change."""
    return int(VERSION.split(".")[0])


def sha256(path: Path) -> str:
    """Return a file's SHA-256 digest in base64."""
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="must not contain a folder named build")
    build(parser.parse_args().out_dir)
