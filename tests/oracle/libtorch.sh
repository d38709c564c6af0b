#!/bin/sh
# A CPU libtorch for tch 0.26 (which wants 2.13.0), from wheels on PyPI; x86-64 Linux.
#   libtorch.sh DEST        makes DEST/{include,lib}; does nothing where it is already complete
# Needs python3 with pip (any version) and cc. Downloads 540 MB, once.
. "$(dirname "$0")/wheels.sh"
begin "$1" "torch-2.13.0 cudart-13.0.96 cupti-13.0.85 layout-1"
[ "$(uname -sm)" = "Linux x86_64" ] || { echo "libtorch.sh: only Linux x86_64" >&2; exit 1; }
wheels="$dest.wheels"                      # survives a failure, so that nothing is fetched twice
mkdir -p "$wheels"
echo "libtorch: downloading 540 MB of wheels from PyPI (once)" >&2
fetch "$wheels" <<R
torch==2.13.0 --hash=sha256:60fcdcb2f3876e21146cb4524ef06397d727ca9ad5f020818547e25075fe3cb7
nvidia-cuda-runtime==13.0.96 \
 --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
nvidia-cuda-cupti==13.0.85 \
 --hash=sha256:4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8
R

# Only what the CPU library needs: it was linked in a CUDA build and names two CUDA libraries.
"$python" - "$wheels" "$work/out" <<'P'
import glob, os, shutil, sys, zipfile

wheels, out = sys.argv[1:3]
wanted = {"libtorch_cpu.so", "libc10.so", "libgomp.so.1", "libcudart.so.13", "libcupti.so.13"}
licences = {"license", "notice", "license.txt"}
found = set()
for wheel in sorted(glob.glob(wheels + "/*.whl")):
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            base = name.rsplit("/", 1)[-1]
            if name.startswith("torch/include/") and base:
                path = f"{out}/{name[len('torch/'):]}"
            elif "/lib/" in name and base in wanted:
                path = f"{out}/lib/{base}"
                found.add(base)
            elif ".dist-info/" in name and base.lower() in licences:
                path = f"{out}/licenses/{name.replace('/', '_')}"
            else:
                continue
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with archive.open(name) as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
assert found == wanted, wanted - found
P

# The wheel's libtorch.so only pulls in libtorch_cuda.so and all of CUDA; an empty library of that
# name that pulls in libtorch_cpu.so takes its place.
echo 'int kiln_stub_libtorch(void) { return 0; }' > "$work/stub.c"
${CC:-cc} -shared -fPIC -Wl,-soname,libtorch.so -Wl,--no-as-needed -Wl,-rpath,'$ORIGIN' \
    -o "$work/out/lib/libtorch.so" "$work/stub.c" -L"$work/out/lib" \
    -Wl,--allow-shlib-undefined -ltorch_cpu
echo "2.13.0+cpu" > "$work/out/build-version"      # torch-sys checks it
finish
rm -rf "$wheels"
