# make demo and make test are all a newcomer needs; each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types docs links bench clean

demo: .venv/ready
	$(BIN)/fedtap run first_leak

test: .venv/ready
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

types: .venv/ready links
	MYPYPATH=build/types $(BIN)/mypy

# The site, in build/site: strict, and offline once its tools are there.
docs: .venv/docs links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: .venv/ready
	mkdir -p build
	$(BIN)/fedtap bench run --out build/bench.json

# mypy and the site find the package under its own name through a folder of links.
links:
	mkdir -p build/types/fedtap
	ln -sfn $(addprefix $(CURDIR)/,fedtap/__init__.py fedtap/py.typed simulator attackers clients scenarios) build/types/fedtap

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

.venv/docs: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

clean:
	rm -rf .venv build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
