#!/bin/sh
# Time an engine with trtexec, whole and layer by layer, and record the board's state around it.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=prelude.sh
. "$here/prelude.sh"

usage() {
    cat <<'HELP'
usage: measure.sh ARTIFACT [--precision int8|fp16|fp32] [--engine FILE] [--out FOLDER] [--runs N] [--warmup-ms N]
                  [--power-mode N] [--max-clocks] [--dry-run]

Runs the engine that build.sh built and writes into FOLDER what `qexport report RUN --merge` reads:

  times.json    every run's time (trtexec --exportTimes)
  profile.json  every layer's time, from a run of its own (--exportProfile)
  layers.json   what the layers are made of (--exportLayerInfo)
  board.json    the board: versions, power mode, clocks, temperatures, throttling; before, during and after

Power mode and clocks are recorded as they are. They are changed only when you ask:

  --power-mode N  sudo nvpmodel -m N for the measurement, and back afterwards. Some modes need a reboot: set
                  those yourself. `nvpmodel -q` says which there are
  --max-clocks    sudo jetson_clocks for the measurement, and the old clocks back afterwards

  --precision P   int8 (default), fp16 or fp32
  --engine FILE   default: FOLDER/P.engine, else the one that `qexport build` made, ARTIFACT/engines
  --out FOLDER    default: results
  --runs N        at least that many counted runs. Default: 200
  --warmup-ms N   milliseconds of runs before them. Default: 2000
  --dry-run       print the commands, run none

  sh measure.sh tensorrt
  sh measure.sh tensorrt --power-mode 0 --max-clocks --runs 1000

The times are those of the GPU, frame on the device in to boxes on the device out: copies are not in them.

Exit codes: 0 measured; 1 trtexec failed; 2 wrong input; 3 no trtexec, or no nvpmodel where one was asked for.
HELP
}

artifact='' precision=int8 engine='' out=results runs=200 warmup_ms=2000 mode='' max_clocks=0
while [ $# -gt 0 ]; do
    case $1 in
        --precision) need_value "$1" $#; precision=$2; shift ;;
        --engine) need_value "$1" $#; engine=$2; shift ;;
        --out) need_value "$1" $#; out=$2; shift ;;
        --runs) need_value "$1" $#; need_number "$1" "$2"; runs=$2; shift ;;
        --warmup-ms) need_value "$1" $#; need_number "$1" "$2"; warmup_ms=$2; shift ;;
        --power-mode) need_value "$1" $#; need_number "$1" "$2"; mode=$2; shift ;;
        --max-clocks) max_clocks=1 ;;
        --dry-run) dry_run=1 ;;
        -h | --help) usage; exit 0 ;;
        -*) fail "$UNUSABLE" "unknown option $1; see --help" ;;
        *) [ -z "$artifact" ] || fail "$UNUSABLE" "one artifact, please: $artifact or $1"; artifact=$1 ;;
    esac
    shift
done
artifact=${artifact%/}
need_artifact "$artifact" "$precision"
[ "$runs" -gt 0 ] || fail "$UNUSABLE" "--runs is at least 1"
find_trtexec

if [ -z "$engine" ]; then
    for engine in "$out/$precision.engine" "$artifact/engines/detector.$precision.engine"; do
        if [ -f "$engine" ]; then break; fi
    done
fi
if [ ! -f "$engine" ]; then
    [ "$dry_run" = 1 ] || fail "$UNUSABLE" "no engine for $precision, neither $out/$precision.engine nor one in $artifact/engines. Run build.sh $artifact --precision $precision first"
    engine=$out/$precision.engine
fi
onnx_sha256=$(sha256sum "$source" | cut -d ' ' -f 1)
if [ -f "$engine.onnx-sha256" ] && [ "$(cat "$engine.onnx-sha256")" != "$onnx_sha256" ]; then
    fail "$UNUSABLE" "$engine was built from another ${source##*/} than the one in $artifact. Run build.sh again"
fi
# What `qexport build` made has its source in the record beside it.
record=$artifact/engines/engines.json
if [ "$engine" = "$artifact/engines/detector.$precision.engine" ] && ! grep -q "$onnx_sha256" "$record" 2>/dev/null; then
    fail "$UNUSABLE" "$engine was built from another ${source##*/} than the one in $artifact. Run build.sh again"
fi

# What was asked for, and how to undo it.
old_mode='' clocks_file=''
restore() {
    [ -z "${watcher:-}" ] || kill "$watcher" 2>/dev/null || :
    if [ -n "$clocks_file" ]; then
        run sudo jetson_clocks --restore "$clocks_file" || say "warning: the old clocks could not be restored; a reboot does it"
    fi
    if [ -n "$old_mode" ]; then
        run sudo nvpmodel -m "$old_mode" </dev/null || say "warning: power mode $old_mode could not be set again: sudo nvpmodel -m $old_mode"
    fi
}
trap restore EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
run mkdir -p "$out"
if [ -n "$mode" ]; then
    mode_now=MODE_NOW
    if [ "$dry_run" = 0 ]; then
        command -v nvpmodel >/dev/null 2>&1 || fail "$MISSING" "--power-mode needs nvpmodel, which is part of JetPack and not on this machine"
        mode_now=$(nvpmodel -q 2>/dev/null | sed -n '/^[0-9][0-9]*$/p' | tail -n 1)
        [ -n "$mode_now" ] || fail "$FAILED" "the power mode of now could not be read (nvpmodel -q), so it was not changed: it could not be set back"
    fi
    # Without an input it cannot wait for an answer when a mode needs a reboot.
    run sudo nvpmodel -m "$mode" </dev/null || fail "$FAILED" "power mode $mode was refused; modes that need a reboot have to be set by hand"
    old_mode=$mode_now
fi
if [ "$max_clocks" = 1 ]; then
    if [ "$dry_run" = 0 ]; then
        command -v jetson_clocks >/dev/null 2>&1 || fail "$MISSING" "--max-clocks needs jetson_clocks, which is part of JetPack and not on this machine"
    fi
    run sudo jetson_clocks --store "$out/clocks.conf" || fail "$FAILED" "the clocks could not be saved, so they were not changed"
    clocks_file=$out/clocks.conf
    run sudo jetson_clocks || fail "$FAILED" "jetson_clocks failed"
fi

set -- "--loadEngine=$engine" "--exportTimes=$out/times.json" "--exportProfile=$out/profile.json" \
    "--exportLayerInfo=$out/layers.json" "--iterations=$runs" --duration=0 "--warmUp=$warmup_ms" --dumpProfile
# TensorRT 11 has the last three on its own; 8.2 says the verbosity here once more.
if takes --profilingVerbosity; then set -- "$@" --profilingVerbosity=detailed; elif takes --nvtxMode; then set -- "$@" --nvtxMode=verbose; fi
for flag in --separateProfileRun --useCudaGraph --noDataTransfers; do
    if takes "$flag"; then set -- "$@" "$flag"; fi
done

if [ "$dry_run" = 1 ]; then
    printf '%s >%s\n' "$(quoted sh "$here/board.sh")" "$(quoted "$out/before.json")"
    quoted "$trtexec" "$@"
    printf '%s >%s\n' "$(quoted sh "$here/board.sh")" "$(quoted "$out/after.json")"
    printf '%s >%s\n' "$(quoted sh "$here/board.sh" --before "$out/before.json" --after "$out/after.json" --watched "$out/watched.txt" --engine "$out/engine.json")" "$(quoted "$out/board.json")"
    exit 0
fi

rm -f "$out/times.json" "$out/profile.json" "$out/layers.json" "$out/board.json"
sh "$here/board.sh" >"$out/before.json"
sh "$here/board.sh" --watch >"$out/watched.txt" &
watcher=$!
if ! "$trtexec" "$@" >"$out/measure.log" 2>&1; then
    tail -n 20 "$out/measure.log" >&2
    fail "$FAILED" "trtexec could not run $engine; everything it said is in $out/measure.log"
fi
kill "$watcher" 2>/dev/null || :
watcher=''
sh "$here/board.sh" >"$out/after.json"
printf '{"precision": "%s", "onnx_sha256": "%s", "engine_sha256": "%s", "warmup_ms": %s, "flags": "%s"}\n' "$precision" \
    "$onnx_sha256" "$(sha256sum "$engine" | cut -d ' ' -f 1)" "$warmup_ms" \
    "$(for word in "$@"; do case $word in *=*/*) ;; *) printf '%s ' "$word" ;; esac; done | sed 's/ $//')" >"$out/engine.json"
sh "$here/board.sh" --before "$out/before.json" --after "$out/after.json" --watched "$out/watched.txt" \
    --engine "$out/engine.json" >"$out/board.json"
rm -f "$out/before.json" "$out/after.json" "$out/watched.txt" "$out/engine.json"
for file in times profile layers board; do
    [ -s "$out/$file.json" ] || fail "$FAILED" "$out/$file.json was not written; see $out/measure.log"
done
say "measured. On the workstation: qexport report RUN --merge $out/times.json $out/profile.json $out/layers.json $out/board.json"
