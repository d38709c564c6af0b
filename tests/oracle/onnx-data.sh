#!/bin/sh
# The ONNX test data (1765 node tests, the light models, onnx.proto) of the onnx 1.22.0 wheel, the
# last one that carries it.
#   onnx-data.sh DEST       does nothing where DEST is already complete
. "$(dirname "$0")/wheels.sh"
begin "$1" "onnx-1.22.0 layout-1"
echo "onnx: downloading 19 MB of test data from PyPI (once)" >&2
fetch "$work" <<R
onnx==1.22.0 --hash=sha256:1d0a2bdb15eb2b3cb65c438f3423d9620d14fdce32f92380e6bb1b2e09568ef5
R
"$python" - "$work" <<'P'
import glob, os, shutil, sys, zipfile

work = sys.argv[1]
prefix = "onnx/backend/test/data/"
kinds = {"node", "light", "simple", "pytorch-operator", "pytorch-converted"}
with zipfile.ZipFile(glob.glob(work + "/*.whl")[0]) as archive:
    for name in archive.namelist():
        if name in ("onnx/onnx.proto", "onnx/onnx-data.proto"):
            path = name[len("onnx/"):]
        elif name.startswith(prefix) and name[len(prefix):].split("/")[0] in kinds:
            path = name[len(prefix):]
        else:
            continue
        path = f"{work}/out/{path}"
        if name.endswith("/"):
            continue
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with archive.open(name) as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target)
P
finish
