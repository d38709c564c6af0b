#!/bin/sh
# Emulators and C compilers for other architectures, from packages of Debian (or its kin).
#   qemu.sh         does nothing where they are already there
# Installs them as root with apt-get; elsewhere says what is missing. The tests that need them are
# skipped then, aloud.
set -eu
missing=
for command in qemu-aarch64 qemu-riscv64 qemu-x86_64 aarch64-linux-gnu-gcc riscv64-linux-gnu-gcc; do
    command -v "$command" > /dev/null || missing="$missing $command"
done
[ -z "$missing" ] && exit 0
packages="qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross
    gcc-riscv64-linux-gnu libc6-dev-riscv64-cross"
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "emulators: installing packages with apt-get (once)" >&2
    export DEBIAN_FRONTEND=noninteractive
    # Lists of packages may be missing or old.
    # shellcheck disable=SC2086
    if apt-get install -q -y --no-install-recommends $packages > /dev/null 2>&1 ||
        { apt-get update -q > /dev/null 2>&1 &&
            apt-get install -q -y --no-install-recommends $packages > /dev/null; }; then
        exit 0
    fi
    echo "emulators: apt-get failed" >&2
fi
echo "emulators: no$missing here: no test runs code of other architectures" >&2
echo "emulators: on Debian they are in" $packages >&2
