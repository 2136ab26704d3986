# make demo and make test are all a newcomer needs; each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint types clean

demo: .venv/ready
	$(BIN)/fedtap run first_leak

test: lint
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

# mypy finds the package under its own name through a folder of links.
types: .venv/ready
	mkdir -p build/types/fedtap
	ln -sfn $(addprefix $(CURDIR)/,fedtap/__init__.py fedtap/py.typed simulator attackers clients scenarios) build/types/fedtap
	MYPYPATH=build/types $(BIN)/mypy

bench: .venv/ready
	$(BIN)/python -m fedtap.scenarios.bench

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
