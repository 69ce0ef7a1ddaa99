# Every target sets itself up: it makes .venv when missing and installs what it needs.
PYTHON ?= python3
JAX ?= cpu
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
EXTRAS_train := examples
EXTRAS_test := examples,test
EXTRAS_docs := examples,docs
EXTRAS_dev := dev
JAX_BUILD := $(if $(filter cpu,$(JAX)),jax,jax[$(JAX)])

.PHONY: train compare test test-lowest docs lint clean

train: $(VENV)/.train-$(JAX)  ## train the MLA language model with MuonClip on real text
	$(BIN)/python -m examples.mla.train $(ARGS)

compare: $(VENV)/.train-$(JAX)  ## the same model at a high learning rate, with and without QK-Clip
	$(BIN)/python -m examples.mla.compare $(ARGS)

test: $(VENV)/.test-$(JAX)  ## the whole test suite
	$(BIN)/python -m pytest -n auto $(ARGS)

docs: $(VENV)/.docs-$(JAX)  ## the documentation, strictly, into site/
	$(BIN)/mkdocs build --strict

lint: $(VENV)/.dev-$(JAX)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

test-lowest:  ## the tests with the oldest versions that pyproject.toml admits
	$(MAKE) test VENV=.venv-lowest PIP_CONSTRAINTS=lowest.txt

clean:
	rm -rf .venv .venv-lowest site

# One stamp per purpose and JAX build; a changed pyproject.toml installs anew.
$(VENV)/.%-$(JAX): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(PIP_CONSTRAINTS),-c $(PIP_CONSTRAINTS)) "$(JAX_BUILD)" -e ".[$(EXTRAS_$*)]"
	touch $@
