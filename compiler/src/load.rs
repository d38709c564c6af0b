//! Compiled models from files, with errors that commands can show.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use kiln_runtime::gpu::{EM_CUDA, GpuArtifact};
use kiln_runtime::load::ArtifactFile;
use kiln_runtime::manifest::ArtifactError;
use kiln_runtime::pool::Pool;
use kiln_runtime::session::Executable;

use crate::error::{Diagnostic, Error, ErrorKind, Result};

/// Whether a file is an object file, a shared library or a static library: a compiled model, where
/// it is any model. No ONNX file begins like one.
pub fn is_artifact(path: impl AsRef<Path>) -> bool {
    let mut start = [0; 8];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut start));
    let magics: [&[u8]; 5] =
        [b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\x64\x86", b"\x64\xaa", b"!<arch>\n"];
    read.is_ok() && magics.iter().any(|magic| start.starts_with(magic))
}

/// Whether a file is a compiled model for GPUs.
pub fn is_cuda_artifact(path: impl AsRef<Path>) -> bool {
    let mut start = [0; 20];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut start));
    read.is_ok() && start.starts_with(b"\x7fELF") && start[18..] == EM_CUDA.to_le_bytes()
}

/// The model of a file for GPUs that was opened from `path`.
///
/// # Errors
/// When the file is for CPUs, or its weights cannot be read.
pub fn load_cuda(file: ArtifactFile, path: impl AsRef<Path>) -> Result<GpuArtifact> {
    let path = path.as_ref();
    let folder = path.parent().unwrap_or(Path::new(""));
    file.gpu(folder).map_err(|error| failure(path, &error))
}

/// Opens a compiled model and checks what does not depend on the machine; runs nothing of it.
///
/// # Errors
/// When the file cannot be read, is none that Kiln wrote, or is damaged.
pub fn open_artifact(path: impl AsRef<Path>) -> Result<ArtifactFile> {
    let path = path.as_ref();
    ArtifactFile::open(path).map_err(|error| failure(path, &error))
}

/// The executable of a compiled model, with a pool of its own of that many threads.
///
/// # Safety
/// As [`Executable::load`]: the file is code.
///
/// # Errors
/// When the file cannot be read, is none that Kiln wrote, is damaged, or is for another machine.
pub unsafe fn load(path: impl AsRef<Path>, threads: usize) -> Result<Executable> {
    let path = path.as_ref();
    let file = open_artifact(path)?;
    // SAFETY: passed on to the caller.
    unsafe { load_opened(file, path, threads) }
}

/// The same of a file that was opened from `path`.
///
/// # Safety
/// As [`load`].
///
/// # Errors
/// As [`load`].
pub unsafe fn load_opened(
    file: ArtifactFile,
    path: impl AsRef<Path>,
    threads: usize,
) -> Result<Executable> {
    let path = path.as_ref();
    let folder = path.parent().unwrap_or(Path::new(""));
    let pool =
        Pool::new(threads.max(1)).map_err(|error| failure(path, &ArtifactError::Code(error)));
    // SAFETY: passed on to the caller.
    let loaded = unsafe { file.load(folder, Arc::new(pool?)) };
    loaded.map_err(|error| failure(path, &error))
}

/// What a person is told.
pub(crate) fn failure(path: &Path, error: &ArtifactError) -> Error {
    let kind = match error {
        ArtifactError::Version { .. }
        | ArtifactError::Target { .. }
        | ArtifactError::Gpu
        | ArtifactError::Cpu(_)
        | ArtifactError::Features { .. }
        | ArtifactError::Code(_) => ErrorKind::Incompatible,
        _ => ErrorKind::Io,
    };
    let code = if kind == ErrorKind::Io { "K0911" } else { "K0912" };
    let mut diagnostic = Diagnostic::new(code, "the compiled model cannot be loaded")
        .tensor(path.display().to_string())
        .found(error.to_string());
    if path.extension().is_some_and(|extension| extension == "a") {
        diagnostic = diagnostic.help("a static library is for a linker; load the .so or .o");
    }
    Error::new(kind, diagnostic)
}
