//! Gives the compiler a mark that changes with its source: models that another version compiled
//! are not taken for its own.

use std::fs;
use std::path::{Path, PathBuf};

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn main() {
    let mut found = Vec::new();
    // The runtime stands beside the compiler in the repository, and under its version elsewhere.
    for folder in ["src", "../runtime/src"].map(Path::new) {
        if folder.is_dir() {
            println!("cargo::rerun-if-changed={}", folder.display());
            files(folder, &mut found);
        }
    }
    found.sort();
    // FNV-1a, 64 bits: a mark against mistakes.
    let mut mark = 0xcbf2_9ce4_8422_2325u64;
    for path in &found {
        for byte in fs::read(path).unwrap_or_default() {
            mark = (mark ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    println!("cargo::rustc-env=KILN_SOURCE={mark:016x}");
}
