#!/usr/bin/env bash
# Lint, types and tests, with the environment they need: bash tests/run.sh [PYTEST ARGUMENT ...]
set -euo pipefail
cd "$(dirname "$0")/.."
begun=$SECONDS
source launch/environment.sh test,dev

step() { printf '\n== %s\n' "$*"; }

failed=""
check() { step "$@"; "$@" || failed="$failed${failed:+, }$1 $2"; }

check ruff check .
check ruff format --check .
check mypy --no-error-summary
check python -m pytest "$@"

took=$((SECONDS - begun))
if [ -n "$failed" ]; then
    printf '\n== FAILED after %d s: %s\n' $took "$failed"
    exit 1
fi
printf '\n== all passed after %d s\n' $took
