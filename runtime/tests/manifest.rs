//! Manifests of compiled files: written, found, and refused for every kind of damage.

#[path = "common/file.rs"]
mod file;

use file::{artifact, sealed, sections};
use std::path::Path;

use kiln_runtime::gpu::{DeviceMemory, Kernel, Module, Ports, Spot, TRIPLE};
use kiln_runtime::load::ArtifactFile;
use kiln_runtime::manifest::{
    ArtifactError, MAGIC, Manifest, SECTION, TEXT, WEIGHTS, Weights, encode, find,
};
use kiln_runtime::plan::{Place, Plan, PlanState, Port, Step};
use kiln_runtime::tensor::DType;
use kiln_runtime::work::{Term, Work};
use object::BinaryFormat;

const CODE: [u8; 100] = [0xc3; 100];
const CONSTANTS: [u8; 128] = [1; 128];

fn manifest() -> Manifest {
    let port = |name: &str| Port::new(name, DType::F32, &[2, 3]);
    Manifest {
        producer: "kiln 0.1.0".into(),
        target: "x86_64-unknown-linux-gnu".into(),
        features: vec!["avx2".into()],
        model_hash: [7; 32],
        name: "relu".into(),
        plan: Plan {
            states: Vec::new(),
            dims: Vec::new(),
            inputs: vec![port("x")],
            outputs: vec![port("y")],
            steps: vec![Step {
                name: "relu".into(),
                kernel: 0,
                work: 0,
                buffers: vec![Place::Input(0), Place::Const(0), Place::Output(0)],
                extent: 6,
                chunks: 1,
            }],
            work: vec![Work {
                name: "relu".into(),
                flops: vec![Term { times: 6, lengths: Vec::new() }],
                bytes: vec![Term { times: 48, lengths: Vec::new() }],
            }],
            arena_bytes: 64,
        },
        entries: vec![0],
        faster: Vec::new(),
        modules: Vec::new(),
        weights: Weights::Inside { bytes: CONSTANTS.len() },
    }
}

#[test]
fn what_was_written_is_found_in_every_format() {
    for format in [BinaryFormat::Elf, BinaryFormat::MachO, BinaryFormat::Coff] {
        let file = sealed(format, &CODE, &encode(&manifest()), &CONSTANTS);
        let (found, sections) = find(&file).expect("an artifact");
        assert_eq!(found, manifest());
        // Writers fill sections up to their alignment.
        assert!(file[sections.text].starts_with(&CODE), "{format:?}");
        assert_eq!(file[sections.weights.expect("weights")], CONSTANTS, "{format:?}");
    }
}

#[test]
fn every_flipped_bit_and_every_cut_is_refused() {
    let mut file = artifact(&manifest(), &CODE, &CONSTANTS);
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

/// Random numbers, the same on every run.
fn random() -> impl FnMut() -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

/// Changes of header and payload with a hash that is right again: nothing but the checks
/// themselves stands between them and the loader.
#[test]
fn damage_with_a_right_hash_never_panics() {
    let encoded = encode(&manifest());
    let mut random = random();
    for _ in 0..20_000 {
        let mut changed = encoded.clone();
        for _ in 0..1 + random() % 4 {
            let at = 12 + random() as usize % (changed.len() - 12);
            changed[at] = random() as u8;
        }
        if let Ok((manifest, _)) = find(&sealed(BinaryFormat::Elf, &CODE, &changed, &CONSTANTS)) {
            let kernels = manifest.modules.iter().map(|module| module.kernels.len());
            for entries in
                kernels.chain(manifest.modules.is_empty().then_some(manifest.entries.len()))
            {
                assert_eq!(manifest.plan.check(entries, manifest.weights.bytes()), Ok(()));
            }
        }
    }
}

/// A text for GPUs, and what a file says of it.
const TEXT_FOR_GPUS: &[u8] = b".version 7.4\0.version 8.0\0";

fn for_gpus() -> Manifest {
    let module = |sm, text| {
        let kernel = Kernel { name: "relu".into(), blocks: 1, threads: 6, shared: 0 };
        Module { sm, text, kernels: vec![kernel] }
    };
    let modules = vec![module(80, 0..13), module(90, 13..26)];
    Manifest { target: TRIPLE.into(), entries: Vec::new(), modules, ..manifest() }
}

#[test]
fn files_for_gpus_are_found_and_every_flipped_bit_is_refused() {
    let mut file = artifact(&for_gpus(), TEXT_FOR_GPUS, &CONSTANTS);
    assert_eq!(find(&file).expect("an artifact").0, for_gpus());
    for byte in 0..file.len() {
        for bit in 0..8 {
            file[byte] ^= 1 << bit;
            assert!(find(&file).is_err(), "bit {bit} of byte {byte}");
            file[byte] ^= 1 << bit;
        }
    }
    let opened = ArtifactFile::from_bytes(&file).expect("an artifact");
    assert!(matches!(opened.check_machine(), Err(ArtifactError::Gpu)));
    let loaded = opened.gpu(Path::new("")).expect("a model for GPUs");
    for (sm, version) in [(80, "7.4"), (89, "7.4"), (90, "8.0"), (120, "7.4")] {
        let module = loaded.module(sm).expect("a module");
        let text = loaded.text(module).expect("its text").to_str();
        assert_eq!(text, Ok(format!(".version {version}").as_str()));
    }
    assert!(loaded.module(75).is_none());
    let file = artifact(&manifest(), &CODE, &CONSTANTS);
    let opened = ArtifactFile::from_bytes(&file).expect("an artifact");
    assert!(matches!(opened.gpu(Path::new("")), Err(ArtifactError::Cpu(_))));
}

#[test]
fn modules_that_cannot_be_are_refused() {
    let refused = |change: &dyn Fn(&mut Module)| {
        let mut manifest = for_gpus();
        change(&mut manifest.modules[1]);
        let file = artifact(&manifest, TEXT_FOR_GPUS, &CONSTANTS);
        find(&file).expect_err("an error").to_string()
    };
    assert!(refused(&|m| m.text = 13..1000).contains("version 90: their text is not in the file"));
    assert!(refused(&|m| m.text = 0..26).contains("does not end where it should"));
    assert!(refused(&|m| m.text = 13..25).contains("does not end where it should"));
    assert!(refused(&|m| m.kernels[0].name = "a\0b".into()).contains("a kernel has no name"));
    assert!(refused(&|m| m.kernels[0].threads = 1025).contains("or too many"));
    assert!(refused(&|m| m.kernels[0].blocks = 0).contains("no blocks or threads"));
    assert!(refused(&|m| m.kernels.clear()).contains("runs kernel 0"));
}

#[test]
fn ports_of_a_device_lie_apart_and_states_share_their_place() {
    let mut plan = manifest().plan;
    let port = |name: &str, extent| Port::new(name, DType::F32, &[extent]);
    plan.inputs = vec![port("a", 100), port("past", 70), port("b", 1)];
    plan.outputs = vec![port("next", 70), port("y", 33)];
    plan.states = vec![PlanState { input: 1, output: 0, in_place: true }];
    let ports = Ports::of(&plan);
    assert_eq!(ports.inputs, [Spot::Given(256), Spot::Kept(0), Spot::Given(768)]);
    assert_eq!(ports.outputs, [Spot::Kept(0), Spot::Given(1024)]);
    assert_eq!((ports.dims, ports.bytes, ports.kept), (0, 1280, 512));
    let memory = DeviceMemory::of(&plan, 1000);
    assert_eq!(memory, DeviceMemory { weights: 1000, arena: 64, ports: 1280, kept: 512 });
    assert_eq!((memory.total(), memory.lane(2)), (2856, 64 + 2 * 1280 + 512));
    // Sizes that no memory has do not overflow.
    plan.inputs =
        vec![port("a", usize::MAX / 8), port("past", usize::MAX / 8), port("b", usize::MAX / 8)];
    assert_eq!(Ports::of(&plan).outputs[0], Spot::Kept(0));
}

/// The same for the tables of the file around it.
#[test]
fn damaged_tables_with_a_right_hash_never_panic() {
    let mut random = random();
    for format in [BinaryFormat::Elf, BinaryFormat::MachO, BinaryFormat::Coff] {
        let sound = sealed(format, &CODE, &encode(&manifest()), &CONSTANTS);
        let at = file::offset(&sound, SECTION);
        for _ in 0..10_000 {
            let mut changed = sound.clone();
            for _ in 0..1 + random() % 4 {
                let byte = random() as usize % changed.len();
                if !(at..at + MAGIC.len()).contains(&byte) {
                    changed[byte] = random() as u8;
                }
            }
            kiln_runtime::manifest::seal(&mut changed, at);
            if let Ok((_, sections)) = find(&changed) {
                assert!(sections.text.end <= changed.len());
                assert!(sections.weights.is_none_or(|weights| weights.end <= changed.len()));
            }
        }
    }
}

#[test]
fn errors_say_what_is_wrong() {
    let text = |file: &[u8]| find(file).expect_err("an error").to_string();
    assert!(text(b"").starts_with("not a compiled model"));
    let bare = sections(BinaryFormat::Elf, &[(TEXT, &[0])]);
    assert!(text(&bare).contains("no section `.kiln`"));
    let mut encoded = encode(&manifest());
    let unsealed = |encoded: &[u8]| {
        let parts = [(TEXT, &CODE[..]), (SECTION, encoded), (WEIGHTS, &CONSTANTS)];
        text(&sections(BinaryFormat::Elf, &parts))
    };
    assert!(unsealed(&encoded).contains("changed or damaged"));
    assert!(unsealed(&encoded[..20]).contains("header of the compiled model has 20 bytes"));
    encoded[0] = 0;
    assert!(unsealed(&encoded).contains("begins with [00, 4b"));
    let changed = |at: usize, byte: u8| {
        let mut encoded = encode(&manifest());
        encoded[at] = byte;
        text(&sealed(BinaryFormat::Elf, &CODE, &encoded, &CONSTANTS))
    };
    let version = changed(MAGIC.len(), 1);
    assert!(version.contains("has format 1, this Kiln reads format 4"), "{version}");
    assert!(changed(13, 0xff).contains("the manifest has"));
    assert!(changed(12, 9).contains("does not parse"));
    let changed = |change: &dyn Fn(&mut Manifest)| {
        let mut manifest = manifest();
        change(&mut manifest);
        text(&artifact(&manifest, &CODE, &CONSTANTS))
    };
    assert!(changed(&|m| m.entries[0] = 100).contains("kernel 0 starts at byte 100 of 100"));
    assert!(changed(&|m| m.plan.arena_bytes = usize::MAX).contains("asks for 184467"));
    assert!(changed(&|m| m.plan.steps[0].kernel = 1).contains("runs kernel 1"));
    assert!(changed(&|m| m.weights = Weights::Inside { bytes: 129 }).contains("has 128 bytes"));
    for file in ["", "..", "a/b", "/etc/passwd"] {
        let external = Weights::External { file: file.into(), bytes: 1, hash: [0; 32] };
        let error = changed(&|m| m.weights = external.clone());
        assert!(error.contains("in the same folder"), "{error}");
    }
}
