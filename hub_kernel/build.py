"""Write the operations as a kernel of the Hugging Face hub, as its library ``kernels`` loads it.

OUT_DIR/build gets a folder for each backend of torch, with the package's files and their metadata, and the card of the
repository. ``integrations`` stays behind: it patches trainers, which import the installed package.
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
    """A folder a backend and the card."""
    if (out_dir / "build").exists():
        raise SystemExit(f"OUT_DIR must have no folder build yet, {out_dir} has: name another, or delete it")
    if out_dir.resolve().is_relative_to(PACKAGE):
        raise SystemExit(f"OUT_DIR must be outside of the package, got {out_dir}")
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
    """The package's modules, and nothing that an editor or a tool left beside them."""
    found = [path.relative_to(PACKAGE) for path in [*PACKAGE.rglob("*.py"), PACKAGE / "py.typed"]]
    return [path for path in found if path.parts[0] != "integrations" and not any(n[0] == "." for n in path.parts)]


def metadata(variant: Path, backend: str) -> dict[str, object]:
    """What ``kernels`` wants to know of the files in ``variant``."""
    files = {
        path.relative_to(variant).as_posix(): sha256(path) for path in sorted(variant.rglob("*")) if path.is_file()
    }
    content = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return {
        "name": "sppo-kernels",
        # The module's name and the namespace of its operations. It must not be that of another build in one process.
        "id": f"_sppo_kernels_{backend}_{content[:7]}",
        "version": major_version(),
        "kernels-minver": "0.14.0",  # the first that names the module by the id
        "license": "Apache-2.0",
        "python-depends": [],  # beyond torch and its triton
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }


def major_version() -> int:
    """The hub counts incompatible changes alone; by its convention 0 is a version whose interface may still change."""
    return int(VERSION.split(".")[0])


def sha256(path: Path) -> str:
    """A file's digest, in base64."""
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="has no folder build yet")
    build(parser.parse_args().out_dir)
