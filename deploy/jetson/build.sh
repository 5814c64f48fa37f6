#!/bin/sh
# Build the engine of an artifact with the TensorRT of this board.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=prelude.sh
. "$here/prelude.sh"

usage() {
    cat <<'HELP'
usage: build.sh ARTIFACT [--precision int8|fp16|fp32] [--out FOLDER] [--with qexport|trtexec]
                [--half-floats] [--dry-run]

Builds an engine. It runs on this board, with this TensorRT and in this power mode's limits of memory, and
nowhere else; the .onnx travels, the engine does not. Takes minutes.

  ARTIFACT        the folder RUN/tensorrt, copied from the workstation
  --precision P   which network: int8 (default), fp16 or fp32
  --out FOLDER    where the engine goes when trtexec builds it. Default: results
  --with TOOL     qexport: `qexport build`, which also records in artifact.json what the engine is bound to.
                  trtexec: what every JetPack has. Default: qexport where it and TensorRT's Python bindings are
                  installed, else trtexec
  --half-floats   TensorRT before 10: let what is not int8 run in half precision (trtexec --fp16). Newer ones
                  take every type from the network
  --dry-run       print the commands, run none

  sh build.sh tensorrt
  sh build.sh tensorrt --precision fp32

Exit codes: 0 built; 1 TensorRT refused it, the log is named; 2 wrong input; 3 no TensorRT.
HELP
}

artifact='' precision=int8 out=results tool='' half_floats=0
while [ $# -gt 0 ]; do
    case $1 in
        --precision) need_value "$1" $#; precision=$2; shift ;;
        --out) need_value "$1" $#; out=$2; shift ;;
        --with) need_value "$1" $#; tool=$2; shift ;;
        --half-floats) half_floats=1 ;;
        --dry-run) dry_run=1 ;;
        -h | --help) usage; exit 0 ;;
        -*) fail "$UNUSABLE" "unknown option $1; see --help" ;;
        *) [ -z "$artifact" ] || fail "$UNUSABLE" "one artifact, please: $artifact or $1"; artifact=$1 ;;
    esac
    shift
done
artifact=${artifact%/}
need_artifact "$artifact" "$precision"
[ "$half_floats" = 0 ] || [ "$precision" = int8 ] || fail "$UNUSABLE" "--half-floats is for --precision int8; fp16 is half precision already and fp32 is not to have it"
case $tool in
    '') if python_with qexport tensorrt >/dev/null; then tool=qexport; else tool=trtexec; fi ;;
    qexport | trtexec) ;;
    *) fail "$UNUSABLE" "--with is qexport or trtexec, got '$tool'" ;;
esac

if [ "$tool" = qexport ]; then
    [ "$half_floats" = 0 ] || fail "$UNUSABLE" "--half-floats is for --with trtexec; qexport build takes every type from the network"
    python=$(python_with qexport tensorrt) || fail "$MISSING" "no Python here has both qexport and tensorrt. Run install.sh, or give --with trtexec"
    run "$python" -m qexport build "$artifact" --precision "$precision"
    exit 0
fi

find_trtexec
# The types: a network that is strongly typed says them itself; older versions are told what they may use.
types=''
if takes --stronglyTyped; then
    types=--stronglyTyped
elif takes --int8; then
    case $precision in
        int8) types=--int8 ;;
        fp16) types=--fp16 ;;
        fp32) ;;
    esac
fi
if [ "$half_floats" = 1 ]; then
    [ "$types" = --int8 ] || fail "$UNUSABLE" "--half-floats: this TensorRT takes every type from the network"
    types='--int8 --fp16'
fi
# Stop when it is built. The flag has two names.
only_build=''
if takes --skipInference; then only_build=--skipInference; elif takes --buildOnly; then only_build=--buildOnly; fi
# TensorRT 8.2 gives the builder 16 MB unless told; newer ones take what the board has.
workspace=''
if takes --workspace && ! takes --memPoolSize; then workspace=--workspace=512; fi
# Without the details the inspector has no names of the network's nodes, and no time can be given to a module.
details=''
if takes --profilingVerbosity; then details=--profilingVerbosity=detailed; elif takes --nvtxMode; then details=--nvtxMode=verbose; fi

engine=$out/$precision.engine
case $source in
    *.network) fail "$UNUSABLE" "trtexec reads no ${source##*/}, the network of torch2trt: build it with qexport build $artifact --precision $precision" ;;
esac
set -- "$trtexec" "--onnx=$source" "--saveEngine=$engine"
# shellcheck disable=SC2086 # flags, empty ones left out
set -- "$@" $types $details $workspace $only_build
run mkdir -p "$out"
if [ "$dry_run" = 1 ]; then
    quoted "$@"
    exit 0
fi
say "building $engine; this takes minutes"
if ! "$@" >"$out/build.log" 2>&1; then
    tail -n 20 "$out/build.log" >&2
    fail "$FAILED" "TensorRT could not build $source; everything it said is in $out/build.log"
fi
# What it was built from: merging checks it against artifact.json.
sha256sum "$source" | cut -d ' ' -f 1 >"$engine.onnx-sha256"
say "built $engine"
