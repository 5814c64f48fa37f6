#!/bin/sh
# What the service runs: detects in every image that is put into a folder, or in a camera's frames; boxes as JSON lines.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=prelude.sh
. "$here/prelude.sh"

usage() {
    cat <<'HELP'
usage: serve.sh BUNDLE [--venv FOLDER] [--state FOLDER] [--camera DEVICE] [--score S] [--threads N] [--batch N]
                [--poll-s N] [--keep-days N] [--once] [--dry-run]

service.sh makes a systemd service of this; by hand it shows what that does. It prints one line of JSON for each
image and tells systemd that it is alive after every step, which is what the service's watchdog waits for.

Of a folder (the default): images that are put into STATE/inbox are detected in, up to --batch of them by one
process, and moved to STATE/done; one that cannot be read goes to STATE/rejected. An image is taken once nothing has
been written to it for --poll-s seconds; rename it into the folder, or give it a name with a dot in front until it is
whole.

Of a camera: `qexport detect BUNDLE DEVICE --json -`, which takes the newest frame each time.

  --venv FOLDER    default: beside the bundle, its name with .venv behind it
  --state FOLDER   default $STATE_DIRECTORY, which systemd sets
  --camera DEVICE  /dev/video0
  --score S        lowest score of a box. Default: 0.5
  --threads N      of the runtime. Default: 1
  --batch N        images for one process, which takes about a second to start. Default: 8
  --poll-s N       how long to wait before looking again. Default: 2
  --keep-days N    remove images from done and rejected after so many days. Default: 7
  --once           stop when the folder is empty
  --dry-run        print the commands, run none

  sh serve.sh mine.qbundle --state state --once

Exit codes: 0 stopped; 1 it failed on the way; 2 the bundle or an option cannot be used; 3 software is missing.
HELP
}

bundle='' venv='' state=${STATE_DIRECTORY:-} camera='' score=0.5 threads=1 batch=8 poll_s=2 keep_days=7 once=0
while [ $# -gt 0 ]; do
    case $1 in
        --venv) need_value "$1" $#; venv=$(absolute "$2"); shift ;;
        --state) need_value "$1" $#; state=$2; shift ;;
        --camera) need_value "$1" $#; camera=$2; shift ;;
        --score) need_value "$1" $#; score=$2; shift ;;
        --threads) need_value "$1" $#; need_number "$1" "$2"; threads=$2; shift ;;
        --batch) need_value "$1" $#; need_number "$1" "$2"; batch=$2; shift ;;
        --poll-s) need_value "$1" $#; need_number "$1" "$2"; poll_s=$2; shift ;;
        --keep-days) need_value "$1" $#; need_number "$1" "$2"; keep_days=$2; shift ;;
        --once) once=1 ;;
        --dry-run) dry_run=1 ;;
        -h | --help) usage; exit 0 ;;
        -*) fail "$UNUSABLE" "unknown option $1; see --help" ;;
        *) [ -z "$bundle" ] || fail "$UNUSABLE" "one bundle, please: $bundle or $1"; bundle=$1 ;;
    esac
    shift
done
bundle=${bundle%/}
need_bundle "$bundle"
bundle=$(absolute "$bundle")
[ -n "$state" ] || fail "$UNUSABLE" "give a folder for what is done: --state FOLDER"
state=$(absolute "$state")
[ "$batch" -gt 0 ] || fail "$UNUSABLE" "--batch is at least 1"
find_qexport "$bundle" "$venv"

# tell_systemd STATE: nothing where no service manager waits.
tell_systemd() {
    [ -z "${NOTIFY_SOCKET:-}" ] || systemd-notify "$1" || say "warning: systemd-notify failed; the watchdog will end this service"
}

# detect IMAGE...: their boxes go to `found`; what is said for people is left out.
detect() {
    run "$qexport" detect "$bundle" "$@" --score "$score" --threads "$threads" --json "$found" >"$detect_to"
}

# check_self: the bundle, its runtime and the disk are all right: an image of the bundle's own goes through.
check_self() {
    detect "$bundle/golden/0/frame.png" || {
        self_code=$?
        fail "$self_code" "$bundle does not detect in its own golden frame; qexport's message is above"
    }
    tell_systemd WATCHDOG=1
}

# work_off IMAGE...: detect, print, and move them out of the way.
work_off() {
    tell_systemd WATCHDOG=1
    detect_code=0
    detect "$@" || detect_code=$?
    case $detect_code in
        0)
            cat "$found"
            mv -f -- "$@" "$state/done/"
            ;;
        "$UNUSABLE")
            if [ $# -gt 1 ]; then
                # One of them; the others are not to suffer for it.
                for image in "$@"; do work_off "$image"; done
            else
                check_self
                mv -f -- "$1" "$state/rejected/"
                say "rejected: $1, its error is above"
            fi
            ;;
        *) fail "$detect_code" "qexport detect failed; its message is above" ;;
    esac
}

# watch_folder: forever, or until there is nothing left.
watch_folder() {
    settled=$state/.settled
    run mkdir -p "$state/inbox" "$state/done" "$state/rejected"
    check_self
    tell_systemd READY=1
    if [ "$dry_run" = 1 ]; then return; fi
    chmod 2770 "$state/inbox" 2>/dev/null || say "warning: $state/inbox belongs to another user; its mode stays as it is"
    cd "$state/inbox"
    rm -f "$settled"
    # Once: what is there is whole. Else: what nothing was written to between two looks.
    if [ "$once" = 1 ]; then touch "$settled"; fi
    while :; do
        tell_systemd WATCHDOG=1
        set --
        if [ -e "$settled" ]; then
            for image in ./*; do
                if [ ! -f "$image" ] || [ -h "$image" ]; then continue; fi
                if [ -n "$(find "$image" -newer "$settled")" ]; then continue; fi
                case $image in
                    *.[jJ][pP][gG] | *.[jJ][pP][eE][gG] | *.[pP][nN][gG] | *.[bB][mM][pP] | *.[wW][eE][bB][pP] | *.[tT][iI][fF] | *.[tT][iI][fF][fF] | *.[pP][pPgG][mM])
                        set -- "$@" "$image" ;;
                    *) # A video would keep the watchdog waiting.
                        mv -f -- "$image" "$state/rejected/"
                        say "rejected: $image is no image by its name" ;;
                esac
                [ $# -lt "$batch" ] || break
            done
        fi
        touch "$settled"
        if [ $# -gt 0 ]; then
            work_off "$@"
            find "$state/done" "$state/rejected" -type f -ctime "+$keep_days" -exec rm -f {} +
        elif [ "$once" = 1 ]; then
            return
        else
            sleep "$poll_s"
        fi
    done
}

# watch_camera: until the camera ends.
watch_camera() {
    if [ "$dry_run" = 1 ]; then
        run "$qexport" detect "$bundle" "$camera" --score "$score" --threads "$threads" --json -
        return
    fi
    answer_file=$state/.answer
    {
        camera_code=0
        "$qexport" detect "$bundle" "$camera" --score "$score" --threads "$threads" --json - || camera_code=$?
        printf '%s\n' "$camera_code" >"$answer_file"
    } | {
        seen=''
        while IFS= read -r line; do
            case $line in '{'*) printf '%s\n' "$line" ;; *) say "$line" ;; esac
            [ -n "$seen" ] || tell_systemd READY=1
            seen=1
            tell_systemd WATCHDOG=1
        done
    }
    camera_code=$(cat "$answer_file")
    [ "$camera_code" = 0 ] || fail "$camera_code" "qexport detect of $camera ended; its message is above"
    # A camera has no end: systemd starts it again.
    fail "$FAILED" "$camera gave no more frames"
}

found=$state/.found.jsonl
detect_to=/dev/null
[ "$dry_run" = 0 ] || detect_to=/dev/stdout
if [ -n "$camera" ]; then watch_camera; else watch_folder; fi
