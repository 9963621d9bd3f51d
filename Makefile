# Works from any directory: make -C path/to/rmoe test
ROOT := $(dir $(realpath $(lastword $(MAKEFILE_LIST))))
# The first of these that runs.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.10 \
	python3; do $$name -c '' 2>/dev/null && echo $$name && break; done)
SETUP := @$(PYTHON) $(ROOT)tools/bootstrap.py
RUN := cd $(ROOT) && .venv/bin/python
# Two workers with a thread each: the tests are many and small.
PYTEST := -m pytest -n 2
# What the detection models and the stand-in need of mmcv's operators.
WITH_OPERATORS := tests/test_mmcv_ops tests/test_backbones/test_mmdet.py \
	tests/test_tools/test_inferencers.py tests/test_tools/test_detection.py

.PHONY: env test test-oldest test-fork lint demo clean

env:
	$(SETUP) test

ifeq ($(MMCV),full)
test:
	$(SETUP) full
	@cd $(ROOT) && PYTHONPATH=$(ROOT).venv/mmcv-full .venv/bin/python \
		$(PYTEST) $(WITH_OPERATORS) $(ARGS)
else
test: env lint
	@$(RUN) $(PYTEST) tests $(ARGS)
endif

test-oldest:
	$(SETUP) oldest
	@cd $(ROOT) && .venv-oldest/bin/python $(PYTEST) tests $(ARGS)

test-fork:
	$(SETUP) fork
	@cd $(ROOT) && .venv-fork/bin/python $(PYTEST) tests $(ARGS)

lint: env
	@$(RUN) -m ruff check rmoe tools tests configs setup.py
	@$(RUN) -m mypy rmoe

demo:
	$(SETUP)
	@$(RUN) tools/demo.py $(if $(DATA),--data "$(abspath $(DATA))") $(ARGS)

clean:
	rm -rf $(ROOT).venv $(ROOT).venv-oldest $(ROOT).venv-fork $(ROOT)work_dirs
