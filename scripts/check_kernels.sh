#!/usr/bin/env bash
# Test the kernels in Triton on a machine without a GPU: interpreted, and compiled ahead. Triton takes about 1 GB, so it is
# no part of the environment; it is put into a folder of its own.
#
#   scripts/check_kernels.sh [DIR]     DIR: where Triton is, or goes (default: .triton)
#
# Environment: PYTHON (the interpreter that has the package; default: that of .venv).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-${CYTOSSL_VENV:-.venv}/bin/python}
folder=$(realpath -m -- "${1:-.triton}")

if [ ! -d "$folder/triton" ]; then
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" -r requirements-triton.txt
fi
export PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
"$python" -c "import triton" # else the tests would skip
mapfile -t files < <(grep -l triton_kernels tests/networks/test_*.py)
"$python" -m pytest -q -n auto --dist worksteal "${files[@]}"
