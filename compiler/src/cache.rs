//! Compiled models on disk, found again by what they were compiled from and for.
//!
//! An entry is the shared library that `kiln compile` writes, or its file for GPUs, named by a hash
//! of the graph, its constants, the machine, the options and the compiler. Entries appear whole:
//! they are written under a name that no other writer has, synced, and renamed. Code is loaded from
//! here, so the folder is private to its owner, or refused.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use kiln_runtime::gpu::GpuArtifact;
use kiln_runtime::hash::hashes;
use kiln_runtime::load::ArtifactFile;
use kiln_runtime::manifest::{self, ArtifactError};
use kiln_runtime::pool::Pool;
use kiln_runtime::session::Executable;
use rustix::fs::{AtFlags, Mode, OFlags, fstat, openat, renameat, unlinkat};

use crate::error::{Diagnostic, Error, ErrorKind, Result};
use crate::graph::Graph;
use crate::load::failure;
use crate::precision::Precision;
use crate::rules::Budget;

/// Age from which on a temporary file without a living writer is removed.
const STALE: Duration = Duration::from_secs(3600);
const TEMPORARY: &str = ".tmp";

/// What the cache did for a compilation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CacheUse {
    /// There is none.
    Off,
    /// The model was there.
    Found,
    /// The model was compiled and kept.
    Kept,
    /// The model was compiled, but could not be kept: the disk is full, say.
    NotKept(String),
    /// What was there was damaged. It was removed, and the model was compiled anew and kept.
    Replaced(String),
}

impl std::fmt::Display for CacheUse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CacheUse::Off => f.write_str("no cache"),
            CacheUse::Found => f.write_str("found in the cache"),
            CacheUse::Kept => f.write_str("compiled and kept in the cache"),
            CacheUse::NotKept(why) => write!(f, "compiled, not kept in the cache: {why}"),
            CacheUse::Replaced(why) => write!(f, "compiled anew, the cache was damaged: {why}"),
        }
    }
}

/// The name of a compiled graph: equal names, equal code. `made_for` is a processor, or GPUs.
pub(crate) fn key(
    graph: &Graph,
    options: (Option<Budget>, bool),
    precision: Precision,
    made_for: &dyn std::fmt::Debug,
) -> String {
    let compiler = (env!("CARGO_PKG_VERSION"), env!("KILN_SOURCE"));
    let emitter = (cranelift_codegen::VERSION, manifest::VERSION);
    let options = (options, precision.name());
    let mut text = format!("{compiler:?} {emitter:?} {options:?} {made_for:?}\n");
    text += &format!("{}\n", graph.describe());
    let constants: Vec<&[u8]> = graph.constants.iter().map(|c| &c.bytes[..]).collect();
    hashes(&constants).iter().for_each(|hash| text += &manifest::hex(hash));
    manifest::hex(blake3::hash(text.as_bytes()).as_bytes())
}

/// Takes the model of that name from the folder, or makes it and keeps it there. `make` gives the
/// bytes of a compiled file whose functions begin with the name that it is given.
pub(crate) fn compile(
    folder: &Path,
    key: &str,
    threads: usize,
    make: impl FnOnce(&str) -> Result<Vec<u8>>,
) -> Result<(Executable, CacheUse)> {
    let pool = Pool::new(threads).map_err(|e| failure(folder, &ArtifactError::Code(e)))?;
    let pool = Arc::new(pool);
    // SAFETY: the bytes are as this compiler has written them, for this processor: it did so just
    // now, or their name says so and nobody but this user could have written them.
    let load = |file: ArtifactFile| unsafe { file.load(folder, pool.clone()) };
    find(folder, (key, "so"), &load, make)
}

/// The same of a model for GPUs.
pub(crate) fn compile_cuda(
    folder: &Path,
    key: &str,
    make: impl FnOnce(&str) -> Result<Vec<u8>>,
) -> Result<(GpuArtifact, CacheUse)> {
    find(folder, (key, "kiln"), &|file| file.gpu(folder), make)
}

/// What a file becomes that was opened.
type Load<'a, T> = dyn Fn(ArtifactFile) -> std::result::Result<T, ArtifactError> + 'a;

fn find<T>(
    folder: &Path,
    (key, ending): (&str, &str),
    load: &Load<T>,
    make: impl FnOnce(&str) -> Result<Vec<u8>>,
) -> Result<(T, CacheUse)> {
    let cache = Folder::open(folder)?;
    let (name, entry) = (format!("kiln_{key}"), format!("{key}.{ending}"));
    let damaged = match cache.load(&entry, &name, load) {
        Ok(Some(found)) => return Ok((found, CacheUse::Found)),
        Ok(None) => None,
        Err(why) => {
            // Where it cannot be removed it is replaced below, or was so by somebody else.
            let _ = unlinkat(&cache.fd, &entry, AtFlags::empty());
            Some(why)
        }
    };
    let bytes = make(&name)?;
    let kept = cache.keep(&entry, &bytes);
    let mut used = match (kept, damaged) {
        (Err(error), _) => CacheUse::NotKept(error.to_string()),
        (Ok(()), Some(why)) => CacheUse::Replaced(why),
        (Ok(()), None) => CacheUse::Kept,
    };
    if !matches!(used, CacheUse::NotKept(_)) {
        // The weights of the file are shared with other processes.
        match cache.load(&entry, &name, load) {
            Ok(Some(found)) => return Ok((found, used)),
            Ok(None) => used = CacheUse::NotKept("somebody removed it".into()),
            Err(why) => used = CacheUse::NotKept(why),
        }
    }
    let file = ArtifactFile::from_bytes(&bytes).map_err(|e| failure(folder, &e))?;
    Ok((load(file).map_err(|e| failure(folder, &e))?, used))
}

/// A folder that only its owner can write.
struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

impl Folder {
    /// Opens the folder, which is made where it is missing.
    fn open(path: &Path) -> Result<Folder> {
        use std::os::unix::fs::DirBuilderExt;
        let fail = |found: String| {
            let diagnostic = Diagnostic::new("K0921", "the folder of the cache cannot be used")
                .tensor(path.display().to_string())
                .found(found);
            Error::new(ErrorKind::Io, diagnostic)
        };
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.map_err(|e| fail(e.to_string()))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| fail(e.to_string()))?;
        let stat = fstat(&fd).map_err(|e| fail(e.to_string()))?;
        let own = rustix::process::geteuid().as_raw();
        let expect = |expected: &str, found: String, help: &str| {
            let mut error = fail(found);
            let diagnostic = error.diagnostics.remove(0).expected(expected).help(help);
            Err(Error::new(ErrorKind::Io, diagnostic))
        };
        if stat.st_uid != own {
            let help = "code is loaded from it: give a folder of your own";
            return expect("a folder of this user", format!("user {}", stat.st_uid), help);
        }
        if stat.st_mode & 0o022 != 0 {
            let help = "code is loaded from it: chmod go-w, or give a new folder";
            let found = format!("mode {:03o}", stat.st_mode & 0o777);
            return expect("a folder that only its owner can write", found, help);
        }
        Ok(Folder { fd, path: path.to_path_buf() })
    }

    /// The model of that name; says what is wrong with a file that cannot be used.
    fn load<T>(
        &self,
        entry: &str,
        name: &str,
        load: &Load<T>,
    ) -> std::result::Result<Option<T>, String> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = match openat(&self.fd, entry, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let stat = fstat(&fd).map_err(|e| e.to_string())?;
        if stat.st_uid != rustix::process::geteuid().as_raw() || stat.st_mode & 0o022 != 0 {
            return Err("others could write it".into());
        }
        let path = self.path.join(entry);
        let file = ArtifactFile::of(&File::from(fd), &path).map_err(|e| e.to_string())?;
        if file.manifest.name != name {
            return Err(format!("it is named {}", file.manifest.name));
        }
        load(file).map(Some).map_err(|e| e.to_string())
    }

    /// Writes an entry; it appears whole or not at all.
    fn keep(&self, entry: &str, bytes: &[u8]) -> io::Result<()> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        self.clean();
        let now = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_nanos());
        let (pid, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let name = format!("{}.{pid}.{count}.{now:x}{TEMPORARY}", &entry[..16.min(entry.len())]);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = openat(&self.fd, &name, flags, Mode::RUSR | Mode::WUSR)?;
        let mut file = File::from(fd);
        let written = file
            .write_all(bytes)
            .and_then(|()| file.sync_all())
            .and_then(|()| Ok(renameat(&self.fd, &name, &self.fd, entry)?))
            .and_then(|()| Ok(rustix::fs::fsync(&self.fd)?));
        if written.is_err() {
            let _ = unlinkat(&self.fd, &name, AtFlags::empty());
        }
        written
    }

    /// Removes what writers left behind that were ended in the middle.
    fn clean(&self) {
        let Ok(entries) = std::fs::read_dir(&self.path) else { return };
        for found in entries.flatten() {
            let name = found.file_name();
            let modified = found.metadata().and_then(|metadata| metadata.modified());
            let age = modified.ok().and_then(|time| time.elapsed().ok()).unwrap_or_default();
            if is_stale(&name, age) {
                let _ = unlinkat(&self.fd, &name, AtFlags::empty());
            }
        }
    }
}

/// Whether a file is a temporary one that nobody will finish.
fn is_stale(name: &OsString, age: Duration) -> bool {
    let Some(rest) = name.to_str().and_then(|name| name.strip_suffix(TEMPORARY)) else {
        return false;
    };
    let writer = rest.split('.').nth(1).and_then(|pid| pid.parse().ok());
    let alive = writer
        .and_then(rustix::process::Pid::from_raw)
        .is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH));
    age > STALE && !alive
}
