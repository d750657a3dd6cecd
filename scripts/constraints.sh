#!/usr/bin/env bash
# Writes constraints.txt anew, with the newest versions that serve every Python given.
# The oldest Python resolves freely; each later one must take the versions found so far, so that
# one version serves all. Where that cannot be, pip says so: bound the package in a pyproject.toml.
#
# Usage: scripts/constraints.sh PYTHON3.10 PYTHON3.11 PYTHON3.12      (oldest first)
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { sed -n '2,/^$/s/^# \?//p' "$0" >&2; exit 2; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
touch "$work/pins"
for python in "$@"; do
    echo "$("$python" --version): resolving and installing"
    "$python" -m venv --clear "$work/venv"
    "$work/venv/bin/pip" install -q --disable-pip-version-check -c "$work/pins" \
        -e core $(printf -- '-e %s ' plugins/*/) -e ".[all,cpu,test,dev]"
    "$work/venv/bin/pip" check
    "$work/venv/bin/python" -c "import paddlenlp.transformers"
    "$work/venv/bin/pip" freeze -q --exclude-editable | LC_ALL=C sort -fu - "$work/pins" > "$work/more"
    mv "$work/more" "$work/pins"
done

{
    echo "# The exact versions that sft is installed and tested with, on Python 3.10, 3.11 and 3.12:"
    echo "#     pip install -c constraints.txt ..."
    echo "# Made by scripts/constraints.sh; do not edit by hand."
    # The two builds of Paddle carry the same version; only the CPU one is installed above.
    sed '/^paddlepaddle==/{p;s/==/-gpu==/}' "$work/pins"
} > constraints.txt
