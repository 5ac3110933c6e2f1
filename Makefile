# make demo: the main job. make test: what CI runs. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow check docs bench bench-check evidence methods compat clean

demo: $(VENV)/.demo
	$(BIN)/laconic demo $(ARGS)

# The shape checks of jaxtyping and beartype are on, except for torch.compile and for bad arguments.
test: check
	LACONIC_CHECK_SHAPES=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not unchecked and not slow"
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "unchecked and not slow"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m slow
	LACONIC_EVERY_PAIR=1 $(BIN)/python -m pytest -q -n 2 tests/test_laws.py tests/test_zoo.py tests/test_transformers.py \
		tests/test_timm_families.py tests/test_torchvision.py tests/test_open_clip.py tests/test_lvvit_psvit.py

check: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/mypy

# The pages that need no measurement.
docs: $(VENV)/.dev
	$(BIN)/python -m benchmarks.tables docs/macs.md
	$(BIN)/python -m benchmarks.backbones docs/backbones.md
	$(BIN)/python -m benchmarks.plan_page docs/plan.md results/plan-*.json
	$(BIN)/python -m benchmarks.methods_table docs/methods.md --page-only
	$(BIN)/python -m benchmarks.readme

# Hours on two cores. It can be interrupted and resumed: runs that results/evidence.jsonl holds are not repeated.
evidence: $(VENV)/.dev
	$(BIN)/python -m benchmarks.evidence --page docs/evidence.md $(ARGS)

# An hour on two cores; it can be resumed too.
methods: $(VENV)/.dev
	$(BIN)/python -m benchmarks.methods_table docs/methods.md $(ARGS)

# Half an hour on an otherwise idle machine: measure the speed and write its pages.
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.performance docs/performance.md --run cpu
	$(BIN)/python -m benchmarks.performance docs/performance.md --run cpu-compiled
	$(BIN)/python -m benchmarks.scaling docs/scaling.md --run

# Report what has become slower than in the committed run (on the same kind of machine).
bench-check: $(VENV)/.dev
	$(BIN)/python -m benchmarks.performance docs/performance.md --check cpu

# More than half an hour: two new environments in .compat, with the newest and the oldest supported versions.
compat:
	$(PYTHON) tests/compat.py docs/compatibility.md $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The extra is installed against the pinned versions, and again only when they change.
$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(VENV)/.demo $@

clean:
	rm -rf $(VENV) .compat .pytest_cache .mypy_cache .ruff_cache build dist
