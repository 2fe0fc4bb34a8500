# make demo   install into .venv and run the built-in example on real data
# make test   install into .venv with the test tools and run the tests
# make check  lint, format, types and import contracts
# make faults the long sweeps: every system call killed, power cuts, full disks, flipped bits
# make bench  the CPU benchmark, written to benchmarks/results/
# make figures the pictures of the README, from a run of the demo

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check faults bench figures clean

.venv/.base: pyproject.toml constraints.txt hatch_build.py kernels/cmdgpu_kernels/native/native.cpp
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e .
	touch $@

.venv/.dev: .venv/.base
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/.base
	$(BIN)/cmdgpu demo cmdgpu-demo

test: .venv/.dev
	$(BIN)/pytest -n auto --dist worksteal

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

faults: .venv/.dev
	HYPOTHESIS_PROFILE=search $(BIN)/pytest -m "" tests/faults

.venv/.bench: .venv/.dev
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e ".[bench]"
	touch $@

bench: .venv/.bench
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/out_of_core.py
	$(BIN)/python benchmarks/storage.py
	$(BIN)/python benchmarks/importing.py
	$(BIN)/python benchmarks/render.py

figures: .venv/.dev
	$(BIN)/python benchmarks/figures.py

clean:
	rm -rf .venv build dist cmdgpu-demo
