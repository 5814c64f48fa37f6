#!/bin/sh
# Install the device side of qexport on this board from the bundle that this script lies in, and verify the bundle.
set -eu
umask 022
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

# Written in when the bundle was made.
wheel='@WHEEL@'
extra='@EXTRA@'

FAILED=1 UNUSABLE=2 MISSING=3

usage() {
    cat <<'HELP'
usage: install.sh [--venv FOLDER] [--python PYTHON] [--wheels FOLDER] [--torch-index URL] [--video] [--no-verify]
                  [--dry-run]

Makes a virtual environment, installs into it the qexport of this bundle with the runtime that the artifact needs,
and runs `qexport verify`. PyTorch only where it is the runtime; nothing outside of that folder, no sudo.

  --venv FOLDER    default: beside the bundle, its name with .venv behind it
  --python PYTHON  which Python, 3.10 or newer and 64 bit. Default: python3
  --wheels FOLDER  take packages from this folder and not from the package index, for a board without network. Fill
                   it on a machine with one, for this board's processor and Python:
                   pip download --dest FOLDER --only-binary :all: --platform manylinux_2_28_aarch64 \
                       --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
                       --python-version 3.11 'BUNDLE/wheel/qexport-....whl[EXTRA]'
  --torch-index URL
                   where PyTorch is taken from, if it is the runtime: PyTorch's own index of CPU wheels, or one that
                   you trust. Without it pip's usual index is asked, whose torch for 64-bit Arm is a CUDA build of
                   454 MB with CUDA's libraries on top. Default: the variable QEXPORT_TORCH_INDEX
  --video          also what reads video files and cameras (PyAV)
  --no-verify      install only
  --dry-run        print the commands, run none

Exit codes: 0 done, and every golden tensor is bit-identical; 1 pip failed or a tensor differs; 2 wrong option or
a bundle that was changed; 3 something is missing, and named.
HELP
}

say() { printf '%s\n' "$*" >&2; }

# fail CODE MESSAGE...
fail() {
    code=$1
    shift
    say "error: $*"
    exit "$code"
}

# run COMMAND...: run it; with --dry-run print it.
run() {
    if [ "$dry_run" = 1 ]; then
        printf '%s\n' "$*"
    else
        "$@"
    fi
}

venv="$here.venv" python=python3 wheels='' torch_index=${QEXPORT_TORCH_INDEX:-} verify=1 dry_run=0
while [ $# -gt 0 ]; do
    case $1 in
        --venv | --python | --wheels | --torch-index)
            [ $# -ge 2 ] || fail "$UNUSABLE" "$1 needs a value; see --help"
            case $1 in
                --venv) venv=$2 ;;
                --python) python=$2 ;;
                --wheels) wheels=$2 ;;
                --torch-index) torch_index=$2 ;;
            esac
            shift 2
            ;;
        --video) extra="$extra,video" && shift ;;
        --no-verify) verify=0 && shift ;;
        --dry-run) dry_run=1 && shift ;;
        --help | -h) usage && exit 0 ;;
        *) fail "$UNUSABLE" "unknown option $1; see --help" ;;
    esac
done
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
case $venv/ in
    "$here"/*) fail "$UNUSABLE" "--venv $venv: lies in the bundle, which would then be another. Choose a folder beside it" ;;
esac
[ -z "$wheels" ] || [ -d "$wheels" ] || fail "$UNUSABLE" "--wheels $wheels: no such folder"

case $extra in
    qnnpack-runtime* | executorch*) with_torch=1 ;;
    *) with_torch=0 ;;
esac
case $torch_index in
    '' | http://* | https://* | file://*) ;;
    *) fail "$UNUSABLE" "--torch-index $torch_index: no address of a package index. For a folder of wheels: --wheels" ;;
esac

# Before anything of the bundle runs.
if command -v sha256sum >/dev/null 2>&1; then
    (cd "$here" && sha256sum --check --quiet SHA256SUMS >&2) ||
        fail "$UNUSABLE" "$here: a file of the bundle is missing or was changed; copy it again"
fi

command -v "$python" >/dev/null 2>&1 || fail "$MISSING" "$python is not on this machine. sudo apt-get install python3 python3-venv, or --python PYTHON"
machine=$(uname -m)
about=$("$python" -c 'import struct, sys; print("%d.%d %d" % (sys.version_info[0], sys.version_info[1], 8 * struct.calcsize("P")))')
version=${about% *} bits=${about#* }
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' ||
    fail "$MISSING" "$python is Python $version; qexport takes 3.10 to 3.13. Choose another with --python"
[ "$bits" = 64 ] || fail "$MISSING" "$python is a $bits-bit program on $machine: there is no runtime for 32-bit systems. Install the 64-bit image of the operating system"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$MISSING" "$python cannot make virtual environments. sudo apt-get install python$version-venv"

# pip_install WHAT...: a missing wheel is an answer, an hour of compiling on a board is none. ExecuTorch asks for one
# package of pure Python of which the index has the source alone.
pip_install() {
    if [ -n "$wheels" ]; then
        set -- --no-index --find-links "$wheels" "$@"
    else
        set -- --only-binary :all: --no-binary antlr4-python3-runtime "$@"
    fi
    run "$venv/bin/python" -m pip install --disable-pip-version-check --quiet "$@"
}

# What the bundle's qexport asks of PyTorch, as its wheel says it, a line each.
torch_requirements() {
    "$python" - "$here/$wheel" "${extra%%,*}" <<'PYTHON'
import sys, zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = wheel.read(name).decode().splitlines()
for line in lines:
    what, _, of = line.partition(";")
    asked = what.partition(":")[2].strip()
    if what.startswith("Requires-Dist:") and sys.argv[2] in of and asked.startswith("torch"):
        print(asked)
PYTHON
}

say "installing into $venv (Python $version, $machine)"
run "$python" -m venv "$venv" || fail "$FAILED" "$venv: no virtual environment could be made there; --venv chooses another folder"
if [ "$with_torch" = 1 ] && [ -n "$torch_index" ] && [ -z "$wheels" ]; then
    requirements=$(torch_requirements)
    set --
    while IFS= read -r line; do set -- "$@" "$line"; done <<EOF
$requirements
EOF
    run "$venv/bin/python" -m pip install --disable-pip-version-check --quiet --index-url "$torch_index" "$@" ||
        fail "$FAILED" "pip could not install $* from $torch_index, which --torch-index or QEXPORT_TORCH_INDEX names. What pip says is above"
elif [ "$with_torch" = 1 ] && [ -z "$wheels" ] && [ "$machine" = aarch64 ]; then
    say "PyTorch comes from pip's usual index: for this processor a CUDA build of 454 MB, with CUDA's libraries on top. A CPU build is smaller and enough: --torch-index"
fi
pip_install "$here/${wheel}[$extra]" ||
    fail "$FAILED" "pip could not install qexport[$extra] on this machine: $machine, Python $version. What pip says is above. Where it finds no matching distribution, there is no wheel of the runtime for this processor and Python (or none in --wheels): try another Python with --python. Where it says externally managed or no space, --venv takes another folder. Without a network: --wheels"
# A qexport of the same version that was there before may be another.
pip_install --force-reinstall --no-deps "$here/$wheel" || fail "$FAILED" "pip could not install $here/$wheel"

if [ "$dry_run" = 0 ]; then say "installed: $(du -sm "$venv" | cut -f 1) MB"; fi

if [ "$verify" = 1 ]; then
    run "$venv/bin/qexport" verify "$here" || exit $?
fi
say "done. Next:"
say "  $venv/bin/qexport detect $here IMAGE"
say "  $venv/bin/qexport bench $here --out measurement.json"
