# make demo and make test are all a new user needs; each makes the environment when it is not there.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.* csrc/*/*.*)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test bench lint clean

demo: $(VENV)/.built
	@$(BIN)/par-xl demo

test: $(VENV)/.built
	@$(BIN)/python -m pytest -n 2 --dist worksteal

bench: $(VENV)/.built
	@$(BIN)/par-xl bench

lint: $(VENV)/.built
	@echo "== ruff, mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

$(VENV)/.installed: requirements.txt
	@echo "== environment in $(VENV) ($$($(PYTHON) --version))"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== torch, triton and the build's tools (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq -r requirements.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed pyproject.toml setup.py $(SOURCES)
	@echo "== par_xl: its dependencies, and its C++ and CUDA kernels"
	@$(BIN)/python -m pip install -qq -c requirements.txt --no-build-isolation -e ".[train,test,lint]"
	@$(BIN)/par-xl info
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info par_xl/_C*.so
