#!/usr/bin/env bash
# Formats the C++ and CUDA sources in place by .clang-format; arguments go to clang-format (--dry-run -Werror: only check).
set -euo pipefail
cd "$(dirname "$0")/.."
find csrc tests/extension tests/ptx -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' \) -print0 |
    xargs -0 clang-format -i "$@"
