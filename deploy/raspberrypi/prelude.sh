# What every script of this folder begins with: messages, exit codes, --dry-run, the bundle, the board's files.
# shellcheck shell=sh
# Exit codes, as those of qexport: 0 done; 1 a build or a measurement failed; 2 the input cannot be used;
# 3 software is missing, the message names what installs it.

# shellcheck disable=SC2034 # the scripts that read this file use them
FAILED=1 UNUSABLE=2 MISSING=3
dry_run=0

say() { printf '%s\n' "$*" >&2; }

# fail CODE MESSAGE...: say it and leave.
fail() {
    fail_code=$1
    shift
    say "error: $*"
    exit "$fail_code"
}

# quoted WORD...: the words as a shell takes them, on one line.
quoted() {
    quoted_between=''
    for quoted_word in "$@"; do
        case $quoted_word in
            '' | *[!A-Za-z0-9_./:=,@%+-]*)
                quoted_word="'$(printf '%s' "$quoted_word" | sed "s/'/'\\\\''/g")'"
                ;;
        esac
        printf '%s%s' "$quoted_between" "$quoted_word"
        quoted_between=' '
    done
    printf '\n'
}

# run COMMAND...: run it; with --dry-run print it and do nothing.
run() {
    if [ "$dry_run" = 1 ]; then
        quoted "$@"
    else
        "$@"
    fi
}

# need_value OPTION COUNT: leave where no word follows an option; COUNT is how many words are left, the option
# among them.
need_value() {
    [ "$2" -ge 2 ] || fail "$UNUSABLE" "$1 needs a value; see --help"
}

# need_number OPTION VALUE
need_number() {
    case $2 in
        '' | *[!0-9]*) fail "$UNUSABLE" "$1 takes a whole number, got '$2'" ;;
    esac
}

# Where the board's own files lie; another folder in the tests, which make up a board.
board_root=${QEXPORT_BOARD_ROOT:-}

# ONNX Runtime keeps a number of this machine and counts its use, unless it is told not to.
export ORT_DISABLE_TELEMETRY=1

# need_bundle BUNDLE: a bundle's folder, whole as far as a name tells; qexport checks every byte.
need_bundle() {
    [ -n "$1" ] || fail "$UNUSABLE" "give the bundle, the folder or the archive that qexport bundle wrote; see --help"
    [ -e "$1" ] || fail "$UNUSABLE" "$1: no such bundle"
    [ -f "$1/bundle.json" ] && [ -f "$1/install.sh" ] || fail "$UNUSABLE" "$1: no bundle.json and install.sh there. Give the folder that qexport bundle wrote"
}

# find_qexport BUNDLE VENV: set `qexport`, the program that install.sh installed for this bundle.
find_qexport() {
    qexport=${2:-$1.venv}/bin/qexport
    [ "$dry_run" = 1 ] || [ -x "$qexport" ] || fail "$MISSING" "$qexport is not there. Run install.sh $1 first, or say with --venv where it installed"
}

# absolute PATH: print it as seen from the root.
absolute() {
    case $1 in
        /*) printf '%s\n' "$1" ;;
        *) printf '%s\n' "$PWD/$1" ;;
    esac
}

# need_plain OPTION PATH: no letters that systemd or a shell on the other side reads as more than a name.
need_plain() {
    case $2 in
        '' | -* | *..* | *[!A-Za-z0-9_./-]*) fail "$UNUSABLE" "$1 takes a path of letters, digits and ._-/, got '$2'" ;;
    esac
}

# read_line FILE: print the first line, without the zero byte that the device tree ends with; nothing where the file
# is not there.
read_line() {
    [ ! -r "$1" ] || head -n 1 "$1" 2>/dev/null | tr -d '\000'
}
