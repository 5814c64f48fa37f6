#!/bin/sh
# Detect on an image, on the board.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=prelude.sh
. "$here/prelude.sh"

usage() {
    cat <<'HELP'
usage: run.sh ARTIFACT IMAGE [--dry-run]
       run.sh ARTIFACT --raw NAME:FILE [--engine FILE] [--out FOLDER] [--dry-run]

The first form is `qexport detect`: it prints the boxes, in pixels of the image. It needs what install.sh
installs (JetPack 6 and newer).

The second form needs trtexec alone (JetPack 4 and 5): it gives the engine one input as raw bytes and writes the
outputs as JSON. trtexec reads no images: make the bytes on the workstation.

  --raw NAME:FILE  input tensor and the file with its bytes, `frame:frame.raw`
  --engine FILE    default results/int8.engine, which build.sh wrote
  --out FOLDER     where outputs.json goes. Default: results
  --dry-run        print the commands, run none

  sh run.sh tensorrt street.jpg

Exit codes: 0 done; 1 the engine failed; 2 wrong input; 3 software is missing.
HELP
}

artifact='' image='' raw='' engine='' out=results
while [ $# -gt 0 ]; do
    case $1 in
        --raw) need_value "$1" $#; raw=$2; shift ;;
        --engine) need_value "$1" $#; engine=$2; shift ;;
        --out) need_value "$1" $#; out=$2; shift ;;
        --dry-run) dry_run=1 ;;
        -h | --help) usage; exit 0 ;;
        -*) fail "$UNUSABLE" "unknown option $1; see --help" ;;
        *)
            if [ -z "$artifact" ]; then artifact=$1
            elif [ -z "$image" ]; then image=$1
            else fail "$UNUSABLE" "one artifact and one image, please; $1 is one too many"; fi
            ;;
    esac
    shift
done
artifact=${artifact%/}
need_artifact "$artifact" int8

if [ -n "$image" ]; then
    [ -z "$raw" ] || fail "$UNUSABLE" "give an image or --raw, not both"
    [ -f "$image" ] || fail "$UNUSABLE" "$image: no such file"
    python=$(python_with qexport tensorrt) || fail "$MISSING" "no Python here has both qexport and tensorrt: run install.sh. On JetPack 4 and 5 there is none; use --raw, or measure.sh to time the engine"
    run "$python" -m qexport detect "$artifact" "$image"
    exit 0
fi

[ -n "$raw" ] || fail "$UNUSABLE" "give an image, or --raw NAME:FILE; see --help"
[ -f "${raw#*:}" ] || fail "$UNUSABLE" "--raw $raw: no file '${raw#*:}'"
[ -n "$engine" ] || engine=$out/int8.engine
[ "$dry_run" = 1 ] || [ -f "$engine" ] || fail "$UNUSABLE" "$engine: no such engine. Run build.sh $artifact --with trtexec first"
find_trtexec
run mkdir -p "$out"
run "$trtexec" "--loadEngine=$engine" "--loadInputs=$raw" "--exportOutput=$out/outputs.json" --iterations=1 --duration=0 --warmUp=0 \
    || fail "$FAILED" "trtexec failed; its message is above"
[ "$dry_run" = 1 ] || say "wrote $out/outputs.json"
