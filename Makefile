# make demo             install, then watch a pretrained dense model become a TTT-E2E model (about 9 minutes on 2 CPU cores)
# make matrix-demo      all ten arms of both families at demo size, then the report (at most 90 minutes on 2 CPU cores)
# make matrix-wallclock the same for Qwen's bridge at shares of the baseline's GPU-hours, then the report (about 15 minutes more)
# make test             install if needed, then run the tests
# make check            lint, formatting, types, layering

PYTHON ?= python3
BIN := .venv/bin
# Runs side by side, one thread each: on two cores more per hour than one run with two. Budgets in time need one number for all.
MATRIX_JOBS ?= 2
# Test files run side by side in so many processes of one thread each.
TEST_PROCESSES ?= 2
# Extra flags for pip, e.g. an index with CPU builds of torch.
PIP_FLAGS ?=
INSTALLED := .venv/.installed

DEMO := artifacts/demo
EXTERNAL := runs/demo_external/demo
BRIDGE := runs/q_p1_bridge/demo
GEMMA := artifacts/demo_gemma
GEMMA_EXTERNAL := runs/demo_gemma_external/demo
REPORT := reports/demo
CLI := $(BIN)/python cli.py

.PHONY: help install demo matrix-demo matrix-wallclock test check format clean-demo
.DELETE_ON_ERROR:

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

demo: $(INSTALLED) $(DEMO)/checkpoint/checkpoint.json $(DEMO)/data/long/manifest.json
	@echo "[6/6] Converting inside one run: B1 sliding window, B2 TTT at 256 tokens, C TTT at 1,024 tokens (about 6 minutes)"
	@$(CLI) fit --config configs/q_p1_bridge.yaml --config configs/size/demo.yaml
	@$(CLI) report $(EXTERNAL) $(BRIDGE)
	@echo
	@echo "Look next:"
	@echo "  loss by position   $(BRIDGE)/position_loss.png"
	@echo "  run record         $(BRIDGE)/record.json"
	@echo "  TensorBoard        $(BIN)/tensorboard --logdir runs"

$(DEMO)/data/short/manifest.json: | $(INSTALLED)
	@echo "[1/6] Standard library of this Python: tokenizer and short documents (about 30 seconds)"
	@$(CLI) prepare --config configs/data/stdlib.yaml

$(DEMO)/data/long/manifest.json: | $(DEMO)/data/short/manifest.json
	@echo "[2/6] Long documents, same split and tokenizer (about 15 seconds)"
	@$(CLI) prepare --config configs/data/stdlib_long.yaml

# The recipe runs again after an interruption: fit continues where it was cut off.
$(EXTERNAL)/checkpoints/A/checkpoint.json: | $(DEMO)/data/long/manifest.json
	@echo "[3/6] Training the external dense model from nothing (about 3 minutes)"
	@$(CLI) fit --config configs/demo/pretrain.yaml

$(DEMO)/external/config.json: | $(EXTERNAL)/checkpoints/A/checkpoint.json
	@echo "[4/6] Exporting it as a Hugging Face folder (seconds)"
	@$(CLI) export --checkpoint $(EXTERNAL)/checkpoints/A --output $(DEMO)/external

$(DEMO)/checkpoint/checkpoint.json: | $(DEMO)/external/config.json
	@echo "[5/6] Importing it: audit, and parity with transformers (about 15 seconds)"
	@$(CLI) import --source $(DEMO)/external --output $(DEMO)/checkpoint --trained-by $(EXTERNAL)

matrix-demo: $(INSTALLED) $(DEMO)/checkpoint/checkpoint.json $(DEMO)/data/long/manifest.json $(GEMMA)/checkpoint/checkpoint.json
	@$(CLI) matrix --config configs/matrix/demo.yaml --jobs $(MATRIX_JOBS)
	@$(CLI) report runs/*/demo --output $(REPORT)

matrix-wallclock: matrix-demo
	@$(CLI) matrix --config configs/matrix/demo_wallclock.yaml --jobs $(MATRIX_JOBS)
	@$(CLI) report runs/*/demo runs/*/demo-t* --output $(REPORT)

# Gemma's external model comes about like Qwen's, in tokens of its own kind.
$(GEMMA)/data/short/manifest.json: | $(INSTALLED)
	@echo "Gemma [1/5] Standard library of this Python in tokens of Gemma's kind (about 40 seconds)"
	@$(CLI) prepare --config configs/data/gemma_stdlib.yaml

$(GEMMA)/data/long/manifest.json: | $(GEMMA)/data/short/manifest.json
	@echo "Gemma [2/5] Long documents, same split and tokenizer (about 15 seconds)"
	@$(CLI) prepare --config configs/data/gemma_stdlib_long.yaml

$(GEMMA_EXTERNAL)/checkpoints/A/checkpoint.json: | $(GEMMA)/data/long/manifest.json
	@echo "Gemma [3/5] Training the external model from nothing (about 3 minutes)"
	@$(CLI) fit --config configs/demo_gemma/pretrain.yaml

$(GEMMA)/external/config.json: | $(GEMMA_EXTERNAL)/checkpoints/A/checkpoint.json
	@echo "Gemma [4/5] Exporting it as a Hugging Face folder (seconds)"
	@$(CLI) export --checkpoint $(GEMMA_EXTERNAL)/checkpoints/A --output $(GEMMA)/external

$(GEMMA)/checkpoint/checkpoint.json: | $(GEMMA)/external/config.json
	@echo "Gemma [5/5] Importing it: audit, and parity with transformers (about 15 seconds)"
	@$(CLI) import --source $(GEMMA)/external --output $(GEMMA)/checkpoint --trained-by $(GEMMA_EXTERNAL)

test: $(INSTALLED)
	@echo "Running the tests: at most 10 minutes on 2 cores"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

check: $(INSTALLED)
	@echo "Checking lint, formatting, types and layering: about 30 seconds"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/test_layering.py

format: $(INSTALLED)
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

clean-demo:
	@echo "Removing what make demo and make matrix-demo made"
	@rm -rf $(DEMO) $(GEMMA) $(REPORT) runs/*/demo runs/*/demo-t*
