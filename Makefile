PYTHON ?= $(shell command -v python3.11 || command -v python3)
READY := .venv/ready
DOCS := .venv/ready-docs

PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q
PARALLEL := -n auto --dist worksteal

.PHONY: help setup demo test processes slow browser slurm lint types check bench docs

help: ## this list
	@sed -n 's/^\([a-z]*\):.* ## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST)
setup: $(READY) ## make .venv and install the versions of constraints.txt into it
demo: $(READY) ## set up, then tune the built-in model on handwritten digits
	.venv/bin/finetune train method=snell sparsity=0.1
test: $(READY) ## the quick tests, on all cores; none of them starts a process
	$(PYTEST) $(PARALLEL) -m "not (slow or processes or slurm or browser)"
processes: $(READY) ## the tests that start processes
	$(PYTEST) $(PARALLEL) -m "processes and not (slow or slurm or browser)"
slow: $(READY) ## the slow tests, for an hour or more; FAMILY=sparse runs those of one family of methods
	$(PYTEST) $(PARALLEL) -m slow $(if $(FAMILY),--family $(FAMILY))
browser: $(READY) ## the tests of the HTML report in a headless Chromium, where there is one
	$(PYTEST) -m browser tests/report
slurm: $(READY) ## the tests of clusters, where there is a Slurm
	$(PYTEST) -m slurm tests/sweep
lint: $(READY) ## style
	.venv/bin/ruff check . && .venv/bin/ruff format --check .
types: $(READY) ## static types, strict
	.venv/bin/mypy
check: lint types test ## style, types and the quick tests
bench: $(READY) ## the table of docs/benchmarks.md: memory and speed beside their peers
	for t in snell sparse curve; do .venv/bin/python scripts/benchmark.py --table $$t || exit; done
docs: $(DOCS) ## the documentation, built into site/; warnings are errors, and nothing is fetched
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[test,dev]' && touch $@
$(DOCS): $(READY)
	.venv/bin/pip install -q -c constraints.txt 'finetune-bench[docs]' && touch $@  # it is installed: only the extra is added
