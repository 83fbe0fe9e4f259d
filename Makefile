# make demo    install and run the comparison (stock Trainer against adaptive clipping), about 5 minutes on 2 cores
# make test    install and run lint, types and all tests
# make install only the environment, in .venv
# make tune    tune the stock arm of the demo anew and record it in the package
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= adaclip-demo

.PHONY: install demo test lint tune wheel-test clean

install: $(VENV)/installed

# pip is upgraded first: old ones do not apply constraints to extras of the project itself.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/hf-adaclip compare --output $(DEMO)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

tune: install
	$(BIN)/hf-adaclip compare --tune --output runs/tuning
	cp runs/tuning/tuned.json hf_adaclip/convergence/tuned.json

clean:
	rm -rf $(VENV) build dist *.egg-info
