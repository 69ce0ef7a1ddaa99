# Every target sets itself up: it makes .venv when missing and installs what it needs.
PYTHON ?= python3
JAX ?= cpu
VENV ?= .venv
MODELS ?= .venv-models
ARGS ?=
BIN := $(VENV)/bin
# What each page of the documentation says it is.
EDITION = $(shell sed -n 's/^version = "\(.*\)"/version \1/p' pyproject.toml), commit $(if $(PROJECT_URL),<a href="$(PROJECT_URL)/commit/$(COMMIT)">$(COMMIT)</a>,$(COMMIT))
COMMIT = $(shell git describe --always --dirty --abbrev=10 --exclude '*')
EXTRAS_train := examples
EXTRAS_test := examples,test
EXTRAS_bench := bench
EXTRAS_docs := examples,docs
EXTRAS_dev := dev
EXTRAS_release := release
EXTRAS_pages := pages
$(if $(filter $(JAX),cpu cuda12 cuda13 tpu),,$(error JAX=$(JAX) is no build of JAX: say cpu, cuda12, cuda13 or tpu))
JAX_BUILD := $(if $(filter cpu,$(JAX)),jax,jax[$(JAX)])

.PHONY: help train compare bench methods overhead test test-all contract coverage mutants budgets fuzz soak test-models test-gpu test-tpu roofline accelerator test-lowest docs notebooks accessibility package release lint kills clean

help:  ## this list
	@grep -E '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

train: $(VENV)/.train-$(JAX)  ## train the MLA language model with MuonClip on real text
	$(BIN)/python -m examples.mla.train $(ARGS)

compare: $(VENV)/.train-$(JAX)  ## the same model at a high learning rate, with and without QK-Clip
	$(BIN)/python -m examples.mla.compare $(ARGS)

overhead: $(VENV)/.train-$(JAX)  ## what QuacK and QK-Clip add to the optimizer's compiled cost
	$(BIN)/python -m benchmarks.overhead $(ARGS)

bench: $(addprefix bench-,orthogonalize optimizer_step attention train_step)  ## next to Optax, jax.nn and PyTorch; records and pictures in bench/

# One of them: make bench-attention ARGS="--repeats 15"
bench-%: $(VENV)/.bench-$(JAX)
	@mkdir -p bench
	$(BIN)/python -m benchmarks.$* --json bench/$*.json --picture bench/$*.png $(ARGS)

methods: $(VENV)/.train-$(JAX)  ## which method of orthogonalization is the fastest where
	$(BIN)/python -m benchmarks.methods $(ARGS)

# One of them: make study-clip ARGS="--size cpu"
study-%: $(VENV)/.train-$(JAX)  ## what a source claims, tested: abilities, clip, decay, family, finetune, mla_norm, shared_keys, rank, spectrum, transfer, quack
	$(BIN)/python -m studies.$* $(ARGS)

test: $(VENV)/.test-$(JAX)  ## the tests, but for the slow ones
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not long" $(ARGS)

test-all: $(VENV)/.test-$(JAX)  ## every test, but for those with targets of their own
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not long" $(ARGS)

contract: $(VENV)/.test-$(JAX)  ## every cell of the contract: links × behaviours × meshes
	$(BIN)/python -m pytest tests/contract -n auto -m contract $(ARGS)

coverage: $(VENV)/.test-$(JAX)  ## lines of the package that tests run, on this Python and the newest
	COVERAGE_FILE=.coverage.default $(MAKE) test-all ARGS="--cov=muonclip_jax --cov-report="
	newest=$$(.ci/newest); test -z "$$newest" || COVERAGE_FILE=.coverage.newest $(MAKE) test \
		PYTHON="$$newest" VENV=.venv-newest ARGS='-m "versions and not slow and not long" --cov=muonclip_jax --cov-report='
	$(BIN)/coverage combine
	$(BIN)/coverage report --skip-covered --show-missing --fail-under=97

mutants: $(VENV)/.test-$(JAX)  ## break the package in 250 places, and tell which breaks no test catches
	$(BIN)/python -m tests.mutants.run $(ARGS)

budgets: $(VENV)/.test-$(JAX)  ## FLOPs, bytes and operations of compiled programs against a file
	$(BIN)/python -m benchmarks.budgets $(ARGS)

# make fuzz SECONDS=600 SEED=1000: each property for ten minutes, from seed 1000 on
fuzz: $(VENV)/.test-$(JAX)  ## random cases against float64, SECONDS=120 for each property
	FUZZ_SECONDS=$(or $(SECONDS),120) FUZZ_SEED=$(or $(SEED),0) $(BIN)/python -m pytest tests/fuzz -s -p no:cacheprovider $(ARGS)

soak: $(VENV)/.train-$(JAX)  ## 5,000 steps of MuonClip at a rate at which Muon diverges: nothing may grow
	$(BIN)/python -m benchmarks.soak $(ARGS)

# Links into the repository need PROJECT_URL=https://host/owner/project; without it they are plain text.
docs: $(VENV)/.docs-$(JAX)  ## the documentation, strictly, into site/
	$(BIN)/python -m docs.tools.gather
	DOCS_EDITION='$(EDITION)' $(BIN)/python -m zensical build --strict --clean

notebooks: $(VENV)/.test-$(JAX)  ## run the notebooks of docs/notebooks again, and keep what they show
	JAX_PLATFORMS=cpu $(BIN)/jupyter-execute --inplace --NotebookClient.record_timing=False docs/notebooks/*.ipynb $(ARGS)

# Reports of runs that are there are looked at too. Pictures go to bench/pages.
accessibility: docs $(VENV)/.pages-$(JAX)  ## pages on a wide screen and a phone, light and dark, by axe; needs Chromium
	$(BIN)/python -m docs.tools.accessibility --pictures bench/pages site $(wildcard runs/*/report.html) $(ARGS)

package: $(VENV)/.release-$(JAX)  ## sdist and wheel into dist/; README's code from the wheel alone, on two Pythons
	.ci/package $(abspath $(BIN)/python) $$(.ci/newest)

release: $(VENV)/.release-$(JAX) docs  ## package, tag and site of the version of pyproject.toml; refuses what is unfinished
	$(BIN)/python .ci/release.py $(abspath $(BIN)/python) $$(.ci/newest)
	$(BIN)/python -m docs.tools.publish

lint: $(VENV)/.dev-$(JAX)  ## ruff and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

kills: $(VENV)/.test-$(JAX)  ## the example's training, killed 24 times, half of them inside a save
	KILLS=24 $(BIN)/python -m pytest tests/examples/test_kills.py -s $(ARGS)

test-models:  ## the tests on models from Gemma, Tunix, Transformers and (Python >= 3.12) MaxText
	$(MAKE) $(MODELS)/.test-cpu VENV=$(MODELS) JAX=cpu
	$(MODELS)/bin/python -m pip install --quiet --no-deps -r tests/models/requirements.txt
	$(MODELS)/bin/python -m pytest tests/models -n auto --dist loadfile -W ignore $(ARGS)

test-gpu:  ## compiles for GPUs what they would run; needs no GPU, but JAX's CUDA plugin (400 MB)
	@$(call with_compiler,gpu,-m pytest tests/gpu $(OF_COMPILED) -n auto -rs $(ARGS))

test-tpu:  ## compiles for TPU pods what they would run; needs no TPU, but libtpu (500 MB)
	@$(call with_compiler,tpu,-m pytest tests/tpu $(OF_COMPILED) -n auto -rs $(ARGS))

# On a machine with one: make accelerator JAX=cuda13, or JAX=tpu; ARGS="--part attention" for a part.
accelerator: $(VENV)/.bench-$(JAX)  ## numerics and benchmarks on a GPU or TPU, in ten minutes at most; dated records
	$(BIN)/python -m benchmarks.accelerator $(ARGS)

roofline: roofline-gpu roofline-tpu  ## FLOPs and bytes over the peaks of an H100 and a v5p, next to Optax and MaxText

roofline-%:
	@mkdir -p bench
	@$(call with_compiler,$*,-m pip install --quiet --no-deps maxtext) || true  # for Python >= 3.12
	@$(call with_compiler,$*,-m benchmarks.roofline --chips $(CHIP_$*) --json bench/roofline-$*.json $(ARGS))

# Compilers for GPUs and TPUs in an environment of their own, and the tests that both run.
COMPILERS ?= .venv-compilers
COMPILER_gpu := jax[cuda13-local]
COMPILER_tpu := jax[tpu]
CHIP_gpu := h100
CHIP_tpu := v5p
OF_COMPILED := $(addprefix tests/benchmarks/test_,compiled.py kernels.py roofline.py)

# $(call with_compiler,gpu,ARGUMENTS): Python with these, where there is such a compiler.
define with_compiler
$(MAKE) $(COMPILERS)/.test-cpu VENV=$(COMPILERS) JAX=cpu && \
if $(COMPILERS)/bin/python -m pip install --quiet "$(COMPILER_$1)"; then $(COMPILERS)/bin/python $2; \
else echo "Skipped: $(COMPILER_$1) cannot be installed here. It exists for Linux on x86-64."; fi
endef

test-lowest:  ## the tests with the oldest versions that pyproject.toml admits
	mkdir -p .venv-lowest
	$(PYTHON) tests/lowest_versions.py > .venv-lowest/constraints.txt
	$(MAKE) test-all VENV=.venv-lowest CONSTRAINTS="-c .venv-lowest/constraints.txt"

clean:  ## remove what the targets made
	rm -rf .venv .venv-lowest .venv-newest .venv-models .venv-compilers .venv-others bench dist site site-source

.NOTPARALLEL:  # benchmarks must have the machine for themselves

# One stamp per purpose and JAX build; a changed pyproject.toml installs anew.
$(VENV)/.%-$(JAX): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is not. Say make PYTHON=/path/to/python3 ..."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ echo "$(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv"; exit 1; }
	@echo "Installing into $(VENV); the first time takes a minute or two"
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet $(CONSTRAINTS) "$(JAX_BUILD)" -e ".[$(EXTRAS_$*)]"
	@touch $@
