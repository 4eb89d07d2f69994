#!/bin/bash
# Dispatch and combine between network namespaces, which stand for hosts joined by veth and a bridge: this library and Open MPI in
# turn. Needs root, iproute2, openmpi-bin, `cargo build --release --bin xccl`, and moe_openmpi of build.sh.
# Usage: between_nodes.sh [hosts [ranks-of-each [tokens [rounds]]]]
set -euo pipefail
hosts=${1:-2} each=${2:-2} tokens=${3:-8,128} rounds=${4:-3}
here=$(cd "${0%/*}" && pwd)
target=${CARGO_TARGET_DIR:-$here/../../target}
xccl=$target/release/xccl mpi=${MOE_OPENMPI:-$target/peers/moe_openmpi}
for file in "$xccl" "$mpi"; do
  [ -x "$file" ] || { echo "$file is missing: see the first lines of $0" >&2; exit 1; }
done

stem=xccl-$$ work=$(mktemp -d) children=()
finish() {
  for pid in "${children[@]}"; do kill "$pid" 2>/dev/null || true; done
  for name in sw $(seq 0 $((hosts - 1))); do ip netns del "$stem-$name" 2>/dev/null || true; done
  rm -r "$work"
}
trap finish EXIT
trap 'exit 1' INT TERM

ip netns add "$stem-sw"
ip -n "$stem-sw" link add br0 type bridge
ip -n "$stem-sw" link set br0 up
list='' # for mpirun
for host in $(seq 0 $((hosts - 1))); do
  ip netns add "$stem-$host"
  ip -n "$stem-sw" link add "p$host" type veth peer name eth0 netns "$stem-$host"
  ip -n "$stem-sw" link set "p$host" master br0 up
  ip -n "$stem-$host" link set lo up
  ip -n "$stem-$host" link set eth0 up
  ip -n "$stem-$host" addr add "10.74.0.$((host + 1))/24" dev eth0
  list+=${list:+,}10.74.0.$((host + 1)):$each
done

# Runs a command on a host: HOST COMMAND... mpirun starts its daemons by it, in place of ssh. Open MPI tells hosts apart by name.
cat >"$work/rsh" <<EOF
#!/bin/bash
while [[ \$1 == -* ]]; do shift; done
host=\$1; shift
number=\$((\${host##*.} - 1))
exec ip netns exec $stem-\$number unshare --uts sh -c "hostname node\$number; \$*"
EOF
chmod +x "$work/rsh"

ours() {
  children=()
  for host in $(seq $((hosts - 1)) -1 0); do
    XCCL_JOB=$stem-$1 ip netns exec "$stem-$host" "$xccl" run -n "$each" --nnodes "$hosts" --node-rank "$host" \
      --master 10.74.0.1:29541 -- "$xccl" bench moe --tokens "$tokens" --reduction engine --routing "$work/ids.npy" \
      --iters 40 --warmup 10 ${verify:-} &
    children+=($!)
  done
  for pid in "${children[@]}"; do wait "$pid"; done
  children=()
}

openmpi() {
  "$work/rsh" 10.74.0.1 mpirun.openmpi --allow-run-as-root --oversubscribe -n $((hosts * each)) --host "$list" \
    --mca plm_rsh_agent "$work/rsh" --mca oob_tcp_if_include eth0 --mca btl_tcp_if_include eth0 --mca btl tcp,self,vader \
    --mca pml ob1 --mca mpi_yield_when_idle 1 --mca orte_keep_fqdn_hostnames 1 "$mpi" --layout rows --tokens "$tokens" \
    --routing "$work/ids.npy" --iters 40 --warmup 10 ${verify:-}
}

# One routing for both: distinct experts of each token, drawn alike.
python3 - "$work/ids.npy" <<'EOF'
import random, struct, sys
random.seed(6)
header = "{'descr': '<i4', 'fortran_order': False, 'shape': (4096, 8), }".ljust(117) + "\n"
rows = b"".join(struct.pack("<8i", *random.sample(range(256), 8)) for _ in range(4096))
open(sys.argv[1], "wb").write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + rows)
EOF
for round in $(seq "$rounds"); do
  # Every byte is checked once, outside the timing.
  verify=$([ "$round" = 1 ] && echo --verify || true)
  ours "$round"
  openmpi
done
