# make train, make test and make bars work from a bare clone: they create .venv and install everything.
# PYTHON: the interpreter (3.11 to 3.13).  TORCH_INDEX: a package index to take torch's CPU build from, if yours has none.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
GROUP ?= main
BAR ?=
ARGS ?=
# What boxes need, and the programs that shell tasks use; DEBIAN= installs none of them.
DEBIAN ?= bubblewrap git sqlite3 make gcc libc6-dev zip unzip xz-utils bzip2 jq procps

.PHONY: install debian train warmstart test bars pages lint types clean

install: debian $(VENV)/.installed

# Root installs what is missing; anyone else is told. Without it make train runs the environments that need no box.
debian:
	@dpkg-query --show $(DEBIAN) > /dev/null 2>&1 || \
		{ [ "$$(id -u)" = 0 ] && timeout 300 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 600 \
			apt-get install -qq -y --no-install-recommends $(DEBIAN) > /dev/null; } || \
		echo "For boxes (terminal, SWE): apt-get install $(DEBIAN)"

$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard kernels/cpu/*)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "Palaestra needs Python 3.11 to 3.13; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: install
	$(BIN)/palaestra train quickstart $(ARGS)

# The checkpoint that the quickstart begins from, anew: minutes on two cores.
warmstart: install
	@test ! -e runs/warmstart || { echo "runs/warmstart exists: move it away, or finish it with palaestra train warmstart --resume"; exit 1; }
	$(BIN)/palaestra train warmstart $(ARGS)
	$(BIN)/palaestra model convert runs/warmstart/model --output trainer/assets/warmstart
	cp runs/warmstart/recipe.json runs/warmstart/summary.json trainer/assets/warmstart/
	cd trainer/assets/warmstart && sha256sum model.safetensors > sha256

test: install
	$(BIN)/pytest $(ARGS)

bars: install
	$(BIN)/python benchmarks/bars.py GROUP=$(GROUP) $(if $(BAR),BAR=$(BAR)) $(ARGS)

pages: install
	$(BIN)/python benchmarks/pages.py

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: install
	@mkdir -p build/types/palaestra
	@for room in gym environments tasks kernels model rollout trainer; do \
		ln -sfn ../../../$$room build/types/palaestra/$$room; done
	$(BIN)/mypy -p palaestra

clean:
	rm -rf $(VENV) build *.egg-info kernels/_cpu.so
