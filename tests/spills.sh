#!/bin/sh
# Registers, shared memory and spills of every CUDA kernel, by nvcc -Xptxas -v; fails on a spill or local memory, and
# where the assembler makes every wgmma wait for the one before, or nvcc warns. The table is kept in benchmarks/results/spills.txt.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for arch in 80 90a; do
  for file in "$root"/csrc/cuda/*.cu; do
    case "$arch $file" in "80 "*_sm90.cu) continue ;; esac  # code for sm_90a alone
    # -gencode, not -arch: for sm_90a the latter assembles plain sm_90 as well, which has no wgmma.
    nvcc -std=c++20 -O3 -gencode "arch=compute_$arch,code=sm_$arch" -DIGPT_CUDA_ARCHS='""' -Werror all-warnings -Xptxas -v -c "$file" -o "$out/object.o" 2>> "$out/log" || { tail -20 "$out/log" >&2; exit 1; }
  done
done
awk '/Compiling entry function/ { split($0, part, "\047"); kernel = part[2]; arch = part[4] }
     /bytes stack frame/ { stack = $1; stores = $5; loads = $9 }
     /Used .* registers/ {
       match($0, /Used [0-9]+/); registers = substr($0, RSTART + 5, RLENGTH - 5)
       smem = match($0, /[0-9]+ bytes smem/) ? substr($0, RSTART, RLENGTH) : "0 bytes smem"
       printf "%-8s %4s registers  %-16s stack %s, spills %s/%s  %s\n", arch, registers, smem, stack, stores, loads, kernel
       if (stack + stores + loads > 0) bad = 1
     }
     END { exit bad }' "$out/log" | { command -v c++filt > /dev/null && c++filt || cat; } | LC_ALL=C sort -k 8 -k 1,1 > "$out/table"
cp "$out/table" "$root/benchmarks/results/spills.txt"
cat "$out/table"
awk '/bytes stack frame/ && ($1 + $5 + $9 > 0) { bad = 1 } END { exit bad }' "$out/log" || { echo "error: a kernel spills or uses local memory" >&2; exit 1; }
! grep "wgmma.mma_async instructions are serialized" "$out/log" >&2 || { echo "error: a kernel's wgmma are serialized" >&2; exit 1; }
# What warpgroups hand over by setmaxnreg is reckoned from 65,536 registers among 384 threads: of fewer, one would wait for ever.
! grep -E "(fwd|dkdv|dq|dlogits)_sm90_kernel" "$out/table" | grep -v " 168 registers" >&2 || { echo "error: a kernel with setmaxnreg was not allotted 168 registers" >&2; exit 1; }
