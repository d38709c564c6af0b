#!/bin/sh
# The assembler of PTX, of the wheel nvidia-cuda-nvcc 13.0.88. It needs no GPU and no driver.
#   ptxas.sh DEST       does nothing where DEST is already complete
set -eu
dest=$1
stamp="ptxas-13.0.88 layout-1"
[ "$(cat "$dest/.stamp" 2>/dev/null || true)" = "$stamp" ] && exit 0
python=${PYTHON:-python3}
work="$dest.work.$$"
mkdir -p "$work"
trap 'rm -rf "$work"' EXIT
cat > "$work/requirements.txt" <<R
nvidia-cuda-nvcc==13.0.88 --hash=sha256:56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03
R
echo "ptxas: downloading 37 MB from PyPI (once)" >&2
"$python" -m pip download -q --disable-pip-version-check --no-cache-dir --no-deps \
    --require-hashes --only-binary=:all: --platform manylinux2014_x86_64 \
    -d "$work" -r "$work/requirements.txt"
"$python" - "$work" <<'P'
import glob, os, sys, zipfile

work = sys.argv[1]
os.makedirs(work + "/out")
with zipfile.ZipFile(glob.glob(work + "/*.whl")[0]) as archive:
    with open(work + "/out/ptxas", "wb") as file:
        file.write(archive.read("nvidia/cu13/bin/ptxas"))
os.chmod(work + "/out/ptxas", 0o755)
P
echo "$stamp" > "$work/out/.stamp"
rm -rf "$dest"
mv "$work/out" "$dest"
