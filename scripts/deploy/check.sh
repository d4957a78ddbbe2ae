#!/usr/bin/env bash
# Set up the environment of the MONAI Deploy application, run it on a made-up slide and hold it to the bundle's own
# result. About two minutes after the packages are installed; nothing is left in the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
scripts/deploy/setup.sh
ulimit -s 32768 2>/dev/null || true # Holoscan warns below that
exec "${CYTOSSL_DEPLOY_VENV:-.venv-deploy}/bin/python" scripts/deploy/check.py "$@"
