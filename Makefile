# Two commands set everything up: `make demo` and `make test`. Both work alone on a fresh clone.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
IDS ?= 10000,100000,1000000
OPENMINED := out/bench-openmined
FLOWER := out/bench-flower

.PHONY: demo test bench clean

demo: $(VENV)/installed
	$(BIN)/colonnade demo

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(JOBS)

# Minutes on a quiet machine, most of them at a million ids a side; IDS=10000,100000 is enough for a look.
bench: $(VENV)/installed-dev $(OPENMINED)/installed $(FLOWER)/installed
	@rm -f out/bench-exchange.json out/bench-psi.json out/bench-horizontal.json
	-$(BIN)/python benchmarks/exchange.py --json out/bench-exchange.json
	-$(BIN)/python benchmarks/psi.py --ids $(IDS) --openmined-python $(OPENMINED)/bin/python --json out/bench-psi.json
	-$(BIN)/python benchmarks/horizontal.py --flower-python $(FLOWER)/bin/python --json out/bench-horizontal.json
	$(BIN)/python benchmarks/report.py out/bench-exchange.json out/bench-psi.json out/bench-horizontal.json

# openmined-psi, which we measure against, pins what we do not.
$(OPENMINED)/installed: benchmarks/requirements-openmined.txt | $(BIN)/python
	$(BIN)/python -m venv $(OPENMINED)
	$(OPENMINED)/bin/python -m pip install --quiet --requirement $<
	touch $@

# So does Flower, with whose simulation the horizontal mode is compared.
$(FLOWER)/installed: benchmarks/requirements-flower.txt | $(BIN)/python
	$(BIN)/python -m venv $(FLOWER)
	$(FLOWER)/bin/python -m pip install --quiet --requirement $<
	touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed; try: make PYTHON=/path/to/python3 demo"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) out build *.egg-info
