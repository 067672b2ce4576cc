#!/bin/sh
# The op tests of the CPU backend under the address and undefined-behaviour sanitizers, in a build of its own.
# Usage: tests/sanitize.sh BIN, with BIN the directory of python, cmake and ninja.
set -eu
bin=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
tree=$root/build/sanitize/tree
export PATH="$bin:$PATH"
mkdir -p "$tree"
cp -r "$root/igpt_fast" "$tree/"
rm -f "$tree"/igpt_fast/_C*.so
cmake -S "$root" -B "$root/build/sanitize" -G Ninja -DIGPT_CUDA=OFF -DIGPT_SANITIZE=address,undefined \
  -DPython_EXECUTABLE="$bin/python" -Dpybind11_DIR="$(python -c 'import pybind11; print(pybind11.get_cmake_dir())')" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$tree/igpt_fast" > /dev/null
cmake --build "$root/build/sanitize" --target _C
# Leaks are not looked for: the interpreter's own would drown ours, and kernels own no memory past a call.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH="$tree" \
  python -m pytest -p no:cacheprovider "$root"/tests/test_norm.py "$root"/tests/test_activation.py "$root"/tests/test_cross_entropy.py \
  "$root"/tests/test_linear.py "$root"/tests/test_attention.py "$root"/tests/test_palette_ops.py
