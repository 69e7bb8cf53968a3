#!/usr/bin/env bash
# On a machine with a GPU, torch, triton and pytest, and no network: installs the project beside the
# system's packages, runs the tests of the GPU's kernels, looks for wrong accesses, then benchmarks.
# Leaves its results in the folder that is its argument, and ends within 9 minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-out}")
mkdir -p "$out"
site=$(mktemp -d)
export PYTHONPATH=$site PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
timeout 120 python3 -m pip install --quiet --no-deps --no-build-isolation --no-index --target "$site" \
  -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native . || exit
python3 -c 'import date_kernels; print(date_kernels.info())' | tee "$out/info.txt"

parallel=()
python3 -c 'import xdist' 2>/dev/null && parallel=(-n 8) # kernels compile on all cores
failed=0
timeout 190 python3 -m pytest -q -p no:cacheprovider -p no:benchmark "${parallel[@]}" \
  tests/test_gpu.py tests/test_gpu_backends.py 2>&1 | tee "$out/tests.txt" || failed=1
for tool in memcheck initcheck synccheck racecheck; do
  timeout 28 compute-sanitizer --tool "$tool" --error-exitcode 1 python3 bench/short_run.py \
    2>&1 | tail -n 3 | tee "$out/$tool.txt" || failed=1
done
timeout 120 python3 bench/gpu.py --output "$out" 2>&1 | tee "$out/bench.txt" || failed=1
exit $failed
