# Every target makes its own virtual environment when it is missing or out of date.
#   make PYTHON=/path/to/python3.12 ...   chooses the interpreter      make VENV=.venv-311 ...   keeps several side by side

VENV ?= .venv
# More than the two cores of a small machine: some tests wait for processes and disks.
WORKERS ?= 3
export PYTHONUNBUFFERED := 1
# The tests start many processes: each would compile the sources again.
unexport PYTHONDONTWRITEBYTECODE
# Large arrays in large pages: a step of the quickstart allocates a few hundred megabytes, and takes a quarter less time for it.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

python := $(VENV)/bin/python
ready := $(VENV)/.ready
packages := $(patsubst %/__init__.py,%,$(wildcard sparse_lm/__init__.py pallas_kernels/__init__.py experiments/__init__.py))
multidevice := $(wildcard tests/multidevice)
# Each worker starts with tests that lie together, so those of a file share what they compiled, and takes others' when it is done.
workers := -n $(WORKERS) --dist worksteal
# Tests compile far more than they compute: XLA's optimizations of CPU code cost a quarter of the time and gain nothing here.
fast := XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0"
fake_devices := XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-faults test-all lint clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# An environment of another Python version than the one asked for is made anew.
ifdef PYTHON
ifneq ($(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>&1),$(shell cat $(ready) 2>/dev/null))
.PHONY: $(ready)
endif
endif

$(ready): setup.cfg pyproject.toml $(wildcard constraints/*)
	@constraints/make_venv.sh $(VENV) $(PYTHON)

quickstart: $(ready)  ## train a small sparse language model on real text and write its report
	@$(python) scripts/pretrain.py quickstart
	@echo "The report of the run: $(CURDIR)/runs/quickstart/report.html"

test: $(ready)  ## the tests, without slow ones and those of faults
	$(fast) $(python) -m pytest $(workers) -m "not slow and not faults" --ignore=tests/multidevice
ifneq ($(multidevice),)
	$(fake_devices) $(python) -m pytest $(workers) -m "not slow and not faults" $(multidevice)
endif

test-faults: $(ready)  ## runs that are stopped, killed or lose a process, and go on to the same bits
	$(fast) $(python) -m pytest $(workers) -m "faults and not slow" tests/train tests/weight_sparsity tests/multiprocess

test-all: $(ready)  ## every test, slow ones included
	$(fast) $(python) -m pytest $(workers) --ignore=tests/multidevice
ifneq ($(multidevice),)
	$(fake_devices) $(python) -m pytest $(workers) $(multidevice)
endif

lint: $(ready)  ## ruff (rules and format) and mypy
	@status=0; \
	for check in "ruff check ." "ruff format --check ." "mypy $(packages)"; do \
	    echo "$$check"; $(python) -m $$check || status=1; \
	done; exit $$status

clean:  ## remove the environment and caches; runs/ and data/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
