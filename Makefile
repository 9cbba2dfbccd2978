# Two commands do everything: `make demo` and `make test`. Both install into .venv first, and both can be repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLD := $(VENV)/year-old

.PHONY: demo test test-year-old lint bench clean

demo: $(STAMP)
	$(BIN)/logitless-demo compare

test: $(STAMP)
	$(BIN)/python -m pytest

test-year-old: $(OLD)/.installed
	PYTHONPATH=$(CURDIR)/$(OLD) $(BIN)/python -m pytest tests/integrations/test_patch.py tests/integrations/test_training_frameworks.py \
		tests/integrations/test_architectures.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(STAMP)
	$(BIN)/logitless bench

$(STAMP): pyproject.toml demo/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,dev,frameworks]' -e ./demo
	touch $(STAMP)

$(OLD)/.installed: $(STAMP) tests/integrations/year-old.txt
	rm -rf $(OLD)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLD) -r tests/integrations/year-old.txt
	touch $(OLD)/.installed

clean:
	rm -rf $(VENV) runs .pytest_cache .hypothesis .ruff_cache
