#!/usr/bin/env bash
# Writes deploy/requirements.lock (what the broker runs on), deploy/sandbox.lock (the same, and what the sandbox's agent
# needs to talk), deploy/build.lock (what builds the broker's wheel) and .ci/test.lock (all that .ci/run installs): every
# package with one version and the hashes of all its files, for every Python from 3.11 on. No address of an index is recorded.
# Uses the uv of the extra `test`, as it is in .venv or on PATH.
#   bash deploy/lock.sh              refresh after a change of pyproject.toml; pins that still fit stay
#   bash deploy/lock.sh --upgrade    move every pin to the newest version
set -euo pipefail
cd "$(dirname "$0")/.."

uv=$(PATH=$PWD/.venv/bin:$PATH command -v uv) || { echo "uv is missing: pip install -e '.[test]'" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

compile() { # INPUT OUTPUT [OPTION…]
  "$uv" pip compile "$1" --output-file "$2" "${@:3}" \
    --system-certs --universal --python-version 3.11 --generate-hashes \
    --no-emit-index-url --no-emit-find-links --quiet \
    --custom-compile-command "bash deploy/lock.sh"
}

compile pyproject.toml deploy/requirements.lock --extra otel "$@" # traces are off until a variable asks for them
compile pyproject.toml deploy/sandbox.lock --extra otel --extra voice --constraint deploy/requirements.lock "$@"
sed -nE '/^\[build-system\]/,/^\[project\]/s/^requires = \["(.*)"\]$/\1/p' pyproject.toml |
  sed 's/", "/\n/g' >"$work/build.in"
compile "$work/build.in" deploy/build.lock --no-annotate "$@"
echo editables >>"$work/build.in" # hatchling's own need for `pip install -e`
compile pyproject.toml .ci/test.lock "$work/build.in" --extra test --extra bench --no-annotate \
  --constraints deploy/requirements.lock --constraints deploy/build.lock "$@"
