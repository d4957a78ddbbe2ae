#!/usr/bin/env bash
# Prove and measure everything on a CUDA device, within nine minutes and without a network.
#
#   scripts/bench/gpu.sh                      on a machine with an NVIDIA GPU and a CUDA build of PyTorch
#   scripts/bench/gpu.sh --wheels DIR         take what is missing (MONAI, Ignite, cuCIM, ...) from the wheels of a folder
#   scripts/bench/gpu.sh --only attention     some parts: tests attention kernels views steps reading nuclei embedding
#                                             recovery pretraining
#   scripts/bench/gpu.sh --dry                the same code in tiny sizes on the CPU, as continuous integration runs it
#   scripts/bench/gpu.sh --output DIR         where gpu.json and gpu.md go (default: gpu)
#
# Each part has a time limit: one that fails or is slow costs itself alone. Environment: PYTHON (the interpreter that has
# torch; default: that of .venv where there is one, else python3).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

wheels="" arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --wheels) wheels=$(realpath -- "${2:?--wheels needs a folder}"); shift 2 ;;
    -h | --help) sed -n '2,13p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) arguments+=("$1"); shift ;;
  esac
done
venv=$root/${CYTOSSL_VENV:-.venv}
[ -x "${CYTOSSL_VENV:-$venv}/bin/python" ] && venv=${CYTOSSL_VENV:-$venv}
python=${PYTHON:-}
[ -n "$python" ] || { [ -x "$venv/bin/python" ] && python=$venv/bin/python || python=python3; }

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  # Only what is missing: PYTHONPATH comes before what is installed, which would be hidden.
  mapfile -t missing < <("$python" - "$wheels" <<'PYTHON'
import importlib.metadata
import pathlib
import sys

installed = {(found.metadata["Name"] or "").lower().replace("_", "-") for found in importlib.metadata.distributions()}
for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    if wheel.name.split("-")[0].lower().replace("_", "-") not in installed:
        print(wheel)
PYTHON
  )
  echo "gpu.sh: ${#missing[@]} wheels of $wheels for what is missing"
  if [ "${#missing[@]}" -gt 0 ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "${missing[@]}"
  fi
  export PYTHONPATH=$PYTHONPATH:$site
fi
"$python" "$root/scripts/bench/gpu/run.py" ${arguments[@]+"${arguments[@]}"}
