//! Files that commands read and write.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::failure::Failure;
use crate::interrupt;

/// The bytes of a file.
pub fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    fs::read(path).map_err(|error| Failure::io(path.display(), error))
}

/// Writes a file under a temporary name in the same folder and then gives it its name, so that no
/// one ever sees a part of it. `-` is standard output; devices and pipes are written directly.
pub fn write(
    path: &Path,
    contents: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), Failure> {
    let written = if path == Path::new("-") {
        let mut out = BufWriter::new(io::stdout().lock());
        contents(&mut out).and_then(|()| out.flush())
    } else if fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        File::options().write(true).open(path).and_then(|mut file| contents(&mut file))
    } else {
        write_new(path, contents)
    };
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(|error| Failure::io(path.display(), error)),
    }
}

fn write_new(
    path: &Path,
    contents: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    // A name that is a link goes on being one: what it leads to is replaced.
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let mut builder = tempfile::Builder::new();
    builder.prefix(".kiln-").suffix(".tmp");
    #[cfg(unix)]
    {
        // The rights of any new file; temporary ones are private otherwise.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    let mut file = interrupt::guarded(|| {
        let file = builder.tempfile_in(folder.unwrap_or(Path::new(".")))?;
        Ok((file.path().to_path_buf(), file))
    })?;
    let mut out = BufWriter::new(file.as_file_mut());
    contents(&mut out)?;
    out.flush()?;
    drop(out);
    file.as_file().sync_all()?;
    file.persist(&path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("out.npz");
        write(&path, |out| out.write_all(b"old")).expect("a write");
        let failed = write(&path, |out| {
            out.write_all(b"new")?;
            Err(io::Error::other("the disk is full"))
        });
        let text = failed.expect_err("a failure").to_string();
        assert!(text.contains("out.npz: the disk is full"), "{text}");
        assert_eq!(read(&path).expect("the old file"), b"old");
        assert_eq!(fs::read_dir(folder.path()).expect("the folder").count(), 1);
        write(&path, |out| out.write_all(b"new")).expect("a write");
        assert_eq!(read(&path).expect("the new file"), b"new");
        assert!(write(&folder.path().join("no/such/folder"), |_| Ok(())).is_err());
    }
}
