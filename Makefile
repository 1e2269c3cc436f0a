# Each target makes .venv if it is not there and installs what it needs.
PYTHON ?= python3
RUN = .venv/bin

.PHONY: demo test lint all

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.installed  ## watch pocket write Python, plain and with lookahead decoding
	$(RUN)/lookahead demo

test: .venv/.installed  ## the whole test suite; DATA=folder adds the tests that need data sets and models
	$(RUN)/pytest -n 2 $(if $(DATA),--data=$(DATA))

lint: .venv/.installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: .venv/.installed
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .
