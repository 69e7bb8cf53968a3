# `make demo`, `make bench` and `make test` do all their own set-up in .venv/, and reuse it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO_ARGS ?=
BENCH_ARGS ?=
PAPERS_ARGS ?=
TEST_PROCESSES ?= 2
# One of those that `pip install .` compiles for.
CUDA_ARCHITECTURES ?= 90

bin := .venv/bin
integrations := .venv/integrations
build := CMakeLists.txt pyproject.toml $(shell find csrc -type f)
native_code = $(shell find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.c' -o -name '*.cu' -o -name '*.cuh')
sources := date_kernels python tests examples bench

.NOTPARALLEL:
.PHONY: demo demo-tune papers papers-quick bench test test-integrations mutants lint format clean

demo: .venv/demo
	$(bin)/python examples/demo/run.py $(DEMO_ARGS)

demo-tune: .venv/demo
	$(bin)/python examples/demo/tune.py

# The papers' studies: hours, and what shows their point within ten minutes.
papers: .venv/demo
	$(bin)/python examples/papers/run.py $(PAPERS_ARGS)

papers-quick: .venv/demo
	$(bin)/python examples/papers/run.py --size quick $(PAPERS_ARGS)

bench: .venv/bench
	$(bin)/python -m date_optim.bench $(BENCH_ARGS)

# A file's tests in one process, so that what it builds is built once. Beside other processes
# pytest-benchmark would warn, which is an error; no benchmark is among these tests.
test: lint
	$(bin)/pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --benchmark-disable

# Beside trainers, trackers and other packages' optimizers.
test-integrations: $(integrations)/done
	$(integrations)/bin/python $(bin)/pytest tests/integrations tests/peers tests/test_trackers.py

# Breaks one promise at a time and fails unless the test named for it fails.
mutants: .venv/test
	$(bin)/python tests/mutants/run.py

lint: .venv/test
	$(bin)/ruff check $(sources)
	$(bin)/ruff format --check $(sources)
	$(bin)/mypy
	$(bin)/clang-format --dry-run --Werror $(native_code)

format: .venv/test
	$(bin)/ruff check --fix $(sources)
	$(bin)/ruff format $(sources)
	$(bin)/clang-format -i $(native_code)

# A build that fails is an error here, where `pip install .` would go on without compiled kernels.
export DATE_KERNELS_NATIVE := ON

# torch comes first and alone, so that nothing else decides which build of it is taken.
.venv/torch:
	$(PYTHON) -m venv .venv
	$(bin)/pip install --quiet "$(TORCH)" numpy
	touch $@

# The demo's steps are on the CPU, and the kernels of GPUs compile for minutes.
.venv/demo: .venv/torch $(build)
	DATE_KERNELS_CUDA=OFF $(bin)/pip install --quiet --editable ".[demo]"
	touch $@

# With the CUDA kernels where there is a GPU to time them on, and with the packages that the CPU's
# bars are over; without their dependencies, which would replace torch.
cpu_peers := ^(timm|torch-optimizer|pytorch-ranger|pytorch-optimizer)==
.venv/bench: .venv/torch $(build) tests/peers/requirements.txt
	DATE_KERNELS_CUDA=$(if $(shell command -v nvidia-smi),AUTO,OFF) $(bin)/pip install --quiet \
	  --editable ".[bench]" -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native
	grep -E '$(cpu_peers)' tests/peers/requirements.txt | $(bin)/pip install --quiet --no-deps -r /dev/stdin
	touch $@

.venv/test: .venv/torch $(build)
	$(bin)/pip install --quiet --editable ".[bench,demo,test]" -C cmake.define.DATE_KERNELS_WERROR=ON \
	  -C cmake.define.DATE_KERNELS_CUDA=AUTO -C cmake.define.CMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)
	touch $@

# On top of .venv, which stays as it is: its torch and its build serve here, too.
$(integrations)/done: .venv/test tests/integrations/requirements.txt tests/peers/requirements.txt
	$(bin)/python -m venv $(integrations)
	$(bin)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	  > "$$($(integrations)/bin/python -c 'import site; print(site.getsitepackages()[0])')/below.pth"
	$(integrations)/bin/python -m pip install --quiet -r tests/integrations/requirements.txt \
	  "torch==$$($(bin)/python -c 'import torch; print(torch.__version__)')"
	$(integrations)/bin/python -m pip install --quiet --no-deps -r tests/peers/requirements.txt
	touch $@

clean:
	rm -rf .venv build out
