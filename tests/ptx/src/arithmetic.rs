//! What instructions compute, bit for bit: floats are rounded to nearest and keep subnormal
//! numbers; integers wrap.

use half::{bf16, f16};

use super::parse::Ty;

/// Which types an operation has.
pub fn known(op: &str, ty: Ty) -> Result<(), String> {
    let float = matches!(ty, Ty::F(32 | 64));
    let int = matches!(ty, Ty::S(32 | 64) | Ty::U(32 | 64));
    let bits = matches!(ty, Ty::B(32 | 64) | Ty::Pred);
    let fits = match op {
        "mov" => !matches!(ty, Ty::BF16 | Ty::TF32 | Ty::F(16)),
        "cvta.to.global" => ty == Ty::U(64),
        "add" | "sub" | "mul.lo" | "mad.lo" | "div" | "rem" | "min" | "max" => int,
        "mul.wide" | "mad.wide" => matches!(ty, Ty::S(32) | Ty::U(32)),
        "add.rn" | "sub.rn" | "mul.rn" | "fma.rn" | "div.rn" | "sqrt.rn" | "rcp.rn" => float,
        "min.NaN" | "max.NaN" => ty == Ty::F(32),
        "neg" => float,
        "abs" => float || matches!(ty, Ty::S(_)),
        "and" | "or" | "xor" | "not" => bits,
        "shl" => bits && ty != Ty::Pred,
        "shr" => int,
        _ => false,
    };
    fits.then_some(()).ok_or_else(|| format!("{op} of {ty:?}"))
}

/// Which conversions there are, and how they round.
pub fn convertible(round: &str, to: Ty, from: Ty) -> Result<(), String> {
    let int = |t| matches!(t, Ty::S(_) | Ty::U(_));
    let fits = match (from, to) {
        (Ty::F(a), Ty::F(b)) if a == b => matches!(round, "rzi" | "rni" | "rmi" | "rpi"),
        (Ty::F(a), Ty::F(b)) if a < b => round.is_empty(),
        (Ty::F(_), Ty::F(_)) => round == "rn",
        (Ty::F(32), Ty::BF16) => round == "rn",
        (Ty::F(32), Ty::TF32) => round == "rna",
        (Ty::F(_), to) if int(to) => round == "rzi",
        (from, Ty::F(_)) if int(from) => round == "rn",
        (from, to) if int(from) && int(to) => round.is_empty(),
        _ => false,
    };
    fits.then_some(()).ok_or_else(|| format!("cvt.{round} from {from:?} to {to:?}"))
}

fn float(ty: Ty, bits: u64) -> f64 {
    match ty {
        Ty::F(16) => f16::from_bits(bits as u16).to_f64(),
        Ty::F(32) => f32::from_bits(bits as u32).into(),
        _ => f64::from_bits(bits),
    }
}

/// The bits of an f32; there is one NaN.
fn f32_bits(v: f32) -> u64 {
    if v.is_nan() { 0x7fff_ffff } else { v.to_bits().into() }
}

/// An integer of a type.
fn integer(ty: Ty, bits: u64) -> i128 {
    match ty {
        Ty::S(8) => (bits as i8).into(),
        Ty::S(16) => (bits as i16).into(),
        Ty::S(32) => (bits as i32).into(),
        Ty::S(_) => (bits as i64).into(),
        _ => (bits & mask(ty.bits())).into(),
    }
}

/// The low bits.
pub fn mask(bits: u32) -> u64 {
    if bits == 64 { u64::MAX } else { (1 << bits) - 1 }
}

/// Whether two numbers of a type compare so.
pub fn compare(cmp: &str, ty: Ty, x: u64, y: u64) -> bool {
    if let Ty::F(_) = ty {
        let (x, y) = (float(ty, x), float(ty, y));
        return match cmp {
            "eq" => x == y,
            "ne" => x.partial_cmp(&y).is_some_and(|order| order.is_ne()),
            "neu" => x != y,
            "lt" => x < y,
            "le" => x <= y,
            "gt" => x > y,
            "ge" => x >= y,
            _ => x.is_nan() || y.is_nan(),
        };
    }
    let (x, y) = (integer(ty, x), integer(ty, y));
    match cmp {
        "eq" => x == y,
        "ne" => x != y,
        "lt" => x < y,
        "le" => x <= y,
        "gt" => x > y,
        _ => x >= y,
    }
}

/// An operation; an integer divided by zero is what PTX says nothing of.
pub fn operation(op: &str, ty: Ty, from: &[u64]) -> Result<u64, String> {
    let (x, y) = (from[0], from.get(1).copied().unwrap_or(0));
    Ok(match (op, ty) {
        ("mov" | "cvta.to.global", _) => x,
        ("and", _) => x & y,
        ("or", _) => x | y,
        ("xor", _) => x ^ y,
        ("not", _) => !x & mask(ty.bits()),
        ("shl", _) => x.checked_shl(y as u32).unwrap_or(0) & mask(ty.bits()),
        ("shr", _) => (integer(ty, x) >> y.min(64)) as u64 & mask(ty.bits()),
        (_, Ty::F(32)) => {
            let [x, y, z] =
                [0, 1, 2].map(|k| f32::from_bits(from.get(k).copied().unwrap_or(0) as u32));
            float_operation(op, x, y, z)
        }
        (_, Ty::F(_)) => {
            let [x, y, z] = [0, 1, 2].map(|k| f64::from_bits(from.get(k).copied().unwrap_or(0)));
            let value = match op {
                "add.rn" => x + y,
                "sub.rn" => x - y,
                "mul.rn" => x * y,
                "fma.rn" => x.mul_add(y, z),
                "div.rn" => x / y,
                "neg" => -x,
                "abs" => x.abs(),
                "sqrt.rn" => x.sqrt(),
                _ => 1.0 / x,
            };
            value.to_bits()
        }
        _ => return integers(op, ty, from),
    })
}

fn float_operation(op: &str, x: f32, y: f32, z: f32) -> u64 {
    let extreme = |less: bool| match x.is_nan() || y.is_nan() {
        true => f32::NAN,
        // Of zeros the negative one is less.
        false if x == y => {
            if x.is_sign_negative() == less {
                x
            } else {
                y
            }
        }
        false => {
            if (x < y) == less {
                x
            } else {
                y
            }
        }
    };
    match op {
        "neg" => return (-x).to_bits().into(),
        "abs" => return x.abs().to_bits().into(),
        _ => {}
    }
    f32_bits(match op {
        "add.rn" => x + y,
        "sub.rn" => x - y,
        "mul.rn" => x * y,
        "fma.rn" => x.mul_add(y, z),
        "div.rn" => x / y,
        "min.NaN" => extreme(true),
        "max.NaN" => extreme(false),
        "sqrt.rn" => x.sqrt(),
        _ => 1.0 / x,
    })
}

fn integers(op: &str, ty: Ty, from: &[u64]) -> Result<u64, String> {
    let wide = op.ends_with(".wide");
    let [x, y] = [0, 1].map(|k| integer(ty, from.get(k).copied().unwrap_or(0)));
    let z = from.get(2).copied().unwrap_or(0);
    let z = if wide { i128::from(z as i64) } else { integer(ty, z) };
    let value = match op {
        "add" => x + y,
        "sub" => x - y,
        "mul.lo" | "mul.wide" => x.wrapping_mul(y),
        "mad.lo" | "mad.wide" => x.wrapping_mul(y).wrapping_add(z),
        "div" => x.checked_div(y).ok_or("an integer is divided by zero")?,
        "rem" => x.checked_rem(y).ok_or("an integer is divided by zero")?,
        "min" => x.min(y),
        "max" => x.max(y),
        _ => x.abs(),
    };
    Ok(value as u64 & mask(if wide { 64 } else { ty.bits() }))
}

/// A conversion.
pub fn convert(round: &str, to: Ty, from: Ty, x: u64) -> u64 {
    match (from, to) {
        (Ty::F(a), Ty::F(b)) if a == b => {
            let v = float(from, x);
            let whole = match round {
                "rzi" => v.trunc(),
                "rni" => v.round_ties_even(),
                "rmi" => v.floor(),
                _ => v.ceil(),
            };
            if a == 32 { f32_bits(whole as f32) } else { whole.to_bits() }
        }
        (Ty::F(_), Ty::F(64)) => float(from, x).to_bits(),
        (Ty::F(_), Ty::F(32)) => f32_bits(float(from, x) as f32),
        (Ty::F(_), Ty::F(_)) => {
            let v = float(from, x);
            if v.is_nan() { 0x7fff } else { f16::from_f32(to_odd(v)).to_bits().into() }
        }
        (Ty::F(_), Ty::BF16) => {
            let v = f32::from_bits(x as u32);
            if v.is_nan() { 0x7fff } else { bf16::from_f32(v).to_bits().into() }
        }
        (Ty::F(_), Ty::TF32) => match f32::from_bits(x as u32).is_nan() {
            true => 0x7fff_e000,
            // Half a step is added to the magnitude, and what is left over dropped.
            false => (x + 0x1000) & 0xffff_e000,
        },
        (Ty::F(bits), _) => {
            let v = float(from, x);
            // What a NaN becomes hangs on the types.
            if v.is_nan() {
                return if bits == 64 || to.bits() == 64 { 1 << (to.bits() - 1) } else { 0 };
            }
            let (low, high) = match to {
                Ty::S(bits) => (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1),
                _ => (0, (1i128 << to.bits()) - 1),
            };
            (v as i128).clamp(low, high) as u64 & mask(to.bits())
        }
        (_, Ty::F(32)) => f32_bits(integer(from, x) as f32),
        (_, Ty::F(64)) => (integer(from, x) as f64).to_bits(),
        (_, Ty::F(_)) => f16::from_f32(to_odd(integer(from, x) as f64)).to_bits().into(),
        _ => integer(from, x) as u64 & mask(to.bits().max(32)),
    }
}

/// The number as f32, or where there is none its neighbour with an odd mantissa: what is rounded
/// again from that is rounded once.
fn to_odd(v: f64) -> f32 {
    let near = v as f32;
    if f64::from(near) == v || near.is_infinite() || near.to_bits() & 1 == 1 {
        return near;
    }
    let up = f64::from(near).abs() < v.abs();
    f32::from_bits(if up { near.to_bits() + 1 } else { near.to_bits() - 1 })
}
