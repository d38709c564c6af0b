//! What every compiled file says of itself: a section with a fixed header, which is checked before
//! anything else is read, and a payload.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | [`MAGIC`] |
//! | 8 | 4 | [`VERSION`], little endian |
//! | 12 | 4 | length of the payload, little endian |
//! | 16 | 32 | blake3 of the whole file, these 32 bytes taken as zeros |
//! | 48 | .. | the [`Manifest`], by postcard |
//!
//! The hash finds damage, not malice: a file is as trustworthy as the place that it comes from.

use std::ffi::CStr;
use std::io;
use std::ops::Range;
use std::path::PathBuf;

use object::{Object, ObjectSection};
use serde::{Deserialize, Serialize};

use crate::gpu;
pub use crate::hash::Hash;
use crate::hash::hash_without;
use crate::plan::{Plan, PlanError};
use crate::session::Names;

/// Name of the section with the manifest; Mach-O spells it `__kiln`.
pub const SECTION: &str = ".kiln";
/// Name of the section with the code, or with text for GPUs; Mach-O spells it `__text`.
pub const TEXT: &str = ".text";
/// Name of the section with the constants; Mach-O spells it `__weights`.
pub const WEIGHTS: &str = ".weights";

/// The first bytes of a manifest. No text, so that no text is taken for one.
pub const MAGIC: [u8; 8] = *b"\x89KILN\r\n\x1a";
/// Version of the format; another one is refused.
pub const VERSION: u32 = 4;

const HASH: Range<usize> = 16..48;
const HEADER_BYTES: usize = HASH.end;
/// A payload larger than this is damage: a plan of a million steps is smaller.
const MAX_PAYLOAD: usize = 1 << 28;

/// What a compiled file says of itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the compiler.
    pub producer: String,
    /// Target triple.
    pub target: String,
    /// Features that the processor must have, by the names of [`cpu`](crate::cpu).
    pub features: Vec<String>,
    /// Hash of the model that the code was made of.
    pub model_hash: Hash,
    /// What the functions for C begin with.
    pub name: String,
    /// Which kernel runs when, on which buffers.
    pub plan: Plan,
    /// Where each kernel starts in the section [`TEXT`].
    pub entries: Vec<usize>,
    /// The same kernels as code for processors that can do more, the fastest first.
    pub faster: Vec<Faster>,
    /// Kernels for GPUs, as text in the section [`TEXT`]; a file for CPUs has none, one for GPUs
    /// has no entries.
    pub modules: Vec<gpu::Module>,
    /// The constants.
    pub weights: Weights,
}

/// Kernels for processors that can do more than others.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Faster {
    /// Features that the processor must have.
    pub features: Vec<String>,
    /// Where each kernel starts in the section [`TEXT`].
    pub entries: Vec<usize>,
}

/// Where the constants of a compiled file are.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Weights {
    /// In its section [`WEIGHTS`]; where there are none, the section may be missing.
    Inside {
        /// Their size.
        bytes: usize,
    },
    /// In a file in the same folder.
    External {
        /// Its name, without a folder.
        file: String,
        /// Its size.
        bytes: usize,
        /// Its hash.
        hash: Hash,
    },
}

impl Weights {
    /// Size of the constants.
    pub fn bytes(&self) -> usize {
        match self {
            Weights::Inside { bytes } | Weights::External { bytes, .. } => *bytes,
        }
    }
}

/// Where the parts are in the file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sections {
    /// The code.
    pub text: Range<usize>,
    /// The constants, where they are inside.
    pub weights: Option<Range<usize>>,
}

/// Why a compiled file cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArtifactError {
    /// It is no object file or shared library.
    #[error("not a compiled model: {0}")]
    Format(String),
    /// A section is missing.
    #[error("not a compiled model: the file has no section `{0}`")]
    Section(&'static str),
    /// A part ends too early.
    #[error("{what} has {found} bytes, expected {expected}; was a copy cut off?")]
    Truncated {
        /// The part.
        what: &'static str,
        /// Its size.
        found: usize,
        /// The size that it should have.
        expected: usize,
    },
    /// The header does not begin with [`MAGIC`].
    #[error("the header of the compiled model begins with {found:02x?}, expected {MAGIC:02x?}")]
    Magic {
        /// The bytes there.
        found: Vec<u8>,
    },
    /// Another version of the format.
    #[error(
        "the compiled model has format {found}, this Kiln reads format {VERSION}; compile anew"
    )]
    Version {
        /// The version there.
        found: u32,
    },
    /// The bytes are not those that were written.
    #[error(
        "{what} has the hash {}, expected {}; it was changed or damaged",
        hex(found),
        hex(expected)
    )]
    Hash {
        /// The file.
        what: String,
        /// The hash of its bytes.
        found: Hash,
        /// The hash that was written.
        expected: Hash,
    },
    /// The payload does not parse.
    #[error("the manifest of the compiled model does not parse: {0}")]
    Payload(String),
    /// A kernel outside of the code.
    #[error("kernel {index} starts at byte {found} of {expected} bytes of code")]
    Entry {
        /// Index of the kernel.
        index: usize,
        /// Where it starts.
        found: usize,
        /// Size of the code.
        expected: usize,
    },
    /// A module for GPUs that cannot be what the text says.
    #[error("the kernels for GPUs of version {sm}: {why}")]
    Module {
        /// Version of the instruction set.
        sm: u32,
        /// What is wrong.
        why: &'static str,
    },
    /// The name of the external weights leads out of the folder.
    #[error("the weights are in `{0}`, expected the name of a file in the same folder")]
    FileName(String),
    /// More memory than there are addresses.
    #[error("the compiled model asks for {0} bytes of memory for intermediate values")]
    Arena(usize),
    /// The plan names what is not there.
    #[error("the plan of the compiled model: {0}")]
    Plan(#[from] PlanError),
    /// Made for a GPU.
    #[error("the model was compiled for a GPU; run it with --device cuda, or by kiln-cuda")]
    Gpu,
    /// Made for a CPU.
    #[error("the model was compiled for {0}, not for a GPU; compile it with --device cuda")]
    Cpu(String),
    /// Made for another kind of machine.
    #[error("the model was compiled for {found}, this machine is {expected}; compile it here")]
    Target {
        /// The target of the file.
        found: String,
        /// This machine.
        expected: String,
    },
    /// The processor lacks what the code uses.
    #[error(
        "the model was compiled for a processor with {missing}, which this one lacks; \
         compile it here, or for an older processor"
    )]
    Features {
        /// What is missing.
        missing: Names,
    },
    /// A file cannot be read.
    #[error("{what} {}: {error}", path.display())]
    File {
        /// What the file is.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The system refuses memory for code.
    #[error("the code of the compiled model cannot be loaded: {0}")]
    Code(io::Error),
}

/// The bytes of the section [`SECTION`], with zeros for the hash: [`seal`] sets it.
pub fn encode(manifest: &Manifest) -> Vec<u8> {
    let payload = postcard::to_allocvec(manifest).expect("strings and numbers can be written");
    assert!(payload.len() <= MAX_PAYLOAD, "a manifest of {} bytes", payload.len());
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((payload.len() as u32).to_le_bytes());
    bytes.resize(HEADER_BYTES, 0);
    bytes.extend(payload);
    bytes
}

/// Writes the hash of a file into its manifest, which starts at byte `at`. The last step of
/// writing the file: nothing may change after it.
///
/// # Panics
/// When there is no manifest.
pub fn seal(file: &mut [u8], at: usize) {
    assert_eq!(file[at..at + MAGIC.len()], MAGIC, "a manifest at byte {at}");
    let hash = hash_without(file, at + HASH.start..at + HASH.end);
    file[at + HASH.start..at + HASH.end].copy_from_slice(&hash);
}

/// Finds the manifest of a file, and checks all of it that does not depend on the machine.
///
/// # Errors
/// When the file is none that Kiln wrote, or is damaged.
pub fn find(file: &[u8]) -> Result<(Manifest, Sections), ArtifactError> {
    let object = object::File::parse(file).map_err(|e| ArtifactError::Format(e.to_string()))?;
    let section = range(&object, SECTION, file.len())?;
    let section = section.ok_or(ArtifactError::Section(SECTION))?;
    let payload = payload(file, section)?;
    let manifest: Manifest = match postcard::take_from_bytes(payload) {
        Ok((manifest, [])) => manifest,
        Ok((_, rest)) => {
            let text = format!("{} bytes are left over", rest.len());
            return Err(ArtifactError::Payload(text));
        }
        Err(error) => return Err(ArtifactError::Payload(error.to_string())),
    };
    let text = range(&object, TEXT, file.len())?.ok_or(ArtifactError::Section(TEXT))?;
    let mut weights = range(&object, WEIGHTS, file.len())?;
    match &manifest.weights {
        Weights::Inside { bytes: 0 } => weights = None,
        Weights::Inside { bytes: expected } => {
            let found = weights.as_ref().ok_or(ArtifactError::Section(WEIGHTS))?.len();
            if found != *expected {
                let what = "the section of weights";
                return Err(ArtifactError::Truncated { what, found, expected: *expected });
            }
        }
        Weights::External { file, .. } => {
            weights = None;
            let outside = file.is_empty() || file.contains(['/', '\\', '\0']) || file == "..";
            if outside || file == "." {
                return Err(ArtifactError::FileName(file.clone()));
            }
        }
    }
    check(&manifest, &file[text.clone()])?;
    Ok((manifest, Sections { text, weights }))
}

/// The bytes of a section in the file.
fn range(
    object: &object::File<'_>,
    name: &'static str,
    file_bytes: usize,
) -> Result<Option<Range<usize>>, ArtifactError> {
    let Some(section) = object.section_by_name(name) else { return Ok(None) };
    let Some((offset, size)) = section.file_range() else { return Ok(None) };
    let end = offset.checked_add(size).and_then(|end| usize::try_from(end).ok());
    match end.filter(|&end| end <= file_bytes) {
        Some(end) => Ok(Some(offset as usize..end)),
        None => {
            let expected = offset.saturating_add(size).try_into().unwrap_or(usize::MAX);
            Err(ArtifactError::Truncated { what: "the file", found: file_bytes, expected })
        }
    }
}

/// The payload of the manifest in that range, after the header was checked.
fn payload(file: &[u8], section: Range<usize>) -> Result<&[u8], ArtifactError> {
    let (at, bytes) = (section.start, &file[section]);
    let truncated = |what, found, expected| ArtifactError::Truncated { what, found, expected };
    let (header, rest) = bytes
        .split_at_checked(HEADER_BYTES)
        .ok_or_else(|| truncated("the header of the compiled model", bytes.len(), HEADER_BYTES))?;
    let (magic, numbers) = header.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(ArtifactError::Magic { found: magic.to_vec() });
    }
    let number = |at: usize| {
        let bytes = numbers[at..at + 4].try_into().expect("four bytes");
        u32::from_le_bytes(bytes)
    };
    let (version, len) = (number(0), number(4) as usize);
    if version != VERSION {
        return Err(ArtifactError::Version { found: version });
    }
    // A section may be padded.
    if len > rest.len() || len > MAX_PAYLOAD {
        return Err(truncated("the manifest", rest.len(), len));
    }
    let expected: Hash = header[HASH].try_into().expect("32 bytes");
    let found = hash_without(file, at + HASH.start..at + HASH.end);
    if found != expected {
        return Err(ArtifactError::Hash { what: "the file".into(), found, expected });
    }
    Ok(&rest[..len])
}

fn check(manifest: &Manifest, text: &[u8]) -> Result<(), ArtifactError> {
    let constants = manifest.weights.bytes();
    let faster = manifest.faster.iter().map(|set| &set.entries);
    for entries in [&manifest.entries].into_iter().chain(faster) {
        for (index, &found) in entries.iter().enumerate() {
            if found >= text.len() {
                return Err(ArtifactError::Entry { index, found, expected: text.len() });
            }
        }
        if manifest.modules.is_empty() {
            manifest.plan.check(entries.len(), constants)?;
        }
    }
    for module in &manifest.modules {
        check_module(module, text)?;
        manifest.plan.check(module.kernels.len(), constants)?;
    }
    let arena = manifest.plan.arena_bytes;
    if isize::try_from(arena).map_or(true, |bytes| bytes > isize::MAX / 2) {
        return Err(ArtifactError::Arena(arena));
    }
    Ok(())
}

/// Threads of a block, at most, on every GPU.
const MOST_THREADS: u32 = 1024;

fn check_module(module: &gpu::Module, text: &[u8]) -> Result<(), ArtifactError> {
    let wrong = |why| Err(ArtifactError::Module { sm: module.sm, why });
    let Some(text) = text.get(module.text.clone()) else {
        return wrong("their text is not in the file");
    };
    if CStr::from_bytes_with_nul(text).is_err() {
        return wrong("their text does not end where it should");
    }
    for kernel in &module.kernels {
        if kernel.name.is_empty() || kernel.name.contains('\0') {
            return wrong("a kernel has no name");
        }
        let blocks = 1..=i32::MAX as u32;
        if !blocks.contains(&kernel.blocks) || !(1..=MOST_THREADS).contains(&kernel.threads) {
            return wrong("a kernel has no blocks or threads, or too many");
        }
    }
    Ok(())
}

/// A hash as people write it.
pub fn hex(hash: &Hash) -> String {
    blake3::Hash::from_bytes(*hash).to_hex().to_string()
}
