#!/bin/sh
# Make the environment of the image: the system's Python where it is new enough, else one that uv fetches.
set -eu

case ${1:-} in
    '' | -*)
        printf '%s\n' "usage: make_venv.sh FOLDER" "" \
            "Used by Dockerfile.jetson. On a board itself, install.sh does this and more."
        case ${1:-} in --help | -h) exit 0 ;; *) exit 2 ;; esac
        ;;
esac

if python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    # It has to see the bindings of TensorRT, which are the system's.
    python3 -m venv --system-site-packages "$1"
else
    python3 -m pip install --quiet 'uv>=0.5,<1'
    # Readable by the user of the image; the default would be the home folder of root.
    UV_PYTHON_INSTALL_DIR=/opt/qexport/python python3 -m uv venv --seed --python 3.11 "$1"
fi
"$1/bin/python" -m pip install --quiet --upgrade 'pip>=23' 'setuptools>=77'
