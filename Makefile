# make demo and make test are all a newcomer needs; each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint clean

demo: .venv/ready
	$(BIN)/fedtap run first_leak

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: .venv/ready
	$(BIN)/python -m scenarios.bench

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
