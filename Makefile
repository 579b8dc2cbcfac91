# Two commands for a newcomer: `make demo`, `make test`. Everything lives in .venv and runs/.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?=
BUDGET ?= 500

# The repository root holds a folder `kernels`, the name of a Hugging Face package: keep it off sys.path.
export PYTHONSAFEPATH = 1
export TRITONSPARSE_TRITON36 = $(CURDIR)/$(VENV)/triton-3.6

.PHONY: demo test test-long test-oldest lint gpu first-contact triton-cache bench-smoke

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test,lint]"
	touch $@

# The GPU machines' Triton: kernels are compiled ahead of time under both.
$(VENV)/triton-3.6/triton/__init__.py: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/triton-3.6 triton==3.6.0

demo: $(VENV)/installed
	$(BIN)/accelerate launch --num_cpu_threads_per_process $(shell $(PYTHON) -c "import os; print(os.cpu_count())") \
		-m tritonsparse.train.translation --recipe demo --output_dir runs/demo

# A worker a core, a file of tests at a time; each computes on one thread, and idle ones sleep instead of spinning, for
# the suite starts processes of its own.
test test-long test-oldest: export OMP_NUM_THREADS = 1
test test-long test-oldest: export OMP_WAIT_POLICY = passive
WORKERS = --numprocesses $(shell $(PYTHON) -c "import os; print(min(8, os.cpu_count()))") --dist loadfile

test: $(VENV)/installed $(VENV)/triton-3.6/triton/__init__.py
	$(BIN)/python -m pytest $(WORKERS)

test-long: $(VENV)/installed $(VENV)/triton-3.6/triton/__init__.py
	$(BIN)/python -m pytest $(WORKERS) -m "not gpu"

# The oldest torch, transformers and accelerate that pyproject.toml allows, in an environment of their own (gigabytes:
# that torch has no build for CPUs alone on every index). No compile tests of Triton 3.6 there: it is that torch's own.
OLDEST := $(VENV)-oldest

$(OLDEST)/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip setuptools
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -e ".[test]"
	touch $@

test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest $(WORKERS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# mypy reads folders, not package-dir: show it the package in its installed shape.
	rm -rf $(VENV)/tree && mkdir -p $(VENV)/tree/tritonsparse
	ln -s $(CURDIR)/tritonsparse/* $(CURDIR)/kernels $(CURDIR)/eval $(CURDIR)/train $(VENV)/tree/tritonsparse/
	cd $(VENV)/tree && ../bin/mypy --config-file ../../pyproject.toml -p tritonsparse

bench-smoke: $(VENV)/installed
	$(BIN)/python benchmarks/bench_threshold.py --smoke
	$(BIN)/python benchmarks/bench_masked_gemm.py --smoke
	$(BIN)/python benchmarks/bench_conv.py --smoke
	$(BIN)/python benchmarks/bench_block.py --smoke
	$(BIN)/python benchmarks/bench_block_inference.py --smoke
	$(BIN)/python benchmarks/bench_semi_structured.py --smoke
	$(BIN)/python benchmarks/bench_whole_model.py --smoke
	$(BIN)/python benchmarks/bench_packed.py --smoke
	$(BIN)/python benchmarks/bench_train_step.py --smoke
	$(BIN)/python benchmarks/bench_block_step.py --smoke
	$(BIN)/python benchmarks/bench_transfo_xl.py --smoke
	$(BIN)/python benchmarks/bench_host.py --smoke

# What follows needs no network and no .venv: the Python that has torch runs it.
HERE = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
CHOICE = $(if $(QUICK),--quick) $(if $(ONLY),--only '$(ONLY)')

# The first call on a GPU: the figures that matter, most valuable first, in ten minutes (BUDGET=570).
first-contact:
	$(HERE) benchmarks/first_contact.py --budget $(BUDGET) $(if $(OUT),--out $(OUT)) $(if $(ONLY),--only '$(ONLY)')

# The rest, call after call: whatever has no result yet.
gpu:
	$(HERE) benchmarks/gpu_queue.py --budget $(BUDGET) $(if $(OUT),--out $(OUT)) $(CHOICE)

# Kernels compiled here for those calls: one file that travels with the tree; a miss costs nothing. TESTS=1 adds the
# kernels of the GPU tests.
triton-cache: $(VENV)/installed $(VENV)/triton-3.6/triton/__init__.py
	$(BIN)/python benchmarks/triton_cache.py build $(if $(TESTS),--tests)
