# make demo             install, then watch a pretrained dense model become a TTT-E2E model (about 9 minutes on 2 CPU cores)
# make matrix-demo      all ten arms of both families at demo size, then the report (about an hour on 2 CPU cores)
# make matrix-wallclock the same for Qwen's bridge at shares of the baseline's GPU-hours, then the report (about 15 minutes more)
# make test             install if needed, then run the tests
# make check            lint, formatting, types, layering
# make docs             write the tables of docs/ that are made from the code

PYTHON ?= python3
BIN := .venv/bin
# Runs side by side, one thread each: on two cores more per hour than one run with two. Budgets in time need one number for all.
MATRIX_JOBS ?= 2
# Test files run side by side in so many processes of one thread each.
TEST_PROCESSES ?= 2
# Extra flags for pip, e.g. an index with CPU builds of torch.
PIP_FLAGS ?=
INSTALLED := .venv/.installed

EXTERNAL := runs/demo_external/demo
BRIDGE := runs/q_p1_bridge/demo
REPORT := reports/demo
CLI := $(BIN)/python cli.py
# What runs of one family's demo start from.
ready = artifacts/$(1)/checkpoint/checkpoint.json artifacts/$(1)/data/short/manifest.json artifacts/$(1)/data/long/manifest.json

.PHONY: help install demo matrix-demo matrix-wallclock test check docs format clean-demo
.DELETE_ON_ERROR:
# What a chain made on its way to a checkpoint is kept, and not made again where only the checkpoint is left.
.SECONDARY:

help:
	@sed -n 's/^# //p;/^$$/q' Makefile

install: $(INSTALLED)

# litdata requires torchvision, which it does not need for tokens and which breaks a CPU build of torch: hence --no-deps.
# Its version is pinned here because it cannot stand in pyproject.toml.
$(INSTALLED): pyproject.toml Makefile
	@echo "Installing into .venv: about 2 minutes, 1.5 GB (more where torch brings CUDA)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -e '.[dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps litdata==0.2.76
	@touch $@

demo: $(INSTALLED) $(call ready,demo)
	@echo "Converting inside one run: B1 sliding window, B2 TTT at 256 tokens, C TTT at 1,024 tokens (about 6 minutes)"
	@$(CLI) fit --config configs/q_p1_bridge.yaml --config configs/size/demo.yaml
	@$(CLI) report $(EXTERNAL) $(BRIDGE)
	@echo
	@echo "Look next:"
	@echo "  loss by position   $(BRIDGE)/position_loss.png"
	@echo "  run record         $(BRIDGE)/record.json"
	@echo "  TensorBoard        $(BIN)/tensorboard --logdir runs"

matrix-demo: $(INSTALLED) $(call ready,demo) $(call ready,demo_gemma)
	@$(CLI) matrix --config configs/matrix/demo.yaml --jobs $(MATRIX_JOBS)
	@$(CLI) report runs/*/demo --output $(REPORT)

matrix-wallclock: matrix-demo
	@$(CLI) matrix --config configs/matrix/demo_wallclock.yaml --jobs $(MATRIX_JOBS)
	@$(CLI) report runs/*/demo runs/*/demo-t* --output $(REPORT)

# The external model of each family's demo, from text to an imported checkpoint. The stem is demo (Qwen-shaped) or demo_gemma.
PREPARE_demo := configs/data/stdlib
PREPARE_demo_gemma := configs/data/gemma_stdlib

artifacts/%/data/short/manifest.json: | $(INSTALLED)
	@echo "$* [1/5] Standard library of this Python: tokenizer and short documents (about 30 seconds)"
	@$(CLI) prepare --config $(PREPARE_$*).yaml

artifacts/%/data/long/manifest.json: | artifacts/%/data/short/manifest.json
	@echo "$* [2/5] Long documents, same split and tokenizer (about 15 seconds)"
	@$(CLI) prepare --config $(PREPARE_$*)_long.yaml

# The recipe runs again after an interruption: fit continues where it was cut off.
runs/%_external/demo/checkpoints/A/checkpoint.json: | artifacts/%/data/long/manifest.json
	@echo "$* [3/5] Training the external dense model from nothing (about 3 minutes)"
	@$(CLI) fit --config configs/$*/pretrain.yaml

artifacts/%/external/config.json: | runs/%_external/demo/checkpoints/A/checkpoint.json
	@echo "$* [4/5] Exporting it as a Hugging Face folder (seconds)"
	@$(CLI) export --checkpoint runs/$*_external/demo/checkpoints/A --output artifacts/$*/external

artifacts/%/checkpoint/checkpoint.json: | artifacts/%/external/config.json
	@echo "$* [5/5] Importing it: audit, and parity with transformers (about 15 seconds)"
	@$(CLI) import --source artifacts/$*/external --output artifacts/$*/checkpoint --trained-by runs/$*_external/demo

test: $(INSTALLED)
	@echo "Running the tests: at most 10 minutes on 2 cores"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

check: $(INSTALLED)
	@echo "Checking lint, formatting, types and layering: about 30 seconds"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/test_layering.py

docs: $(INSTALLED)
	@cd tests && ../$(BIN)/python -m helpers.field_tables

format: $(INSTALLED)
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

clean-demo:
	@echo "Removing what make demo and make matrix-demo made"
	@rm -rf artifacts/demo artifacts/demo_gemma $(REPORT) runs/*/demo runs/*/demo-t*
