//! A compiled model: its plan, its machine code and its constants.

use std::ops::Range;
use std::sync::Arc;

use memmap2::Mmap;

use crate::code::Code;
use crate::memory::{ALIGN, AlignedBytes};
use crate::plan::Plan;

/// Constants in the layout that the kernels read, shared by all runs. They start on a multiple of
/// [`ALIGN`].
pub struct Constants(Bytes);

enum Bytes {
    Owned(AlignedBytes),
    /// A part of a file, in memory once for all processes that map it.
    Mapped(Arc<Mmap>, Range<usize>),
}

impl From<AlignedBytes> for Constants {
    fn from(bytes: AlignedBytes) -> Constants {
        Constants(Bytes::Owned(bytes))
    }
}

impl Constants {
    /// Bytes of a mapped file; copied where they do not start on a multiple of [`ALIGN`].
    ///
    /// # Panics
    /// When the range does not lie in the file.
    pub fn mapped(map: Arc<Mmap>, range: Range<usize>) -> Constants {
        let bytes = &map[range.clone()];
        match bytes.as_ptr().addr() % ALIGN {
            0 => Constants(Bytes::Mapped(map, range)),
            _ => AlignedBytes::from_bytes(bytes).into(),
        }
    }

    /// A copy of `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Constants {
        AlignedBytes::from_bytes(bytes).into()
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.0 {
            Bytes::Owned(bytes) => bytes.bytes(),
            Bytes::Mapped(map, range) => &map[range.clone()],
        }
    }

    /// Their number.
    pub fn len(&self) -> usize {
        self.bytes().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether they are read where a file is mapped.
    pub fn is_mapped(&self) -> bool {
        matches!(self.0, Bytes::Mapped(..))
    }
}

/// A compiled model.
pub struct Artifact {
    /// Which kernel runs when, on which buffers.
    pub plan: Plan,
    /// The kernels.
    pub code: Code,
    /// What the kernels read besides inputs.
    pub constants: Constants,
}
