# Every target sets up .venv first when it is missing or out of date. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/listops_demo

.PHONY: demo test check clean

demo: $(RUN)/cost.json
	$(BIN)/lineara fit --config recipes/long_range_arena/listops_demo.yaml --ckpt_path last
	$(BIN)/lineara test --config recipes/long_range_arena/listops_demo.yaml
	@cat $(RUN)/cost.md
	@echo "pictures:"
	@$(BIN)/lineara draw curves --run_dir $(RUN)
	@$(BIN)/lineara draw maps --checkpoint $(RUN)/checkpoints/best.ckpt --layer 1
	@$(BIN)/lineara draw cost --costs $(RUN)/cost.json

# Some files at a time, each on one thread, one process per core; a file's tests stay together, for what they share.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell src tests docs recipes benchmarks README.md CONTRIBUTING.md CHANGELOG.md

clean:
	rm -rf .venv data/listops runs/listops_demo

$(RUN)/cost.json: .venv/installed
	$(BIN)/lineara bench cost --positions 256 1024 4096 16384 --limit_seconds 5 --output $@

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "lineara needs Python 3.11 or newer, got %d.%d; name one by: make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
