//! Tensors of a model: inside the file, or beside it beneath the model's folder.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use kiln_runtime::tensor::{DType, Small, size_bytes};
use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::proto::TensorProto;
use crate::error::Diagnostic;
use crate::graph::Constant;
use crate::graph::op::{Shape, Type};

/// The dtype of that number in `TensorProto.DataType`.
pub fn dtype_of(number: i32) -> Result<DType, Diagnostic> {
    Ok(match number {
        1 => DType::F32,
        2 => DType::U8,
        3 => DType::I8,
        4 => DType::U16,
        5 => DType::I16,
        6 => DType::I32,
        7 => DType::I64,
        9 => DType::Bool,
        10 => DType::F16,
        11 => DType::F64,
        12 => DType::U32,
        13 => DType::U64,
        16 => DType::BF16,
        17 => DType::Small(Small::F8E4M3FN),
        18 => DType::Small(Small::F8E4M3FNUZ),
        19 => DType::Small(Small::F8E5M2),
        20 => DType::Small(Small::F8E5M2FNUZ),
        21 => DType::Small(Small::U4),
        22 => DType::Small(Small::I4),
        23 => DType::Small(Small::F4E2M1),
        24 => DType::Small(Small::F8E8M0),
        25 => DType::Small(Small::U2),
        26 => DType::Small(Small::I2),
        other => {
            return Err(Diagnostic::new("K0110", "an element type that is not supported")
                .found(format!("TensorProto.DataType {other}"))
                .help("strings and complex numbers are not supported"));
        }
    })
}

/// The number of an element type; the inverse of [`dtype_of`].
pub fn number_of(dtype: DType) -> i32 {
    let found = (1..=26).find(|&number| dtype_of(number) == Ok(dtype));
    found.expect("every type of a model has a number")
}

/// Files beside the model, opened once.
pub struct Files {
    folder: Option<PathBuf>,
    open: HashMap<String, Bytes>,
}

impl Files {
    /// Files beneath a folder; none where there is no folder.
    pub fn new(folder: Option<&Path>) -> Files {
        Files { folder: folder.map(Path::to_path_buf), open: HashMap::new() }
    }

    /// The constant that a tensor message is.
    pub fn constant(&mut self, tensor: &TensorProto) -> Result<Constant, Diagnostic> {
        let dtype = dtype_of(tensor.data_type.unwrap_or(0))?;
        let mut shape = Shape::new();
        for &dim in &tensor.dims {
            let extent = usize::try_from(dim).map_err(|_| {
                Diagnostic::new("K0111", "a negative extent").found(format!("{:?}", tensor.dims))
            })?;
            shape.push(extent);
        }
        let size = size_bytes(dtype, &shape).ok_or_else(|| {
            Diagnostic::new("K0111", "a tensor too large for memory").found(format!("{shape:?}"))
        })?;
        let packed = match dtype {
            DType::Small(small) => size.div_ceil(8 / small.bits()),
            _ => size,
        };
        let bytes = match (&tensor.raw_data, tensor.data_location) {
            (_, Some(1)) => self.external(tensor, packed)?,
            (Some(raw), _) if !raw.is_empty() || size == 0 => raw.clone(),
            _ => typed_data(tensor, dtype),
        };
        if bytes.len() != packed {
            return Err(Diagnostic::new("K0111", "a tensor with the wrong number of bytes")
                .expected(format!("{packed} for {dtype}{:?}", shape.as_slice()))
                .found(bytes.len().to_string()));
        }
        let bytes = match dtype {
            DType::Small(small) if packed < size => unpacked(&bytes, small, size),
            _ => bytes,
        };
        Ok(Constant { ty: Type::of(dtype, shape), bytes })
    }

    fn external(&mut self, tensor: &TensorProto, size: usize) -> Result<Bytes, Diagnostic> {
        let fail = |what: &str| Diagnostic::new("K0112", format!("external data: {what}"));
        let mut location = None;
        let (mut offset, mut length) = (0usize, size);
        for entry in &tensor.external_data {
            let value = entry.value.as_deref().unwrap_or("");
            let number = || {
                value.parse::<usize>().map_err(|_| {
                    fail("an offset or length that is no number").found(value.to_string())
                })
            };
            match entry.key.as_deref() {
                Some("location") => location = Some(value.to_string()),
                Some("offset") => offset = number()?,
                Some("length") => length = number()?,
                _ => {}
            }
        }
        let location = location.ok_or_else(|| fail("no location"))?;
        let file = self.file(&location)?;
        let end = offset.checked_add(length).filter(|&end| end <= file.len() && length == size);
        let end = end.ok_or_else(|| {
            fail("a range outside of the file")
                .expected(format!("{size} bytes within {}", file.len()))
                .found(format!("{length} bytes at {offset} of {location}"))
        })?;
        Ok(file.slice(offset..end))
    }

    /// A file beneath the model's folder: no absolute path, no way up, no link.
    fn file(&mut self, location: &str) -> Result<Bytes, Diagnostic> {
        if let Some(bytes) = self.open.get(location) {
            return Ok(bytes.clone());
        }
        let fail = |what: String| {
            Diagnostic::new("K0112", format!("external data: {what}"))
                .found(location.to_string())
                .help("the file must lie in the model's folder and not be a link")
        };
        let folder =
            self.folder.as_deref().ok_or_else(|| fail("the model has no folder".into()))?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let at = File::open(folder).map_err(|e| fail(e.to_string()))?;
        let opened = rustix::fs::openat2(&at, location, flags, Mode::empty(), beneath)
            .map_err(|e| fail(e.to_string()))?;
        let file = File::from(opened);
        let regular = file.metadata().is_ok_and(|m| m.is_file());
        if !regular {
            return Err(fail("not a regular file".into()));
        }
        // SAFETY: the map is read only; a file that shrinks under a running compiler is outside
        // of what any reader of it can guard against.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| fail(e.to_string()))?;
        let bytes = Bytes::from_owner(map);
        self.open.insert(location.to_string(), bytes.clone());
        Ok(bytes)
    }
}

/// A byte for each of so many codes, of which several lie in a byte, the first one lowest.
fn unpacked(bytes: &[u8], small: Small, count: usize) -> Bytes {
    let bits = small.bits();
    let code = |n: usize| {
        let up = bytes[n * bits / 8] << (8 - bits - n * bits % 8);
        // The code is in the upper bits now, so that a sign spreads as it comes down.
        if small.is_signed() { (up as i8 >> (8 - bits)) as u8 } else { up >> (8 - bits) }
    };
    (0..count).map(code).collect()
}

/// The elements of the typed fields as bytes; too few or many where the message is wrong.
fn typed_data(tensor: &TensorProto, dtype: DType) -> Bytes {
    let from_i32 = |width: usize| -> Vec<u8> {
        tensor.int32_data.iter().flat_map(|v| v.to_le_bytes()[..width].to_vec()).collect()
    };
    let bytes: Vec<u8> = match dtype {
        DType::F32 | DType::TF32 => {
            tensor.float_data.iter().flat_map(|v| v.to_ne_bytes()).collect()
        }
        DType::F64 => tensor.double_data.iter().flat_map(|v| v.to_ne_bytes()).collect(),
        DType::I64 => tensor.int64_data.iter().flat_map(|v| v.to_ne_bytes()).collect(),
        DType::U64 => tensor.uint64_data.iter().flat_map(|v| v.to_ne_bytes()).collect(),
        DType::U32 => tensor.uint64_data.iter().flat_map(|v| (*v as u32).to_ne_bytes()).collect(),
        DType::I32 => from_i32(4),
        DType::F16 | DType::BF16 | DType::I16 | DType::U16 => from_i32(2),
        DType::I8 | DType::U8 | DType::Bool | DType::Small(_) => from_i32(1),
    };
    Bytes::from(bytes)
}
