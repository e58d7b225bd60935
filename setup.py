"""Package metadata. ``pip install .`` installs the fused operations; extras add the trainer and its tools."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "sppo_kernels/__init__.py").read_text(), re.M).group(1)

TRAIN = [
    "transformers>=5.17",
    "accelerate>=1.10",
    "datasets>=4.0",
    "pyyaml>=6.0",
    "matplotlib>=3.9",
    "math-verify>=0.9",
    "reasoning-gym>=0.1.25",
]
BENCH = ["pytest-benchmark>=5.0", "matplotlib>=3.9"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings-python>=2.0", "latex2mathml>=3.77"]


def long_description() -> str:
    """Return the README as the package index shows it: without what only the repository has.

    These are images and their captions, links, and the list of the documentation.
    """
    text = (HERE / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^\]]*\]\((?!https:)[^)]*\)\n\n\*Left.*?\*\n\n", "", text, flags=re.M | re.S)
    text = re.sub(r"^## Documentation\n.*?(?=^```bibtex)", "## Citation\n\n", text, flags=re.M | re.S)
    return re.sub(r"(?<!!)\[((?:!\[[^\]]*\]\([^)]*\)|[^\]])*)\]\((?!https:)[^)]*\)", r"\1", text)


setup(
    name="sppo-kernels",
    version=VERSION,
    description="Fused Triton kernels for sequence-level PPO (arXiv 2604.08865), and a thin SPPO trainer on top",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    keywords="reinforcement-learning ppo sppo grpo llm triton kernels",
    python_requires=">=3.11",
    packages=find_packages(include=["sppo_kernels*", "sppo*"]),
    package_data={"sppo": ["py.typed"], "sppo.cli": ["recipes/*.yaml"], "sppo_kernels": ["py.typed"]},
    install_requires=["torch>=2.10", "numpy>=1.26", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={
        "train": TRAIN,
        "bench": BENCH,
        "docs": DOCS,
        "peft": ["peft>=0.18"],
        "quantization": ["peft>=0.18", "bitsandbytes>=0.50"],
        "vllm": ["vllm>=0.20"],
        "trackers": ["tensorboard>=2.19", "trackio>=0.21", "wandb>=0.20"],
        "flash": ["flash-attn>=2.8"],
        "dev": [
            *TRAIN,
            *BENCH,
            *DOCS,
            "peft>=0.18",
            "tensorboard>=2.19",
            "trackio>=0.21",
            "pytest>=9.0",  # has faulthandler_exit_on_timeout
            "pytest-xdist>=3.6",
            "hypothesis>=6.130",
            "ruff>=0.17,<0.18",  # newer versions format differently
            "mypy>=1.18",
            "types-PyYAML",
            "trl==1.16.0",  # the version that sppo_kernels.integrations.trl supports
            "kernels==0.17.2",  # loads the output of hub_kernel/build.py in a test
        ],
    },
    entry_points={
        "console_scripts": ["sppo = sppo.cli.main:main"],
        "verl.plugins": ["sppo_seq = sppo_kernels.integrations.verl_plugin"],
    },
)
