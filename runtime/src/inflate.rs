//! Decompression of deflate streams (RFC 1951), which `numpy.savez_compressed` writes.

use std::io;

/// Base length and number of extra bits of the symbols 257 to 285.
#[rustfmt::skip]
const LENGTHS: [(u16, u8); 29] = [
    (3, 0), (4, 0), (5, 0), (6, 0), (7, 0), (8, 0), (9, 0), (10, 0), (11, 1), (13, 1), (15, 1),
    (17, 1), (19, 2), (23, 2), (27, 2), (31, 2), (35, 3), (43, 3), (51, 3), (59, 3), (67, 4),
    (83, 4), (99, 4), (115, 4), (131, 5), (163, 5), (195, 5), (227, 5), (258, 0),
];

/// Base distance and number of extra bits of the distance symbols.
#[rustfmt::skip]
const DISTANCES: [(u16, u8); 30] = [
    (1, 0), (2, 0), (3, 0), (4, 0), (5, 1), (7, 1), (9, 2), (13, 2), (17, 3), (25, 3), (33, 4),
    (49, 4), (65, 5), (97, 5), (129, 6), (193, 6), (257, 7), (385, 7), (513, 8), (769, 8),
    (1025, 9), (1537, 9), (2049, 10), (3073, 10), (4097, 11), (6145, 11), (8193, 12),
    (12289, 12), (16385, 13), (24577, 13),
];

/// The order in which lengths of the code for code lengths are stored.
const CODE_ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

/// A code is at most this long.
const MAX_BITS: usize = 15;

/// Decompresses a stream whose result has `size` bytes.
///
/// # Errors
/// When the stream is damaged, or its result has another size.
pub fn inflate(stream: &[u8], size: usize) -> io::Result<Vec<u8>> {
    // No stream grows by more than 1032 times, so a false size cannot ask for more memory.
    let mut out = Vec::with_capacity(size.min(stream.len().saturating_mul(1032)));
    let mut bits = Bits { stream, at: 0, buffer: 0, count: 0 };
    loop {
        let last = bits.take(1)? == 1;
        match bits.take(2)? {
            0 => stored(&mut bits, &mut out, size)?,
            1 => {
                let (literals, distances) = fixed_codes()?;
                block(&mut bits, &mut out, size, &literals, &distances)?;
            }
            2 => {
                let (literals, distances) = dynamic_codes(&mut bits)?;
                block(&mut bits, &mut out, size, &literals, &distances)?;
            }
            _ => return Err(damaged("an unknown kind of block")),
        }
        if last {
            break;
        }
    }
    if out.len() == size { Ok(out) } else { Err(damaged("fewer bytes than the archive says")) }
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("damaged compressed data: {what}"))
}

struct Bits<'a> {
    stream: &'a [u8],
    at: usize,
    buffer: u64,
    count: usize,
}

impl Bits<'_> {
    /// Fills the buffer; at the end of the stream zeros follow, which `drop` does not let pass.
    fn fill(&mut self) {
        while self.count <= 56 && self.at < self.stream.len() {
            self.buffer |= u64::from(self.stream[self.at]) << self.count;
            self.at += 1;
            self.count += 8;
        }
    }

    fn drop(&mut self, count: usize) -> io::Result<()> {
        if count > self.count {
            return Err(damaged("it ends too early"));
        }
        self.buffer >>= count;
        self.count -= count;
        Ok(())
    }

    fn take(&mut self, count: usize) -> io::Result<usize> {
        self.fill();
        let value = self.buffer & ((1 << count) - 1);
        self.drop(count)?;
        Ok(value as usize)
    }

    fn symbol(&mut self, code: &Code) -> io::Result<usize> {
        self.fill();
        let entry = code.0[(self.buffer & ((1 << MAX_BITS) - 1)) as usize];
        if entry == 0 {
            return Err(damaged("an unknown code"));
        }
        self.drop(usize::from(entry & 15))?;
        Ok(usize::from(entry >> 4))
    }
}

/// For all values of the next [`MAX_BITS`] bits: the symbol times 16, plus its length in bits.
struct Code(Vec<u16>);

impl Code {
    fn new(lengths: &[u8]) -> io::Result<Code> {
        let mut table = vec![0u16; 1 << MAX_BITS];
        let mut next = 0usize;
        for length in 1..=MAX_BITS {
            for (symbol, _) in
                lengths.iter().enumerate().filter(|(_, l)| usize::from(**l) == length)
            {
                if next >> length != 0 {
                    return Err(damaged("more codes than there is room for"));
                }
                let reversed = next.reverse_bits() >> (usize::BITS as usize - length);
                let entry = (symbol as u16) << 4 | length as u16;
                table[reversed..].iter_mut().step_by(1 << length).for_each(|at| *at = entry);
                next += 1;
            }
            next <<= 1;
        }
        Ok(Code(table))
    }
}

fn fixed_codes() -> io::Result<(Code, Code)> {
    let lengths: Vec<u8> = (0..288u16)
        .map(|symbol| match symbol {
            0..=143 => 8,
            144..=255 => 9,
            256..=279 => 7,
            280.. => 8,
        })
        .collect();
    Ok((Code::new(&lengths)?, Code::new(&[5; 30])?))
}

fn dynamic_codes(bits: &mut Bits<'_>) -> io::Result<(Code, Code)> {
    let n_literals = bits.take(5)? + 257;
    let n_distances = bits.take(5)? + 1;
    let n_codes = bits.take(4)? + 4;
    let mut code_lengths = [0u8; 19];
    for &symbol in &CODE_ORDER[..n_codes] {
        code_lengths[symbol] = bits.take(3)? as u8;
    }
    let code = Code::new(&code_lengths)?;
    let total = n_literals + n_distances;
    let mut lengths: Vec<u8> = Vec::with_capacity(total);
    while lengths.len() < total {
        let (length, repeat) = match bits.symbol(&code)? {
            16 => {
                let last = *lengths.last().ok_or_else(|| damaged("nothing to repeat"))?;
                (last, 3 + bits.take(2)?)
            }
            17 => (0, 3 + bits.take(3)?),
            18 => (0, 11 + bits.take(7)?),
            length => (length as u8, 1),
        };
        lengths.extend(std::iter::repeat_n(length, repeat));
    }
    if lengths.len() > total {
        return Err(damaged("more lengths than codes"));
    }
    Ok((Code::new(&lengths[..n_literals])?, Code::new(&lengths[n_literals..])?))
}

fn stored(bits: &mut Bits<'_>, out: &mut Vec<u8>, size: usize) -> io::Result<()> {
    bits.drop(bits.count % 8)?;
    let (length, inverse) = (bits.take(16)?, bits.take(16)?);
    if length ^ inverse != 0xffff {
        return Err(damaged("a length that contradicts itself"));
    }
    // Whole bytes that were read ahead are given back.
    let from = bits.at - bits.count / 8;
    (bits.buffer, bits.count) = (0, 0);
    let bytes = bits.stream.get(from..from + length);
    let bytes = bytes.ok_or_else(|| damaged("it ends too early"))?;
    bits.at = from + length;
    if out.len() + length > size {
        return Err(damaged("more bytes than the archive says"));
    }
    out.extend_from_slice(bytes);
    Ok(())
}

fn block(
    bits: &mut Bits<'_>,
    out: &mut Vec<u8>,
    size: usize,
    literals: &Code,
    distances: &Code,
) -> io::Result<()> {
    loop {
        let symbol = bits.symbol(literals)?;
        if symbol == 256 {
            return Ok(());
        }
        if symbol < 256 {
            if out.len() >= size {
                return Err(damaged("more bytes than the archive says"));
            }
            out.push(symbol as u8);
            continue;
        }
        let (base, extra) =
            *LENGTHS.get(symbol - 257).ok_or_else(|| damaged("an unknown length"))?;
        let length = usize::from(base) + bits.take(usize::from(extra))?;
        let (base, extra) = *DISTANCES
            .get(bits.symbol(distances)?)
            .ok_or_else(|| damaged("an unknown distance"))?;
        let distance = usize::from(base) + bits.take(usize::from(extra))?;
        if distance > out.len() {
            return Err(damaged("a distance before the start"));
        }
        if out.len() + length > size {
            return Err(damaged("more bytes than the archive says"));
        }
        // Byte by byte: the copy may read what it has just written.
        let from = out.len() - distance;
        for at in from..from + length {
            out.push(out[at]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `zlib` makes of the first text below: a block of fixed codes.
    #[rustfmt::skip]
    const FIXED: &[u8] = &[
        0xcb, 0xce, 0xcc, 0xc9, 0x53, 0xc8, 0x46, 0x21, 0x74, 0x14, 0xd2, 0x32, 0x8b, 0x52,
        0x15, 0x01,
    ];
    /// What `zlib` makes of 300 bytes of [`letters`]: a block with codes of its own.
    #[rustfmt::skip]
    const DYNAMIC: &[u8] = &[
        0x55, 0x4f, 0x09, 0x12, 0x00, 0x21, 0x08, 0x7a, 0x2b, 0xf0, 0xff, 0x3f, 0xac, 0x84,
        0xc7, 0x6c, 0x93, 0x69, 0x84, 0x60, 0x20, 0x00, 0x55, 0x80, 0xef, 0xf4, 0x12, 0x93,
        0x6a, 0xab, 0xe0, 0x77, 0xad, 0x0a, 0x4c, 0x32, 0x8f, 0x85, 0x57, 0x84, 0xe8, 0x1c,
        0x70, 0xa4, 0x1e, 0xb5, 0x11, 0x8c, 0x5a, 0x14, 0xd8, 0xaf, 0x11, 0x2a, 0x7d, 0x0b,
        0xc1, 0x26, 0x5a, 0x66, 0x8f, 0xf3, 0x53, 0x4f, 0xeb, 0x5a, 0x68, 0xa7, 0x25, 0xb6,
        0x1c, 0x20, 0x16, 0xeb, 0x2d, 0x1e, 0x30, 0x7d, 0x19, 0xc1, 0xae, 0xf6, 0x11, 0x75,
        0x4d, 0xfd, 0xc5, 0x53, 0x65, 0x7f, 0xe5, 0x03,
    ];

    fn letters() -> Vec<u8> {
        let mut x = 1u64;
        let mut next = || {
            x = (x * 1_103_515_245 + 12345) & 0x7fff_ffff;
            97 + ((x >> 16) % 3 * ((x >> 20) % 2)) as u8
        };
        (0..300).map(|_| next()).collect()
    }

    #[test]
    fn streams_of_zlib() {
        assert_eq!(inflate(FIXED, 26).expect("a sound stream"), b"kiln kiln kiln kiln, fire!");
        assert_eq!(inflate(DYNAMIC, 300).expect("a sound stream"), letters());
    }

    #[test]
    fn damaged_streams_are_errors_or_other_bytes_but_never_panic() {
        for stream in [FIXED, DYNAMIC] {
            for at in 0..stream.len() {
                assert!(inflate(&stream[..at], 300).is_err());
                for bit in 0..8 {
                    let mut wrong = stream.to_vec();
                    wrong[at] ^= 1 << bit;
                    let _ = inflate(&wrong, 300);
                }
            }
        }
    }

    #[test]
    fn a_stored_stream() {
        let stream = [&[1, 3, 0, 0xfc, 0xff][..], b"abc"].concat();
        assert_eq!(inflate(&stream, 3).expect("a sound stream"), b"abc");
        assert!(inflate(&stream, 2).is_err());
        assert!(inflate(&stream, 4).is_err());
        assert!(inflate(&stream[..7], 3).is_err());
    }
}
