#!/bin/sh
# From the workstation: copy an artifact to a board, build and measure it there, bring the results back.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=prelude.sh
. "$here/prelude.sh"

usage() {
    cat <<'HELP'
usage: over_ssh.sh HOST ARTIFACT [--out FOLDER] [--precision int8|fp16|fp32] [--wheel FILE] [--image FILE]
                   [--port N] [--remote FOLDER] [--runs N] [--half-floats] [--power-mode N] [--max-clocks]
                   [--skip-build] [--dry-run]

Run it on the workstation. Copies these scripts and the artifact to HOST:FOLDER, runs install.sh, build.sh and
measure.sh there and copies what they wrote into --out. Log in by key: it connects several times.

  HOST            as ssh takes it: nano, user@192.168.55.1
  ARTIFACT        RUN/tensorrt of a run
  --out FOLDER    on the workstation. Default: results/HOST
  --precision P   int8 (default), fp16 or fp32
  --wheel FILE    a wheel of qexport to install on the board (python -m pip wheel --no-deps .). Without it nothing
                  is installed, and trtexec builds and measures
  --image FILE    also detect on this image there; needs --wheel, or qexport on the board
  --port N        of ssh. Default: what ssh's configuration says
  --remote FOLDER on the board, in the home folder. Default: qexport-board
  --skip-build    measure the engine that is there
  --runs N, --half-floats, --power-mode N, --max-clocks
                  handed to build.sh and measure.sh. Without the last two nothing of the board's power mode and
                  clocks is changed
  --dry-run       print the commands, run none

  sh over_ssh.sh nano runs/mine/tensorrt
  qexport report runs/mine --merge results/nano/*.json

Exit codes: 0 done; 1 a build or a measurement failed; 2 wrong input; 3 software is missing here or there.
HELP
}

host='' artifact='' out='' precision=int8 wheel='' image='' port='' remote=qexport-board skip_build=0
build_options='' measure_options=''
while [ $# -gt 0 ]; do
    case $1 in
        --out) need_value "$1" $#; out=$2; shift ;;
        --precision) need_value "$1" $#; precision=$2; shift ;;
        --wheel) need_value "$1" $#; wheel=$2; shift ;;
        --image) need_value "$1" $#; image=$2; shift ;;
        --port) need_value "$1" $#; need_number "$1" "$2"; port=$2; shift ;;
        --remote) need_value "$1" $#; remote=$2; shift ;;
        --runs | --power-mode)
            need_value "$1" $#; need_number "$1" "$2"; measure_options="$measure_options $1 $2"; shift ;;
        --max-clocks) measure_options="$measure_options $1" ;;
        --half-floats) build_options="$build_options $1" ;;
        --skip-build) skip_build=1 ;;
        --dry-run) dry_run=1 ;;
        -h | --help) usage; exit 0 ;;
        -*) fail "$UNUSABLE" "unknown option $1; see --help" ;;
        *)
            if [ -z "$host" ]; then host=$1
            elif [ -z "$artifact" ]; then artifact=$1
            else fail "$UNUSABLE" "one host and one artifact, please; $1 is one too many"; fi
            ;;
    esac
    shift
done
[ -n "$host" ] || fail "$UNUSABLE" "give the host and the artifact; see --help"
artifact=${artifact%/}
need_artifact "$artifact" "$precision"
case $remote in
    '' | /* | *[!A-Za-z0-9_./-]* | *..*) fail "$UNUSABLE" "--remote is a folder in the home folder of the board, of letters, digits and ._-/, got '$remote'" ;;
esac
for file in "$wheel" "$image"; do
    [ -z "$file" ] || [ -f "$file" ] || fail "$UNUSABLE" "$file: no such file"
done
for program in ssh scp; do
    command -v "$program" >/dev/null 2>&1 || fail "$MISSING" "$program is not on this machine: install openssh-client"
done
[ -n "$out" ] || out=results/${host##*@}

# there WORD...: run on the board, in the remote folder; every word arrives as it is here.
there() {
    # shellcheck disable=SC2086 # a flag and its value, or nothing
    run ssh ${port:+-p "$port"} "$host" "cd $remote && $(quoted "$@")"
}

# leave_with CODE: what a script there answered, in words; ssh itself answers 255.
leave_with() {
    [ "$1" -ne 255 ] || fail "$MISSING" "ssh could not reach $host; its message is above"
    fail "$1" "on $host: its message is above"
}

run mkdir -p "$out"
# shellcheck disable=SC2086
run ssh ${port:+-p "$port"} "$host" "mkdir -p $remote/scripts" || leave_with $?
# shellcheck disable=SC2086
run scp -q ${port:+-P "$port"} "$here"/*.sh "$host:$remote/scripts/" || leave_with 255
if [ "$skip_build" = 0 ]; then
    # Removed first: scp would put a second copy inside of a folder that is there.
    there rm -rf tensorrt || leave_with $?
    # shellcheck disable=SC2086
    run scp -q -r ${port:+-P "$port"} "$artifact" "$host:$remote/tensorrt" || leave_with 255
    # What was built on the workstation does not load there.
    there rm -rf tensorrt/engines || leave_with $?
fi
if [ -n "$wheel" ]; then
    # shellcheck disable=SC2086
    run scp -q ${port:+-P "$port"} "$wheel" "$host:$remote/" || leave_with 255
    there sh scripts/install.sh --from "./${wheel##*/}" || leave_with $?
fi
if [ "$skip_build" = 0 ]; then
    # shellcheck disable=SC2086 # options without blanks
    there sh scripts/build.sh tensorrt --precision "$precision" --out results $build_options || leave_with $?
fi
# shellcheck disable=SC2086
there sh scripts/measure.sh tensorrt --precision "$precision" --out results $measure_options || leave_with $?
if [ -n "$image" ]; then
    # shellcheck disable=SC2086
    run scp -q ${port:+-P "$port"} "$image" "$host:$remote/image.${image##*.}" || leave_with 255
    there sh scripts/run.sh tensorrt "image.${image##*.}" || leave_with $?
fi
for file in times.json profile.json layers.json board.json measure.log; do
    # shellcheck disable=SC2086
    run scp -q ${port:+-P "$port"} "$host:$remote/results/$file" "$out/" || leave_with 255
done
say "results: $out"
say "next: qexport report $(quoted "$(dirname -- "$artifact")") --merge $(quoted "$out"/times.json "$out"/profile.json "$out"/layers.json "$out"/board.json)"
