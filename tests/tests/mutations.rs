//! Models that are damaged at random: always an error that says something, never a panic.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kiln::onnx::{ImportOptions, Limits, import};
use kiln_tests::cases::{folders, read};
use kiln_tests::{Random, oracle};

const MUTATIONS: u64 = 10_000;
/// Files above this size are mostly weights, where damage does nothing.
const LARGEST: u64 = 8 << 10;
/// Lengths, tags and extents at which code breaks.
const BYTES: [u8; 10] = [0x00, 0x01, 0x02, 0x08, 0x12, 0x7f, 0x80, 0xfe, 0xff, 0x0a];

/// One to four damages: bytes changed, dropped, repeated, or taken from another file.
fn mutate(file: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = file.to_vec();
    for _ in 0..1 + random.below(4) {
        if bytes.is_empty() {
            break;
        }
        let at = random.below(bytes.len());
        let end = (at + 1 + random.below(16)).min(bytes.len());
        match random.below(7) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = BYTES[random.below(BYTES.len())],
            2 => bytes[at] = random.bits() as u8,
            3 => bytes.truncate(at),
            4 => drop(bytes.drain(at..end)),
            5 => {
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            _ => {
                let from = random.below(other.len());
                let to = (from + 1 + random.below(64)).min(other.len());
                bytes.splice(at..end, other[from..to].iter().copied());
            }
        }
    }
    bytes
}

fn seeds(data: &Path) -> Vec<Bytes> {
    let mut files = Vec::new();
    for kind in ["node", "pytorch-operator", "pytorch-converted", "simple"] {
        files.extend(folders(&data.join(kind)).iter().map(|f| f.join("model.onnx")));
    }
    let small = |f: &std::path::PathBuf| f.metadata().is_ok_and(|m| m.len() <= LARGEST);
    files.iter().filter(|f| small(f)).map(|f| read(f)).filter(|b| !b.is_empty()).collect()
}

#[test]
fn damaged_models_are_refused_and_never_panic() {
    let Some(data) = oracle("onnx-1.22.0") else { return };
    let seeds = seeds(&data);
    let limits = Limits { nodes: 10_000, bytes: 64 << 20, ..Limits::default() };
    let options = ImportOptions { limits, ..ImportOptions::default() };
    let (mut accepted, mut slowest) = (0, Duration::ZERO);
    for seed in 0..MUTATIONS {
        let mut random = Random::new(seed);
        let file = &seeds[random.below(seeds.len())];
        let other = &seeds[random.below(seeds.len())];
        let damaged = Bytes::from(mutate(file, other, &mut random));
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| import(damaged, &options)));
        slowest = slowest.max(start.elapsed());
        match result {
            Ok(Ok(_)) => accepted += 1,
            Ok(Err(error)) => {
                let text = error.to_string();
                assert!(!error.diagnostics.is_empty(), "mutation {seed}: no diagnostic");
                let said = error.diagnostics.iter().all(|d| !d.message.is_empty());
                assert!(said && !text.is_empty(), "mutation {seed}: nothing said");
                let clean = text.chars().all(|c| c == '\n' || !c.is_control());
                assert!(clean, "mutation {seed}: control characters in {text:?}");
            }
            Err(_) => panic!("mutation {seed} panics (see above)"),
        }
    }
    println!("{accepted} of {MUTATIONS} damaged models are still models; slowest {slowest:?}");
    assert!(slowest < Duration::from_secs(5), "a damaged model took {slowest:?}");
}
