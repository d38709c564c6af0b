#!/bin/sh
# The assembler of PTX, of the wheel nvidia-cuda-nvcc 13.0.88. It needs no GPU and no driver.
#   ptxas.sh DEST       does nothing where DEST is already complete
. "$(dirname "$0")/wheels.sh"
begin "$1" "ptxas-13.0.88 layout-1"
echo "ptxas: downloading 37 MB from PyPI (once)" >&2
fetch "$work" <<R
nvidia-cuda-nvcc==13.0.88 --hash=sha256:56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03
R
"$python" - "$work" <<'P'
import glob, os, sys, zipfile

work = sys.argv[1]
with zipfile.ZipFile(glob.glob(work + "/*.whl")[0]) as archive:
    with open(work + "/out/ptxas", "wb") as file:
        file.write(archive.read("nvidia/cu13/bin/ptxas"))
os.chmod(work + "/out/ptxas", 0o755)
P
finish
