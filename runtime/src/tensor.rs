//! Tensors that cross the border of a compiled model: a dtype, a shape and row-major bytes.
//!
//! ```
//! use kiln_runtime::tensor::Tensor;
//! let t = Tensor::from_slice(&[2, 2], &[1.0f32, 2.0, 3.0, 4.0]);
//! assert_eq!(t.as_slice::<f32>().unwrap()[3], 4.0);
//! ```

use serde::{Deserialize, Serialize};
use std::fmt;

/// Element type of a tensor.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    BF16,
    /// IEEE 754 binary64.
    F64,
    /// Signed 8-bit integer.
    I8,
    /// Signed 16-bit integer.
    I16,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned 8-bit integer.
    U8,
    /// Unsigned 16-bit integer.
    U16,
    /// Unsigned 32-bit integer.
    U32,
    /// Unsigned 64-bit integer.
    U64,
    /// One byte, 0 or 1.
    Bool,
    /// A code that stands for a number: moved and converted, never computed with.
    Small(Small),
    /// A binary32 whose mantissa has 10 bits, the others are 0. Only inside of models.
    TF32,
}

/// Element types of which files and formats keep codes of 8 bits or fewer. In memory each code has
/// a byte of its own: those of integers are the integers, those of fractions are their bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum Small {
    /// 4 bits of exponent, 3 of mantissa; no infinities.
    F8E4M3FN,
    /// The same with one zero, whose negative is the only NaN.
    F8E4M3FNUZ,
    /// 5 bits of exponent, 2 of mantissa, as IEEE 754 would have it.
    F8E5M2,
    /// The same with one zero, whose negative is the only NaN; no infinities.
    F8E5M2FNUZ,
    /// A power of two, or NaN.
    F8E8M0,
    /// 2 bits of exponent, 1 of mantissa; all are numbers.
    F4E2M1,
    /// Signed 4-bit integer.
    I4,
    /// Unsigned 4-bit integer.
    U4,
    /// Signed 2-bit integer.
    I2,
    /// Unsigned 2-bit integer.
    U2,
}

/// Every small type with its name in text, in the order of the enum.
pub const SMALL: [(Small, &str); 10] = [
    (Small::F8E4M3FN, "f8e4m3fn"),
    (Small::F8E4M3FNUZ, "f8e4m3fnuz"),
    (Small::F8E5M2, "f8e5m2"),
    (Small::F8E5M2FNUZ, "f8e5m2fnuz"),
    (Small::F8E8M0, "f8e8m0"),
    (Small::F4E2M1, "f4e2m1"),
    (Small::I4, "i4"),
    (Small::U4, "u4"),
    (Small::I2, "i2"),
    (Small::U2, "u2"),
];

/// Every dtype, in the order of the enum.
pub const DTYPES: [DType; 24] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::F64,
    DType::I8,
    DType::I16,
    DType::I32,
    DType::I64,
    DType::U8,
    DType::U16,
    DType::U32,
    DType::U64,
    DType::Bool,
    DType::Small(SMALL[0].0),
    DType::Small(SMALL[1].0),
    DType::Small(SMALL[2].0),
    DType::Small(SMALL[3].0),
    DType::Small(SMALL[4].0),
    DType::Small(SMALL[5].0),
    DType::Small(SMALL[6].0),
    DType::Small(SMALL[7].0),
    DType::Small(SMALL[8].0),
    DType::Small(SMALL[9].0),
    DType::TF32,
];

impl Small {
    /// Bits of a code: several lie in a byte of a file where they are fewer than 8.
    pub fn bits(self) -> usize {
        match self {
            Small::F8E4M3FN | Small::F8E4M3FNUZ | Small::F8E5M2 | Small::F8E5M2FNUZ => 8,
            Small::F8E8M0 => 8,
            Small::F4E2M1 | Small::I4 | Small::U4 => 4,
            Small::I2 | Small::U2 => 2,
        }
    }

    /// Whether the codes are integers below zero as well.
    pub fn is_signed(self) -> bool {
        matches!(self, Small::I4 | Small::I2)
    }

    /// The least and the greatest number where the codes are integers.
    pub fn int_range(self) -> Option<(i8, i8)> {
        match self {
            Small::I4 => Some((-8, 7)),
            Small::U4 => Some((0, 15)),
            Small::I2 => Some((-2, 1)),
            Small::U2 => Some((0, 3)),
            Small::F8E4M3FN | Small::F8E4M3FNUZ | Small::F8E5M2 | Small::F8E5M2FNUZ => None,
            Small::F8E8M0 | Small::F4E2M1 => None,
        }
    }
}

impl DType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            DType::I8 | DType::U8 | DType::Bool | DType::Small(_) => 1,
            DType::F16 | DType::BF16 | DType::I16 | DType::U16 => 2,
            DType::F32 | DType::TF32 | DType::I32 | DType::U32 => 4,
            DType::F64 | DType::I64 | DType::U64 => 8,
        }
    }

    /// Bits of one element in files, where several codes may share a byte.
    pub fn bits(self) -> usize {
        match self {
            DType::Small(small) => small.bits(),
            other => 8 * other.bytes(),
        }
    }

    /// The dtype that code knows for it: bytes, for one of codes.
    pub fn stored(self) -> DType {
        match self {
            DType::Small(small) if small.is_signed() => DType::I8,
            DType::Small(_) => DType::U8,
            other => other,
        }
    }

    /// Whether the type has a fraction and is computed with.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F64) || self.is_rounded()
    }

    /// Whether its numbers are those of f32 that have fewer bits, and are computed with as f32.
    pub fn is_rounded(self) -> bool {
        matches!(self, DType::F16 | DType::BF16 | DType::TF32)
    }

    /// What has the same bytes and is known outside of models.
    pub fn storage(self) -> DType {
        if self == DType::TF32 { DType::F32 } else { self }
    }

    /// Whether the type is an integer below zero as well.
    pub fn is_signed(self) -> bool {
        matches!(self, DType::I8 | DType::I16 | DType::I32 | DType::I64)
    }

    /// The name used in every text form, such as `f32`.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::F64 => "f64",
            DType::I8 => "i8",
            DType::I16 => "i16",
            DType::I32 => "i32",
            DType::I64 => "i64",
            DType::U8 => "u8",
            DType::U16 => "u16",
            DType::U32 => "u32",
            DType::U64 => "u64",
            DType::Bool => "bool",
            DType::Small(small) => SMALL.iter().find(|s| s.0 == small).map_or("", |s| s.1),
            DType::TF32 => "tf32",
        }
    }

    /// The dtype of that [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<DType> {
        DTYPES.into_iter().find(|d| d.name() == name)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A Rust type that is the storage of a dtype.
pub trait Element: bytemuck::Pod {
    /// The dtype.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($rust:ty => $dtype:ident),*) => {
        $(impl Element for $rust { const DTYPE: DType = DType::$dtype; })*
    };
}
elements!(f32 => F32, f64 => F64, half::f16 => F16, half::bf16 => BF16, i8 => I8, i16 => I16,
    i32 => I32, i64 => I64, u8 => U8, u16 => U16, u32 => U32, u64 => U64);

/// Number of elements of a shape, or `None` where the product overflows.
pub fn numel(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent))
}

/// Bytes of a tensor of that type, or `None` where the product overflows, be it only that of the
/// extents other than 0: so every product of some of the extents fits as well.
pub fn size_bytes(dtype: DType, shape: &[usize]) -> Option<usize> {
    let most = shape.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent.max(1)));
    most?.checked_mul(dtype.bytes()).filter(|&n| n <= isize::MAX as usize)?;
    numel(shape)?.checked_mul(dtype.bytes()).filter(|&n| n <= isize::MAX as usize)
}

/// An owned, row-major tensor.
#[derive(Clone, PartialEq)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    // Words, so that every element type is aligned.
    words: Vec<u64>,
    len_bytes: usize,
}

impl Tensor {
    /// A tensor of zeros. Panics where the size overflows: sizes are checked at the border.
    pub fn zeros(dtype: DType, shape: &[usize]) -> Tensor {
        let len_bytes = size_bytes(dtype, shape).expect("size of a tensor fits in memory");
        let words = vec![0u64; len_bytes.div_ceil(8)];
        Tensor { dtype, shape: shape.to_vec(), words, len_bytes }
    }

    /// A tensor with a copy of `bytes`, or `None` where their number does not fit the type.
    pub fn from_bytes(dtype: DType, shape: &[usize], bytes: &[u8]) -> Option<Tensor> {
        (size_bytes(dtype, shape)? == bytes.len()).then(|| {
            let mut tensor = Tensor::zeros(dtype, shape);
            tensor.bytes_mut().copy_from_slice(bytes);
            tensor
        })
    }

    /// A tensor with a copy of `values`. Panics where their number is not that of the shape.
    pub fn from_slice<T: Element>(shape: &[usize], values: &[T]) -> Tensor {
        Tensor::from_bytes(T::DTYPE, shape, bytemuck::cast_slice(values))
            .expect("as many values as the shape has elements")
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.len_bytes / self.dtype.bytes()
    }

    /// The elements as bytes in native order.
    pub fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len_bytes]
    }

    /// The elements as bytes in native order.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len_bytes]
    }

    /// The elements, or `None` where `T` is not the dtype's storage.
    pub fn as_slice<T: Element>(&self) -> Option<&[T]> {
        (T::DTYPE == self.dtype.storage()).then(|| bytemuck::cast_slice(self.bytes()))
    }

    /// The elements, or `None` where `T` is not the dtype's storage.
    pub fn as_slice_mut<T: Element>(&mut self) -> Option<&mut [T]> {
        (T::DTYPE == self.dtype.storage()).then(|| bytemuck::cast_slice_mut(self.bytes_mut()))
    }

    /// The same elements under another shape of as many elements, or `None`.
    pub fn reshaped(mut self, shape: &[usize]) -> Option<Tensor> {
        (numel(shape)? == self.numel()).then(|| {
            self.shape = shape.to_vec();
            self
        })
    }

    /// A borrowed form.
    pub fn view(&self) -> TensorView<'_> {
        TensorView { dtype: self.dtype, shape: &self.shape, bytes: self.bytes() }
    }

    /// A borrowed form that can be written.
    pub fn view_mut(&mut self) -> TensorViewMut<'_> {
        TensorViewMut {
            dtype: self.dtype,
            shape: &self.shape,
            bytes: &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len_bytes],
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)
    }
}

/// A borrowed, row-major tensor: what a run reads.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first.
    pub shape: &'a [usize],
    /// The elements in native order; no alignment is asked for.
    pub bytes: &'a [u8],
}

/// A borrowed, row-major tensor: what a run writes.
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first.
    pub shape: &'a [usize],
    /// The elements in native order; no alignment is asked for.
    pub bytes: &'a mut [u8],
}
