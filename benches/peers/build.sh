#!/bin/sh
# Builds every peer that this machine has the parts for into target/peers/, and says of each other one what it needs.
# Always exits with 0, unless what should build does not. `xccl bench compare` finds them there.
set -eu
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
here=$(cd "$here" && pwd)
target=${CARGO_TARGET_DIR:-$here/../../target}
out=$target/peers
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=0

built() { echo "built:   $1"; }
skipped() { echo "skipped: $1"; }
broken() {
  echo "failed:  $1"
  failed=1
}

# The same three programs over each MPI. Debian installs both side by side; elsewhere MPICC_OPENMPI and MPICC_MPICH name them.
mpi() { # name, compiler, Debian packages
  if ! command -v "$2" >/dev/null 2>&1; then
    skipped "$1: $2 not found; apt-get install $3"
    return
  fi
  for program in p2p moe coll; do
    if "$2" -std=gnu11 -O3 -march=native -ffp-contract=off -Wall -Wextra -Wno-stringop-overflow ${CFLAGS:-} \
      -o "$out/${program}_$1" "$here/${program}_mpi.c"; then
      built "$out/${program}_$1"
    else
      broken "$1: $program over $2"
    fi
  done
}
mpi openmpi "${MPICC_OPENMPI:-mpicc.openmpi}" "openmpi-bin libopenmpi-dev"
mpi mpich "${MPICC_MPICH:-mpicc.mpich}" "mpich libmpich-dev"

if command -v ucx_perftest >/dev/null 2>&1; then
  built "ucx_perftest is installed"
else
  skipped "ucx: ucx_perftest not found; apt-get install ucx-utils"
fi

# libfabric's own measurements of remote writes. The release has a fi_rma_pingpong, which 1.17's has not; it is made to ask the
# installed library for the interface of 1.17. FABTESTS names an unpacked release or a git repository of libfabric.
fabtests() {
  version=v1.21.0
  if [ ! -e /usr/include/rdma/fabric.h ]; then
    skipped "fabtests: no libfabric headers; apt-get install libfabric-dev"
    return
  fi
  source=$out/fabtests
  mkdir -p "$source"
  if [ -d "${FABTESTS:-}/fabtests" ]; then
    cp -r "$FABTESTS/fabtests" "$FABTESTS/include" "$source"
  elif [ -d "$source/fabtests/benchmarks" ]; then
    :
  elif [ -z "${FABTESTS:-}" ] || ! git -C "$FABTESTS" archive "$version" fabtests include | tar -x -C "$source"; then
    skipped "fabtests: FABTESTS names no clone of https://github.com/ofiwg/libfabric with $version"
    return
  fi
  for program in rma_bw rma_pingpong; do
    if (cd "$source/fabtests" && cc -O2 -w -D_GNU_SOURCE -DHAVE_CLOCK_GETTIME=1 -DHAVE_EPOLL=1 -DPACKAGE_VERSION='""' \
      -DFT_FIVERSION='FI_VERSION(1, 17)' -I../include -Iinclude -Iinclude/unix -Ibenchmarks -o "$out/fi_$program" \
      "benchmarks/$program.c" benchmarks/benchmark_shared.c common/shared.c common/hmem*.c -lfabric -lpthread -ldl); then
      built "$out/fi_$program"
    else
      broken "fabtests: $program"
    fi
  done
}
fabtests

# A project of its own, so that nobody who builds the library builds its dependencies.
if ! command -v cargo >/dev/null 2>&1; then
  skipped "iceoryx2: cargo not found"
elif CARGO_TARGET_DIR="$out/iceoryx2-build" cargo build --release --quiet --locked --manifest-path "$here/iceoryx2/Cargo.toml"; then
  cp "$out/iceoryx2-build/release/p2p_iceoryx2" "$out/"
  built "$out/p2p_iceoryx2"
else
  broken "iceoryx2: does it reach the registry, or has its dependencies already?"
fi

# PyTorch is 3 GB to download and 6 GB installed, so it is only fetched when asked for: build.sh --with-torch
cp "$here/moe_gloo.py" "$out/"
python=$out/venv/bin/python
if [ "${1:-}" = --with-torch ] && [ ! -x "$python" ]; then
  python3 -m venv "$out/venv" && "$python" -m pip install --quiet torch numpy || broken "gloo: installing torch and numpy"
fi
if [ -x "$python" ] && "$python" -c 'import torch, numpy; assert torch.distributed.is_gloo_available()' 2>/dev/null; then
  built "$out/moe_gloo.py for $python"
else
  skipped "gloo: no PyTorch in $out/venv; benches/peers/build.sh --with-torch installs it (3 GB to download)"
fi
exit $failed
