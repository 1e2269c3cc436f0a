# Each target installs what it needs where that is not there: into .venv for developers, into .demo for the demo.
PYTHON ?= python3
RUN = .venv/bin

# A build of torch for CPUs; what pip takes by itself comes with gigabytes of libraries for GPUs.
TORCH = $(shell grep '^torch==' constraints.txt)

# The oldest version of transformers that is supported, beside the newest, which is in .venv.
OLDEST = 5.16.0

.PHONY: demo test test-oldest test-install lint format

.venv/.installed: pyproject.toml constraints.txt setup.py $(wildcard src/lookahead_decoding/model/native/*.[ch])
	$(PYTHON) -m venv .venv
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.demo/.installed: pyproject.toml constraints.txt setup.py $(shell find src -name "*.py" -o -name "*.[ch]")
	@echo 'Installing the package, PyTorch for CPUs and transformers into .demo; some minutes, and about 1 GB.'
	$(PYTHON) -m venv .demo
	.demo/bin/python -m pip install --disable-pip-version-check --no-warn-conflicts -c constraints.txt $(TORCH) .
	@touch $@

demo: .demo/.installed  ## watch pocket write Python, plain and with lookahead decoding
	.demo/bin/lookahead demo

test: .venv/.installed  ## the whole test suite; DATA=folder adds the tests that need data sets and models
	$(RUN)/pytest -n 2 $(if $(DATA),--data=$(DATA))

.oldest/.installed: .venv/.installed
	rm -rf .oldest
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --target .oldest --no-deps transformers==$(OLDEST)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --target .oldest 'huggingface-hub>=1.5,<2'
	touch $@

test-oldest: .oldest/.installed  ## the tests of exactness with the oldest supported transformers
	PYTHONPATH=.oldest $(RUN)/pytest -n 2 $(if $(DATA),--data=$(DATA)) tests/test_exactness.py tests/test_hf.py \
		tests/test_image_text.py tests/test_models.py tests/test_parallel.py tests/test_rope.py tests/test_target.py

test-install:  ## the wheel in an environment that pip fills by itself: the example of the README, and the command
	rm -rf .bare
	$(PYTHON) -m venv .bare
	.bare/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	.bare/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir .bare/wheel .
	.bare/bin/python -m pip install --quiet --disable-pip-version-check .bare/wheel/*.whl
	.bare/bin/python -m pip list --disable-pip-version-check
	awk '/^```python/ { inside = 1; next } /^```/ { if (inside) exit } inside' README.md > .bare/example.py
	cd .bare && bin/python -c 'from lookahead_decoding.model.native.library import why_no_library as w; print(w() or "native steps")'
	cd .bare && bin/python example.py
	cd .bare && bin/lookahead generate pocket -p 'def add(a, b):' --max-new-tokens 32

lint: .venv/.installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: .venv/.installed
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .
