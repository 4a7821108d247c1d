# Every target creates .venv if needed. Requirements: python 3.11 to 3.13 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test versions newest faults lint types bench gpu docs setup clean

demo: setup
	$(BIN)/mochi-tune demo

test: setup
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --ignore tests/faults

# Runs the tests of models, adapters and training with other versions of torch, each in its own environment. The
# lowest and the newest version are those of docs/limits.md.
TORCH ?= 2.10.0 2.15.0
WITH_TORCH := --editable '.[trackio,footage]' diffusers bitsandbytes pytest pytest-timeout pytest-xdist
VERSIONED := tests/models tests/adapters tests/sampling tests/parallel tests/training tests/toy/test_train_toy.py \
	tests/recipes/test_train_lora.py tests/recipes/test_train_lora_details.py tests/recipes/test_train_lora_memory.py \
	tests/recipes/test_sample.py tests/recipes/test_export.py tests/recipes/test_verify.py
versions:
	mkdir -p build && grep -vE '^(torch|triton)==' constraints.txt > build/constraints.txt
	for torch in $(TORCH); do \
		$(PYTHON) -m venv build/torch_$$torch && \
		build/torch_$$torch/bin/python -m pip install --quiet --constraint build/constraints.txt torch==$$torch $(WITH_TORCH) && \
		build/torch_$$torch/bin/python -m pytest --numprocesses auto --dist loadfile $(VERSIONED) || exit 1; done

# Runs only the numerical tests with the newest torch that pip finds, to find incompatibilities early.
newest: build/torch_newest/.installed
	build/torch_newest/bin/python -c 'import torch; print("torch", torch.__version__)'
	build/torch_newest/bin/python -m pytest --numprocesses auto --dist loadfile $(NUMBERS)

NUMBERS := tests/models tests/adapters tests/sampling tests/training/test_objective.py tests/training/test_optim.py \
	tests/recipes/test_train_lora.py
build/torch_newest/.installed: pyproject.toml constraints.txt
	mkdir -p build && grep -vE '^(torch|triton)==' constraints.txt > build/constraints.txt
	$(PYTHON) -m venv build/torch_newest
	build/torch_newest/bin/python -m pip install --quiet --constraint build/constraints.txt torch $(WITH_TORCH)
	touch $@

# Injects faults into real processes and files, as docs/reliability.md lists them. Takes several minutes.
faults: setup
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder tests/faults

# Benchmarks the full size with random weights: FRAMES="37 85 163" on a GPU; 7 takes a few minutes on a CPU.
FRAMES ?= 7
bench: setup
	for frames in $(FRAMES); do for what in sample decode encode train; do \
		$(BIN)/mochi-tune bench what=$$what num_frames=$$frames out=bench.jsonl || exit 1; done; done

# Runs the GPU checks in under 8 minutes, and writes their results to gpu.jsonl.
gpu: setup
	$(BIN)/python -m mochi_tune.recipes.gpu_check gpu.jsonl

# Builds the documentation site into site/, in its own environment. A broken link or an unlisted page is an error.
docs: build/docs_venv/.installed
	NO_MKDOCS_2_WARNING=1 build/docs_venv/bin/mkdocs build

build/docs_venv/.installed: docs/requirements.txt
	$(PYTHON) -m venv build/docs_venv
	build/docs_venv/bin/python -m pip install --quiet --requirement docs/requirements.txt
	touch $@

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# pyright does not know the installed layout of the packages, so it checks links under their installed names.
types: setup
	rm -rf build/typed && mkdir -p build/typed
	cp -rs $(CURDIR)/mochi_tune build/typed/
	cp -rs $(CURDIR)/recipes $(CURDIR)/data_prep $(CURDIR)/conf build/typed/mochi_tune/
	$(BIN)/pyright

setup: $(VENV)/.installed

# Install the pinned torch first, so that no other package selects a version.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "mochi-tune needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + ": run make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
