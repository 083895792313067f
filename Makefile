# Every target sets up the virtual environment first if it does not exist.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Extra arguments for pip, for machines that need another index for the CPU build of PyTorch.
PIP_FLAGS ?=
EXTRAS ?= cpu,dev
STAMP  := $(VENV)/.installed-$(EXTRAS)

# TBPO-A with the exact KL, at the learning rate that was best for it (benchmarks/RESULTS.md).
QUICKSTART := run.name=quickstart objective.name=tbpo_a objective.state_baseline.kind=exact_kl \
  training.learning_rate=4.0e-5 compare.promote.model_name=quickstart

.PHONY: install quickstart report test test-fast test-slow coverage check format lint types docs bench clean

install: $(STAMP)

# vLLM depends on torchvision, torchaudio and torchcodec. Their packaged builds are for CUDA and break
# `import transformers` with a CPU build of PyTorch. Text models need none of them.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) "torch==2.13.0"
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable ".[$(EXTRAS)]"
	if $(BIN)/python -c "import torch, sys; sys.exit(torch.version.cuda is not None)"; then \
	  $(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; fi
	touch $@

quickstart: $(STAMP)
	$(BIN)/python jobs/pipeline.py --config jobs/configs/tiny.yaml $(QUICKSTART)

# Opens the report in the browser; on a machine without one, the path is printed.
report:
	@test -f runs/quickstart/report/report.html || { echo "no report yet: run make quickstart"; exit 1; }
	@echo runs/quickstart/report/report.html
	@$(BIN)/python -m webbrowser -t "file://$(CURDIR)/runs/quickstart/report/report.html" || true

# The tests without Ray share both cores; those with Ray share one session, so they run one after the other.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not e2e and not slow"
	$(BIN)/python -m pytest -m "e2e and not slow"

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not e2e and not heavy and not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

coverage: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not e2e and not slow" --cov --cov-report=term

format: $(STAMP)
	$(BIN)/ruff format --check .

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

check: format lint types test docs

bench: $(STAMP)
	$(BIN)/python jobs/benchmark.py --config jobs/configs/tiny.yaml

clean:
	rm -rf runs site .coverage .mypy_cache .ruff_cache .hypothesis build *.egg-info
