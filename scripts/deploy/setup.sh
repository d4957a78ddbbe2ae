#!/usr/bin/env bash
# Make the virtual environment of the MONAI Deploy application. Started again, it does only what is missing.
#
# The SDK needs pydicom and highdicom, and brings packages (Holoscan, Triton client) that nothing else here wants: it
# gets an environment of its own. torch is the CPU build; CUDA packages that Holoscan lists come along, unused. cuCIM is
# left out: it crashes inside Holoscan, slides are read with OpenSlide.
#
# Environment: CYTOSSL_DEPLOY_VENV (folder, default .venv-deploy), PYTHON (3.11 or newer),
# CYTOSSL_TORCH_INDEX (where the CPU build of torch comes from).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

venv=${CYTOSSL_DEPLOY_VENV:-.venv-deploy}
torch_index=${CYTOSSL_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"

wanted=$(cat requirements.txt requirements-deploy.txt pyproject.toml scripts/deploy/setup.sh | cksum | cut -d' ' -f1)
stamp=$venv/.cytossl-deploy
if [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ]; then
  exit 0
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

torch=$(sed -n 's/^torch==//p' requirements.txt)
if ! "$venv/bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch')" 2>/dev/null; then
  if [ "$(uname -s)" = Darwin ]; then wheel=torch==$torch; else wheel=torch==$torch+cpu; fi
  echo "deploy: $wheel"
  # The index is asked for this one package only, so that its absence costs one try and not one a package.
  pip install --quiet --retries 1 --extra-index-url "$torch_index" --no-deps "$wheel"
fi
echo "deploy: MONAI Deploy App SDK and this package"
pip install --quiet -r requirements.txt -r requirements-deploy.txt
pip install --quiet --no-deps --editable .
printf '%s' "$wanted" >"$stamp"
