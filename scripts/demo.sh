#!/usr/bin/env bash
# Set up, then run the main job from slides to a prediction with its evidence, on two CPU cores in about ten minutes.
#
#   scripts/demo.sh                       on made-up cytology slides
#   scripts/demo.sh --slides slides.csv   on your own: slide_id,path,label (see docs/howto/own_slides.md)
#   scripts/demo.sh --new new.csv         the slides to predict (default: made-up ones, or those of --slides)
#   scripts/demo.sh --out DIR             where to (default: demo)
#
# Started again it goes on where it stopped: what is whole is not made again. Exit status 3: finished, but some slides
# were left out; the report of the step says which and why. CYTOSSL_STEPS sets the length of pretraining.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

slides="" new="" out=$root/demo
while [ $# -gt 0 ]; do
  case "$1" in
    --slides) slides=$(realpath -- "${2:?--slides needs a slide table}"); shift 2 ;;
    --new) new=$(realpath -- "${2:?--new needs a slide table}"); shift 2 ;;
    --out) mkdir -p "${2:?--out needs a folder}"; out=$(realpath -- "$2"); shift 2 ;;
    -h | --help) sed -n '2,10p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) echo "demo.sh: unknown option $1 (known: --slides --new --out)" >&2; exit 2 ;;
  esac
done
for table in "$slides" "$new"; do
  if [ -n "$table" ] && [ ! -f "$table" ]; then echo "demo.sh: $table does not exist; give a slide table" >&2; exit 2; fi
done

cd "$root"
scripts/setup.sh
venv=$(realpath -- "${CYTOSSL_VENV:-.venv}")
pretrain=$root/bundles/cytossl_pretrain/configs mil=$root/bundles/cytossl_mil/configs
inference=$root/bundles/cytossl_inference/configs
mkdir -p "$out"
cd "$out"

# The encoder that ships is trained on, on these slides: views and fields are of the size that it knows (its model card).
tile=224 mpp=0.25
views=(--view_size 80 --zoom "[0.6,1.6]" --batch_size 64)
cells=(--instances nuclei --field_size 96 --field_mpp 0.25)
left_out=0
# A step that left some slides out (status 3) does not stop the others.
step() {
  local title=$1 status=0
  shift
  printf '\n== %s\n' "$title"
  "$venv/bin/python" -W ignore -m cytossl_monai.cli.bundle run "$@" || status=$?
  if [ "$status" = 3 ]; then left_out=3; elif [ "$status" != 0 ]; then exit "$status"; fi
}

if [ -z "$slides" ]; then
  step "made-up slides to learn from" --config_file "$pretrain/synthetic.json" --output_dir "$out/slides" \
    --n_slides 24 --size 4096
  slides=$out/slides/slides.csv
  if [ -z "$new" ]; then
    step "made-up slides to predict" --config_file "$pretrain/synthetic.json" --output_dir "$out/new_slides" \
      --n_slides 4 --size 4096 --seed 1000
    new=$out/new_slides/slides.csv
  fi
fi
step "index: tiles where nuclei are" --config_file "$pretrain/index.json" --slides "$slides" --output_dir "$out/index" \
  --tile_size $tile --mpp $mpp
step "pretrain: the encoder that ships, trained on without labels" \
  --config_file "['$pretrain/train.json','$root/configs/scale/cpu.yaml','$root/configs/backbone/encoder_file.yaml']" \
  --start_from "$root/bundles/cytossl_pretrain/models/lite0_cells.pt" --index_dir "$out/index" --tile_size $tile \
  --mpp $mpp "${views[@]}" --steps "${CYTOSSL_STEPS:-150}" --epoch_length 10 --output_dir "$out/pretrain"
encoder=$out/pretrain/models/model.pt
step "embed: features of every cell" --config_file "$inference/embed.json" \
  --slides "$slides" --index_dir "$out/index" --output_dir "$out/features" --encoder "$encoder" \
  "${cells[@]}"
step "slide classifier: patient-wise folds" --config_file "$mil/cross_validate.json" \
  --slides "$slides" --features_dir "$out/features" --output_dir "$out/mil" \
  --overlays "['$root/configs/mil/discriminant.yaml']" --repeats 3
step "inference: predictions with their evidence" --config_file "$inference/inference.json" \
  --slides "${new:-$slides}" --encoder "$encoder" --classifier "$out/mil/model.pt" --output_dir "$out/reports" \
  --tile_size $tile --mpp $mpp "${cells[@]}"

"$venv/bin/python" "$root/scripts/demo_summary.py" "$out"
exit "$left_out"
