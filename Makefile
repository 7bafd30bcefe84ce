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

# Which build of torch: the one without CUDA where there is no NVIDIA device, if CPU_INDEX says which package index has
# it; it is gigabytes smaller.
TORCH     ?= $(if $(wildcard /dev/nvidiactl /dev/nvidia0)$(shell nvidia-smi -L 2>/dev/null),cuda,cpu)
CPU_INDEX ?=

.PHONY: serve train-demo test ray-test tinker-test asan older-cpus emulated check sources-check shared-store-test format docs wheel wheel-test image-test gpu-check gpu-tune gpu-wheels clean

serve: $(VENV)/.serve  ## serve the bundled demo, or MODEL=<folder or hub id> [PORT=8000] [ARGS="--adapter-slots 8 ..."]
	$(BIN)/lora-serve serve $(MODEL) --port $(PORT) $(DEMO) $(ARGS)

train-demo: $(VENV)/.serve  ## train a further task on the demo server while it answers, and ask it (a minute or two)
	$(BIN)/python demo/train_on_server.py --port $(PORT) $(ARGS)

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

tinker-test: .venv-tinker/.tinker  ## Tinker's SDK and two of its cookbook's recipes against a server, which is killed too: minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow $(or $(ARGS),tests/test_tinker_served.py tests/test_tinker_recipes.py)

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

shared-store-test: $(VENV)/.dev  ## replicas that share a folder or a bucket: seconds to be live at all, twenty kills, random faults
	$(BIN)/pytest -s -m "slow or not slow" tests/adapters/shared tests/test_served_shared_store.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv-docs/.docs  ## build the site of docs/ into build/site; its pages can be opened as files
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

# The system's compiler builds for its own machine, Debian's g++-aarch64-linux-gnu for the other one. torch brings the
# OpenMP runtime that they use, so it stays outside.
WHEEL_COMPILERS := c++ $(filter-out $(shell uname -m)-%,$(notdir $(wildcard /usr/bin/aarch64-linux-gnu-g++)))

wheel: $(VENV)/.wheel  ## dist/*.whl with the CPU kernels inside, for x86-64 and, with a cross compiler, for aarch64
	rm -rf dist build
	for compiler in $(WHEEL_COMPILERS); do \
		rm -rf build/lib; \
		CXX=$$compiler $(BIN)/python -m pip wheel --disable-pip-version-check -q --no-deps -w build/wheels . || exit 1; \
	done
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 --only-plat -w dist build/wheels/*.whl

wheel-test: $(VENV)/.dev  ## that a wheel without a compiler serves the demo with native kernels (minutes)
	$(BIN)/pytest -m packaging tests/deploy/test_wheel.py

image-test: $(VENV)/.dev  ## the image, built and run with podman: keys, read-only root, health, drain (minutes)
	$(BIN)/pytest -m packaging tests/deploy/test_image.py

gpu-check:  ## on a machine with a GPU: its tests, then every goal, in eight minutes, into OUT=gpu-check; no network
	$(PYTHON) bench/gpu/check.py --out $(OUT)

gpu-tune:  ## on a machine with a GPU: measure launch plans of its kernels, for lora_serve/kernels/gpu/tuned
	$(PYTHON) bench/gpu/check.py --only-install
	.venv-gpu/bin/python -m bench.gpu.tune --json $(OUT)/tune.json $(ARGS)

gpu-wheels:  ## on a machine with a network: wheels that gpu-check may need, for GPU_PYTHON=3.12
	$(PYTHON) bench/gpu/wheels.py --python $(GPU_PYTHON)

clean:
	rm -rf $(VENV) .venv-gpu .venv-docs .venv-tinker .emulated wheels gpu-check build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# PyPI's torch for Linux has CUDA. Where the index of the other builds cannot be reached, PyPI's has to do.
$(VENV)/.torch: requirements/serve.txt | $(BIN)/python
	@torch=$$(grep -E '^torch==' requirements/serve.txt); \
	if [ -n "$(CPU_INDEX)" ] && [ "$(TORCH) $$(uname -s)" = "cpu Linux" ]; then \
		echo "no NVIDIA device: $$torch without CUDA (TORCH=cuda installs the other build)"; \
		$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --retries 1 --timeout 10 \
			--index-url $(CPU_INDEX) $$torch || echo "$(CPU_INDEX) gave no torch; the package index is asked"; \
	fi
	touch $@

$(VENV)/.serve: requirements/serve.txt pyproject.toml setup.py $(VENV)/.torch
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/serve.txt -e .
	touch $@

$(VENV)/.ray: requirements/ray.txt $(VENV)/.dev
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/ray.txt
	touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.serve
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/dev.txt
	touch $@

# The recipes in an environment of their own, which sees what the tests have as well.
.venv-tinker/.tinker: requirements/tinker.txt $(VENV)/.dev
	$(BIN)/python -m venv .venv-tinker
	.venv-tinker/bin/python -m pip install --disable-pip-version-check -q --no-deps -r requirements/tinker.txt
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$(.venv-tinker/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/tests.pth"
	touch $@

.venv-docs/.docs: requirements/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --disable-pip-version-check -q -r requirements/docs.txt
	touch $@

$(VENV)/.wheel: requirements/wheel.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/wheel.txt
	touch $@
