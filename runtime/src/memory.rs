//! Bytes that start on a cache line.

/// Alignment in bytes of arenas and constants: a cache line, and the widest vector register.
pub const ALIGN: usize = 64;

/// Owned bytes whose first one lies on a multiple of [`ALIGN`].
pub struct AlignedBytes {
    // Longer than asked for by ALIGN - 1; never grown, so that the heap block stays where it is.
    block: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBytes {
    /// `len` zeros; the pages of a large block cost nothing until they are touched.
    pub fn zeroed(len: usize) -> AlignedBytes {
        let block = vec![0u8; len.checked_add(ALIGN - 1).expect("a block fits in memory")];
        let start = block.as_ptr().addr().wrapping_neg() % ALIGN;
        AlignedBytes { block, start, len }
    }

    /// A copy of `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> AlignedBytes {
        let mut copy = AlignedBytes::zeroed(bytes.len());
        copy.bytes_mut().copy_from_slice(bytes);
        copy
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.block[self.start..self.start + self.len]
    }

    /// The bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.block[self.start..self.start + self.len]
    }

    /// Their number.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_is_aligned_and_keeps_its_bytes() {
        for len in [0, 1, 63, 64, 65, 4096, 1 << 20] {
            let bytes: Vec<u8> = (0..len).map(|i| i as u8).collect();
            let aligned = AlignedBytes::from_bytes(&bytes);
            assert_eq!(aligned.bytes().as_ptr().addr() % ALIGN, 0, "{len} bytes");
            assert_eq!(aligned.bytes(), bytes);
        }
    }
}
