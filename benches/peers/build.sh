#!/bin/sh
# Builds the MPI peer into target/peers/. Exits 0 with "skipped: ..." where there is no MPI compiler.
# Debian/Ubuntu: apt-get install openmpi-bin libopenmpi-dev
set -eu
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
here=$(cd "$here" && pwd)
out=${CARGO_TARGET_DIR:-$here/../../target}/peers
mpicc=${MPICC:-mpicc}
if ! command -v "$mpicc" >/dev/null 2>&1; then
  echo "skipped: $mpicc not found; install the Debian packages openmpi-bin libopenmpi-dev"
  exit 0
fi
mkdir -p "$out"
"$mpicc" -std=gnu11 -O3 -march=native -ffp-contract=off -Wall -Wextra ${CFLAGS:-} -o "$out/moe_mpi" "$here/moe_mpi.c"
echo "built: $(cd "$out" && pwd)/moe_mpi"
