//! Tensors in the files of NumPy: `.npy` holds one array, `.npz` is a zip archive of them.
//!
//! bfloat16 has no name there; it is written as two bytes without a type (`<V2`), which
//! `array.view(ml_dtypes.bfloat16)` turns back into numbers. Types of codes have no names either:
//! they are written as the bytes that they are in memory, and come back as such.

use std::io::{self, Write};

use miniz_oxide::inflate::decompress_to_vec_with_limit;

use crate::tensor::{DType, Tensor, TensorView, size_bytes};

const MAGIC: &[u8] = b"\x93NUMPY";

/// Type codes of NumPy, without the mark of the byte order.
const CODES: [(DType, &str); 14] = [
    (DType::F32, "f4"),
    (DType::F16, "f2"),
    (DType::BF16, "V2"),
    (DType::F64, "f8"),
    (DType::I8, "i1"),
    (DType::I16, "i2"),
    (DType::I32, "i4"),
    (DType::I64, "i8"),
    (DType::U8, "u1"),
    (DType::U16, "u2"),
    (DType::U32, "u4"),
    (DType::U64, "u8"),
    (DType::Bool, "b1"),
    (DType::TF32, "f4"),
];

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// Reads the bytes of a `.npy` file.
///
/// # Errors
/// When the bytes are damaged, or hold a type that Kiln does not have.
pub fn read_npy(file: &[u8]) -> io::Result<Tensor> {
    let short = || invalid("not a .npy file: it ends in the header");
    if !file.starts_with(MAGIC) {
        return Err(invalid("not a .npy file: it does not begin with \\x93NUMPY"));
    }
    let (length, start) = match *file.get(6).ok_or_else(short)? {
        1 => (le(file, 8, 2).ok_or_else(short)?, 10),
        2 | 3 => (le(file, 8, 4).ok_or_else(short)?, 12),
        version => return Err(invalid(format!("version {version} of .npy is unknown"))),
    };
    let end = start + length as usize;
    let header = file.get(start..end).ok_or_else(short)?;
    let header = std::str::from_utf8(header).map_err(|_| invalid("the .npy header is no text"))?;
    let descr = field(header, "descr")?.trim_matches(['\'', '"']);
    let fortran = field(header, "fortran_order")? == "True";
    let shape = parse_shape(field(header, "shape")?)?;
    let (order, code) = descr.split_at_checked(1).unwrap_or((descr, ""));
    let dtype = CODES.iter().find(|(_, known)| *known == code).map(|(dtype, _)| *dtype);
    let dtype = dtype.ok_or_else(|| invalid(format!("the element type `{descr}` is unknown")))?;
    let size = size_bytes(dtype, &shape)
        .ok_or_else(|| invalid(format!("the size of shape {shape:?} overflows")))?;
    let found = file.len() - end;
    let bytes = file.get(end..end + size).ok_or_else(|| {
        invalid(format!("{found} bytes of data, expected {size} for {dtype}{shape:?}"))
    })?;
    // Fortran order is the row-major order of the axes turned round.
    let mut bytes = if fortran && shape.len() > 1 {
        transposed(bytes, &shape, dtype.bytes())
    } else {
        bytes.to_vec()
    };
    if order == if cfg!(target_endian = "little") { ">" } else { "<" } {
        bytes.chunks_exact_mut(dtype.bytes()).for_each(<[u8]>::reverse);
    }
    if dtype == DType::Bool {
        bytes.iter_mut().for_each(|byte| *byte = u8::from(*byte != 0));
    }
    Tensor::from_bytes(dtype, &shape, &bytes).ok_or_else(short)
}

/// The text of a value in the header, which is a Python dictionary of three known keys.
fn field<'a>(header: &'a str, key: &str) -> io::Result<&'a str> {
    let missing = || invalid(format!("the .npy header has no readable `{key}`"));
    let quoted = [format!("'{key}'"), format!("\"{key}\"")];
    let at = quoted.iter().find_map(|q| header.find(q.as_str()).map(|at| at + q.len()));
    let value = header[at.ok_or_else(missing)?..].trim_start();
    let value = value.strip_prefix(':').ok_or_else(missing)?.trim_start();
    let end = match value.as_bytes().first().ok_or_else(missing)? {
        b'(' => value.find(')').map(|end| end + 1),
        quote @ (b'\'' | b'"') => value[1..].find(char::from(*quote)).map(|end| end + 2),
        _ => value.find([',', '}']),
    };
    Ok(value[..end.ok_or_else(missing)?].trim_end())
}

fn parse_shape(text: &str) -> io::Result<Vec<usize>> {
    let inner = text.trim_start_matches('(').trim_end_matches(')');
    let extents = inner.split(',').map(str::trim).filter(|extent| !extent.is_empty());
    extents
        .map(|extent| extent.parse().map_err(|_| invalid(format!("the shape `{text}` is wrong"))))
        .collect()
}

fn transposed(bytes: &[u8], shape: &[usize], width: usize) -> Vec<u8> {
    let mut result = Vec::with_capacity(bytes.len());
    let mut index = vec![0; shape.len()];
    for _ in 0..bytes.len() / width {
        let at = index.iter().zip(shape).rev().fold(0, |at, (i, extent)| at * extent + i);
        result.extend_from_slice(&bytes[at * width..(at + 1) * width]);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            if index[axis] < shape[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
    result
}

/// The header of a `.npy` file; the elements follow in native order.
fn npy_header(view: TensorView<'_>) -> Vec<u8> {
    let code =
        CODES.iter().find(|(dtype, _)| *dtype == view.dtype.stored()).map_or("", |(_, code)| code);
    let order = match view.dtype.bytes() {
        1 => '|',
        _ if cfg!(target_endian = "little") => '<',
        _ => '>',
    };
    let extents: String = view.shape.iter().map(|extent| format!("{extent}, ")).collect();
    let extents =
        if view.shape.len() > 1 { extents.trim_end_matches(", ") } else { extents.trim() };
    let mut text =
        format!("{{'descr': '{order}{code}', 'fortran_order': False, 'shape': ({extents}), }}");
    // The elements begin on a multiple of 64 bytes.
    let padding = (MAGIC.len() + 4 + text.len() + 1).wrapping_neg() % 64;
    text.extend(std::iter::repeat_n(' ', padding));
    text.push('\n');
    let length = u16::try_from(text.len()).expect("a header of a few hundred bytes");
    [MAGIC, &[1, 0], &length.to_le_bytes(), text.as_bytes()].concat()
}

/// Writes a `.npy` file.
///
/// # Errors
/// When `out` fails.
pub fn write_npy(out: &mut impl Write, view: TensorView<'_>) -> io::Result<()> {
    out.write_all(&npy_header(view))?;
    out.write_all(view.bytes)
}

/// Little-endian number of `count` bytes.
fn le(bytes: &[u8], at: usize, count: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(count)?)?;
    Some(bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
}

const LOCAL: u64 = 0x0403_4b50;
const CENTRAL: u64 = 0x0201_4b50;
const END: u64 = 0x0605_4b50;
const END64: u64 = 0x0606_4b50;
const END64_LOCATOR: u64 = 0x0706_4b50;
/// Stands for a number that is stored in 64 bits elsewhere.
const LARGE: u64 = 0xffff_ffff;
/// The 64-bit extra field.
const EXTRA64: u64 = 1;

/// Reads the bytes of a `.npz` file: arrays with their keys, in the order of the file.
///
/// # Errors
/// When the archive is damaged or encrypted, or one of its arrays cannot be read.
pub fn read_npz(file: &[u8]) -> io::Result<Vec<(String, Tensor)>> {
    let damaged = || invalid("not a .npz file: the zip archive is damaged");
    // The end record has a comment of up to 64 KiB behind it.
    let first = file.len().saturating_sub(22 + 0xffff);
    let end =
        (first..=file.len().saturating_sub(22)).rev().find(|&at| le(file, at, 4) == Some(END));
    let end = end.ok_or_else(damaged)?;
    let mut count = le(file, end + 10, 2).ok_or_else(damaged)?;
    let mut at = le(file, end + 16, 4).ok_or_else(damaged)?;
    let locator = end.checked_sub(20).filter(|&at| le(file, at, 4) == Some(END64_LOCATOR));
    if let Some(locator) = locator {
        let end64 = le(file, locator + 8, 8).ok_or_else(damaged)? as usize;
        if le(file, end64, 4) != Some(END64) {
            return Err(damaged());
        }
        count = le(file, end64.saturating_add(32), 8).ok_or_else(damaged)?;
        at = le(file, end64.saturating_add(48), 8).ok_or_else(damaged)?;
    }
    let mut arrays = Vec::new();
    let mut at = at as usize;
    for _ in 0..count {
        let entry = Entry::parse(file, at).ok_or_else(damaged)?;
        at = entry.next;
        let key = entry.name.strip_suffix(".npy").unwrap_or(&entry.name).to_string();
        let tensor = entry.contents(file).and_then(|bytes| read_npy(&bytes));
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{key}: {error}"));
        let tensor = tensor.map_err(named)?;
        arrays.push((key, tensor));
    }
    Ok(arrays)
}

/// One file of an archive, as the directory at its end describes it.
struct Entry {
    name: String,
    method: u64,
    encrypted: bool,
    crc: u32,
    packed: usize,
    size: usize,
    /// Where its local header lies.
    offset: usize,
    /// Where the next entry of the directory lies.
    next: usize,
}

impl Entry {
    fn parse(file: &[u8], at: usize) -> Option<Entry> {
        if le(file, at, 4)? != CENTRAL {
            return None;
        }
        let field = |offset, count| le(file, at + offset, count);
        let (name, extra, comment) =
            (field(28, 2)? as usize, field(30, 2)? as usize, field(32, 2)? as usize);
        let extras = at + 46 + name;
        let mut numbers = [field(24, 4)?, field(20, 4)?, field(42, 4)?];
        if let Some(mut large) = find_extra64(file.get(extras..extras + extra)?) {
            // Only those numbers that are too large for their place, in this order.
            for number in numbers.iter_mut().filter(|number| **number == LARGE) {
                *number = le(large, 0, 8)?;
                large = &large[8..];
            }
        }
        let [size, packed, offset] = numbers.map(|number| number as usize);
        Some(Entry {
            name: String::from_utf8_lossy(file.get(at + 46..extras)?).into_owned(),
            method: field(10, 2)?,
            encrypted: field(8, 2)? & 1 != 0,
            crc: field(16, 4)? as u32,
            packed,
            size,
            offset,
            next: extras + extra + comment,
        })
    }

    fn contents(&self, file: &[u8]) -> io::Result<Vec<u8>> {
        let bytes = (|| {
            if le(file, self.offset, 4)? != LOCAL {
                return None;
            }
            let name = le(file, self.offset + 26, 2)? as usize;
            let extra = le(file, self.offset + 28, 2)? as usize;
            let start = self.offset + 30 + name + extra;
            file.get(start..start.checked_add(self.packed)?)
        })();
        let bytes = bytes.ok_or_else(|| invalid("the zip archive is damaged"))?;
        if self.encrypted {
            return Err(invalid("the zip archive is encrypted"));
        }
        let bytes = match self.method {
            0 if self.packed == self.size => bytes.to_vec(),
            8 => inflate(bytes, self.size)?,
            method => return Err(invalid(format!("compression method {method} is unknown"))),
        };
        if crc32(&[&bytes]) != self.crc {
            return Err(invalid("the checksum of the zip archive does not match"));
        }
        Ok(bytes)
    }
}

/// Decompresses a stream whose result has `size` bytes; never asks for much more memory.
fn inflate(stream: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let bytes = decompress_to_vec_with_limit(stream, size);
    let bytes = bytes.map_err(|error| invalid(format!("damaged compressed data: {error}")))?;
    let is_whole = bytes.len() == size;
    is_whole.then_some(bytes).ok_or_else(|| invalid("fewer bytes than the archive says"))
}

/// The content of the extra field with 64-bit numbers.
fn find_extra64(mut extras: &[u8]) -> Option<&[u8]> {
    while let (Some(id), Some(size)) = (le(extras, 0, 2), le(extras, 2, 2)) {
        let end = 4 + size as usize;
        let content = extras.get(4..end)?;
        if id == EXTRA64 {
            return Some(content);
        }
        extras = &extras[end..];
    }
    None
}

/// Writes a `.npz` file: not compressed, equal bytes for equal arrays.
///
/// # Errors
/// When `out` fails, or a key is longer than 65,000 bytes.
pub fn write_npz(out: &mut impl Write, arrays: &[(&str, TensorView<'_>)]) -> io::Result<()> {
    let mut offset = 0u64;
    let mut directory = Vec::new();
    for (key, view) in arrays {
        if key.len() > 65_000 {
            return Err(invalid("a key of a .npz file has at most 65,000 bytes"));
        }
        let (name, header) = (format!("{key}.npy"), npy_header(*view));
        let size = (header.len() + view.bytes.len()) as u64;
        let crc = crc32(&[&header, view.bytes]);
        // Version, flags (names are UTF-8), method (stored), time, date (1980-01-01): the same
        // in both headers, as are the numbers after them, which always are in the extra field.
        let mut common = words(&[(45, 2), (1 << 11, 2), (0, 2), (0, 2), (0x21, 2)]);
        common.extend(words(&[(u64::from(crc), 4), (LARGE, 4), (LARGE, 4)]));
        common.extend(words(&[(name.len() as u64, 2)]));
        let mut local = words(&[(LOCAL, 4)]);
        local.extend(&common);
        local.extend(words(&[(20, 2)]));
        local.extend(name.as_bytes());
        local.extend(words(&[(EXTRA64, 2), (16, 2), (size, 8), (size, 8)]));
        directory.extend(words(&[(CENTRAL, 4), (45, 2)]));
        directory.extend(&common);
        // Lengths of extra field and comment, disk, attributes, offset.
        directory.extend(words(&[(28, 2), (0, 2), (0, 2), (0, 2), (0, 4), (LARGE, 4)]));
        directory.extend(name.as_bytes());
        directory.extend(words(&[(EXTRA64, 2), (24, 2), (size, 8), (size, 8), (offset, 8)]));
        out.write_all(&local)?;
        out.write_all(&header)?;
        out.write_all(view.bytes)?;
        offset += local.len() as u64 + size;
    }
    let (count, size) = (arrays.len() as u64, directory.len() as u64);
    out.write_all(&directory)?;
    out.write_all(&words(&[(END64, 4), (44, 8), (45, 2), (45, 2), (0, 4), (0, 4), (count, 8)]))?;
    out.write_all(&words(&[(count, 8), (size, 8), (offset, 8)]))?;
    out.write_all(&words(&[(END64_LOCATOR, 4), (0, 4), (offset + size, 8), (1, 4)]))?;
    let short = count.min(0xffff);
    out.write_all(&words(&[(END, 4), (0, 2), (0, 2), (short, 2), (short, 2)]))?;
    out.write_all(&words(&[(size.min(LARGE), 4), (LARGE, 4), (0, 2)]))
}

/// Little-endian numbers, each with its width in bytes.
fn words(numbers: &[(u64, usize)]) -> Vec<u8> {
    numbers.iter().flat_map(|(number, width)| number.to_le_bytes()[..*width].to_vec()).collect()
}

/// The checksum of zip archives over all parts.
fn crc32(parts: &[&[u8]]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0;
        while index < 256 {
            let (mut value, mut bit) = (index as u32, 0);
            while bit < 8 {
                value = (value >> 1) ^ (0xedb8_8320 * (value & 1));
                bit += 1;
            }
            table[index] = value;
            index += 1;
        }
        table
    };
    let step = |crc: u32, byte: &u8| (crc >> 8) ^ TABLE[usize::from(crc as u8 ^ byte)];
    !parts.iter().flat_map(|part| part.iter()).fold(!0, step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DTYPES;

    fn tensors() -> Vec<(String, Tensor)> {
        let shapes: [&[usize]; 4] = [&[], &[5], &[2, 3], &[0, 4]];
        let name = |dtype: DType, shape: &[usize]| format!("{dtype}/{}", shape.len());
        let fill = |dtype: DType, shape: &[usize]| {
            let mut tensor = Tensor::zeros(dtype, shape);
            let limit = if dtype == DType::Bool { 2 } else { 251 };
            let bytes = tensor.bytes_mut().iter_mut().enumerate();
            bytes.for_each(|(at, byte)| *byte = (at * 7 % limit) as u8);
            tensor
        };
        let of = |dtype| shapes.map(|shape| (name(dtype, shape), fill(dtype, shape)));
        DTYPES.into_iter().flat_map(of).collect()
    }

    fn archive(tensors: &[(String, Tensor)]) -> Vec<u8> {
        let views: Vec<_> = tensors.iter().map(|(key, t)| (key.as_str(), t.view())).collect();
        let mut file = Vec::new();
        write_npz(&mut file, &views).expect("memory does not fail");
        file
    }

    #[test]
    fn archives_come_back_as_they_were() {
        let file = archive(&tensors());
        let back = read_npz(&file).expect("a sound archive");
        assert_eq!(back.len(), tensors().len());
        for ((key, tensor), (old_key, old)) in back.iter().zip(tensors()) {
            assert_eq!(*key, old_key);
            assert!(tensor.bytes() == old.bytes() && tensor.shape() == old.shape(), "{key}");
            assert_eq!(tensor.dtype(), old.dtype().stored().storage(), "{key}");
        }
    }

    #[test]
    fn damage_is_an_error_and_never_a_panic() {
        let file = archive(&tensors()[..3]);
        for at in 0..file.len() {
            assert!(read_npz(&file[..at]).is_err());
            for bit in 0..8 {
                let mut wrong = file.clone();
                wrong[at] ^= 1 << bit;
                let _ = read_npz(&wrong);
                let _ = read_npy(&wrong[48..]);
            }
        }
    }

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
    fn compressed_streams_have_the_size_that_the_archive_says() {
        for (stream, text) in
            [(FIXED, b"kiln kiln kiln kiln, fire!".to_vec()), (DYNAMIC, letters())]
        {
            assert_eq!(inflate(stream, text.len()).expect("a sound stream"), text);
            assert!(inflate(stream, text.len() - 1).is_err());
            assert!(inflate(stream, text.len() + 1).is_err());
            for at in 0..stream.len() {
                assert!(inflate(&stream[..at], text.len()).is_err());
                for bit in 0..8 {
                    let mut wrong = stream.to_vec();
                    wrong[at] ^= 1 << bit;
                    let _ = inflate(&wrong, text.len());
                }
            }
        }
        // A thousand times as large as the stream, which is stopped early.
        let zeros = miniz_oxide::deflate::compress_to_vec(&vec![0; 1 << 24], 6);
        let error = inflate(&zeros, 1 << 10).expect_err("too many bytes").to_string();
        assert!(error.contains("damaged compressed data"), "{error}");
    }

    #[test]
    fn other_orders_are_turned_round() {
        let header = "{'descr': '>i2', 'fortran_order': True, 'shape': (2, 3), }\n";
        let length = (header.len() as u16).to_le_bytes();
        let mut file = [MAGIC, &[1, 0], &length, header.as_bytes()].concat();
        // Column by column: 1 4, 2 5, 3 6.
        file.extend([1i16, 4, 2, 5, 3, 6].iter().flat_map(|value| value.to_be_bytes()));
        let tensor = read_npy(&file).expect("a sound file");
        assert_eq!(tensor.shape(), [2, 3]);
        assert_eq!(tensor.as_slice::<i16>(), Some(&[1, 2, 3, 4, 5, 6][..]));
        file.pop();
        let text = read_npy(&file).expect_err("an error").to_string();
        assert_eq!(text, "11 bytes of data, expected 12 for i16[2, 3]");
    }

    #[test]
    fn the_header_is_the_one_of_numpy() {
        let mut file = Vec::new();
        let tensor = Tensor::from_slice(&[3], &[1.0f32, 2.0, 3.0]);
        write_npy(&mut file, tensor.view()).expect("memory does not fail");
        let text = "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }";
        assert_eq!(std::str::from_utf8(&file[10..128]).expect("text").trim_end(), text);
        assert_eq!(file.len(), 128 + 12);
        assert_eq!(crc32(&[b"1234", b"56789"]), 0xcbf4_3926);
    }
}
