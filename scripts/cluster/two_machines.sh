#!/usr/bin/env bash
# Pretraining by torchrun over two "machines": two network namespaces with a veth between them, one process in each,
# against two processes on one machine. Losses and weights must be equal. Called by check.sh.
#
#   scripts/cluster/two_machines.sh DIR PYTHON     DIR has slides/slides.csv (check.py make)
set -euo pipefail
dir=$(realpath -- "${1:?a folder}") python=${2:?the Python of the package}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
skip() { echo "SKIPPED scripts/cluster/two_machines.sh: $1"; exit 0; }
[ "$(id -u)" = 0 ] || skip "not root: it cannot make network namespaces"
command -v ip >/dev/null || skip "no ip (package iproute2)"
one=cytossl$$a two=cytossl$$b
finish() { ip netns del "$one" 2>/dev/null || true; ip netns del "$two" 2>/dev/null || true; }
trap finish EXIT
ip netns add "$one" 2>/dev/null || skip "network namespaces are not allowed here"
ip netns add "$two"
ip link add "v$$a" netns "$one" type veth peer name "v$$b" netns "$two" 2>/dev/null || skip "no veth device here"
ip -n "$one" addr add 10.77.0.1/24 dev "v$$a"
ip -n "$two" addr add 10.77.0.2/24 dev "v$$b"
for name in "$one" "$two"; do ip -n "$name" link set lo up; done
ip -n "$one" link set "v$$a" up
ip -n "$two" link set "v$$b" up
ip netns exec "$two" ping -c 1 -W 5 10.77.0.1 >/dev/null 2>&1 || sleep 2

index=$dir/index_for_training
"$python" -W ignore -m monai.bundle run --config_file "$root/bundles/cytossl_pretrain/configs/index.json" \
  --slides "$dir/slides/slides.csv" --output_dir "$index" --tile_size 96 --num_workers 0 --overview False \
  > "$dir/two.index.log" 2>&1 || [ $? = 3 ]
configs=$root/bundles/cytossl_pretrain/configs
train=(-m monai.bundle run --config_file "['$configs/train.json','$configs/multi_gpu_train.json']"
  --index_dir "$index" --steps 6 --epoch_length 6 --batch_size 4 --num_workers 0 --log_every 1 --monitor_every 100
  --tensorboard False --warmup_epochs 0 --backend gloo
  "--backbone#num_layers" 2 "--backbone#hidden_size" 48 "--backbone#num_heads" 3 "--backbone#mlp_dim" 96
  "--backbone#img_size" 96 "--views#global_size" 96)
export OMP_NUM_THREADS=1
launch=("$python" -W ignore -m torch.distributed.run)
"${launch[@]}" --nnodes 1 --nproc_per_node 2 --master_addr 127.0.0.1 --master_port 29611 \
  "${train[@]}" --output_dir "$dir/train_one" > "$dir/two.one.log" 2>&1 || { tail -n 20 "$dir/two.one.log"; exit 1; }
machine() { # namespace, rank, device
  ip netns exec "$1" env GLOO_SOCKET_IFNAME="$3" "${launch[@]}" --nnodes 2 --nproc_per_node 1 --node_rank "$2" \
    --master_addr 10.77.0.1 --master_port 29612 "${train[@]}" --output_dir "$dir/train_two" > "$dir/two.$2.log" 2>&1
}
machine "$one" 0 "v$$a" & first=$!
machine "$two" 1 "v$$b" & second=$!
wait "$first" || { tail -n 20 "$dir/two.0.log"; exit 1; }
wait "$second" || { tail -n 20 "$dir/two.1.log"; exit 1; }
"$python" -W ignore "$root/scripts/cluster/check.py" losses "$dir/train_one" "$dir/train_two"
