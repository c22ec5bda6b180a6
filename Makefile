# Every target is complete by itself: it makes .venv and installs what it needs, once.
#
#   make demo PYTHON=python3.12     another interpreter, 3.10 to 3.13
#   make demo TORCH=torch==2.12.0   another PyTorch; without a GPU the default is the version in
#                                   constraints.txt, of which a CPU build is enough

PYTHON ?= python3
GPU    := $(shell command -v nvidia-smi || command -v rocminfo || command -v rocm-smi)
TORCH  ?= $(if $(GPU),torch,-c constraints.txt torch)
BIN    := .venv/bin

# Python must not take the folder kernels/ for the package of that name on PyPI
export PYTHONSAFEPATH = 1

define CHECK_PYTHON
import sys; v = "%d.%d" % sys.version_info[:2]; \
sys.exit(None if v in ("3.10", "3.11", "3.12", "3.13") else \
"llmkern needs Python 3.10 to 3.13, and $(PYTHON) is " + v + "; choose another: make PYTHON=python3.12")
endef

.PHONY: help demo test bench docs lint prove clean
help:                     ## list the targets
	@sed -n 's/^\([a-z]*\): .*## /  make \1\t/p' $(MAKEFILE_LIST)
demo: .venv/installed     ## train a small GPT with and without the kernels, and compare
	$(BIN)/llmkern demo
test: .venv/installed     ## every op on every backend that this machine has, and all the rest
	$(BIN)/pytest -n auto --dist worksteal
bench: .venv/installed    ## time every op against PyTorch
	PYTHONSAFEPATH= $(BIN)/python -m benchmarks
prove: .venv/installed    ## all evidence that the numbers are right, into docs/proof.md: 22 minutes
	$(BIN)/python tests/proof
docs: .venv/installed     ## make docs/ops.md from the op table
	$(BIN)/python -m llmkern.ops.page docs/ops.md
lint: .venv/linter        ## style
	$(BIN)/ruff check
	$(BIN)/ruff format --check
clean:                    ## remove what was built and installed, and the results of runs
	rm -rf .venv build dist *.egg-info llmkern/_cpu_*.so runs .pytest_cache .ruff_cache .hypothesis

.venv/installed: setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e '.[test,hf]'
	@touch $@
.venv/linter: .venv/installed
	$(BIN)/pip install --quiet 'ruff>=0.9'
	@touch $@
