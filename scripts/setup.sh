#!/usr/bin/env bash
# Make a virtual environment and install Cyto-SSL into it. Started again, it does only what is missing.
#
#   scripts/setup.sh              CPU: torch for CPU, cuCIM without its CUDA dependencies
#   scripts/setup.sh --gpu        NVIDIA GPU: CUDA build of torch, cuCIM with cupy and nvimgcodec
#   scripts/setup.sh --dev        also what the tests, the linters and the documentation need
#
# Environment: CYTOSSL_VENV (folder, default .venv), PYTHON (interpreter, 3.11 or newer),
# CYTOSSL_TORCH_INDEX (where the CPU build of torch comes from).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gpu=0 dev=0
for argument in "$@"; do
  case "$argument" in
    --gpu) gpu=1 ;;
    --dev) dev=1 ;;
    -h | --help) sed -n '2,10p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) echo "setup.sh: unknown option $argument (known: --gpu --dev)" >&2; exit 2 ;;
  esac
done

venv=${CYTOSSL_VENV:-.venv}
torch_index=${CYTOSSL_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
requirements=requirements.txt
[ "$dev" = 1 ] && requirements=requirements-dev.txt

if [ ! -x "$venv/bin/python" ]; then
  for candidate in "${PYTHON:-}" python3 python3.12 python3.11; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "setup: new virtual environment $venv ($("$candidate" --version))"
      "$candidate" -m venv "$venv"
      break
    fi
  done
  if [ ! -x "$venv/bin/python" ]; then
    echo "setup.sh: Python 3.11 or newer with venv was not found; install it, or name it with PYTHON=/path/to/python3" >&2
    exit 1
  fi
fi

wanted=$(cat requirements*.txt pyproject.toml scripts/setup.sh | cksum | cut -d' ' -f1)-gpu$gpu-dev$dev
stamp=$venv/.cytossl-setup
if [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ]; then
  exit 0
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if [ "$gpu" = 0 ]; then
  torch=$(sed -n 's/^torch==//p' requirements.txt)
  # macOS wheels are CPU builds already; elsewhere the local version "+cpu" keeps CUDA packages out.
  if [ "$(uname -s)" = Darwin ]; then wheel=torch==$torch; else wheel=torch==$torch+cpu; fi
  echo "setup: $wheel"
  pip install --quiet --retries 1 --extra-index-url "$torch_index" "$wheel"
fi
echo "setup: packages of $requirements"
pip install --quiet -r "$requirements"
echo "setup: cuCIM and this package"
if [ "$gpu" = 1 ]; then
  pip install --quiet -r requirements-gpu.txt
elif [ "$(uname -s)" = Linux ]; then
  pip install --quiet --no-deps -r requirements-cucim.txt
else
  echo "setup: cuCIM has no wheel for $(uname -s); slides are read with OpenSlide and tifffile" >&2
fi
pip install --quiet --no-deps --editable .
printf '%s' "$wanted" >"$stamp"
