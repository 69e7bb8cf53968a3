#!/usr/bin/env bash
# On a machine with a GPU, torch, triton and pytest, and no network: installs the project beside the
# system's packages, runs the tests of the GPU's kernels, looks for wrong accesses, benchmarks, then
# holds ours to the bars for as long as is left. Leaves its results in the folder that is its first
# argument, and ends within 9 minutes. The commit is the second argument, else DATE_KERNELS_COMMIT,
# else git's: a copy of the working tree may have no git.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-out}")
mkdir -p "$out"
commit=${2:-${DATE_KERNELS_COMMIT:-}}
if [[ -z $commit && -e .git ]]; then commit=$(git rev-parse --short HEAD); fi
export DATE_KERNELS_COMMIT=$commit
site=$(mktemp -d)
export PYTHONPATH=$site PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
timeout 110 python3 -m pip install --quiet --no-deps --no-build-isolation --no-index --target "$site" \
  -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native . || exit
python3 -c 'import date_kernels; print(date_kernels.info())' | tee "$out/info.txt"

parallel=()
python3 -c 'import xdist' 2>/dev/null && parallel=(-n 8) # kernels compile on all cores
failed=0
timeout 180 python3 -m pytest -q -p no:cacheprovider -p no:benchmark "${parallel[@]}" \
  tests/test_gpu.py tests/test_gpu_backends.py 2>&1 | tee "$out/tests.txt" || failed=1
for tool in memcheck initcheck synccheck racecheck; do
  timeout 22 compute-sanitizer --tool "$tool" --error-exitcode 1 python3 bench/short_run.py \
    2>&1 | tail -n 3 | tee "$out/$tool.txt" || failed=1
done
timeout 110 python3 bench/gpu.py --output "$out" 2>&1 | tee "$out/bench.txt" || failed=1
# 110 + 180 + 4 * 22 + 110: at least 52 of 540 s are left. Bars that are missed or undecided are a
# result, no failure of this script; an interrupt keeps those that are done.
left=$((530 - SECONDS))
minutes=$(python3 -c "print(max($left - 30, 12) / 60 / 12)") # twelve groups take turns
timeout -s INT -k 8 "$left" python3 -m date_optim.bench --device cuda --bars --minutes "$minutes" \
  --peers torch-fused apex --output "$out" 2>&1 | tee "$out/bars.txt"
exit $failed
