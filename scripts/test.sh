#!/usr/bin/env bash
# Set up (once) and run the tests, one process a core. Arguments go to pytest: scripts/test.sh -m "not slow" tests/networks
# CYTOSSL_TEST_PROCESSES: number of processes; 0 runs all in one, for a debugger.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh" --dev
cd "$root"
# Several processes share the cores already: more threads in each would only get in each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${CYTOSSL_VENV:-.venv}/bin/python" -m pytest -n "${CYTOSSL_TEST_PROCESSES:-auto}" --dist worksteal "$@"
