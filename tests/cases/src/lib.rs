//! Cases of the tests that need no reference libraries, so that a program without them can be
//! carried to other machines; numbers for them, and how results are compared.

pub mod cases;
pub mod readers;
pub mod small;
pub mod suite;

use kiln::graph::eval::Value;
use kiln::tensor::{DType, Tensor};

/// Numbers that look random and are the same in every run.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A sequence of its own for every seed.
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    /// A number of [-1, 1).
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// A tensor of numbers of [-1, 1).
    pub fn tensor(&mut self, shape: &[usize]) -> Tensor {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| self.unit()).collect();
        Tensor::from_slice(shape, &values)
    }
}

/// How far results may be from the reference: `|a - b| <= atol + rtol * |b|`.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Relative to the reference.
    pub rtol: f64,
    /// Whatever the reference is.
    pub atol: f64,
}

/// The tolerance of the ONNX suite.
pub const ONNX: Tolerance = Tolerance { rtol: 1e-3, atol: 1e-7 };

/// The first difference between a result and its reference, in dtype, shape or an element.
pub fn difference(got: &Tensor, want: &Tensor, tolerance: Tolerance) -> Option<String> {
    if got.dtype() != want.dtype() || got.shape() != want.shape() {
        return Some(format!("{got:?}, expected {want:?}"));
    }
    let (a, b) = (Value::from_tensor(got).as_f64s(), Value::from_tensor(want).as_f64s());
    let rtol = match want.dtype() {
        DType::BF16 => tolerance.rtol.max(2f64.powi(-6)),
        _ => tolerance.rtol,
    };
    let close = |a: f64, b: f64| {
        a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= tolerance.atol + rtol * b.abs()
    };
    let at = a.iter().zip(&b).position(|(&a, &b)| !close(a, b))?;
    Some(format!("element {at} of {got:?} is {}, expected {}", a[at], b[at]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_found() {
        let x = Tensor::from_slice(&[2], &[1.0f32, f32::NAN]);
        assert_eq!(difference(&x, &x, ONNX), None);
        let y = Tensor::from_slice(&[2], &[1.01f32, f32::NAN]);
        assert!(difference(&x, &y, ONNX).unwrap().contains("element 0"));
        let z = Tensor::from_slice(&[1, 2], &[1.0f32, 0.0]);
        assert!(difference(&x, &z, ONNX).unwrap().contains("[1, 2]"));
    }
}
