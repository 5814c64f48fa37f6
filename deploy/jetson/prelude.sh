# What every script of this folder begins with: messages, exit codes, --dry-run, the board's trtexec.
# shellcheck shell=sh
#
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

# need_artifact FOLDER PRECISION: the artifact holds the network of that precision; its file becomes `source`.
need_artifact() {
    [ -n "$1" ] || fail "$UNUSABLE" "give the artifact's folder, RUN/tensorrt; see --help"
    case $2 in
        int8 | fp16 | fp32) ;;
        *) fail "$UNUSABLE" "--precision is int8, fp16 or fp32, got '$2'" ;;
    esac
    [ -f "$1/artifact.json" ] || fail "$UNUSABLE" "$1: no artifact.json there. Give the folder RUN/tensorrt that qexport export wrote"
    for source in "$1/detector.$2.onnx" "$1/detector.$2.network"; do
        if [ -f "$source" ]; then return; fi
    done
    fail "$UNUSABLE" "$1: no detector.$2.onnx there, so there is nothing to build with --precision $2"
}

# find_trtexec: set `trtexec`; JetPack has it outside of the PATH.
find_trtexec() {
    trtexec=${TRTEXEC:-/usr/src/tensorrt/bin/trtexec}
    if [ ! -x "$trtexec" ]; then
        [ -z "${TRTEXEC:-}" ] || fail "$MISSING" "TRTEXEC=$TRTEXEC is not a program"
        trtexec=$(command -v trtexec) || trtexec=''
    fi
    [ -n "$trtexec" ] || fail "$MISSING" "trtexec is not on this machine. On a Jetson: sudo apt-get install libnvinfer-bin (JetPack 4: it comes with libnvinfer-samples). Elsewhere: TRTEXEC=/path/to/trtexec"
    trtexec_help=$("$trtexec" --help 2>&1) || fail "$MISSING" "$trtexec --help fails: $(printf '%s\n' "$trtexec_help" | tail -n 3). Is this the machine with the GPU?"
}

# takes FLAG: this trtexec lists the flag, and not as one that does nothing any more.
takes() {
    printf '%s\n' "$trtexec_help" | grep -e "^ *$1[ =,]" | grep -v -q -F '[Deprecated]'
}

# python_with MODULE...: print a Python that imports all of them; fails where there is none.
python_with() {
    python_imports=$(printf 'import %s;' "$@")
    for python_tried in "${QEXPORT_VENV:-$HOME/.local/share/qexport/venv}/bin/python" python3; do
        if command -v "$python_tried" >/dev/null 2>&1 && "$python_tried" -c "$python_imports" >/dev/null 2>&1; then
            printf '%s\n' "$python_tried"
            return 0
        fi
    done
    return 1
}
