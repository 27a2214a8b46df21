# make test | demo | bench | gpu-check | gpu-sanitize work from a fresh clone: each first makes what it needs.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
OUT ?= gpu-report
MINUTES ?= 5
# Processes of the tests and of what benchmarks do before they time: compiling kernels is most of both.
JOBS ?= 16
GPU_TESTS = $(shell grep -l 'mark.gpu' tests/test_*.py)
BENCH ?= --quick
TORCH ?= torch==2.13.0
OLDEST_TRITON ?= triton==3.6.0
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
SOURCES := setup.py $(shell find csrc -type f)
CPP := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES))
# Where there is a compiler, code that does not compile stops make instead of being reported and left out.
KDFAST_EXTENSION ?= $(if $(shell command -v $(firstword $(CXX))),1)
# Two test processes share the machine with torch's own threads: idle threads must not spin. How fast torch.compile's own
# code is does not matter: no looking for vector instructions, no processes that compile.
TEST_ENV := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive TORCHINDUCTOR_VEC_ISA_OK=0 TORCHINDUCTOR_COMPILE_THREADS=1
# Neighbouring tests to one process, as they share what was compiled for them.
TEST := -m pytest -q -n 2 --dist worksteal

.PHONY: env build lint test demo bench gpu-check gpu-sanitize gpu-build clean

env: $(VENV)/.installed
build: $(VENV)/.built

# torch comes first, so that nothing else picks another build of it. Compiling is left to `build`, which shows it.
$(VENV)/.installed: Makefile pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) setuptools wheel pybind11 ninja
	KDFAST_EXTENSION=0 $(PIP) --no-build-isolation -e '.[dev]' $(TORCH)
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	KDFAST_EXTENSION=$(KDFAST_EXTENSION) $(PY) setup.py --quiet build_ext --inplace
	touch $@

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

# The Triton of the oldest torch, beside the newest one that the environment has.
$(VENV)/triton-oldest: $(VENV)/.installed
	rm -rf $@
	$(PIP) --no-deps --target $@ $(OLDEST_TRITON)

# The interpreter is chosen when Triton is imported, so its tests run in a process of their own.
test: build lint $(VENV)/triton-oldest
	$(TEST_ENV) PYTHONPATH=$(VENV)/triton-oldest $(PY) $(TEST) -k "test_triton_launch or (test_triton_aot and 90])" \
		tests/test_triton_launch.py tests/test_triton_aot.py
	$(TEST_ENV) TRITON_INTERPRET=1 $(PY) $(TEST) -m interpret
	$(TEST_ENV) $(PY) $(TEST) -m "not interpret"

demo: build
	$(PY) examples/distill_digits.py --out report

bench: build
	$(PY) -m benchmarks

# For a machine with a GPU, its own torch, and perhaps no network or limited time: installs nothing, and writes a handful of
# files into OUT. Benchmarks compile beside the tests, time when these are done, and stop after MINUTES; the next call goes
# on with the cases that benchmarks/results lacks.
gpu-check: gpu-build
	touch "$(OUT)/testing"; set -o pipefail; status=0; \
	$(PYTHON) -m benchmarks --device cuda --resume --jobs $(JOBS) --minutes $(MINUTES) --hold "$(OUT)/testing" \
		--profile "$(OUT)/kernels.csv" $(BENCH) > "$(OUT)/benchmarks.log" 2>&1 & \
	timeout 300 $(PYTHON) -m pytest -q -n $(JOBS) --dist worksteal -m gpu --tb short $(GPU_TESTS) > "$(OUT)/tests.log" 2>&1 || status=$$?; \
	rm "$(OUT)/testing"; tail -n 40 "$(OUT)/tests.log"; wait $$! || status=$$?; \
	tail -n 40 "$(OUT)/benchmarks.log"; tar -czf "$(OUT)/results.tar.gz" benchmarks/results; exit $$status

# Every kernel once under compute-sanitizer, which makes them tens of times slower.
gpu-sanitize: gpu-build
	status=0; for tool in memcheck racecheck; do \
	timeout 240 compute-sanitizer --tool $$tool --error-exitcode 9 $(PYTHON) tests/scenarios.py --device cuda \
		> "$(OUT)/$$tool.log" 2>&1 || status=$$?; tail -n 5 "$(OUT)/$$tool.log"; done; exit $$status

gpu-build:
	mkdir -p "$(OUT)"
	set -o pipefail; KDFAST_EXTENSION=1 KDFAST_CUDA=1 $(PYTHON) setup.py build_ext --inplace 2>&1 | tee "$(OUT)/build.log"
	cat build/ext/*/cuda/*.log >> "$(OUT)/build.log"
	$(PYTHON) -m kdfast.info | tee "$(OUT)/info.txt"

clean:
	rm -rf build dist report gpu-report *.egg-info kdfast/_build.json kdfast/_C*.so .pytest_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.built
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
