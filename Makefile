# `make demo` and `make test` need Python 3.11+ and make alone: each sets up .venv once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo

.PHONY: demo test lint types imports unit slurm wheel clean

demo: $(VENV)/.installed
	$(BIN)/vlmscale demo --out $(OUT)

test: lint types imports unit

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

imports: $(VENV)/.installed-test
	$(BIN)/lint-imports

unit: $(VENV)/.installed-test slurm
	$(BIN)/python -m pytest -n 2 --dist loadfile

# What tests of `--on slurm` start. Without root and apt they say why they are skipped; in CI they fail.
SLURM := slurm-wlm munge
APT := DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends $(SLURM)
slurm:
	@if [ "$$(id -u)" = 0 ] && [ ! -x /usr/sbin/slurmctld ] && command -v apt-get > /dev/null; then \
	  $(APT) || { apt-get update && $(APT); } || echo "no Slurm could be installed; its tests do not run"; fi

wheel: $(VENV)/.installed
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vlmscale needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps lmms-eval==0.7.3
	touch $@ $(VENV)/.installed
