//! Figures about times and tensors.

use std::time::Duration;

use kiln::Precision;
use kiln::graph::small::number;
use kiln::half::{bf16, f16};
use kiln::tensor::{DType, Element, Tensor};

/// The time below which `percent` of the sorted times lie: the nearest rank.
pub fn percentile(sorted: &[Duration], percent: u8) -> Duration {
    let rank = (sorted.len() * usize::from(percent)).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

/// The most memory that this process has had at a time, in MiB, where the system says it.
pub fn peak_rss_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib / 1024.0)
}

/// All elements as `f64`; large 64-bit integers lose their last bits.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    fn of<T: Element>(tensor: &Tensor, convert: impl Fn(T) -> f64) -> Vec<f64> {
        tensor.as_slice::<T>().unwrap_or_default().iter().map(|value| convert(*value)).collect()
    }
    match tensor.dtype() {
        DType::F32 | DType::TF32 => of::<f32>(tensor, f64::from),
        DType::F16 => of::<f16>(tensor, f64::from),
        DType::BF16 => of::<bf16>(tensor, f64::from),
        DType::F64 => of::<f64>(tensor, |value| value),
        DType::I8 => of::<i8>(tensor, f64::from),
        DType::I16 => of::<i16>(tensor, f64::from),
        DType::I32 => of::<i32>(tensor, f64::from),
        DType::I64 => of::<i64>(tensor, |value| value as f64),
        DType::U8 => of::<u8>(tensor, f64::from),
        DType::U16 => of::<u16>(tensor, f64::from),
        DType::U32 => of::<u32>(tensor, f64::from),
        DType::U64 => of::<u64>(tensor, |value| value as f64),
        DType::Bool => tensor.bytes().iter().map(|byte| f64::from(*byte)).collect(),
        DType::Small(small) => tensor.bytes().iter().map(|&code| number(small, code)).collect(),
    }
}

/// How far two tensors are apart.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Largest absolute difference of two elements.
    pub max_abs: f64,
    /// Largest difference relative to the expected element.
    pub max_rel: f64,
    /// Number of elements outside the tolerance.
    pub outside: usize,
    /// The first of these: index, found, expected.
    pub first: Option<(usize, f64, f64)>,
}

/// Compares elements: equal when `|found - expected| <= atol + rtol * |expected|`. NaN equals NaN,
/// an infinity equals itself only.
pub fn compare(found: &Tensor, expected: &Tensor, rtol: f64, atol: f64) -> Difference {
    let mut result = Difference { max_abs: 0.0, max_rel: 0.0, outside: 0, first: None };
    let pairs = values(found).into_iter().zip(values(expected));
    for (index, (found, expected)) in pairs.enumerate() {
        if found == expected || found.is_nan() && expected.is_nan() {
            continue;
        }
        let abs = (found - expected).abs();
        let abs = if abs.is_nan() { f64::INFINITY } else { abs };
        result.max_abs = result.max_abs.max(abs);
        if expected != 0.0 {
            result.max_rel = result.max_rel.max(abs / expected.abs());
        }
        let allowed = if expected.is_finite() { atol + rtol * expected.abs() } else { 0.0 };
        if abs > allowed {
            result.outside += 1;
            result.first.get_or_insert((index, found, expected));
        }
    }
    result
}

/// How far results may be apart.
#[derive(Clone, Copy)]
pub struct Tolerance {
    /// Relative to the expected element.
    pub rtol: f64,
    /// Absolute.
    pub atol: f64,
    /// Whether the absolute one counts in units of the largest element, or of 1 where that is less.
    pub of_largest: bool,
}

impl Tolerance {
    /// That of a person, or what the precision leaves open: sums of f32 in another order. Where
    /// they are rounded to fewer bits, two that are nearly the same may become neighbours, 2^-8 or
    /// 2^-11 apart, and layer after layer adds as much.
    pub fn of(rtol: Option<f64>, atol: Option<f64>, precision: Precision) -> Tolerance {
        let (relative, absolute) = match precision {
            Precision::F32 => (1e-3, 1e-5),
            Precision::Bf16 => (2f64.powi(-6), 2f64.powi(-6)),
            Precision::F16 | Precision::Tf32 => (2f64.powi(-9), 2f64.powi(-9)),
        };
        Tolerance {
            rtol: rtol.unwrap_or(relative),
            atol: atol.unwrap_or(absolute),
            of_largest: atol.is_none() && precision != Precision::F32,
        }
    }

    /// The difference of two tensors; those of another type or shape differ everywhere.
    pub fn compare(self, found: &Tensor, expected: &Tensor) -> Difference {
        if self.of_largest {
            return self.inside(expected).compare(found, expected);
        }
        if found.dtype() == expected.dtype() && found.shape() == expected.shape() {
            return compare(found, expected, self.rtol, self.atol);
        }
        let outside = expected.numel().max(1);
        Difference { max_abs: f64::INFINITY, max_rel: f64::INFINITY, outside, first: None }
    }

    /// For a value inside the model, whose elements may be sums of much larger ones: the absolute
    /// tolerance counts in units of the largest element.
    pub fn inside(self, expected: &Tensor) -> Tolerance {
        let finite = values(expected).into_iter().filter(|value| value.is_finite());
        let largest = finite.fold(0.0f64, |largest, value| largest.max(value.abs()));
        Tolerance { atol: self.atol * largest.max(1.0), of_largest: false, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_shape_differs_everywhere() {
        let tolerance = Tolerance::of(None, None, Precision::F32);
        let (a, b) = (Tensor::zeros(DType::F32, &[4]), Tensor::zeros(DType::F32, &[2, 2]));
        assert_eq!(tolerance.compare(&a, &b).outside, 4);
        assert_eq!(tolerance.compare(&a, &a).outside, 0);
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let times: Vec<Duration> = (1..=100).map(Duration::from_millis).collect();
        let ms = |percent| percentile(&times, percent).as_millis();
        assert_eq!((ms(0), ms(50), ms(90), ms(99), ms(100)), (1, 50, 90, 99, 100));
        assert_eq!(percentile(&times[..1], 99), Duration::from_millis(1));
        assert_eq!(percentile(&[], 50), Duration::ZERO);
    }

    #[test]
    fn differences_are_counted_and_located() {
        let tensor = |values: &[f32]| Tensor::from_slice(&[values.len()], values);
        let expected = tensor(&[1.0, 0.0, f32::NAN, f32::INFINITY, 100.0]);
        let same = compare(&expected, &expected, 0.0, 0.0);
        assert_eq!((same.outside, same.first), (0, None));
        let found = tensor(&[1.0005, 0.0, f32::NAN, f32::INFINITY, 101.0]);
        let near = compare(&found, &expected, 1e-3, 1e-5);
        assert_eq!((near.outside, near.first), (1, Some((4, 101.0, 100.0))));
        assert_eq!(near.max_abs, 1.0);
        let lost = tensor(&[1.0, f32::NAN, 0.0, f32::NEG_INFINITY, 100.0]);
        assert_eq!(compare(&lost, &expected, 1e9, 1e9).outside, 3);
    }
}
