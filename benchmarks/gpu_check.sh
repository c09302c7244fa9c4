#!/bin/bash
# Everything that needs a GPU, in under 9 minutes and without a network: build, tests, sanitizer, benchmarks.
#     bash benchmarks/gpu_check.sh OUT        writes OUT/log.txt and OUT/results/DEVICE/*.json
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${1:?a folder for the results}" && cd "$1" && pwd)
PYTHON=${PYTHON:-python3}
export MAX_JOBS=${MAX_JOBS:-16} PAR_XL_CUDA_ARCHS=${PAR_XL_CUDA_ARCHS:-90} PYTHONUNBUFFERED=1
status=0

step() { # step NAME SECONDS COMMAND...: output to OUT/log.txt, its last lines to the screen
    local name=$1 seconds=$2 code=0; shift 2
    echo "== $name" | tee -a "$OUT/log.txt"
    timeout "$seconds" "$@" > "$OUT/step" 2>&1 || { code=$?; status=1; }
    cat "$OUT/step" >> "$OUT/log.txt"
    tail -n 15 "$OUT/step"
    rm "$OUT/step"
    echo "$name: exit status $code" | tee -a "$OUT/log.txt"
}

step build 90 $PYTHON -m pip install --no-build-isolation --no-deps --no-index -e .
$PYTHON -c "import par_xl; print(par_xl.build_info(), par_xl.backends())"
step tests 230 $PYTHON -m pytest -q -m gpu -n 8 -p no:cacheprovider tests
if command -v compute-sanitizer > /dev/null; then
    step sanitizer 40 compute-sanitizer --tool memcheck --error-exitcode 1 $PYTHON benchmarks/small_cases.py
    step races 30 compute-sanitizer --tool racecheck --error-exitcode 1 $PYTHON benchmarks/small_cases.py
fi
# The models last: results are written case by case, and theirs are the first that a slow machine may go without.
files=(benchmarks/bench_[!m]*.py benchmarks/bench_mix.py benchmarks/bench_models.py)
step benchmarks 140 $PYTHON -m pytest -q -s -p no:cacheprovider "${files[@]}" --seconds 0.3 --results "$OUT/results"
exit $status
