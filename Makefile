# install: everything, into VENV   serve: only what serving needs, into VENV_SERVE (no torch)   see docs/development.md
PYTHON ?= python3
VENV ?= .venv
VENV_SERVE ?= .venv-serve
TORCH ?= torch==2.13.0
# More arguments for the pip call that installs torch, for example the index of its CPU builds: --index-url ...
TORCH_INDEX ?=
PYTEST_ARGS ?=
# How many files of tests run at a time. Those that watch a clock come after those that compute, which use one thread each.
TEST_PROCESSES ?= 2
WATCH_A_CLOCK = tests/chaos $(addprefix tests/service/,observe queue supervise worker) tests/test_fleet.py
CHAOS_SEED ?= 1
CHAOS_JOBS ?= 100
SOAK_MINUTES ?= 10
MUTANTS ?=
VENV_AUDIT ?= .venv-audit

PIP = -m pip --disable-pip-version-check --quiet
RUN = $(VENV)/bin/python -m

.PHONY: help install serve lint check test docs mutants bench-check chaos soak audit sbom gpu-test gpu-train-test lock docker-test quantised-test clean
.DELETE_ON_ERROR:

help:
	@echo "make serve        serve the starter student at http://127.0.0.1:8000 (FEWSTEP_PORT, FEWSTEP_HOST)"
	@echo "make test         the whole test suite (TEST_PROCESSES, PYTEST_ARGS)"
	@echo "make install      everything, into $(VENV)"
	@echo "make lint check   ruff; mypy"
	@echo "make docs         write what documents take from the code"
	@echo "make mutants      small faults, one at a time: which do the tests not notice? (MUTANTS)"
	@echo "make bench-check  has the service become slower? ratios against benchmarks/baseline.json"
	@echo "make chaos        every fault of the matrix, at full size; writes docs/reliability.md (CHAOS_SEED, CHAOS_JOBS)"
	@echo "make soak         steady load with kills for SOAK_MINUTES, plotted in out/soak/"
	@echo "make audit sbom   known vulnerabilities in the lock files; the bill of materials"
	@echo "make gpu-test     every runtime on this machine's NVIDIA GPU, proven and timed"
	@echo "make gpu-train-test   training on this machine's NVIDIA GPUs: resume, two processes, a step of FLUX's size"
	@echo "make docker-test  build the images and bring docker-compose.yml up"
	@echo "make quantised-test  the tests of quantised bases and optimizers, with bitsandbytes and torchao in out/quantised"
	@echo "make lock         the lock files, from pyproject.toml (needs uv)"

install: $(VENV)/.installed

serve: $(VENV_SERVE)/.installed
	@$(VENV_SERVE)/bin/python -m service.run

lint: $(VENV)/.installed
	@$(RUN) ruff check .
	@$(RUN) ruff format --check --quiet .

check: $(VENV)/.installed
	@$(RUN) mypy

test: $(VENV)/.installed
	@OMP_NUM_THREADS=1 $(RUN) pytest --numprocesses $(TEST_PROCESSES) --dist loadfile $(WATCH_A_CLOCK:%=--ignore=%) $(PYTEST_ARGS); \
	computing=$$?; $(RUN) pytest --numprocesses $(TEST_PROCESSES) --dist loadfile $(WATCH_A_CLOCK) $(PYTEST_ARGS); watching=$$?; \
	case $$computing,$$watching in 0,0|0,5|5,0) ;; *) exit 1 ;; esac  # 5: PYTEST_ARGS selects none of these

# With the libraries beside the environment: where they are in it, whatever imports diffusers has lines of theirs on stderr.
quantised-test: $(VENV)/.installed
	@$(VENV)/bin/python $(PIP) install --no-deps --require-hashes --upgrade --target out/quantised -r requirements/quantised.lock
	@PYTHONPATH=out/quantised $(RUN) pytest tests/training/test_quantise.py $(PYTEST_ARGS)

mutants: $(VENV)/.installed
	@$(RUN) tests.mutants.run $(MUTANTS)

bench-check: $(VENV)/.installed
	@$(RUN) benchmarks.check

docs: $(VENV)/.installed
	@$(RUN) tests.documents.generated

chaos: $(VENV)/.installed
	@CHAOS_JOBS=$(CHAOS_JOBS) $(RUN) pytest tests/chaos --chaos --chaos-seed $(CHAOS_SEED) $(PYTEST_ARGS)

soak: $(VENV)/.installed
	@$(RUN) tests.chaos.soak --minutes $(SOAK_MINUTES) --seed $(CHAOS_SEED)

# It fails, and says so, also where the database of known vulnerabilities cannot be reached.
audit: $(VENV_AUDIT)/.installed
	@$(VENV_AUDIT)/bin/python -m deploy.audit requirements/*.lock

sbom: $(VENV_AUDIT)/.installed
	@mkdir -p out
	@$(VENV_AUDIT)/bin/python -W ignore -m cyclonedx_py requirements requirements/serve.lock --pyproject pyproject.toml --validate --output-reproducible -o out/sbom.json
	@echo "out/sbom.json: what serving is made of (CycloneDX)"

gpu-test: $(VENV)/.installed
	@$(RUN) benchmarks.gpu_test

gpu-train-test: $(VENV)/.installed
	@$(RUN) benchmarks.gpu_train

docker-test:
	@$(PYTHON) -m deploy.docker_test

# Needs uv. torch is left out: its CPU build has another hash in every index.
UV = uv
COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header
lock:
	$(COMPILE) pyproject.toml -o requirements/serve.lock
	$(COMPILE) pyproject.toml --extra s3 -c requirements/serve.lock -o requirements/s3.lock
	$(COMPILE) pyproject.toml requirements/torch-needs.in --extra dev -c requirements/serve.lock \
		--overrides requirements/without-torch.txt --no-emit-package torch -o requirements/dev.lock
	$(COMPILE:--universal=--python-platform x86_64-manylinux_2_28) pyproject.toml requirements/gpu.in \
		--extra gpu --extra s3 -c requirements/serve.lock --no-emit-package onnxruntime -o requirements/gpu.lock
	$(COMPILE) --no-deps requirements/quantised.in -o requirements/quantised.lock
	$(COMPILE) requirements/audit.in -o requirements/audit.lock

clean:
	rm -rf $(VENV) $(VENV_SERVE) $(VENV_AUDIT) .pytest_cache .ruff_cache .mypy_cache

$(VENV)/.installed: requirements/dev.lock
	@$(call new_venv,$(VENV))
	@echo "Installing what training, export and the tests need into $(VENV); the first time this takes minutes."
	@$(VENV)/bin/python $(PIP) install --no-deps --require-hashes -r requirements/dev.lock
	@$(VENV)/bin/python $(PIP) install $(TORCH_INDEX) "$(TORCH)"
	@touch $@

$(VENV_SERVE)/.installed: requirements/serve.lock
	@$(call new_venv,$(VENV_SERVE))
	@echo "Installing what serving needs into $(VENV_SERVE); the first time this takes a minute."
	@$(VENV_SERVE)/bin/python $(PIP) install --no-deps --require-hashes -r requirements/serve.lock
	@touch $@

$(VENV_AUDIT)/.installed: requirements/audit.lock
	@$(call new_venv,$(VENV_AUDIT))
	@echo "Installing what audits the lock files into $(VENV_AUDIT); the first time this takes a minute."
	@$(VENV_AUDIT)/bin/python $(PIP) install --no-deps --require-hashes -r requirements/audit.lock
	@touch $@

TOO_OLD = fewstep needs Python 3.11 or later, and $(PYTHON) is not: say for example make PYTHON=python3.11.
NO_VENV = $(PYTHON) cannot make virtual environments: install the package python3-venv.
define new_venv
"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo '$(TOO_OLD)' >&2; exit 1; }; \
"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo '$(NO_VENV)' >&2; exit 1; }; \
test -x $(1)/bin/python || "$(PYTHON)" -m venv $(1)
endef
