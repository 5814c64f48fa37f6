#!/bin/sh
# Say what board this is and in which state: model, versions, power mode, clocks, temperatures, throttling, memory.
# It only reads. What a board does not tell is left out.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=prelude.sh
. "$here/prelude.sh"

usage() {
    cat <<'HELP'
usage: board.sh [--root FOLDER]                          what state the board is in now, as JSON
       board.sh --watch [SECONDS] [--root FOLDER]        one line a period until it is ended:
                                                         GPU MHz, hottest degrees C, throttled (1) or not (0)
       board.sh --before FILE --after FILE [--watched FILE] [--engine FILE] [--root FOLDER]
                                                         board.json: the board, and its state before and after

Prints to standard output; nothing on the board is changed and nothing needs root.

  --root FOLDER   read FOLDER/proc, FOLDER/sys, FOLDER/etc in place of those of this machine
  --dry-run       name the files that would be read

  sh board.sh
  sh board.sh >before.json; ...; sh board.sh >after.json; sh board.sh --before before.json --after after.json

Exit codes: 0 done; 2 wrong option or a file that is not there.
HELP
}

root='' before='' after='' watched='' engine='' period=''
while [ $# -gt 0 ]; do
    case $1 in
        --root) need_value "$1" $#; root=${2%/}; shift ;;
        --before) need_value "$1" $#; before=$2; shift ;;
        --after) need_value "$1" $#; after=$2; shift ;;
        --watched) need_value "$1" $#; watched=$2; shift ;;
        --engine) need_value "$1" $#; engine=$2; shift ;;
        --watch)
            period=1
            case ${2:-} in '' | -*) ;; *) need_number "$1" "$2"; period=$2; shift ;; esac
            ;;
        --dry-run) dry_run=1 ;;
        -h | --help) usage; exit 0 ;;
        *) fail "$UNUSABLE" "unknown option $1; see --help" ;;
    esac
    shift
done
[ -z "$root" ] || [ -d "$root" ] || fail "$UNUSABLE" "--root $root: no such folder"
for file in "$before" "$after" "$watched" "$engine"; do
    [ -z "$file" ] || [ -f "$file" ] || fail "$UNUSABLE" "$file: no such file"
done
case "$before:$after" in
    : | ?*:?*) ;;
    *) fail "$UNUSABLE" "--before and --after go together; see --help" ;;
esac

# content FILE: its text without the zero bytes of the device tree; nothing where it cannot be read. A sensor
# that is switched off gives an error when it is read, not when it is opened.
content() { { tr -d '\000' <"$1" | head -c 4096; } 2>/dev/null || :; }

# text STRING: as JSON.
text() { printf '"%s"' "$(printf '%s' "$1" | tr '\n\t' '  ' | tr -d '\000-\037' | sed 's/\\/\\\\/g; s/"/\\"/g; s/ *$//')"; }

is_number() {
    case $1 in
        '' | - | *[!0-9-]* | ?*-*) return 1 ;;
    esac
}

# scaled NUMBER DIVISOR: with three decimals at most.
scaled() { awk -v number="$1" -v divisor="$2" 'BEGIN { printf "%.6g", number / divisor }'; }

# entry NAME VALUE: one `"name": value` of an object, after a comma where it is not the first.
entry() {
    printf '%s%s: %s' "$entry_between" "$(text "$1")" "$2"
    entry_between=', '
}

# entry_of FILE NAME DIVISOR: the number in a file, scaled; nothing where the file has none.
entry_of() {
    entry_read=$(content "$1")
    if is_number "$entry_read"; then entry "$2" "$(scaled "$entry_read" "$3")"; fi
}

# The GPU's clock by chip: Orin and Nano end in .gpu or the chip's name, Thor has one for each part.
gpu_clock() {
    for gpu_folder in "$root"/sys/class/devfreq/*.gpu "$root"/sys/class/devfreq/*.ga10b \
        "$root"/sys/class/devfreq/*.gv11b "$root"/sys/class/devfreq/*.gp10b "$root"/sys/class/devfreq/gpu-gpc-0; do
        if [ -r "$gpu_folder/cur_freq" ]; then printf '%s' "$gpu_folder"; return; fi
    done
}

clocks() {
    entry_between=''
    for cpu in "$root"/sys/devices/system/cpu/cpu[0-9]*; do
        entry_of "$cpu/cpufreq/scaling_cur_freq" "${cpu##*/}" 1000
        entry_of "$cpu/cpufreq/scaling_max_freq" "${cpu##*/} limit" 1000
    done
    gpu=$(gpu_clock)
    if [ -n "$gpu" ]; then
        entry_of "$gpu/cur_freq" gpu 1000000
        entry_of "$gpu/min_freq" 'gpu lowest' 1000000
        entry_of "$gpu/max_freq" 'gpu limit' 1000000
    fi
    entry_of "$root/sys/kernel/debug/bpmp/debug/clk/emc/rate" memory 1000000 # readable by root alone
}

temperatures() {
    entry_between=''
    for zone in "$root"/sys/class/thermal/thermal_zone*; do
        name=$(content "$zone/type")
        entry_of "$zone/temp" "${name:-${zone##*/}}" 1000
    done
}

# Cooling devices other than fans hold something back while their state is above 0.
cooling() {
    entry_between=''
    for device in "$root"/sys/class/thermal/cooling_device*; do
        name=$(content "$device/type")
        case $name in *fan*) continue ;; esac
        entry_of "$device/cur_state" "${device##*/} ${name:-unnamed}" 1
    done
}

# Counted since boot: events in which the supply voltage or the current made the hardware hold clocks back.
power_events() {
    entry_between=''
    for counter in "$root"/sys/class/hwmon/hwmon*/oc*_event_cnt; do
        name=${counter##*/}
        entry_of "$counter" "${name%_event_cnt}" 1
    done
}

power_mode() {
    mode=''
    if [ -z "$root" ] && command -v nvpmodel >/dev/null 2>&1; then
        # "NV Power Mode: MAXN", then its number on a line of its own.
        mode=$(nvpmodel -q 2>/dev/null | sed -n 's/^NV Power Mode: *//p; /^[0-9][0-9]*$/p' | tr '\n' ' ') || mode=''
        mode=$(printf '%s' "$mode" | sed 's/^\(.*[^ ]\)  *\([0-9][0-9]*\) *$/\1 (\2)/; s/ *$//')
    fi
    if [ -z "$mode" ]; then
        number=$(sed -n 's/^pmode: *0*\([0-9][0-9]*\).*/\1/p' "$root/var/lib/nvpmodel/status" 2>/dev/null) || number=''
        if [ -n "$number" ]; then
            name=$(sed -n "s/^ *< *POWER_MODEL  *ID=$number  *NAME=\([^ >]*\).*/\1/p" "$root/etc/nvpmodel.conf" 2>/dev/null | head -n 1) || name=''
            mode="${name:+$name }($number)"
        fi
    fi
    printf '%s' "$mode"
}

# memory KEY: of /proc/meminfo, KiB.
memory() { sed -n "s/^$1: *\([0-9][0-9]*\) kB.*/\1/p" "$root/proc/meminfo" 2>/dev/null || :; }

snapshot() {
    printf '{"at": %s, "power_mode": %s' "$(text "$(date -u +%Y-%m-%dT%H:%M:%S+00:00)")" "$(text "$(power_mode)")"
    printf ', "clocks_mhz": {%s}, "temperatures_c": {%s}' "$(clocks)" "$(temperatures)"
    printf ', "cooling": {%s}, "power_events": {%s}' "$(cooling)" "$(power_events)"
    available=$(memory MemAvailable)
    printf ', "memory_available_kib": %s}\n' "${available:-null}"
}

# One line for the whole period: it has to cost less than what it watches.
watch_line() {
    gpu=$(gpu_clock)
    gpu_hz=''
    [ -z "$gpu" ] || gpu_hz=$(content "$gpu/cur_freq")
    is_number "$gpu_hz" || gpu_hz=0
    hottest=$({ cat "$root"/sys/class/thermal/thermal_zone*/temp 2>/dev/null || :; } | sort -n | tail -n 1)
    is_number "$hottest" || hottest=0
    held=0
    for device in "$root"/sys/class/thermal/cooling_device*; do
        case $(content "$device/type") in *fan*) continue ;; esac
        state=$(content "$device/cur_state")
        if is_number "$state" && [ "$state" -gt 0 ]; then held=1; fi
    done
    printf '%s %s %s\n' "$(scaled "$gpu_hz" 1000000)" "$(scaled "$hottest" 1000)" "$held"
}

# package PATTERN: version of the first installed package, without Debian's revision.
package() {
    { dpkg-query --admindir="$root/var/lib/dpkg" -W -f '${Version}\n' "$1" 2>/dev/null || :; } | sed 's/-.*//; s/+.*//; /^$/d' | head -n 1
}

# "# R36 (release), REVISION: 4.3, GCID: ..."
l4t_release() { sed -n 's/^# R\([0-9]*\) (release), REVISION: \([0-9.]*\).*/\1.\2/p' "$root/etc/nv_tegra_release" 2>/dev/null || :; }

# jetpack L4T: the version of its package; without one, what the release of L4T belongs to.
jetpack() {
    jetpack_found=$(package nvidia-jetpack)
    case "$jetpack_found:$1" in
        ?*:*) printf '%s' "$jetpack_found" ;;
        :32.*) printf '4' ;;
        :34.* | :35.*) printf '5' ;;
        :36.*) printf '6' ;;
        :38.* | :39.*) printf '7' ;;
    esac
}

cuda() { content "$root/usr/local/cuda/version.json" | tr -d '\n' | sed -n 's/^.*"cuda" *: *{[^}]*"version" *: *"\([0-9.]*\)".*$/\1/p'; }

model() {
    model_found=$(content "$root/proc/device-tree/model")
    [ -n "$model_found" ] || model_found=$(sed -n 's/^model name[^:]*: *//p' "$root/proc/cpuinfo" 2>/dev/null | head -n 1) || :
    printf '%s' "$model_found"
}

# Of the samples, what a report needs; a GPU at rest has a low clock, so the highest is the one it ran at. 0 stands
# for what could not be read.
watched_object() {
    awk 'function known(value) { return value > 0 ? value + 0 : "null" }
        { n++; if (n == 1 || $1 < low) low = $1; if ($1 > high) high = $1; if ($2 > hot) hot = $2; held += $3 }
        END {
            printf "{\"samples\": %d, \"gpu_lowest_mhz\": %s, \"gpu_highest_mhz\": %s", n, known(low), known(high)
            printf ", \"hottest_c\": %s, \"throttled_samples\": %d}", known(hot), held
        }' "$1"
}

if [ "$dry_run" = 1 ]; then
    say "would read, where they are:"
    for name in proc/device-tree/model proc/meminfo etc/nv_tegra_release 'sys/class/thermal/*' 'sys/class/devfreq/*gpu*' \
        'sys/class/hwmon/hwmon*/oc*_event_cnt' 'sys/devices/system/cpu/cpu*/cpufreq/*' var/lib/nvpmodel/status; do
        printf '%s\n' "$root/$name"
    done
elif [ -n "$period" ]; then
    while :; do
        watch_line
        sleep "$period"
    done
elif [ -n "$before" ]; then
    release=$(l4t_release)
    cores=$(grep -c '^processor' "$root/proc/cpuinfo" 2>/dev/null) || cores=0
    total=$(memory MemTotal)
    printf '{"kind": "qexport-board", "format_version": 1, "model": %s, "kernel": %s' "$(text "$(model)")" "$(text "$(uname -srm)")"
    printf ', "l4t": %s, "jetpack": %s, "tensorrt": %s, "cuda": %s' "$(text "$release")" \
        "$(text "$(jetpack "$release")")" "$(text "$(package 'libnvinfer[0-9]*')")" "$(text "$(cuda)")"
    printf ', "cores": %s, "memory_kib": %s' "$cores" "${total:-null}"
    printf ', "engine": %s' "$(if [ -n "$engine" ]; then cat "$engine"; else printf null; fi)"
    printf ', "watched": %s' "$(if [ -s "$watched" ]; then watched_object "$watched"; else printf null; fi)"
    printf ', "before": %s, "after": %s}\n' "$(cat "$before")" "$(cat "$after")"
else
    snapshot
fi
