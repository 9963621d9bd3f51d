# Works from any directory: make -C path/to/rmoe test
ROOT := $(dir $(realpath $(lastword $(MAKEFILE_LIST))))
PYTHON ?= python3.11
RUN := cd $(ROOT) && .venv/bin/python

.PHONY: env test lint demo clean

env:
	@$(PYTHON) $(ROOT)tools/bootstrap.py

test: env lint
	@$(RUN) -m pytest tests $(ARGS)

lint: env
	@$(RUN) -m ruff check rmoe tools tests configs setup.py
	@$(RUN) -m mypy rmoe

demo: env
	@$(RUN) tools/demo.py $(if $(DATA),--data "$(abspath $(DATA))") $(ARGS)

clean:
	rm -rf $(ROOT).venv $(ROOT)work_dirs
