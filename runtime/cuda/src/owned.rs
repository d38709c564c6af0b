//! What a driver gave out, and takes back when its last user goes.

use std::sync::Arc;

use crate::driver::{Answer, Device, Driver, Fault, FaultKind, Resource};
use crate::error::CudaError;
use crate::nvidia::Nvidia;

/// An open device; clones share it.
#[derive(Clone)]
pub struct Gpu {
    driver: Arc<dyn Driver>,
}

impl Gpu {
    /// The device of that number.
    ///
    /// # Errors
    /// When there is no driver, it does not start, or there is no such device.
    pub fn open(ordinal: usize) -> Result<Gpu, CudaError> {
        Ok(Gpu { driver: Arc::new(Nvidia::open(ordinal)?) })
    }

    /// The device of any driver.
    pub fn with(driver: Arc<dyn Driver>) -> Gpu {
        Gpu { driver }
    }

    /// What it is.
    pub fn device(&self) -> &Device {
        self.driver.device()
    }

    /// Bytes of its memory that are free, and all.
    ///
    /// # Errors
    /// What the driver says.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        let what = "asking for free device memory";
        self.driver.memory().map_err(|fault| CudaError::Driver { what, fault })
    }

    /// Its driver.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// Something that the driver gives out.
    pub(crate) fn own(&self, answer: Answer<Resource>) -> Answer<Owned> {
        Ok(Owned { what: answer?, driver: self.driver.clone() })
    }

    /// Device memory; of no bytes, none is asked for.
    pub(crate) fn allocate(&self, bytes: usize) -> Answer<Piece> {
        let ask = || self.own(self.driver.allocate(bytes));
        Ok(Piece((bytes > 0).then(ask).transpose()?))
    }

    /// Pinned memory.
    pub(crate) fn pin(&self, bytes: usize) -> Answer<Pinned> {
        let owned = self.own(self.driver.pin(bytes.max(1)))?;
        if owned.what.number() == 0 {
            let (call, text) = ("cuMemHostAlloc", "no address".to_string());
            return Err(Fault { kind: FaultKind::Other, call, text });
        }
        Ok(Pinned { owned, bytes })
    }
}

/// Something that a driver gave out.
pub struct Owned {
    what: Resource,
    driver: Arc<dyn Driver>,
}

impl Owned {
    /// What it is.
    pub fn get(&self) -> Resource {
        self.what
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.driver.release(self.what);
    }
}

/// A piece of device memory, or nothing.
pub struct Piece(Option<Owned>);

impl Piece {
    /// Its address; 0 of nothing.
    pub fn address(&self) -> u64 {
        self.0.as_ref().map_or(0, |owned| owned.what.number())
    }
}

/// Memory of this machine that the device reads and writes.
pub struct Pinned {
    owned: Owned,
    bytes: usize,
}

impl Pinned {
    /// The first byte.
    pub fn pointer(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.owned.what.number() as usize)
    }

    /// Some of its bytes, to be read.
    ///
    /// # Safety
    /// They were written, and no work of the device that writes them is under way.
    ///
    /// # Panics
    /// When they are not inside.
    pub unsafe fn read(&self, at: usize, bytes: usize) -> &[u8] {
        assert!(at.checked_add(bytes).is_some_and(|end| end <= self.bytes), "inside");
        // SAFETY: the driver gave these bytes out, and nothing writes them.
        unsafe { std::slice::from_raw_parts(self.pointer().wrapping_add(at), bytes) }
    }

    /// Fills some of its bytes.
    ///
    /// # Safety
    /// No work of the device that touches them is under way.
    ///
    /// # Panics
    /// When they are not inside.
    pub unsafe fn write(&mut self, at: usize, bytes: &[u8]) {
        assert!(at.checked_add(bytes.len()).is_some_and(|end| end <= self.bytes), "inside");
        let to = self.pointer().wrapping_add(at);
        // SAFETY: the driver gave these bytes out, and nothing else touches them.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }
}
