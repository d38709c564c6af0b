//! Compiled models from files: mapped, checked, and handed to [`Executable`].

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use memmap2::{Mmap, MmapMut, MmapOptions};

use crate::artifact::{Artifact, Constants};
use crate::code::Code;
use crate::cpu;
use crate::gpu::GpuArtifact;
use crate::hash::hashes;
use crate::manifest::{self, ArtifactError, Hash, Manifest, Sections, Weights};
use crate::pool::Pool;
use crate::session::{Executable, Names};

/// A compiled file whose manifest and hash were checked: it can be looked at, and loaded.
#[derive(Debug)]
pub struct ArtifactFile {
    map: Arc<Mmap>,
    /// What the file says of itself.
    pub manifest: Manifest,
    /// Where its parts are.
    pub sections: Sections,
}

impl ArtifactFile {
    /// Maps a file and checks all that does not depend on the machine. Runs nothing of it.
    ///
    /// # Errors
    /// When the file cannot be read, is none that Kiln wrote, or is damaged.
    pub fn open(path: &Path) -> Result<ArtifactFile, ArtifactError> {
        ArtifactFile::checked(map(&open(path, WHAT)?, path, WHAT)?)
    }

    /// The same of a file that is open already; `path` is its name in errors.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn of(file: &File, path: &Path) -> Result<ArtifactFile, ArtifactError> {
        ArtifactFile::checked(map(file, path, WHAT)?)
    }

    /// The same of bytes in memory, which are copied.
    ///
    /// # Errors
    /// When there is no memory, the bytes are none that Kiln wrote, or are damaged.
    pub fn from_bytes(bytes: &[u8]) -> Result<ArtifactFile, ArtifactError> {
        let mut copy = MmapMut::map_anon(bytes.len().max(1)).map_err(ArtifactError::Code)?;
        copy[..bytes.len()].copy_from_slice(bytes);
        ArtifactFile::checked(copy.make_read_only().map_err(ArtifactError::Code)?)
    }

    fn checked(map: Mmap) -> Result<ArtifactFile, ArtifactError> {
        let (manifest, sections) = manifest::find(&map)?;
        Ok(ArtifactFile { map: Arc::new(map), manifest, sections })
    }

    /// Size of the file.
    pub fn file_bytes(&self) -> usize {
        self.map.len()
    }

    /// Whether this machine can run the code.
    ///
    /// # Errors
    /// When the file is for another target, or the processor lacks a feature.
    pub fn check_machine(&self) -> Result<(), ArtifactError> {
        let Manifest { target, features, modules, .. } = &self.manifest;
        if !modules.is_empty() {
            return Err(ArtifactError::Gpu);
        }
        if !cpu::runs(target) {
            let (found, expected) = (target.clone(), cpu::triple());
            return Err(ArtifactError::Target { found, expected });
        }
        match cpu::missing(features) {
            missing if missing.is_empty() => Ok(()),
            missing => Err(ArtifactError::Features { missing: Names(missing) }),
        }
    }

    /// The model for a GPU. Weights that lie outside are looked for in `folder`.
    ///
    /// # Errors
    /// When the file is for CPUs, or its weights cannot be read or are others.
    pub fn gpu(self, folder: &Path) -> Result<GpuArtifact, ArtifactError> {
        if self.manifest.modules.is_empty() {
            return Err(ArtifactError::Cpu(self.manifest.target));
        }
        let constants = self.constants(folder)?;
        let text = self.map[self.sections.text.clone()].to_vec();
        let Manifest { plan, modules, .. } = self.manifest;
        Ok(GpuArtifact { plan, text, modules, constants })
    }

    /// The constants, which stay where the file is mapped.
    fn constants(&self, folder: &Path) -> Result<Constants, ArtifactError> {
        match &self.manifest.weights {
            Weights::Inside { .. } => Ok(match self.sections.weights.clone() {
                Some(range) => Constants::mapped(self.map.clone(), range),
                None => Constants::from_bytes(&[]),
            }),
            Weights::External { file, bytes, hash } => weights(&folder.join(file), *bytes, hash),
        }
    }

    /// The model, to run on `pool`. Weights that lie outside are looked for in `folder`.
    ///
    /// # Safety
    /// As [`Executable::load`].
    ///
    /// # Errors
    /// As [`Executable::load`].
    pub unsafe fn load(self, folder: &Path, pool: Arc<Pool>) -> Result<Executable, ArtifactError> {
        self.check_machine()?;
        let constants = self.constants(folder)?;
        let text = &self.map[self.sections.text.clone()];
        let faster =
            self.manifest.faster.into_iter().find(|f| cpu::missing(&f.features).is_empty());
        let entries = faster.map_or(self.manifest.entries, |faster| faster.entries);
        let code = Code::load(text, entries).map_err(ArtifactError::Code)?;
        let artifact = Artifact { plan: self.manifest.plan, code, constants };
        // SAFETY: the caller vouches for the file; it was made for this processor.
        Ok(unsafe { Executable::new(artifact, pool) }?)
    }
}

impl Executable {
    /// Loads a compiled model from a file that Kiln wrote: a shared library or an object. Weights
    /// stay in the file's mapping, which all processes share; code is copied.
    ///
    /// # Safety
    /// The file is code: who wrote it decides what this process does. Manifest, hash, plan and
    /// processor are checked, which finds damage and mistakes, but no malice: whoever can change
    /// the code can also write the hash that fits. Load only files that Kiln wrote, from places
    /// where nobody else can write. The file, and that of weights beside it, must not be changed
    /// or cut short for as long as the executable lives; a new file in its place is fine.
    ///
    /// # Errors
    /// When the file cannot be read, is none that Kiln wrote, is damaged, or is for another
    /// machine.
    pub unsafe fn load(
        path: impl AsRef<Path>,
        pool: Arc<Pool>,
    ) -> Result<Executable, ArtifactError> {
        let path = path.as_ref();
        let folder = path.parent().unwrap_or(Path::new(""));
        // SAFETY: passed on to the caller.
        unsafe { ArtifactFile::open(path)?.load(folder, pool) }
    }
}

/// The file in messages.
const WHAT: &str = "the compiled model";

fn open(path: &Path, what: &'static str) -> Result<File, ArtifactError> {
    let fail = |error| ArtifactError::File { what, path: path.to_path_buf(), error };
    File::open(path).map_err(fail)
}

/// Maps a file, with all of its pages: the hash reads them at once.
fn map(file: &File, path: &Path, what: &'static str) -> Result<Mmap, ArtifactError> {
    let fail = |error| ArtifactError::File { what, path: path.to_path_buf(), error };
    if !file.metadata().map_err(fail)?.is_file() {
        return Err(fail(std::io::Error::other("not a regular file")));
    }
    // SAFETY: the map is read only; a file that is cut short while it is in use is outside of
    // what any reader of a mapping can guard against.
    unsafe { MmapOptions::new().populate().map(file) }.map_err(fail)
}

/// Weights that lie in a file beside.
fn weights(path: &Path, expected: usize, hash: &Hash) -> Result<Constants, ArtifactError> {
    if expected == 0 {
        return Ok(Constants::from_bytes(&[]));
    }
    let what = "the weights of the compiled model";
    let map = map(&open(path, what)?, path, what)?;
    if map.len() != expected {
        let what = "the file of weights";
        return Err(ArtifactError::Truncated { what, found: map.len(), expected });
    }
    let found = hashes(&[&map])[0];
    if found != *hash {
        let what = path.display().to_string();
        return Err(ArtifactError::Hash { what, found, expected: *hash });
    }
    Ok(Constants::mapped(Arc::new(map), 0..expected))
}
