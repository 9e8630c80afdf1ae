# The two commands: `make study` and `make test`. Both set up .venv first, in the versions of constraints.txt.
PYTHON ?= python3
STUDY ?= demo
CORES ?= all
BIN := .venv/bin
# Compiled modules are kept: without them each notebook compiles torch and transformers again when it starts.
unexport PYTHONDONTWRITEBYTECODE
# uv finds a folder of wheels only through its own variable.
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

.DEFAULT_GOAL := help
.PHONY: help setup study test faults demo shots lab sync clean

help:  ## print this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10
	@echo; echo "STUDY=<name> takes params/<name>.yaml (default demo): $$(cd params && ls *.yaml 2>/dev/null | sed 's/\.yaml//' | xargs)"

setup: .venv/installed  ## make .venv with the pinned versions

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"error: Python 3.11 or newer is needed, $(PYTHON) is {v}; try make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==0.13.9
	VIRTUAL_ENV="$(CURDIR)/.venv" $(BIN)/uv pip install -c constraints.txt -e '.[dev]'
	@touch $@

study: setup  ## run the notebooks of STUDY that are out of date, then print the table of variants
	@$(BIN)/snakemake --cores $(CORES) --rerun-incomplete --quiet host progress rules reason --config study=$(STUDY)
	@$(BIN)/python -m vitlib.report summary --study $(STUDY)

test: setup  ## linters and tests; the tests of one file share a process, because those of the notebooks share a folder
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/python -m pytest -n 2 --dist loadscope -q

faults: setup  ## kill, damage, fill up and mislead; writes outputs/gallery/faults.csv (about 15 minutes)
	@$(BIN)/python tools/faults.py

demo: outputs/$(STUDY)/checkpoints setup  ## open a page on which two variants of STUDY classify a dropped picture
	@$(BIN)/python -m vitlib demo --checkpoint outputs/$(STUDY)

outputs/%/checkpoints:
	@echo "error: study '$*' has no checkpoints yet: run \`make study STUDY=$*\` first" >&2; exit 1

shots: setup  ## screenshots of the pages of STUDY (or of FOLDER=outputs/gallery/<name>) into its folder shots/
	@$(BIN)/python tools/shots.py $(or $(FOLDER),outputs/$(STUDY))

lab: setup  ## open the notebooks in JupyterLab; they write to outputs/lab/
	$(BIN)/jupyter lab notebooks

sync: setup  ## bring each notebook's .py and .ipynb in step (the newer one wins), and write the repository's address
	$(BIN)/jupytext --sync notebooks/*.py
	$(BIN)/python tools/address.py

# An empty name would remove every study, one with a slash or a dot first anything; the gallery is kept in git.
clean: export CLEANED := $(STUDY)
clean:  ## remove the results of STUDY
	@case "$$CLEANED" in ''|.*|gallery|*[!A-Za-z0-9._-]*) echo "error: STUDY='$$CLEANED' names no study whose results may be removed" >&2; exit 1;; esac
	rm -rf "outputs/$$CLEANED" ".snakemake/done/$$CLEANED"
