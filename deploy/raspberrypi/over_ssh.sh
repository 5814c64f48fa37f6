#!/bin/sh
# From the workstation: copy a bundle to a Raspberry Pi, install, verify and measure there, bring the results back.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=prelude.sh
. "$here/prelude.sh"

usage() {
    cat <<'HELP'
usage: over_ssh.sh HOST BUNDLE [--out FOLDER] [--port N] [--remote FOLDER] [--wheels FOLDER] [--no-apt]
                   [--runs N] [--warmup N] [--threads N] [--performance] [--skip-install] [--dry-run]

Run it on the workstation. Copies these scripts and the bundle to HOST:FOLDER, runs install.sh and measure.sh there
and copies what they wrote into --out. Log in by key: it connects several times.

  HOST              as ssh takes it: raspberrypi.local, me@192.168.1.20
  BUNDLE            what `qexport bundle` wrote, the folder or its archive
  --out FOLDER      on the workstation. Default: results/HOST
  --port N          of ssh. Default: what ssh's configuration says
  --remote FOLDER   on the board, in the home folder. Default: qexport-pi
  --wheels FOLDER   on the workstation: Python packages for a board without a network; they are copied along
  --no-apt          never ask for sudo there: stop where a package is missing
  --skip-install    use what is installed there and the bundle that lies there; BUNDLE is not copied
  --runs N, --warmup N, --threads N, --performance
                    handed to measure.sh. Without the last nothing of the board's clocks is changed
  --dry-run         print the commands, run none

  sh over_ssh.sh me@raspberrypi.local mine.qbundle.tar
  qexport report runs/mine --merge results/raspberrypi.local/measurement.json

Exit codes: 0 done; 1 a tensor differs, a gate failed or an installation did; 2 wrong input; 3 software is missing
here or there. After 1 of a measurement its results are brought back all the same.
HELP
}

host='' bundle='' out='' port='' remote=qexport-pi wheels='' skip_install=0 measure_options='' install_options=''
while [ $# -gt 0 ]; do
    case $1 in
        --out) need_value "$1" $#; out=$2; shift ;;
        --port) need_value "$1" $#; need_number "$1" "$2"; port=$2; shift ;;
        --remote) need_value "$1" $#; remote=$2; shift ;;
        --wheels) need_value "$1" $#; wheels=${2%/}; shift ;;
        --runs | --warmup | --threads)
            need_value "$1" $#; need_number "$1" "$2"; measure_options="$measure_options $1 $2"; shift ;;
        --performance) measure_options="$measure_options $1" ;;
        --no-apt) install_options="$install_options $1" ;;
        --skip-install) skip_install=1 ;;
        --dry-run) dry_run=1 ;;
        -h | --help) usage; exit 0 ;;
        -*) fail "$UNUSABLE" "unknown option $1; see --help" ;;
        *)
            if [ -z "$host" ]; then host=$1
            elif [ -z "$bundle" ]; then bundle=$1
            else fail "$UNUSABLE" "one host and one bundle, please; $1 is one too many"; fi
            ;;
    esac
    shift
done
[ -n "$host" ] || fail "$UNUSABLE" "give the host and the bundle; see --help"
bundle=${bundle%/}
[ -f "$bundle" ] && [ "${bundle%.tar}" != "$bundle" ] || need_bundle "$bundle"
case $remote in
    /*) fail "$UNUSABLE" "--remote is a folder in the home folder of the board, got '$remote'" ;;
esac
need_plain --remote "$remote"
[ -z "$wheels" ] || [ -d "$wheels" ] || fail "$UNUSABLE" "--wheels $wheels: no such folder"
for program in ssh scp; do
    command -v "$program" >/dev/null 2>&1 || fail "$MISSING" "$program is not on this machine: install openssh-client"
done
[ -n "$out" ] || out=results/${host##*@}

# there WORD...: run on the board, in the remote folder; every word arrives as it is here.
there() {
    # shellcheck disable=SC2086 # a flag and its value, or nothing
    run ssh ${port:+-p "$port"} "$host" "cd $remote && $(quoted "$@")"
}

# send WHAT PLACE: copy there. fetch WHAT: copy here.
send() {
    # shellcheck disable=SC2086
    run scp -q -r ${port:+-P "$port"} "$1" "$host:$remote/$2" || leave_with 255
}
fetch() {
    # shellcheck disable=SC2086
    run scp -q ${port:+-P "$port"} "$host:$remote/$1" "$out/" || leave_with 255
}

# leave_with CODE: what a script there answered, in words; ssh itself answers 255.
leave_with() {
    [ "$1" -ne 255 ] || fail "$MISSING" "ssh could not reach $host; its message is above"
    fail "$1" "on $host: its message is above"
}

run mkdir -p "$out"
# shellcheck disable=SC2086
run ssh ${port:+-p "$port"} "$host" "mkdir -p $remote/scripts" || leave_with $?
for script in "$here"/*.sh; do
    send "$script" scripts/
done
if [ "$skip_install" = 0 ]; then
    # Removed first: scp would put a second copy inside of a folder that is there. The environment stays, pip renews it.
    there rm -rf bundle bundle.tar wheels || leave_with $?
    copied=bundle
    [ -d "$bundle" ] || copied=bundle.tar
    send "$bundle" "$copied"
    if [ -n "$wheels" ]; then
        send "$wheels" wheels
        install_options="$install_options --wheels wheels"
    fi
    # measure.sh verifies, and says so in a file.
    # shellcheck disable=SC2086 # options without blanks
    there sh scripts/install.sh "$copied" --no-verify $install_options || leave_with $?
fi
there rm -rf results || leave_with $?
answer=0
# shellcheck disable=SC2086
there sh scripts/measure.sh bundle --out results $measure_options || answer=$?
[ "$answer" -le "$FAILED" ] || leave_with "$answer"
for file in measurement.json verify.json state.txt; do
    fetch "results/$file"
done
say "results: $out"
say "next: qexport report RUN --merge $(quoted "$out/measurement.json")"
[ "$answer" = 0 ] || leave_with "$answer"
