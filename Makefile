# Each target creates what it needs when it is missing and does nothing twice.

PYTHON ?= python3
VENV   ?= .venv
# Which torch to install. On a GPU machine name the build for its CUDA version, or an installed one's version.
TORCH  ?= torch==2.13.0
# The versions of everything else; empty takes the newest.
CONSTRAINTS ?= tests/constraints.txt

RUN    := runs/quickstart
PY     := $(VENV)/bin/python
READY  := $(VENV)/.installed
CORES  := build/cores

# Each test of several processes would compile every module anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-all test-cores test-pythons lint kernels benchmark layer-benchmark elastic elastic-benchmark context-extension overlap rounds anchors tables pictures docs clean

# Two minutes on 2 cores: a corpus, 1F1B and helix on the same batches, a picture of what both ran.
quickstart: $(READY)
	PYTHON=$(abspath $(PY)) RUN=$(RUN) bash examples/quickstart.sh

# Three at a time, for they wait at times, and file by file: much of a test of several processes is the start of one of them.
# With one thread each, which else wait for each other's in busy loops.
test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 3 --dist loadscope -m "not slow" -q

test-all: $(READY) $(CORES)/.unpacked
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 3 --dist loadscope -q

# What uses megatron-core, with every release that is supported: the wheels that are not installed are unpacked.
test-cores: $(READY) $(CORES)/.unpacked
	PYTHON=$(abspath $(PY)) CORES=$(CORES) bash tests/support/cores/run.sh
	OMP_NUM_THREADS=1 HELIXPIPE_CORES=$(abspath $(CORES)) $(PY) -m pytest -q tests/e2e/test_megatron_lm.py \
	    tests/e2e/test_checkpoints_both_ways.py

# What the base install does, on the other Pythons that are supported; PYTHONS names their commands.
test-pythons:
	bash tests/support/pythons/run.sh

$(CORES)/.unpacked: tests/support/unpack_cores.py | $(READY)
	$(PY) tests/support/unpack_cores.py $(CORES)
	touch $@

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# The CUDA kernels, again after a change to csrc/; installing builds them, too, where nvcc is.
kernels: $(READY)
	$(PY) -m helixpipe.kernels

# Schedules side by side on two ranks, with what the planner predicts from a profile; attention is the heaviest part. The variables let glibc keep
# freed activations instead of returning them page by page, as allocators for GPUs do.
benchmark: $(READY)
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc-per-node 2 \
	    benchmarks/schedules.py --seq-length 8192 --num-layers 8 --schedules 1f1b interleaved helix --predict

# Layers under each way of recomputing, the kernels' bandwidth, the longest sequence. Needs a GPU; nine minutes.
layer-benchmark: kernels
	$(PY) benchmarks/layer.py --output benchmarks/results.csv

# The executor against the simulator: eight ranks whose operations sleep, with real messages as long as a segment's forward. Five minutes.
overlap: $(READY)
	OMP_NUM_THREADS=1 $(PY) benchmarks/overlap.py --num-layers 16 --unit-ms 40 --iterations 3 --schedules helix-1 helix-2

# Interlocked rounds against rounds one after the other, in the same way, with the cost model's times. Five minutes.
rounds: $(READY)
	OMP_NUM_THREADS=1 $(PY) benchmarks/rounds.py

# A training job on the standard library's files as they are, each batch planned while the one before trains. Three minutes on 2 cores.
elastic: $(READY)
	PYTHON=$(abspath $(PY)) bash examples/elastic.sh

# A model on Hugging Face from 256 to 1024 tokens: YaRN, training under helix, loss by position before and after. Four minutes on 2 cores.
context-extension: $(READY)
	PYTHON=$(abspath $(PY)) bash examples/context_extension.sh

# Elastic pipelines against packing, on the same files. Under ten minutes on 2 cores.
elastic-benchmark: $(READY) runs/elastic/stdlib.idx
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc-per-node 2 \
	    benchmarks/elastic_training.py --data-path runs/elastic/stdlib --max-seq-length 32768 --global-batch-size 16 --hidden-size 64 \
	    --rounds 1

runs/elastic/stdlib.idx: | $(READY)
	mkdir -p $(@D)
	$(PY) tools/prepare_data.py --input $$($(PY) -c "import sysconfig; print(sysconfig.get_path('stdlib'))") --pattern "*.py" \
	    --exclude site-packages --vocab-size 1024 --output-prefix $(basename $@)

# Published throughput beside what the planner predicts for it. Seconds.
anchors: $(READY)
	$(PY) benchmarks/anchors.py

# The tables of docs/choosing.md and docs/published.md, from the closed forms and the cost model.
tables: $(READY)
	$(PY) tools/tables.py

# The pictures in docs/, made anew.
pictures: $(READY)
	PYTHON=$(abspath $(PY)) bash tools/draw_pictures.sh

# The site of the documentation, into site/; a page that links nowhere is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

$(READY): setup.py pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS)) --editable ".[test,dev,docs]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs site build/kernels helixpipe/kernels/*.so
