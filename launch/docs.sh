#!/usr/bin/env bash
# The documentation, from a fresh machine with Python 3.10+, into build/docs:
#     ./launch/docs.sh             builds it; a warning (a dead link, a page that nothing names) is an error
#     ./launch/docs.sh serve       shows it at http://127.0.0.1:8000 while you edit
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"
ensure_venv docs
export NO_MKDOCS_2_WARNING=true
case ${1:-build} in
    build) exec mkdocs build --strict --quiet ;;
    serve) exec mkdocs serve ;;
    *) die "docs.sh: expected build or serve, got $1" ;;
esac
