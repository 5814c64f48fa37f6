#!/bin/sh
# Run a bundle as a systemd service on a Raspberry Pi: as a user without rights, restarted, watched, in the journal.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=prelude.sh
. "$here/prelude.sh"

usage() {
    cat <<'HELP'
usage: service.sh BUNDLE [--name NAME] [--camera DEVICE] [--score S] [--threads N] [--keep-days N] [--watchdog-s N]
                  [--wheels FOLDER] [--print-unit] [--dry-run]
       service.sh --remove [--name NAME] [--dry-run]

Run it on the Raspberry Pi, as yourself: it asks sudo where it has to. It copies the bundle and these scripts to
/opt/NAME, installs qexport there by install.sh (as you, not as root), makes the user `qexport`, who has no rights
and no login, writes /etc/systemd/system/NAME.service, enables it and starts it.

The service detects in every image that is put into /var/lib/NAME/inbox and writes one line of JSON for each to the
journal (serve.sh --help). It is started again after a failure, and when it does not report for --watchdog-s seconds.
With a bundle that was changed, or with software missing, it is not started again.

  --name NAME       of the service and its folders. Default: qexport
  --camera DEVICE   frames of a USB camera, /dev/video0, and not a folder. Installs what reads it (PyAV). Without the
                    camera, and when it is unplugged, it is tried again every 30 s
  --score S         lowest score of a box. Default: 0.5
  --threads N       of the runtime. Default: 1
  --keep-days N     images stay so long in /var/lib/NAME/done and rejected. Default: 7
  --watchdog-s N    has to be longer than 8 images take. Default: 120
  --wheels FOLDER   for install.sh, on a board without a network
  --print-unit      print the unit and do nothing
  --remove          stop the service, remove its unit and /opt/NAME; /var/lib/NAME and the user stay
  --dry-run         print the commands and the unit, run none

  sh service.sh mine.qbundle
  journalctl --unit qexport --output cat --follow

Exit codes: 0 it runs; 1 an installation or the start failed; 2 wrong input; 3 software is missing.
HELP
}

bundle='' name=qexport camera='' score=0.5 threads=1 keep_days=7 watchdog_s=120 wheels='' print_unit=0 remove=0
while [ $# -gt 0 ]; do
    case $1 in
        --name) need_value "$1" $#; name=$2; shift ;;
        --camera) need_value "$1" $#; camera=$2; shift ;;
        --score) need_value "$1" $#; score=$2; shift ;;
        --threads) need_value "$1" $#; need_number "$1" "$2"; threads=$2; shift ;;
        --keep-days) need_value "$1" $#; need_number "$1" "$2"; keep_days=$2; shift ;;
        --watchdog-s) need_value "$1" $#; need_number "$1" "$2"; watchdog_s=$2; shift ;;
        --wheels) need_value "$1" $#; wheels=$2; shift ;;
        --print-unit) print_unit=1 ;;
        --remove) remove=1 ;;
        --dry-run) dry_run=1 ;;
        -h | --help) usage; exit 0 ;;
        -*) fail "$UNUSABLE" "unknown option $1; see --help" ;;
        *) [ -z "$bundle" ] || fail "$UNUSABLE" "one bundle, please: $bundle or $1"; bundle=$1 ;;
    esac
    shift
done
# The name becomes folders below /opt and /var/lib, which are removed and made.
case $name in
    '' | [!a-z]* | *[!a-z0-9-]*) fail "$UNUSABLE" "--name is of small letters, digits and -, and begins with a letter, got '$name'" ;;
esac
case $score in
    0 | 1 | 0.[0-9]* | 1.0*) ;;
    *) fail "$UNUSABLE" "--score is between 0 and 1, got '$score'" ;;
esac
need_plain --score "$score"
if [ -n "$camera" ]; then
    need_plain --camera "$camera"
    case $camera in /dev/*) ;; *) fail "$UNUSABLE" "--camera is a device, /dev/video0, got '$camera'" ;; esac
fi
[ "$watchdog_s" -ge 10 ] || fail "$UNUSABLE" "--watchdog-s is at least 10"
place=$board_root/opt/$name unit=$board_root/etc/systemd/system/$name.service

# print_unit_of_service: of a folder it sees no device, and what is missing (3) stays missing; a camera that is
# missing comes back. A bundle that was changed (2) ends both.
print_unit_of_service() {
    cat <<UNIT
[Unit]
Description=qexport detects, $name
$([ -n "$camera" ] && printf 'StartLimitIntervalSec=0' || printf 'StartLimitIntervalSec=600\nStartLimitBurst=5')

[Service]
Type=notify
NotifyAccess=all
ExecStart=/bin/sh $place/scripts/serve.sh $place/bundle --venv $place/venv --score $score --threads $threads --keep-days $keep_days${camera:+ --camera $camera}
User=qexport
Group=qexport
# ONNX Runtime would keep a number of this machine in a home folder, which this user has not.
Environment=ORT_DISABLE_TELEMETRY=1
StateDirectory=$name
StateDirectoryMode=0750
UMask=0007
Restart=on-failure
RestartSec=$([ -n "$camera" ] && printf 30 || printf 10)
RestartPreventExitStatus=$([ -n "$camera" ] && printf 2 || printf '2 3')
TimeoutStartSec=300
WatchdogSec=$watchdog_s
StandardOutput=journal
StandardError=journal
SyslogIdentifier=$name
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateNetwork=yes
RestrictAddressFamilies=AF_UNIX
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
$([ -n "$camera" ] && printf 'DevicePolicy=closed\nDeviceAllow=%s rw\nSupplementaryGroups=video' "$camera" || printf 'PrivateDevices=yes')

[Install]
WantedBy=multi-user.target
UNIT
}

if [ "$print_unit" = 1 ]; then
    print_unit_of_service
    exit 0
fi
for program in sudo systemctl systemd-notify; do
    [ "$dry_run" = 1 ] || command -v "$program" >/dev/null 2>&1 || fail "$MISSING" "$program is not on this machine; a service needs it"
done
if [ "$remove" = 1 ]; then
    [ -z "$bundle" ] || fail "$UNUSABLE" "--remove takes no bundle"
    [ "$dry_run" = 1 ] || [ -f "$unit" ] || fail "$UNUSABLE" "$unit: no such service"
    [ "$dry_run" = 1 ] || grep -q -F "$place/scripts/serve.sh" "$unit" || fail "$UNUSABLE" "$unit is of another program"
    run sudo systemctl disable --now "$name.service" || fail "$FAILED" "the service could not be stopped"
    run sudo rm -f "$unit"
    run sudo systemctl daemon-reload
    run sudo rm -rf "$place"
    say "removed. /var/lib/$name stays, and the user qexport"
    exit 0
fi
bundle=${bundle%/}
need_bundle "$bundle"
for source in "$bundle" "$here"; do
    case $(absolute "$source")/ in
        "$place"/*) fail "$UNUSABLE" "$source is what the service runs, and $place is about to be replaced. Give the bundle and the scripts that it was made from" ;;
    esac
done
if [ "$dry_run" = 0 ]; then
    [ ! -e "$unit" ] || grep -q -F "$place/scripts/serve.sh" "$unit" || fail "$UNUSABLE" "$unit is there and of another program. Choose another --name"
    [ ! -e "$place" ] || [ -f "$unit" ] || [ -d "$place/scripts" ] || fail "$UNUSABLE" "$place is there and not of this service. Choose another --name"
    [ "$(id -u)" != 0 ] || say "warning: run as root; pip will install as root, too"
fi

# What is there is stopped first: its files are replaced.
[ ! -f "$unit" ] || run sudo systemctl stop "$name.service"
id qexport >/dev/null 2>&1 || run sudo useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin qexport || fail "$FAILED" "the user qexport could not be made"
run sudo install -d -m 0755 -o "$(id -un)" -g "$(id -gn)" "$place" || fail "$FAILED" "$place could not be made"
run rm -rf "$place/bundle" "$place/scripts"
run mkdir "$place/scripts"
run cp -R "$bundle" "$place/bundle"
for script in "$here"/*.sh; do
    run cp "$script" "$place/scripts/"
done
# Others have to read it, whatever the mask of this shell made of it; the service's user writes nothing of it.
run chmod -R u+rwX,go+rX,go-w "$place/bundle" "$place/scripts"
# A difference in a golden tensor is told and does not keep the service from running.
answer=0
set -- "$place/scripts/install.sh" "$place/bundle" --venv "$place/venv"
[ -z "$wheels" ] || set -- "$@" --wheels "$wheels"
run sh "$@" --no-verify || fail "$?" "nothing was started; the message is above"
python=$(readlink -f "$place/venv/bin/python" || :)
case $python in
    /home/* | /root/*) fail "$UNUSABLE" "python3 is $python, which the service's user cannot read. Put the system's Python first in the PATH: PATH=/usr/bin:\$PATH sh $0 ..." ;;
esac
run "$place/venv/bin/qexport" verify "$place/bundle" --threads "$threads" || answer=$?
[ "$answer" -le "$FAILED" ] || fail "$answer" "nothing was started; qexport's message is above"
[ "$answer" = 0 ] || say "warning: this board does not compute every bit as the workstation did; where and by how much is above"
if [ -n "$camera" ]; then
    [ "$dry_run" = 1 ] || "$place/venv/bin/qexport" detect --help 2>/dev/null | grep -q -w CAMERA || fail "$MISSING" "the qexport of this bundle detects in images and folders, not in a camera's frames. Leave --camera out: images that are put into /var/lib/$name/inbox are detected in"
    set -- -m pip install --disable-pip-version-check --quiet
    [ -z "$wheels" ] || set -- "$@" --no-index --find-links "$wheels"
    for wheel in "$place"/bundle/wheel/*.whl; do
        run env PIP_ONLY_BINARY=:all: "$place/venv/bin/python" "$@" "${wheel}[video]" || fail "$FAILED" "pip could not install what reads a camera; its message is above"
    done
fi

if [ "$dry_run" = 1 ]; then
    printf 'sudo tee %s <<UNIT\n' "$unit"
    print_unit_of_service
    printf 'UNIT\n'
else
    print_unit_of_service | sudo tee "$unit" >/dev/null || fail "$FAILED" "$unit could not be written"
    if command -v systemd-analyze >/dev/null 2>&1; then
        systemd-analyze verify "$unit" || fail "$FAILED" "systemd does not take $unit; its message is above"
    fi
fi
run sudo systemctl daemon-reload
run sudo systemctl enable "$name.service" || fail "$FAILED" "the service could not be enabled"
# Comes back when the service has detected in a golden frame.
run sudo systemctl restart "$name.service" || fail "$FAILED" "the service did not start: journalctl --unit $name --lines 30"
[ "$dry_run" = 1 ] || say "running. journalctl --unit $name --output cat --follow"
if [ -z "$camera" ]; then
    say "images: /var/lib/$name/inbox; to put some there without sudo: sudo usermod -aG qexport $(id -un), and log in again"
fi
