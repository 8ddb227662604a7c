#!/bin/sh
# Runs the recipe @NAME@ of yfpo, commit @COMMIT@, on a machine without any network:
#     sh run.sh [options of `yfpo run`]
# It builds on the packages of python3, or of the Python that PYTHON names, and changes nothing outside its own folder.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
stop() { echo "run.sh: $*" >&2; exit 1; }

check() { # every file in SHA256SUMS whose name begins with $1
    while read -r sum name; do
        case $name in "$1"*) ;; *) continue ;; esac
        [ -f "$here/$name" ] || stop "$name is missing; copy it here again"
        is=$(sha256sum <"$here/$name")
        [ "${is%% *}" = "$sum" ] || stop "$name is damaged; copy it here again"
    done <"$here/SHA256SUMS"
}

unpack() { # the folder $1, from a tar file on standard input, packed if $2 is z
    rm -rf "$here/.unpacked"
    mkdir "$here/.unpacked"
    tar -x"${2:-}"f - -C "$here/.unpacked" || stop "$1 cannot be unpacked; is the disk full?"
    mv "$here/.unpacked/$1" "$here/$1"
    rmdir "$here/.unpacked"
}

install() { # packages, from the bundle alone, whatever pip is set to
    PIP_CONFIG_FILE=/dev/null "$here/.venv/bin/python" -m pip --isolated --disable-pip-version-check -q install \
        --no-index --find-links "$here/bundle/wheels" --no-deps "$@" || stop 'pip could not install the bundle, see above'
}

command -v sha256sum >/dev/null || stop 'there is no sha256sum here; install coreutils'
[ -f "$here/SHA256SUMS" ] || stop 'SHA256SUMS is missing; copy it here again'
[ -f "$here/.sums" ] || cp "$here/SHA256SUMS" "$here/.sums"
cmp -s "$here/SHA256SUMS" "$here/.sums" || stop "another bundle was unpacked in $here; give this one a folder of its own"

for python in "${PYTHON:-python3}" python@PYTHON@ ''; do
    [ -n "$python" ] || stop "this bundle is for Python @PYTHON@, which ${PYTHON:-python3} is not; set PYTHON to one that is"
    [ "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = @PYTHON@ ] && break
done

if [ ! -d "$here/bundle" ]; then
    check bundle.tar
    sed -n 's/^[0-9a-f]*  \(bundle\.tar\.part-.*\)/\1/p' "$here/SHA256SUMS" | while read -r part; do cat "$here/$part"; done | unpack bundle
fi
check bundle/
[ -d "$here/repository" ] || unpack repository z <"$here/bundle/repository.tar.gz"

if [ ! -f "$here/.venv/ready" ]; then
    "$python" -m venv --clear --system-site-packages "$here/.venv" || stop "$python cannot make a venv; install python3-venv"
    "$python" -c 'import site; print("\n".join(site.getsitepackages()))' >"$here/.venv/lib/python@PYTHON@/site-packages/outer.pth"
    [ ! -s "$here/bundle/requirements.txt" ] || install -r "$here/bundle/requirements.txt"
    install --no-build-isolation -e "$here/repository"
    touch "$here/.venv/ready"
fi

"$python" - "$here/bundle/@NAME@.yaml" "$here/@NAME@.yaml" "$here/bundle" <<'END'
import sys
recipe, own, place = sys.argv[1:]
text = open(recipe, encoding='utf-8').read().replace('@HERE@', place.replace("'", "''"))
open(own, 'w', encoding='utf-8').write(text)
END
export YFPO_ROOT="$here/repository" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
exec "$here/.venv/bin/yfpo" run "$here/@NAME@.yaml" "$@"
