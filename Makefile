# Two commands for a newcomer: `make demo` and `make test`. Each installs what it needs into .venv first. `make test-long`
# adds what takes many minutes, such as sixty kills.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test test-long clean

demo: $(VENV)/.installed
	$(VENV)/bin/clipress run configs/demo.yaml --out runs/demo

test: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest -q

test-long: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest -q -m "slow or not slow"

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else \
	  "clipress needs Python 3.10 to 3.12, found %d.%d. Choose one: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): PyTorch and what comes with it is about 6 GB, some minutes."
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs
