#!/usr/bin/env bash
# Set up (once) and run the tests. Arguments go to pytest: scripts/test.sh -m "not slow" tests/networks
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh" --dev
cd "$root"
exec "${CYTOSSL_VENV:-.venv}/bin/python" -m pytest "$@"
