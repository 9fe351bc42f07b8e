#!/usr/bin/env bash
# The tests of what the base install does, on other Pythons than the one of `make test`: planning, simulation, drawing, advice and
# elastic planning, without torch.
#
#   PYTHONS  commands of interpreters; one that is missing is an error
#   WORK     where their environments go
set -euo pipefail
cd "$(dirname "$0")/../../.."

PYTHONS=${PYTHONS:-python3.10 python3.12 python3.13}
WORK=${WORK:-build/pythons}
export HELIXPIPE_KERNELS=0 OMP_NUM_THREADS=1

# Files that import neither torch nor megatron-core, themselves or through a helper.
mapfile -t files < <(grep -LwE "torch|megatron" tests/plan/test_*.py tests/report/test_*.py tests/elastic/test_*.py)
for python in $PYTHONS; do
    environment=$WORK/$(basename "$python")
    [ -e "$environment/.installed" ] || {
        "$python" -m venv "$environment"
        "$environment/bin/python" -m pip install --quiet . "pytest>=8" pytest-timeout "hypothesis>=6"
        touch "$environment/.installed"
    }
    echo "== $("$environment/bin/python" --version)"
    # From the checkout: the installed copy is only what brings the packages.
    PYTHONPATH=$PWD "$environment/bin/python" -m pytest -q -m "not slow" -p no:cacheprovider "${files[@]}"
done
