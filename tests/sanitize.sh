#!/bin/sh
# The op tests of the CPU backend and of the CUDA kernels on the bench (tests/simt) under the address and
# undefined-behaviour sanitizers, then a race check of those kernels by the thread sanitizer. Builds of their own.
# Usage: tests/sanitize.sh BIN, with BIN the directory of python, cmake and ninja.
set -eu
bin=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
tree=$root/build/sanitize/tree
export PATH="$bin:$PATH"
mkdir -p "$tree"
cp -r "$root/igpt_fast" "$tree/"
rm -f "$tree"/igpt_fast/_C*.so
pybind11=$(python -c 'import pybind11; print(pybind11.get_cmake_dir())')
cmake -S "$root" -B "$root/build/sanitize" -G Ninja -DIGPT_CUDA=OFF -DIGPT_SANITIZE=address,undefined \
  -DPython_EXECUTABLE="$bin/python" -Dpybind11_DIR="$pybind11" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$tree/igpt_fast" > /dev/null
cmake --build "$root/build/sanitize" --target _C
bench() {  # bench DIRECTORY SANITIZERS TARGETS...: builds targets of the bench
  directory=$1 sanitizers=$2
  shift 2
  cmake -S "$root/tests/simt" -B "$directory" -G Ninja -DIGPT_SANITIZE="$sanitizers" -DPython_EXECUTABLE="$bin/python" \
    -Dpybind11_DIR="$pybind11" > /dev/null
  cmake --build "$directory" --target "$@"
}
bench "$root/build/sanitize/simt" address,undefined _simt kernels drive
calls=$root/build/sanitize/calls
PYTHONPATH="$root/tests" python -m simt.calls "$calls"
"$root/build/sanitize/simt/drive" "$calls"
# From the tree, since python -m looks in the working directory first. Leaks are not looked for: the interpreter's own
# would drown ours, and kernels own no memory past a call. Fresh memory holds NaN, so that reading it shows.
cd "$tree"
checked() {
  LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=268435456:malloc_fill_byte=255 \
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH="$tree" IGPT_SIMT_DIR="$root/build/sanitize/simt" "$@"
}
checked python -c "import igpt_fast.ops._native as n; assert n._C.__file__.startswith('$tree'), n._C.__file__"
checked python -m pytest -p no:cacheprovider $(grep -l '^from check import' "$root"/tests/test_*.py) \
  "$root"/tests/simt/test_layouts.py "$root"/tests/simt/test_layouts_sm90.py

# Every CUDA thread is a fiber that the thread sanitizer knows, and only what orders CUDA threads orders fibers. Then races
# are planted: a check that cannot fail is none. No address randomisation: the sanitizer's memory map
# does not fit every layout of newer kernels.
bench "$root/build/sanitize/simt-thread" thread drive
drive=$root/build/sanitize/simt-thread/drive
if setarch "$(uname -m)" -R true 2> /dev/null; then drive="setarch $(uname -m) -R $drive"; fi
ops=$root/build/sanitize/ops
if ! $drive "$calls" > "$ops"; then
  cat "$ops"
  exit 1
fi
cat "$ops"
log=$root/build/sanitize/race.log
if $drive race > "$log" 2>&1 || ! grep -q "data race.*tile_kernel" "$log"; then
  echo "error: the thread sanitizer does not see the planted race" >&2
  exit 1
fi
# With barriers that order nothing, every op that has one must be reported.
for op in $(sed -n 's/: the same bits.*//p' "$ops" | grep _ | sort -u); do
  SIMT_UNORDERED=1 $drive "$calls" "$op" > "$log" 2>&1 || true
  if ! grep -q "orders nothing" "$log"; then
    echo "$op: no barrier"
  elif grep -q "WARNING: ThreadSanitizer: data race" "$log"; then
    echo "$op: without the order of its barriers, $(grep -c 'WARNING: ThreadSanitizer: data race' "$log") races are seen"
  else
    echo "error: $op: the thread sanitizer sees no race where barriers order nothing" >&2
    exit 1
  fi
done
