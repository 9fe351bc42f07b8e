# Each target creates what it needs when it is missing and does nothing twice.

PYTHON ?= python3
VENV   ?= .venv
# Which torch to install. On a GPU machine name the build for its CUDA version, or an installed one's version.
TORCH  ?= torch==2.13.0

RUN    := runs/quickstart
PY     := $(VENV)/bin/python
READY  := $(VENV)/.installed

.PHONY: quickstart test test-all lint benchmark overlap tables pictures clean

# A few minutes on 2 cores: a corpus, a training run under helix on four ranks, a picture of what it ran.
quickstart: $(READY)
	PYTHON=$(abspath $(PY)) RUN=$(RUN) bash examples/quickstart.sh

# Two at a time, file by file: much of a test of several processes is the start of one of them.
test: $(READY)
	$(PY) -m pytest -n 2 --dist loadscope -m "not slow" -q

test-all: $(READY)
	$(PY) -m pytest -n 2 --dist loadscope -q

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Schedules side by side on two ranks, with what the planner predicts from a profile; attention is the heaviest part. The variables let glibc keep
# freed activations instead of returning them page by page, as allocators for GPUs do.
benchmark: $(READY)
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc-per-node 2 \
	    tools/benchmark_schedules.py --seq-length 8192 --num-layers 8 --schedules 1f1b interleaved helix --predict

# The executor against the simulator: eight ranks whose operations sleep, with real messages. Five minutes.
overlap: $(READY)
	OMP_NUM_THREADS=1 $(PY) tools/benchmark_overlap.py

# The README's tables, from the closed forms and the cost model.
tables: $(READY)
	$(PY) tools/readme_tables.py

# The pictures in docs/, made anew.
pictures: $(READY)
	PYTHON=$(abspath $(PY)) bash tools/draw_pictures.sh

$(READY): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet --editable ".[test,dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs
