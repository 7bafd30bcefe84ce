# What people do with a checkout. Everything lives in .venv, which changes only when the pins do.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

MODEL  ?= demo/model
PORT   ?= 8000
ARGS   ?=
DEMO   := $(if $(filter demo/model,$(MODEL)),--served-model-name demo --adapters adapters)

GPU_PYTHON ?= 3.12
OUT        ?= gpu-check

.PHONY: serve test ray-test asan older-cpus emulated check sources-check format docs gpu-check gpu-tune gpu-wheels clean

serve: $(VENV)/.serve  ## serve the bundled demo, or MODEL=<folder or hub id> [PORT=8000] [ARGS="--adapter-slots 8 ..."]
	$(BIN)/lora-serve serve $(MODEL) --port $(PORT) $(DEMO) $(ARGS)

test: $(VENV)/.dev  ## all tests, two files at a time, or ARGS="tests/engine -k drain"
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest $(or $(ARGS),-n 2 --dist loadfile --no-loadscope-reorder)

# Native kernels, adapters that load, and steps that are recorded and replayed. Left out: what runs on no native kernel
# (the GPU's, in the interpreter; lowering and the store).
ASAN_TESTS := tests/kernels tests/adapters/test_device_slots.py tests/model/test_recorded_steps.py \
	tests/engine/test_loading_beside_steps.py

ASAN_FLAGS := -O1 -g1 -fsanitize=address -fno-omit-frame-pointer -DLORA_CHECKED \
	--param=asan-instrumentation-with-call-threshold=0# which compiles in a fifth of the time

asan: $(VENV)/.dev  ## these tests under AddressSanitizer, on a debug build of the kernels, or ARGS="tests/kernels"
	@compiler=$${CXX:-$$(command -v c++ || command -v g++ || true)}; \
	runtime=$$(for part in libasan.so libstdc++.so; do $${compiler:-false} -print-file-name=$$part; done 2>/dev/null); \
	case "$$runtime" in /*libasan*) ;; *) echo "asan: skipped, $${compiler:-no compiler} has no AddressSanitizer"; exit 0;; esac; \
	export LORA_SERVE_KERNEL_FLAGS="$(ASAN_FLAGS)" OMP_WAIT_POLICY=passive; \
	$(BIN)/python -c 'from lora_serve.kernels.cpu.build import library; library()' || exit 1; \
	LD_PRELOAD="$$(echo $$runtime)" ASAN_OPTIONS=detect_leaks=0 \
	$(BIN)/pytest -p no:cacheprovider --ignore-glob='*/test_gpu_*' $(or $(ARGS),$(ASAN_TESTS))

# Builds for CPUs that have less than this one: AVX2 only, and AVX-512 without bf16.
OLDER_CPUS := -march=x86-64-v3 -mno-avx512bf16

older-cpus: $(VENV)/.dev  ## the kernels' tests on builds for older x86-64 CPUs, or OLDER_CPUS="-march=x86-64"
	@if [ "$$(uname -m)" != x86_64 ]; then echo "older-cpus: skipped, this is no x86-64"; exit 0; fi; \
	for flags in $(OLDER_CPUS); do \
		echo "older-cpus: $$flags"; \
		LORA_SERVE_KERNEL_FLAGS=$$flags OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive \
		$(BIN)/pytest -p no:cacheprovider -n 2 --dist loadfile --ignore-glob='*/test_gpu_*' tests/kernels || exit 1; \
	done

ray-test: $(VENV)/.ray  ## a Ray cluster on this machine with three replicas, some of which are killed: some minutes
	$(BIN)/pytest -m ray -s $(or $(ARGS),tests/ray)

emulated: $(VENV)/.dev  ## the kernels' tests on emulated CPUs: aarch64 with and without dot products, x86-64 with AVX2
	PYTHON=$(BIN)/python bash tests/emulated.sh

check: $(VENV)/.dev  ## style, types, and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layers.py tests/test_names.py

sources-check: $(VENV)/.dev  ## sources of adapters against an object store, a hub, web servers and a real server
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[sources]"
	$(BIN)/pytest -m "slow or not slow" tests/sources tests/test_served_sources.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv-docs/.docs  ## build the site of docs/ into build/site; its pages can be opened as files
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

gpu-check:  ## on a machine with a GPU: its tests and benchmark, into OUT=gpu-check; needs no network
	$(PYTHON) bench/gpu/check.py --out $(OUT)

gpu-tune:  ## on a machine with a GPU: measure launch plans of its kernels, for lora_serve/kernels/gpu/tuned
	$(PYTHON) bench/gpu/check.py --only-install
	.venv-gpu/bin/python -m bench.gpu.tune --json $(OUT)/tune.json $(ARGS)

gpu-wheels:  ## on a machine with a network: wheels that gpu-check may need, for GPU_PYTHON=3.12
	$(PYTHON) bench/gpu/wheels.py --python $(GPU_PYTHON)

clean:
	rm -rf $(VENV) .venv-gpu .venv-docs .emulated wheels gpu-check build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: requirements/serve.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/serve.txt -e .
	touch $@

$(VENV)/.ray: requirements/ray.txt $(VENV)/.dev
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/ray.txt
	touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.serve
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/dev.txt
	touch $@

.venv-docs/.docs: requirements/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --disable-pip-version-check -q -r requirements/docs.txt
	touch $@
