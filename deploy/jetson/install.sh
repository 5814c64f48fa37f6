#!/bin/sh
# Install the device side of qexport beside the TensorRT of the board.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=prelude.sh
. "$here/prelude.sh"

usage() {
    cat <<'HELP'
usage: install.sh [--from WHEEL_OR_SOURCE] [--venv FOLDER] [--apt] [--dry-run]

Makes a virtual environment that sees the TensorRT of JetPack, and installs the base of qexport into it: numpy,
Pillow and a few small packages, no PyTorch. Nothing else of the system is changed.

JetPack 4 and 5 have no Python 3.10. There nothing is installed: build.sh and measure.sh use trtexec, which comes
with JetPack.

  --from WHEEL_OR_SOURCE  what pip installs: a wheel, or a clone of the repository. Default: qexport of the
                          package index
  --venv FOLDER           default $QEXPORT_VENV, else ~/.local/share/qexport/venv
  --apt                   let sudo apt-get install what is missing of python3-venv and python3-libnvinfer.
                          Without it they are only named
  --dry-run               print the commands, run none

  sh install.sh --from qexport-0.2.0-py3-none-any.whl

Exit codes: 0 done; 1 pip or apt failed; 2 wrong option; 3 something is missing, and named.
HELP
}

source_of=qexport venv=${QEXPORT_VENV:-$HOME/.local/share/qexport/venv} with_apt=0
while [ $# -gt 0 ]; do
    case $1 in
        --from) need_value "$1" $#; source_of=$2; shift ;;
        --venv) need_value "$1" $#; venv=$2; shift ;;
        --apt) with_apt=1 ;;
        --dry-run) dry_run=1 ;;
        -h | --help) usage; exit 0 ;;
        *) fail "$UNUSABLE" "unknown option $1; see --help" ;;
    esac
    shift
done
case $source_of in
    */* | *.whl) [ -e "$source_of" ] || fail "$UNUSABLE" "$source_of: no such file or folder" ;;
esac

# The newest first: JetPack 6 has 3.10, JetPack 7 has 3.12. Only the system's own Python has the bindings.
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    find_trtexec
    say "Python here is $(python3 --version 2>&1 || printf 'missing'); qexport needs 3.10, which JetPack 4 and 5 do not have."
    say "Nothing was installed. build.sh and measure.sh use $trtexec; qexport itself runs on your workstation."
    exit 0
fi

missing=''
python3 -c 'import ensurepip' 2>/dev/null || missing="$missing python3-venv"
python3 -c 'import tensorrt' 2>/dev/null || missing="$missing python3-libnvinfer"
if [ -n "$missing" ] && [ "$with_apt" = 1 ]; then
    # shellcheck disable=SC2086 # a list of package names
    run sudo apt-get install -y --no-install-recommends $missing || fail "$FAILED" "apt-get could not install$missing"
elif [ -n "$missing" ] && [ "$dry_run" = 0 ]; then
    fail "$MISSING" "missing$missing. Install: sudo apt-get install$missing (or give --apt)"
elif [ -n "$missing" ]; then
    say "would stop here: missing$missing; sudo apt-get install$missing (or give --apt)"
fi

# --system-site-packages: the bindings of TensorRT are in the system's folder and on no package index for Jetson.
run python3 -m venv --system-site-packages "$venv" || fail "$FAILED" "the environment $venv could not be made"
run "$venv/bin/python" -m pip install --upgrade "$source_of" || fail "$FAILED" "pip could not install $source_of; its own message is above"
run "$venv/bin/qexport" --version
[ "$dry_run" = 1 ] || say "installed: $venv/bin/qexport"
