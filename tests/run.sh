#!/usr/bin/env bash
# Lint, types and tests, with the environment they need: bash tests/run.sh [PYTEST ARGUMENT ...]
set -euo pipefail
cd "$(dirname "$0")/.."
begun=$SECONDS
source launch/environment.sh test,dev

# The page of a report is tested in a browser; where there is none that test is skipped.
if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "installing chromium, for the tests of reports (log: .venv/chromium.log)"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } >.venv/chromium.log 2>&1 ||
        echo "that failed: they will be skipped"
fi

step() { printf '\n== %s\n' "$*"; }

failed=""
check() { step "$@"; "$@" || failed="$failed${failed:+, }$1 $2"; }

check ruff check .
check ruff format --check .
check mypy --no-error-summary
check python -m pytest -n 2 --dist loadfile "$@" # two at a time: much of it waits or runs on one core

took=$((SECONDS - begun))
if [ -n "$failed" ]; then
    printf '\n== FAILED after %d s: %s\n' $took "$failed"
    exit 1
fi
printf '\n== all passed after %d s\n' $took
