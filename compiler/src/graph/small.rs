//! What the codes of small types stand for, and which code a number gets.

use kiln_runtime::tensor::Small;

/// How the bits of a code make a fraction.
pub struct Format {
    /// Bits behind the leading one.
    pub mantissa: i32,
    /// Exponent of the leading bit of the least numbers that have one.
    pub least: i32,
    /// The bit of the sign, 0 where there is none.
    pub sign: u8,
    /// The code of the largest number.
    pub largest: u8,
    /// The code of what is larger.
    pub beyond: u8,
    /// The code that NaN gets; where there is no NaN, what others make of it.
    pub nan: u8,
}

impl Format {
    /// Whether there is one zero only, so that the code of its negative stands for NaN.
    pub fn one_zero(&self) -> bool {
        self.beyond == self.sign
    }
}

/// The format of a type whose codes are no integers.
pub fn format(small: Small) -> Option<Format> {
    let of = |mantissa, least, sign, [largest, beyond, nan]: [u8; 3]| {
        Some(Format { mantissa, least, sign, largest, beyond, nan })
    };
    match small {
        Small::F8E4M3FN => of(3, -6, 0x80, [0x7e, 0x7f, 0x7f]),
        Small::F8E4M3FNUZ => of(3, -7, 0x80, [0x7f, 0x80, 0x80]),
        Small::F8E5M2 => of(2, -14, 0x80, [0x7b, 0x7c, 0x7e]),
        Small::F8E5M2FNUZ => of(2, -15, 0x80, [0x7f, 0x80, 0x80]),
        Small::F8E8M0 => of(0, -127, 0, [0xfe, 0xff, 0xff]),
        Small::F4E2M1 => of(1, 0, 8, [7, 7, 8]),
        Small::I4 | Small::U4 | Small::I2 | Small::U2 => None,
    }
}

/// The number of a code without a sign.
fn magnitude(small: Small, format: &Format, code: u8) -> f64 {
    let (exponent, low) = (i32::from(code >> format.mantissa), code % (1 << format.mantissa));
    let (exponent, digits) = match (small, exponent) {
        // Powers of two have no zero among them.
        (Small::F8E8M0, _) => (exponent, 1),
        (_, 0) => (0, low),
        (_, exponent) => (exponent - 1, low + (1 << format.mantissa)),
    };
    f64::from(digits) * 2f64.powi(exponent + format.least - format.mantissa)
}

/// The number that a code stands for.
pub fn number(small: Small, code: u8) -> f64 {
    let Some(format) = format(small) else {
        return if small.is_signed() { f64::from(code as i8) } else { f64::from(code) };
    };
    // Bits that the type does not have are as if they were 0.
    let code = if small.bits() == 4 { code & 0xf } else { code };
    let (sign, code) = (code & format.sign, code & !format.sign);
    let without_zero = format.one_zero() && (sign, code) == (format.sign, 0);
    let infinite = small == Small::F8E5M2 && code == format.beyond;
    let value = match code {
        _ if without_zero => f64::NAN,
        _ if infinite => f64::INFINITY,
        code if code > format.largest => f64::NAN,
        code => magnitude(small, &format, code),
    };
    if sign == 0 { value } else { -value }
}

/// The code of the nearest number, of the one with an even code between two.
pub fn code(small: Small, v: f64) -> u8 {
    let Some(format) = format(small) else {
        let (low, high) = small.int_range().unwrap_or_default();
        return (v as i64).clamp(low.into(), high.into()) as u8;
    };
    if v.is_nan() {
        return format.nan;
    }
    let apart = |code: &u8| (magnitude(small, &format, *code) - v.abs()).abs();
    let nearer = |a: &u8, b: &u8| apart(a).total_cmp(&apart(b)).then((a % 2).cmp(&(b % 2)));
    let code = match v.is_finite() {
        true => (0..=format.largest).min_by(nearer).unwrap_or(0),
        false => format.largest,
    };
    let negative = v.is_sign_negative() && !(code == 0 && format.one_zero());
    if negative { code | format.sign } else { code }
}

#[cfg(test)]
mod tests {
    use kiln_runtime::tensor::SMALL;

    use super::*;

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
}
