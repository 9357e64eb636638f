#!/usr/bin/env bash
# Sets up .venv on first use and passes all tests. Arguments go to pytest: bash test/run.sh test/unit
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./setup.sh requirements-dev.txt
exec python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"    # slow files are met first
