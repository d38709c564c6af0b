//! What the codes of small types stand for, and which code a number gets.
//!
//! Without their signs the codes of a type are in the order of their numbers. So a number's code is
//! a matter of how many bounds it has reached, and both ways are tables.

use kiln_runtime::tensor::{DType, Small};

/// How the bits of a code make a fraction.
struct Format {
    /// Bits behind the leading one.
    mantissa: u32,
    /// Exponent of 1.
    bias: i32,
    /// The bit of the sign, 0 where there is none.
    sign: u8,
    /// The code of the largest number.
    largest: u8,
    /// The code of what is larger.
    beyond: u8,
    /// The code that NaN gets; where there is no NaN, what others make of it.
    nan: u8,
}

/// Which way a number between two codes goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rounding {
    /// To the nearest one, and between two to the one whose last bit is 0.
    NearestEven,
    /// To the nearest one, and between two to the larger.
    Nearest,
    /// To the larger.
    Up,
    /// To the smaller.
    Down,
}

/// Which code a number gets, by the number of bounds that its magnitude has reached.
#[derive(Clone, Debug, PartialEq)]
pub struct Ranks {
    /// Ascending; as many as a power of two less one, infinity where there is nothing to reach.
    pub bounds: Vec<f64>,
    /// The code for each rank: of numbers from 0 on, of those below, and of NaN.
    pub codes: Vec<u8>,
}

/// The format of a type whose codes are no integers.
fn format(small: Small) -> Option<Format> {
    let of = |mantissa, bias, sign, [largest, beyond, nan]: [u8; 3]| {
        Some(Format { mantissa, bias, sign, largest, beyond, nan })
    };
    match small {
        Small::F8E4M3FN => of(3, 7, 0x80, [0x7e, 0x7f, 0x7f]),
        Small::F8E4M3FNUZ => of(3, 8, 0x80, [0x7f, 0x80, 0x80]),
        Small::F8E5M2 => of(2, 15, 0x80, [0x7b, 0x7c, 0x7e]),
        Small::F8E5M2FNUZ => of(2, 16, 0x80, [0x7f, 0x80, 0x80]),
        Small::F8E8M0 => of(0, 127, 0, [0xfe, 0xff, 0xff]),
        Small::F4E2M1 => of(1, 1, 8, [7, 7, 8]),
        Small::I4 | Small::U4 | Small::I2 | Small::U2 => None,
    }
}

/// The number of a code without a sign, as if the format had no others than numbers.
fn magnitude(small: Small, format: &Format, code: u8) -> f64 {
    let (exponent, low) = (i32::from(code >> format.mantissa), code % (1 << format.mantissa));
    let (exponent, digits) = match exponent {
        // Powers of two have no zero among them.
        0 if small != Small::F8E8M0 => (1, low),
        exponent => (exponent, low + (1 << format.mantissa)),
    };
    f64::from(digits) * 2f64.powi(exponent - format.bias - format.mantissa as i32)
}

/// The number that a code stands for.
pub fn number(small: Small, code: u8) -> f64 {
    let Some(format) = format(small) else {
        return if small.is_signed() { f64::from(code as i8) } else { f64::from(code) };
    };
    // Bits that the type does not have are as if they were 0.
    let code = if small.bits() == 4 { code & 0xf } else { code };
    let (sign, code) = (code & format.sign, code & !format.sign);
    let without_zero = format.beyond == format.sign && (sign, code) == (format.beyond, 0);
    let infinite = small == Small::F8E5M2 && code == format.beyond;
    let value = match code {
        _ if without_zero => f64::NAN,
        _ if infinite => f64::INFINITY,
        code if code > format.largest => f64::NAN,
        code => magnitude(small, &format, code),
    };
    if sign == 0 { value } else { -value }
}

/// The least number of a dtype, f32 or f64, that is larger.
fn above(dtype: DType, v: f64) -> f64 {
    if dtype == DType::F64 { v.next_up() } else { f64::from((v as f32).next_up()) }
}

/// Which code a number of a dtype, f32 or f64, gets in a type whose codes are no integers; `None`
/// for the others. What is too large becomes the largest number where it is to `saturate`.
pub fn ranks(small: Small, dtype: DType, rounding: Rounding, saturate: bool) -> Option<Ranks> {
    let format = format(small)?;
    let saturate = saturate || format.beyond == format.largest;
    let value = |code: u8| magnitude(small, &format, code);
    let bound = |code: u8| {
        // The code after the last number is as if it were one more.
        let (low, high) = (value(code), value(code + 1));
        let middle = (low + high) / 2.0;
        match rounding {
            Rounding::NearestEven if code.is_multiple_of(2) => above(dtype, middle),
            Rounding::NearestEven | Rounding::Nearest => middle,
            Rounding::Up => above(dtype, low),
            Rounding::Down => high,
        }
    };
    let mut bounds: Vec<f64> = (0..format.largest).map(bound).collect();
    let mut codes: Vec<u8> = (0..=format.largest).collect();
    if !saturate {
        bounds.push(bound(format.largest));
        codes.push(format.beyond);
        if small == Small::F8E8M0 {
            // What is less than the least number is none either.
            bounds.insert(0, value(0));
            codes.insert(0, format.nan);
        }
    }
    let ranks = codes.len().next_power_of_two();
    bounds.resize(ranks - 1, f64::INFINITY);
    codes.resize(ranks, codes[codes.len() - 1]);
    // Where there is one zero, the code of its negative is that of NaN.
    let one_zero = format.beyond == format.sign;
    let negative = |&code: &u8| if one_zero && code == 0 { 0 } else { code | format.sign };
    let negatives: Vec<u8> = codes.iter().map(negative).collect();
    codes.extend(negatives);
    codes.push(format.nan);
    Some(Ranks { bounds, codes })
}

/// The code of a number.
pub fn code(small: Small, v: f64) -> u8 {
    let Some(ranks) = ranks(small, DType::F64, Rounding::NearestEven, true) else {
        let (low, high) = small.int_range().unwrap_or_default();
        return (v as i64).clamp(low.into(), high.into()) as u8;
    };
    let rank = ranks.bounds.iter().filter(|&&bound| v.abs() >= bound).count();
    match (v.is_nan(), v.is_sign_negative()) {
        (true, _) => ranks.codes[ranks.codes.len() - 1],
        (false, negative) => ranks.codes[rank + usize::from(negative) * (ranks.bounds.len() + 1)],
    }
}

#[cfg(test)]
mod tests {
    use kiln_runtime::tensor::SMALL;

    use super::*;

    const FRACTIONS: [Small; 6] = [
        Small::F8E4M3FN,
        Small::F8E4M3FNUZ,
        Small::F8E5M2,
        Small::F8E5M2FNUZ,
        Small::F8E8M0,
        Small::F4E2M1,
    ];

    #[test]
    fn known_codes_are_the_numbers_of_the_formats() {
        let known = [
            (Small::F8E4M3FN, 0x7e, 448.0),
            (Small::F8E4M3FN, 0x01, 2f64.powi(-9)),
            (Small::F8E4M3FN, 0xb8, -1.0),
            (Small::F8E4M3FNUZ, 0x7f, 240.0),
            (Small::F8E4M3FNUZ, 0x01, 2f64.powi(-10)),
            (Small::F8E5M2, 0x7b, 57344.0),
            (Small::F8E5M2, 0x7c, f64::INFINITY),
            (Small::F8E5M2, 0xfc, f64::NEG_INFINITY),
            (Small::F8E5M2, 0x01, 2f64.powi(-16)),
            (Small::F8E5M2FNUZ, 0x7f, 57344.0),
            (Small::F8E5M2FNUZ, 0x01, 2f64.powi(-17)),
            (Small::F8E8M0, 0, 2f64.powi(-127)),
            (Small::F8E8M0, 0xfe, 2f64.powi(127)),
            (Small::F4E2M1, 0xf, -6.0),
            (Small::F4E2M1, 1, 0.5),
            (Small::I4, 0xf8, -8.0),
            (Small::U2, 3, 3.0),
        ];
        for (small, code, value) in known {
            assert_eq!(number(small, code), value, "{small:?} {code:#x}");
        }
        for (small, code) in [
            (Small::F8E4M3FN, 0x7f),
            (Small::F8E4M3FN, 0xff),
            (Small::F8E4M3FNUZ, 0x80),
            (Small::F8E5M2, 0x7d),
            (Small::F8E5M2FNUZ, 0x80),
            (Small::F8E8M0, 0xff),
        ] {
            assert!(number(small, code).is_nan(), "{small:?} {code:#x}");
        }
    }

    /// Every number comes back, and what lies between two goes to the nearer one.
    #[test]
    fn codes_are_those_of_the_nearest_numbers() {
        for (small, _) in SMALL {
            let codes = 0..=(((1u16 << small.bits()) - 1) as u8);
            let signed = |c: u8| match small.int_range() {
                Some((low, _)) if low < 0 => {
                    let shift = 8 - small.bits() as u32;
                    ((c << shift) as i8 >> shift) as u8
                }
                _ => c,
            };
            let finite: Vec<(u8, f64)> = codes
                .map(|c| (signed(c), number(small, signed(c))))
                .filter(|(_, v)| v.is_finite())
                .collect();
            for &(c, v) in &finite {
                assert_eq!(code(small, v), c, "{small:?} of {v}");
            }
            if small.int_range().is_some() {
                continue;
            }
            let mut values: Vec<f64> = finite.iter().map(|f| f.1).collect();
            values.sort_by(f64::total_cmp);
            for pair in values.windows(2).filter(|pair| pair[0] < pair[1]) {
                let width = pair[1] - pair[0];
                for (part, nearest) in [(0.25, pair[0]), (0.75, pair[1])] {
                    let found = number(small, code(small, pair[0] + part * width));
                    assert_eq!(found, nearest, "{small:?}: {part} between {pair:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_too_large_saturates_or_does_not() {
        let beyond = |small, saturate| {
            let ranks =
                ranks(small, DType::F32, Rounding::NearestEven, saturate).expect("fractions");
            let of = |v: f64| {
                let rank = ranks.bounds.iter().filter(|&&b| v.abs() >= b).count();
                ranks.codes[rank + if v < 0.0 { ranks.bounds.len() + 1 } else { 0 }]
            };
            [1e30, -1e30, f64::INFINITY].map(of)
        };
        for small in FRACTIONS {
            let top = code(small, f64::MAX);
            assert_eq!(beyond(small, true)[0], if small == Small::F8E8M0 { 0xe3 } else { top });
            assert_eq!(beyond(small, true)[2], top);
        }
        assert_eq!(beyond(Small::F8E4M3FN, false), [0x7f, 0xff, 0x7f]);
        assert_eq!(beyond(Small::F8E4M3FNUZ, false), [0x80; 3]);
        assert_eq!(beyond(Small::F8E5M2, false), [0x7c, 0xfc, 0x7c]);
        assert_eq!(beyond(Small::F4E2M1, false), [7, 0xf, 7]);
    }

    #[test]
    fn powers_of_two_are_rounded_as_they_are_told() {
        let of = |v: f64, rounding, saturate| {
            let ranks = ranks(Small::F8E8M0, DType::F32, rounding, saturate).expect("fractions");
            ranks.codes[ranks.bounds.iter().filter(|&&b| v >= b).count()]
        };
        assert_eq!([1.0, 1.1, 1.5, 1.9].map(|v| of(v, Rounding::Up, true)), [127, 128, 128, 128]);
        assert_eq!([1.0, 1.1, 1.5, 1.9].map(|v| of(v, Rounding::Down, true)), [127; 4]);
        let nearest = [1.0, 1.4, 1.5, 1.9].map(|v| of(v, Rounding::Nearest, true));
        assert_eq!(nearest, [127, 127, 128, 128]);
        assert_eq!(of(0.0, Rounding::Up, true), 0);
        assert_eq!(of(0.0, Rounding::Nearest, false), 0xff);
        assert_eq!(of(f64::INFINITY, Rounding::Nearest, false), 0xff);
        assert_eq!(of(2f64.powi(-127), Rounding::Nearest, false), 0);
    }
}
