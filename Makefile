# make train   set everything up and run the main job (ARGS="recipe.yaml --set a.b=c" to pass arguments)
# make test    set everything up and pass the tests;   make test-slow   the long matrices
# make cluster-check FILE=cluster/aws.yaml   check deployment files;   make audit   known vulnerabilities of the packages
# make docs    build the documentation into build/site;   make wheel-check   train with the built wheel, outside the tree
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?= -q
BIN = $(VENV)/bin
# In the order of their names: those in tests/cluster are among the longest and come first.
TWO = -n 2 --dist loadfile --no-loadscope-reorder
BROWSER := $(shell command -v chromium 2>/dev/null)

.PHONY: install train test test-fast test-slow lint docs wheel-check cluster-check audit clean
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "error: Python %d.%d found, 3.11 to 3.13 needed: make PYTHON=python3.12 ..." % v)'
	@echo "installing into $(VENV): several minutes and about 8 GB where PyTorch's wheel carries CUDA"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[demo,dev,docs]'
	@touch $@

train: install
	@$(BIN)/python -m pipeline.train $(ARGS)

lint: install
	@$(BIN)/ruff format --check -q . && $(BIN)/ruff check -q . && $(BIN)/mypy --no-error-summary

test: lint
	@$(if $(BROWSER),:,echo "chromium is not installed (apt-get install chromium): the report is not opened in a browser")
	@$(BIN)/python -m pytest $(TWO) $(if $(BROWSER),,-m 'not slow and not browser') $(ARGS)

test-fast: install
	@$(BIN)/python -m pytest $(TWO) -m 'not slow and not cluster and not browser' $(ARGS)

test-slow: install
	@$(BIN)/python -m pytest -m slow $(ARGS)

docs: install
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

wheel-check: install
	@$(BIN)/python -m pytest tests/test_wheel.py $(ARGS)

cluster-check: install
	@$(BIN)/python -m tools.cluster_check $(FILE)

audit: install
	@mkdir -p build && $(BIN)/python -m pip freeze --exclude-editable > build/audit.txt
	@$(BIN)/pip-audit --strict --disable-pip --no-deps --progress-spinner off --requirement build/audit.txt $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
