#!/bin/sh
# Verify a bundle on this board and time it, whole and layer by layer, with the board's state before and after.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=prelude.sh
. "$here/prelude.sh"

usage() {
    cat <<'HELP'
usage: measure.sh BUNDLE [--venv FOLDER] [--out FOLDER] [--runs N] [--warmup N] [--threads N] [--performance]
                  [--dry-run]

Runs `qexport verify` and `qexport bench` of the environment that install.sh made, and writes into FOLDER:

  measurement.json  what `qexport report RUN --merge` takes: latency whole and by layer, memory, verdicts,
                    temperature, clocks, throttling and free memory before and after
  verify.json       every golden frame: bit-identical, or where and by how much it differs
  state.txt         governor, clock, temperature and the firmware's throttling bits, before and after

The board is left as it is, unless you ask:

  --performance   set the governor of every core to `performance` for the measurement (sudo), and back afterwards,
                  also after an error or Ctrl-C

  --venv FOLDER   default: beside the bundle, its name with .venv behind it
  --out FOLDER    default: results. Not within the bundle
  --runs N        runs that count. Default: 100
  --warmup N      runs before them that do not. Default: 10
  --threads N     of the runtime. Default: 1
  --dry-run       print the commands, run none

  sh measure.sh mine.qbundle
  sh measure.sh mine.qbundle --threads 4 --performance --out results-4

Exit codes: 0 measured, every gate holds; 1 measured, but a tensor differs or a gate fails, throttling for one;
2 wrong input; 3 software is missing.
HELP
}

bundle='' venv='' out=results runs=100 warmup=10 threads=1 performance=0
while [ $# -gt 0 ]; do
    case $1 in
        --venv) need_value "$1" $#; venv=$2; shift ;;
        --out) need_value "$1" $#; out=$2; shift ;;
        --runs) need_value "$1" $#; need_number "$1" "$2"; runs=$2; shift ;;
        --warmup) need_value "$1" $#; need_number "$1" "$2"; warmup=$2; shift ;;
        --threads) need_value "$1" $#; need_number "$1" "$2"; threads=$2; shift ;;
        --performance) performance=1 ;;
        --dry-run) dry_run=1 ;;
        -h | --help) usage; exit 0 ;;
        -*) fail "$UNUSABLE" "unknown option $1; see --help" ;;
        *) [ -z "$bundle" ] || fail "$UNUSABLE" "one bundle, please: $bundle or $1"; bundle=$1 ;;
    esac
    shift
done
bundle=${bundle%/}
need_bundle "$bundle"
[ "$runs" -gt 0 ] || fail "$UNUSABLE" "--runs is at least 1"
[ "$threads" -gt 0 ] || fail "$UNUSABLE" "--threads is at least 1"
case $(absolute "$out")/ in
    "$(absolute "$bundle")"/*) fail "$UNUSABLE" "--out $out: lies in the bundle, which would then be another" ;;
esac
find_qexport "$bundle" "$venv"

# governors: every core's governor file; cores that share a clock share one.
governors() {
    for governor in "$board_root"/sys/devices/system/cpu/cpufreq/policy*/scaling_governor; do
        [ ! -r "$governor" ] || printf '%s\n' "$governor"
    done
}

# state WHEN: what the board says of itself; what it does not say is left out.
state() {
    printf '%s\n' "$1"
    for policy in "$board_root"/sys/devices/system/cpu/cpufreq/policy*; do
        [ ! -r "$policy/scaling_governor" ] || printf '  %s governor %s, %s of %s kHz\n' "${policy##*/}" "$(read_line "$policy/scaling_governor")" \
            "$(read_line "$policy/scaling_cur_freq")" "$(read_line "$policy/scaling_max_freq")"
    done
    for zone in "$board_root"/sys/class/thermal/thermal_zone*; do
        [ ! -r "$zone/temp" ] || printf '  %s %s thousandths of a degree C\n' "$(read_line "$zone/type")" "$(read_line "$zone/temp")"
    done
    if command -v vcgencmd >/dev/null 2>&1; then printf '  %s\n' "$(vcgencmd get_throttled 2>&1 || :)"; fi
    sed -n 's/^MemAvailable: */  available memory /p' "$board_root/proc/meminfo" 2>/dev/null || :
}

# set_governor FILE NAME
set_governor() {
    if [ "$dry_run" = 1 ]; then
        printf 'echo %s | sudo tee %s\n' "$2" "$(quoted "$1")"
    else
        printf '%s\n' "$2" | sudo tee "$1" >/dev/null
    fi
}

# What was changed, one `GOVERNOR FILE` a line, so that it can be changed back.
old_governors=''
restore() {
    [ -n "$old_governors" ] || return 0
    printf '%s\n' "$old_governors" | while read -r old file; do
        set_governor "$file" "$old" || say "warning: the governor $old could not be set again in $file; a reboot does it"
    done
}
trap restore EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
if [ "$performance" = 1 ]; then
    files=$(governors)
    [ -n "$files" ] || fail "$MISSING" "--performance: this machine has no governor that could be set (/sys/devices/system/cpu/cpufreq)"
    for file in $files; do
        grep -q -w performance "${file%/*}/scaling_available_governors" || fail "$MISSING" "--performance: ${file%/*} does not list that governor"
        old=$(read_line "$file")
        set_governor "$file" performance || fail "$FAILED" "the governor could not be set, so nothing was measured; sudo's message is above"
        old_governors="${old_governors:+$old_governors
}$old $file"
    done
fi

run mkdir -p "$out"
if [ "$dry_run" = 0 ]; then
    # What an earlier measurement left is not this one's.
    rm -f "$out/measurement.json" "$out/verify.json" "$out/state.txt"
    state before >"$out/state.txt"
fi
answer=0
run "$qexport" verify "$bundle" --threads "$threads" --json "$out/verify.json" || answer=$?
[ "$answer" -le "$FAILED" ] || exit "$answer"
# A difference does not end it: bench writes its own verdict beside every figure.
run "$qexport" bench "$bundle" --runs "$runs" --warmup "$warmup" --threads "$threads" --out "$out/measurement.json" || {
    bench_answer=$?
    [ "$bench_answer" -le "$FAILED" ] || exit "$bench_answer"
    answer=$FAILED
}
[ "$dry_run" = 0 ] || exit 0
state after >>"$out/state.txt"
for file in measurement.json verify.json; do
    [ -s "$out/$file" ] || fail "$FAILED" "$out/$file was not written; qexport's message is above"
done
say "measured. On the workstation: qexport report RUN --merge $(quoted "$out/measurement.json")"
[ "$answer" = 0 ] || fail "$answer" "measured, but a tensor differs or a gate fails: qexport's messages are above"
