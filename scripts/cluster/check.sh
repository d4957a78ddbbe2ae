#!/usr/bin/env bash
# Runs the workflow on a real SLURM (one node, from Debian's packages) over made-up slides: four jobs side by side, one
# cancelled, another's process killed in the midst, then on to the end; and holds every index, feature, prediction and
# report to a run on one machine. Then pretraining on two "machines" (two network namespaces) against two processes on
# one. Where root, the packages or namespaces cannot be had it skips that part and says why.
#
#   scripts/cluster/check.sh [DIR]     what it writes; a temporary folder, removed after, where none is given
#
# CYTOSSL_VENV: environment of the package (.venv); CYTOSSL_CLUSTER_VENV: one with Snakemake, made where missing.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$root/scripts/cluster
python=$(realpath -s -- "${CYTOSSL_VENV:-$root/.venv}")/bin/python
skip() { echo "SKIPPED scripts/cluster/check.sh: $1"; exit 0; }

[ "$(id -u)" = 0 ] || skip "not root: it cannot set up a SLURM"
if ! command -v slurmctld >/dev/null || ! command -v slurmd >/dev/null || ! command -v munged >/dev/null; then
  command -v apt-get >/dev/null || skip "no SLURM here and no apt-get to get it with"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurmctld slurmd slurm-client munge; } \
    >/dev/null 2>&1 || skip "Debian's packages slurmctld, slurmd and munge cannot be had"
fi
if [ $# -gt 0 ]; then mkdir -p "$1"; dir=$(realpath -- "$1"); else dir=$(mktemp -d); remove=$dir; fi
# Snakemake runs its jobs elsewhere: nothing of an array job around this script may reach them.
unset SLURM_ARRAY_TASK_ID SLURM_ARRAY_TASK_COUNT SLURM_JOB_ID
export SLURM_CONF=$dir/slurm/slurm.conf PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
finish() {
  "$here/one_node.sh" stop "$dir/slurm" || true
  if [ -n "${remove:-}" ]; then sleep 1; rm -rf "$remove"; fi
}
trap finish EXIT

tools=${CYTOSSL_CLUSTER_VENV:-$dir/tools}
if [ ! -x "$tools/bin/snakemake" ]; then
  "$python" -m venv "$tools"
  "$tools/bin/pip" install -q --disable-pip-version-check -r "$root/requirements-cluster.txt" >/dev/null 2>&1 \
    || skip "Snakemake cannot be installed"
fi
"$here/one_node.sh" start "$dir/slurm" || skip "SLURM does not start here"

echo "== made-up slides, an encoder and a classifier"
"$python" -W ignore "$here/check.py" make "$dir"

# The pictures of a report are not what is compared here.
printf 'options:\n  inference: "--evidence [tiles] --overview_size 256"\n' > "$dir/check.yaml"
echo "== one machine"
alone() {
  "$tools/bin/snakemake" -q all -s "$here/Snakefile" --workflow-profile "$here/profiles/local" \
    --directory "$dir/alone.work" --cores 2 --config \
    slides="$dir/slides/slides.csv" encoder="$dir/model.pt" classifier="$dir/classifier.pt" out="$dir/alone" \
    chunks=1 tile_size=96 threads=2 python="$python" --configfile "$dir/check.yaml"
}
mkdir -p "$dir/alone.work" "$dir/cluster.work"
alone

echo "== without a scheduler"
mkdir -p "$dir/bare" "$dir/bare.work"
for tool in bash sh env which; do ln -sf "$(command -v "$tool")" "$dir/bare/$tool"; done
if PATH=$dir/bare "$tools/bin/snakemake" -s "$here/Snakefile" --workflow-profile "$here/profiles/slurm" \
  --directory "$dir/bare.work" --config slides="$dir/slides/slides.csv" encoder="$dir/model.pt" \
  classifier="$dir/classifier.pt" out="$dir/bare.out" > "$dir/bare.log" 2>&1; then exit 1; fi
grep "no scheduler here: sbatch is not on the PATH" "$dir/bare.log"

echo "== four jobs side by side on SLURM"
cluster() {
  "$tools/bin/snakemake" -q all -s "$here/Snakefile" --workflow-profile "$here/profiles/slurm" \
    --directory "$dir/cluster.work" --slurm-no-account --slurm-status-command squeue --latency-wait 10 \
    --slurm-init-seconds-before-status-checks 2 --seconds-between-status-checks 2 --config \
    slides="$dir/slides/slides.csv" encoder="$dir/model.pt" classifier="$dir/classifier.pt" out="$dir/cluster" \
    chunks=4 tile_size=96 threads=1 mem_mb=1000 python="$python" \
    --configfile "$dir/check.yaml" > "$dir/snakemake.log" 2>&1
}
cluster & workflow=$!
"$python" "$here/check.py" disturb "$dir" "$workflow"
if ! wait "$workflow"; then
  echo "   the engine gave up; started again, it goes on"
  cluster || { tail -n 40 "$dir/snakemake.log"; exit 1; }
fi
"$python" -W ignore "$here/check.py" compare "$dir/alone" "$dir/cluster" "$dir/slides/slides.csv"

echo "== pretraining on two machines (network namespaces)"
"$here/two_machines.sh" "$dir" "$python"
