use super::*;
use crate::plan::{Place, Port, Step};
use crate::tensor::DType;

fn manifest() -> Manifest {
    let port = |name: &str| Port { name: name.into(), dtype: DType::F32, shape: vec![2, 3] };
    Manifest {
        producer: "kiln 0.1.0".into(),
        target: crate::cpu::triple(),
        features: vec![],
        model_hash: [7; 32],
        name: "relu".into(),
        plan: Plan {
            inputs: vec![port("x")],
            outputs: vec![port("y")],
            steps: vec![Step {
                name: "relu".into(),
                kernel: 0,
                buffers: vec![Place::Input(0), Place::Const(0), Place::Output(0)],
                extent: 6,
                chunks: 1,
            }],
            arena_bytes: 64,
        },
        entries: vec![0],
        weights: Weights::Inside { bytes: 128 },
    }
}

/// An ELF object as the `object` crate's reader wants it, written by hand: header, sections one
/// after another on 64 bytes, names, table.
fn elf(sections: &[(&str, &[u8])]) -> (Vec<u8>, Vec<usize>) {
    let mut file = vec![0; 64];
    let mut names = vec![0u8];
    let mut table = vec![[0u64; 8]];
    let mut offsets = Vec::new();
    let mut add = |file: &mut Vec<u8>, name: &str, kind: u64, bytes: Option<&[u8]>| {
        file.resize(file.len().next_multiple_of(64), 0);
        let name_at = names.len() as u64;
        names.extend(name.bytes().chain([0]));
        let bytes = bytes.unwrap_or(&names);
        offsets.push(file.len());
        // Name and kind, flags, address, offset, size, link and info, alignment, size of entries.
        let row = [name_at | kind << 32, 2, 0, file.len() as u64, bytes.len() as u64, 0, 64, 0];
        table.push(row);
        file.extend(bytes);
    };
    sections.iter().for_each(|(name, bytes)| add(&mut file, name, 1, Some(bytes)));
    add(&mut file, ".shstrtab", 3, None);
    file.resize(file.len().next_multiple_of(8), 0);
    let (at, rows) = (file.len() as u64, table.len() as u16);
    table.iter().flatten().for_each(|word| file.extend(word.to_le_bytes()));
    file[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    let halves = |a: u16, b: u16, c: u16, d: u16| {
        u64::from(a) | u64::from(b) << 16 | u64::from(c) << 32 | u64::from(d) << 48
    };
    // Kind and machine and version, entry, segments, sections, flags, sizes and numbers.
    let words = [halves(1, 62, 1, 0), 0, 0, at, halves(0, 0, 64, 0), halves(0, 64, rows, rows - 1)];
    for (i, word) in words.iter().enumerate() {
        file[16 + i * 8..24 + i * 8].copy_from_slice(&word.to_le_bytes());
    }
    (file, offsets)
}

fn artifact(manifest: &Manifest) -> Vec<u8> {
    let encoded = encode(manifest);
    let (mut file, offsets) =
        elf(&[(TEXT, &[0xc3; 100]), (SECTION, &encoded), (WEIGHTS, &[1; 128])]);
    seal(&mut file, offsets[1]);
    file
}

#[test]
fn what_was_written_is_found() {
    let file = artifact(&manifest());
    let (found, sections) = find(&file).expect("an artifact");
    assert_eq!(found, manifest());
    assert_eq!(&file[sections.text], [0xc3; 100]);
    assert_eq!(&file[sections.weights.expect("weights")], [1; 128]);
}

#[test]
fn every_flipped_bit_and_every_cut_is_refused() {
    let mut file = artifact(&manifest());
    for byte in 0..file.len() {
        for bit in 0..8 {
            file[byte] ^= 1 << bit;
            assert!(find(&file).is_err(), "bit {bit} of byte {byte}");
            file[byte] ^= 1 << bit;
        }
    }
    for len in 0..file.len() {
        assert!(find(&file[..len]).is_err(), "the first {len} bytes");
    }
    assert!(find(&file).is_ok());
}

/// Changes of the header and the payload with a hash that is right again: nothing but the checks
/// themselves stands between them and the loader.
#[test]
fn damage_with_a_right_hash_never_panics() {
    let encoded = encode(&manifest());
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..20_000 {
        let mut changed = encoded.clone();
        for _ in 0..1 + random() % 4 {
            let at = 12 + random() as usize % (changed.len() - 12);
            changed[at] = random() as u8;
        }
        let (mut file, offsets) =
            elf(&[(TEXT, &[0xc3; 100]), (SECTION, &changed), (WEIGHTS, &[1; 128])]);
        seal(&mut file, offsets[1]);
        if let Ok((manifest, _)) = find(&file) {
            let entries = manifest.entries.len();
            assert_eq!(manifest.plan.check(entries, manifest.weights.bytes()), Ok(()));
        }
    }
}

#[test]
fn errors_say_what_is_wrong() {
    let text = |file: &[u8]| find(file).expect_err("an error").to_string();
    assert!(text(b"").starts_with("not a compiled model"));
    assert!(text(&elf(&[(TEXT, &[0])]).0).contains("no section `.kiln`"));
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut encoded = encode(&manifest());
        change(&mut encoded);
        let (mut file, offsets) =
            elf(&[(TEXT, &[0xc3; 100]), (SECTION, &encoded), (WEIGHTS, &[1; 128])]);
        if encoded.starts_with(&MAGIC) && encoded.len() >= HEADER_BYTES {
            seal(&mut file, offsets[1]);
        }
        text(&file)
    };
    assert!(with(&|bytes| bytes[0] = 0).contains("begins with [00, 4b"));
    assert!(
        with(&|bytes| bytes.truncate(20)).contains("header of the compiled model has 20 bytes")
    );
    let version = with(&|bytes| bytes[8] = 2);
    assert!(version.contains("has format 2, this Kiln reads format 1"), "{version}");
    assert!(with(&|bytes| bytes[13] = 0xff).contains("the manifest has"));
    assert!(with(&|bytes| bytes[12] -= 1).contains("does not parse"));
    let mut damaged = artifact(&manifest());
    let at = damaged.len() - 1;
    damaged[at] ^= 1;
    assert!(text(&damaged).contains("changed or damaged"));
    let changed = |change: &dyn Fn(&mut Manifest)| {
        let mut manifest = manifest();
        change(&mut manifest);
        text(&artifact(&manifest))
    };
    assert!(changed(&|m| m.entries[0] = 100).contains("kernel 0 starts at byte 100 of 100"));
    assert!(changed(&|m| m.plan.steps[0].kernel = 1).contains("runs kernel 1"));
    assert!(changed(&|m| m.weights = Weights::Inside { bytes: 129 }).contains("has 128 bytes"));
    for file in ["", "..", "a/b", "/etc/passwd"] {
        let external = Weights::External { file: file.into(), bytes: 1, hash: [0; 32] };
        let error = changed(&|m| m.weights = external.clone());
        assert!(error.contains("in the same folder"), "{error}");
    }
}
