# The two commands of the README. Both make .venv and install into it, pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# A process for each core and a thread for each process: threads of several processes would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow lint clean

demo: .venv/installed-train
	rm -rf runs/demo
	$(BIN)/zoo train recipes/tiny/retnet.yaml train.output=runs/demo
	@echo "--- a fresh process loads runs/demo/latest and continues a prompt ---"
	$(BIN)/zoo generate runs/demo/latest --prompt "def read_text(path):" --max-new-tokens 60

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -m "not slow"

test-slow: .venv/installed-test
	$(INSTALL) --editable '.[deepspeed]'
	$(PYTEST) -m slow
	ZOO_KERNELS=chunked $(PYTEST) -m "not slow" tests/test_contract.py
	ZOO_KERNELS=reference $(PYTEST) -m "not slow" tests/test_contract.py -k "not compiled and not (titans and gradient_checkpointing)"

lint: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed-train: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[train]'
	@touch $@

# The oracles are installed without what they ask for: their own dependencies pull in gigabytes that parity does not use.
.venv/installed-test: .venv/bin/python pyproject.toml constraints.txt tests/parity/oracles.txt
	$(INSTALL) --editable '.[train,test]'
	$(INSTALL) --no-deps --requirement tests/parity/oracles.txt
	@touch $@ .venv/installed-train
