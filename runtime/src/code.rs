//! Machine code in memory that is never writable and executable at once.

use std::ffi::c_void;
use std::io;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

/// A multiple of the page size of every system: the largest is 64 KiB.
const PAGE: usize = 1 << 16;

/// A kernel: works on iterations `begin..end` of its outermost loop; `buffers` points to as many
/// addresses as the kernel has arguments.
pub type KernelFn = unsafe extern "C" fn(buffers: *const *mut u8, begin: i64, end: i64);

/// Loaded machine code, unmapped on drop.
///
/// On Linux the bytes are written into an anonymous file which is mapped executable from the
/// start and sealed. No page ever gains the right to be executed, so this works in services that
/// forbid it (`PR_SET_MDWE`, `MemoryDenyWriteExecute=`). Where such files are forbidden or
/// unknown, the pages are written first and lose the right to be written before they gain that
/// to be executed.
pub struct Code {
    region: Region,
    entries: Vec<usize>,
}

// SAFETY: the mapping is private to this value, and nobody writes to it after `load`.
unsafe impl Send for Code {}
// SAFETY: as above.
unsafe impl Sync for Code {}

impl Code {
    /// Loads position-independent code; `entries` are byte offsets of its kernels.
    ///
    /// # Errors
    /// When the system refuses memory, or an entry lies outside `bytes`.
    pub fn load(bytes: &[u8], entries: Vec<usize>) -> io::Result<Code> {
        if let Some(entry) = entries.iter().find(|&&entry| entry >= bytes.len()) {
            let text = format!("entry at byte {entry} of {} bytes of code", bytes.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let region = Region::reserve(bytes.len())?;
        match map_sealed(&region, bytes) {
            Ok(()) => {}
            // The first way failed before it changed the region, or left pages without rights.
            Err(sealed) => map_protected(&region, bytes).map_err(|protected| {
                let text = format!(
                    "this process may not load machine code: an executable file in memory failed \
                     ({sealed}), and so did making pages executable ({protected})"
                );
                io::Error::new(protected.kind(), text)
            })?,
        }
        Ok(Code { region, entries })
    }

    /// The kernel of that index. Calling it is unsafe: it does what its bytes say.
    ///
    /// # Panics
    /// When there is no such entry.
    pub fn entry(&self, index: usize) -> KernelFn {
        let address = self.region.code().wrapping_add(self.entries[index]);
        // SAFETY: the address lies in the executable part of the region (`load` checked it); a
        // function pointer has the size and representation of a data pointer on all targets here.
        unsafe { std::mem::transmute::<*mut c_void, KernelFn>(address.cast()) }
    }

    /// Number of kernels.
    pub fn entries(&self) -> usize {
        self.entries.len()
    }

    /// Bytes of memory: whole pages.
    pub fn mapped_bytes(&self) -> usize {
        self.region.mapped_bytes()
    }

    /// The bytes that are executed.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: these bytes are mapped readable and nobody writes to them.
        unsafe { std::slice::from_raw_parts(self.region.code(), self.region.code_bytes) }
    }
}

/// Address space with one page without rights before the code and one after it.
struct Region {
    base: NonNull<u8>,
    total: usize,
    code_bytes: usize,
}

impl Region {
    fn reserve(code_bytes: usize) -> io::Result<Region> {
        let total = code_bytes
            .max(1)
            .checked_next_multiple_of(PAGE)
            .and_then(|bytes| bytes.checked_add(2 * PAGE))
            .ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new anonymous mapping at an address that the system chooses.
        let base = unsafe {
            mmap_anonymous(ptr::null_mut(), total, ProtFlags::empty(), MapFlags::PRIVATE)?
        };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Region { base, total, code_bytes })
    }

    fn code(&self) -> *mut u8 {
        self.base.as_ptr().wrapping_add(PAGE)
    }

    /// Whole pages between the two guards.
    fn mapped_bytes(&self) -> usize {
        self.total - 2 * PAGE
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the region is owned by this value and nothing borrowed from it is left. Failure
        // would mean a wrong range, which `reserve` rules out.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.total) };
    }
}

/// Maps a sealed anonymous file with the bytes over the middle of the region.
#[cfg(target_os = "linux")]
fn map_sealed(region: &Region, bytes: &[u8]) -> io::Result<()> {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    use std::io::Write;

    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Since 6.3 a system may refuse files in memory that do not say that they are no programs;
    // older kernels do not know the flag.
    let fd = memfd_create("kiln-code", flags | MemfdFlags::NOEXEC_SEAL)
        .or_else(|_| memfd_create("kiln-code", flags))?;
    let mut file = std::fs::File::from(fd);
    file.write_all(bytes)?;
    file.set_len(region.mapped_bytes() as u64)?;
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK)?;
    // SAFETY: replaces pages inside the region, which nobody uses yet.
    unsafe {
        rustix::mm::mmap(
            region.code().cast(),
            region.mapped_bytes(),
            ProtFlags::READ | ProtFlags::EXEC,
            MapFlags::PRIVATE | MapFlags::FIXED,
            &file,
            0,
        )?;
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn map_sealed(_region: &Region, _bytes: &[u8]) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Writes the bytes into the middle of the region, then makes it executable.
fn map_protected(region: &Region, bytes: &[u8]) -> io::Result<()> {
    let (start, len) = (region.code().cast(), region.mapped_bytes());
    // SAFETY: changes rights of pages inside the region, which nobody uses yet, and copies as
    // many bytes as the region was reserved for while they are writable.
    unsafe {
        mprotect(start, len, MprotectFlags::READ | MprotectFlags::WRITE)?;
        ptr::copy_nonoverlapping(bytes.as_ptr(), region.code(), bytes.len());
        mprotect(start, len, MprotectFlags::READ | MprotectFlags::EXEC)?;
    }
    Ok(())
}

#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod tests {
    use super::*;

    /// `ret`, then a kernel that writes `end - begin` to the first buffer.
    const BYTES: &[u8] = &[0xc3, 0x48, 0x29, 0xf2, 0x48, 0x8b, 0x07, 0x48, 0x89, 0x10, 0xc3];

    fn call(code: &Code) -> u64 {
        let mut result = 0u64;
        let buffers = [(&raw mut result).cast::<u8>()];
        // SAFETY: the kernel writes eight bytes to its first buffer.
        unsafe { code.entry(1)(buffers.as_ptr(), 3, 10) };
        result
    }

    fn rights_of(code: &Code) -> Vec<String> {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps of this process");
        let address = code.region.code().addr();
        let page = PAGE;
        let at = |address: usize| {
            maps.lines().find_map(|line| {
                let (range, rest) = line.split_once(' ')?;
                let (begin, end) = range.split_once('-')?;
                let parse = |text| usize::from_str_radix(text, 16).ok();
                (parse(begin)?..parse(end)?).contains(&address).then(|| rest[..4].to_string())
            })
        };
        [address - page, address, address + code.region.mapped_bytes()]
            .into_iter()
            .map(|address| at(address).expect("a mapped address"))
            .collect()
    }

    #[test]
    fn code_runs_between_guards_and_cannot_be_written() {
        let code = Code::load(BYTES, vec![0, 1]).expect("code loads");
        assert_eq!(call(&code), 7);
        assert_eq!(rights_of(&code), ["---p", "r-xp", "---p"]);
        assert_eq!(code.bytes(), BYTES);
        assert_eq!(code.entries(), 2);
    }

    #[test]
    fn the_way_without_files_ends_in_the_same_rights() {
        let region = Region::reserve(BYTES.len()).expect("memory");
        map_protected(&region, BYTES).expect("rights");
        let code = Code { region, entries: vec![0, 1] };
        assert_eq!(call(&code), 7);
        assert_eq!(rights_of(&code), ["---p", "r-xp", "---p"]);
    }

    #[test]
    fn an_entry_outside_is_an_error() {
        let error = Code::load(BYTES, vec![BYTES.len()]).err().expect("an error");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(Code::load(&[], vec![]).is_ok());
    }
}
