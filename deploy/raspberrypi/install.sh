#!/bin/sh
# Install the device side of qexport on a Raspberry Pi from a bundle, and verify the bundle there.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=prelude.sh
. "$here/prelude.sh"

usage() {
    cat <<'HELP'
usage: install.sh BUNDLE [--venv FOLDER] [--wheels FOLDER] [--torch-index URL] [--no-apt] [--no-verify] [--dry-run]

Run it on the Raspberry Pi: Raspberry Pi OS 12 or 13, 64-bit. It looks at the system first, installs python3-venv
with sudo apt-get if it is missing, makes a virtual environment, installs qexport from the bundle with the runtime
that its artifact needs, and runs the bundle's golden frames. Nothing is compiled; what is fetched are packages, from
Debian's and pip's index. PyTorch is installed for the targets qnnpack and executorch alone, which run in it.

  BUNDLE           the folder that `qexport bundle` wrote, or its archive, which is unpacked beside itself
  --venv FOLDER    default: beside the bundle, its name with .venv behind it
  --wheels FOLDER  take Python packages from this folder and not from the index, for a board without a network;
                   `sh BUNDLE/install.sh --help` says how to fill it
  --torch-index URL
                   where PyTorch is taken from, for qnnpack and executorch: PyTorch's own index of CPU wheels, or one
                   that you trust. Without it pip's usual index is asked, whose torch for 64-bit Arm is a CUDA build
                   of 454 MB with CUDA's libraries on top. Default: the variable QEXPORT_TORCH_INDEX
  --no-apt         never ask for sudo: name what is missing and stop
  --no-verify      install only
  --dry-run        print the commands, run none

  sh install.sh mine.qbundle.tar
  sh install.sh mine.qbundle --wheels wheels --no-apt

Exit codes: 0 done, every golden tensor bit-identical; 1 apt or pip failed, or a tensor differs; 2 wrong option, or
a bundle that was changed; 3 this system cannot run it, or something is missing and named.
HELP
}

bundle='' venv='' wheels='' torch_index='' verify=1 with_apt=1
while [ $# -gt 0 ]; do
    case $1 in
        --venv) need_value "$1" $#; venv=$2; shift ;;
        --wheels) need_value "$1" $#; wheels=$2; shift ;;
        --torch-index) need_value "$1" $#; torch_index=$2; shift ;;
        --no-apt) with_apt=0 ;;
        --no-verify) verify=0 ;;
        --dry-run) dry_run=1 ;;
        -h | --help) usage; exit 0 ;;
        -*) fail "$UNUSABLE" "unknown option $1; see --help" ;;
        *) [ -z "$bundle" ] || fail "$UNUSABLE" "one bundle, please: $bundle or $1"; bundle=$1 ;;
    esac
    shift
done
bundle=${bundle%/}
archive=''
if [ -f "$bundle" ]; then
    archive=$bundle bundle=${bundle%.tar}
    [ "$archive" != "$bundle" ] || fail "$UNUSABLE" "$archive: neither a folder nor a .tar. Give what qexport bundle wrote"
    [ ! -e "$bundle" ] || fail "$UNUSABLE" "$bundle is there already, beside $archive. Give the folder, or remove it first"
else
    need_bundle "$bundle"
fi
[ -z "$wheels" ] || [ -d "$wheels" ] || fail "$UNUSABLE" "--wheels $wheels: no such folder"

# What this is. A 32-bit system may run on a 64-bit kernel, so the kernel is not asked.
model=$(read_line "$board_root/proc/device-tree/model")
release=$board_root/etc/os-release
name=$(sed -n 's/^PRETTY_NAME="\{0,1\}\([^"]*\)"\{0,1\}$/\1/p' "$release" 2>/dev/null || :)
version=$(sed -n 's/^VERSION_ID="\{0,1\}\([^"]*\)"\{0,1\}$/\1/p' "$release" 2>/dev/null || :)
system=$(sed -n 's/^ID="\{0,1\}\([^"]*\)"\{0,1\}$/\1/p' "$release" 2>/dev/null || :)
architecture=$(dpkg --print-architecture 2>/dev/null || uname -m)
say "${model:-no Raspberry Pi}, ${name:-unknown system}, $architecture"
case $architecture in
    armhf | armel | armv6l | armv7l | i?86 | raspbian*)
        fail "$MISSING" "this is a 32-bit system ($architecture). ONNX Runtime and LiteRT are not published for it, so nothing was installed. Write the 64-bit Raspberry Pi OS to the card: it runs on a Pi 3, 4, 5, 400, 500 and Zero 2 W. A Pi 1, a Pi Zero and a Pi 2 before revision 1.2 have 32-bit processors and cannot run it" ;;
esac
case $system:$version in
    debian:12 | debian:13) ;;
    debian:[0-9] | debian:10 | debian:11)
        fail "$MISSING" "$name has a Python older than 3.10, so nothing was installed. Write Raspberry Pi OS 12 (bookworm) or 13 (trixie), 64-bit, to the card" ;;
    *) say "warning: neither Raspberry Pi OS 12 nor 13; going on, what decides is the Python and pip's packages" ;;
esac

if ! python3 -c 'import venv, ensurepip' 2>/dev/null; then
    if [ "$with_apt" = 0 ] && [ "$dry_run" = 0 ]; then
        fail "$MISSING" "python3-venv is missing. Install it: sudo apt-get install python3-venv"
    fi
    command -v sudo >/dev/null 2>&1 || [ "$dry_run" = 1 ] || fail "$MISSING" "python3-venv is missing, and so is sudo. As root: apt-get install python3-venv"
    say "missing: python3-venv; asking sudo for it"
    run sudo apt-get update || fail "$FAILED" "apt-get could not read its index; its message is above. Without a network, install python3-venv from a package file"
    run sudo apt-get install -y --no-install-recommends python3-venv || fail "$FAILED" "apt-get could not install python3-venv; its message is above"
fi

if [ -n "$archive" ]; then
    run mkdir "$bundle" || fail "$UNUSABLE" "$bundle cannot be made. Copy $archive to a folder that you can write"
    run tar -xf "$archive" -C "$bundle" --strip-components=1 || fail "$UNUSABLE" "$archive cannot be unpacked: copy it again, and remove $bundle"
    [ "$dry_run" = 1 ] || need_bundle "$bundle"
fi

# The bundle's own script checks the digests, makes the environment and verifies.
set -- "$bundle/install.sh" --venv "$(absolute "${venv:-$bundle.venv}")"
[ -z "$wheels" ] || set -- "$@" --wheels "$wheels"
[ -z "$torch_index" ] || set -- "$@" --torch-index "$torch_index"
[ "$verify" = 1 ] || set -- "$@" --no-verify
run sh "$@" || exit $?
[ "$dry_run" = 1 ] || say "next: measure.sh $(quoted "$bundle")${venv:+ --venv $(quoted "$venv")}"
