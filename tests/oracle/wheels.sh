# Sourced by the scripts beside it: files out of wheels of PyPI, whose hashes are known.
set -eu

# begin DEST STAMP      ends the script where DEST is complete; else makes the folder $work/out
begin() {
    dest=$1 stamp=$2
    [ "$(cat "$dest/.stamp" 2>/dev/null || true)" = "$stamp" ] && exit 0
    python=${PYTHON:-python3}
    work="$dest.work.$$"
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work/out"
}

# fetch FOLDER < REQUIREMENTS       wheels for any version of Python: their tags are given
fetch() {
    cat > "$work/requirements.txt"
    "$python" -m pip download -q --disable-pip-version-check --no-cache-dir --no-deps \
        --require-hashes --only-binary=:all: --implementation cp --python-version 3.11 --abi cp311 \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
        --platform manylinux_2_25_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 -d "$1" -r "$work/requirements.txt"
}

# finish        $work/out takes the place of DEST
finish() {
    echo "$stamp" > "$work/out/.stamp"
    rm -rf "$dest"
    mv "$work/out" "$dest"
}
