# Works from any directory: make -C path/to/rmoe test
ROOT := $(dir $(realpath $(lastword $(MAKEFILE_LIST))))
# The first of these that runs.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.10 \
	python3; do $$name -c '' 2>/dev/null && echo $$name && break; done)
SETUP := @$(PYTHON) $(ROOT)tools/bootstrap.py
# Two workers with a thread each: the tests are many and small.
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2 $(TESTS) $(ARGS)
TESTS ?= tests

.PHONY: env test test-oldest test-fork lint demo docs clean

env:
	$(SETUP) test

ifeq ($(MMCV),full)
# What detectors and the stand-in need of mmcv's operators.
test: TESTS = tests/test_mmcv_ops tests/test_backbones/test_mmdet.py \
	tests/test_tools/test_inferencers.py
test:
	$(SETUP) full
	@cd $(ROOT) && PYTHONPATH=$(ROOT).venv/mmcv-full $(call PYTEST,.venv)
else
test: env lint
	@cd $(ROOT) && $(call PYTEST,.venv)
endif

test-oldest:
	$(SETUP) oldest
	@cd $(ROOT) && $(call PYTEST,.venv-oldest)

test-fork:
	$(SETUP) fork
	@cd $(ROOT) && $(call PYTEST,.venv-fork)

lint: env
	@cd $(ROOT) && .venv/bin/python -m ruff check rmoe tools tests configs \
		setup.py
	@cd $(ROOT) && .venv/bin/python -m mypy rmoe

# The site, in site/: a broken link is an error. RMOE_REPOSITORY=URL is where
# links to files outside docs/ lead.
docs:
	$(SETUP) docs
	@cd $(ROOT) && NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs \
		build --strict $(ARGS)
	@echo 'open $(ROOT)site/index.html'

demo:
	$(SETUP)
	@cd $(ROOT) && .venv/bin/python tools/demo.py \
		$(if $(DATA),--data "$(abspath $(DATA))") $(ARGS)

clean:
	rm -rf $(ROOT).venv $(ROOT).venv-oldest $(ROOT).venv-fork \
		$(ROOT).venv-docs $(ROOT)site $(ROOT)work_dirs
