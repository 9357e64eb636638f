#!/usr/bin/env bash
# Trains. Sets up .venv on first use; then runs config/config.json, .toml or .env, the first that there is, with the script for its
# model_family and model_type; without one, the embedded demo.
#     bash train.sh [flags of the script]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup.sh requirements.txt

found=()
for config in config/config.{json,toml,env}; do
    [ -f "$config" ] && found+=("$config")
done
if [ ${#found[@]} -gt 0 ]; then
    [ ${#found[@]} -eq 1 ] || echo "train.sh: ${found[0]} is read, and not ${found[*]:1}" >&2
    script=$(python -c 'import sys; from library import dialects; print(dialects.script_of(sys.argv[1]))' "${found[0]}")
    exec accelerate launch ${ACCELERATE_FLAGS:-} "$script" --config_file "${found[0]}" "$@"
fi
exec bash config/demo/run.sh "$@"
