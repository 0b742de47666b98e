#!/usr/bin/env bash
# Makes (or brings up to date) the virtual environment VENV for development: constraints/make_venv.sh VENV [PYTHON]
#
# Without PYTHON it takes the newest supported interpreter it finds: on PATH, among pyenv's versions, among uv's.
# Python 3.12 and 3.13 get JAX 0.11.2, Python 3.11 gets JAX 0.10.2; constraints/ pins every package, so installs repeat.
# `constraints/make_venv.sh --find` only prints the interpreter it would take.
set -euo pipefail
cd "$(dirname "$0")/.."

supported="3.13 3.12 3.11"

# Prints "major.minor" of an interpreter, or nothing when it does not run (pyenv's shims may point nowhere).
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

# An interpreter is of use only if it can make an environment with pip in it.
can_make_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

candidates() {
    local version
    for version in $supported; do type -ap "python$version" || true; done
    type -ap python3 python || true
    if command -v pyenv >/dev/null; then ls -d "$(pyenv root)"/versions/3.*/bin/python 2>/dev/null | sort -rV || true; fi
    if command -v uv >/dev/null; then uv python list --only-installed --no-python-downloads 2>/dev/null | awk '{print $2}' || true; fi
}

explain_missing_venv() {
    echo "$1 (Python $2) cannot make a virtual environment: its ensurepip module is missing." >&2
    echo "  On Debian and Ubuntu: apt-get install python3-venv   (or python$2-venv)" >&2
}

find_python() {
    local version candidate found crippled="" seen=""
    local -a all
    mapfile -t all < <(candidates)
    for version in $supported; do
        for candidate in "${all[@]}"; do
            found=$(version_of "$candidate")
            if [[ -n $found && " $seen " != *" $found "* ]]; then seen="$seen $found"; fi
            [[ $found == "$version" ]] || continue
            if can_make_venv "$candidate"; then echo "$candidate"; return; fi
            crippled=${crippled:-"$candidate $found"}
        done
    done
    if [[ -n $crippled ]]; then
        explain_missing_venv $crippled
    else
        echo "No Python 3.11, 3.12 or 3.13 found (PATH, pyenv, uv); versions seen:${seen:- none}." >&2
        echo "  On Debian 12: apt-get install python3 python3-venv.   Or name one: make PYTHON=/path/to/python ..." >&2
    fi
    return 1
}

if [[ ${1:-} == --find ]]; then find_python; exit; fi

venv=$1
python=${2:-}
[[ -n $python ]] || python=$(find_python)
version=$(version_of "$python")
case $version in
    3.12 | 3.13) constraints=constraints/python3.12.txt ;;
    3.11) constraints=constraints/python3.11.txt ;;
    "") echo "$python does not run; name a Python 3.11, 3.12 or 3.13" >&2; exit 1 ;;
    *) echo "$python is Python $version; supported: ${supported// /, }" >&2; exit 1 ;;
esac
can_make_venv "$python" || { explain_missing_venv "$python" "$version"; exit 1; }

if [[ $(version_of "$venv/bin/python") != "$version" ]]; then
    echo "Making $venv with $python (Python $version)"
    "$python" -m venv --clear "$venv"
fi
echo "Installing the packages of $constraints into $venv (about a minute)"
# The build backend comes from the same list, so that no second environment is made for it;
# byte code is compiled on first import, of what is imported, not here of everything.
export PIP_DISABLE_PIP_VERSION_CHECK=1
install=("$venv/bin/python" -m pip install --quiet --no-compile --constraint "$constraints")
"${install[@]}" setuptools
"${install[@]}" --no-build-isolation --editable '.[dev]'
echo "$version" >"$venv/.ready"
