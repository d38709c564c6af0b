//! Vectors and masks.

use iced_x86::{Instruction, Mnemonic, Register};

use super::{Fault, Processor, is_memory, number};

type Lanes = [u32; 16];

/// The number of a vector register and its lanes of f32.
fn place(register: Register) -> Option<(usize, usize)> {
    let row = |first, lanes| number(register, first, 32).map(|n| (n, lanes));
    row(Register::XMM0, 4).or(row(Register::YMM0, 8)).or(row(Register::ZMM0, 16))
}

/// How many lanes an instruction works on: those of its first vector register.
fn width(i: &Instruction) -> Option<usize> {
    (0..i.op_count()).find_map(|k| place(i.op_register(k))).map(|p| p.1)
}

/// A NaN of the operands, the first one, goes on; NaN that comes of numbers is negative.
fn ruled(result: f32, operands: &[f32]) -> f32 {
    match operands.iter().find(|x| x.is_nan()) {
        _ if !result.is_nan() => result,
        Some(nan) => f32::from_bits(nan.to_bits() | 0x0040_0000),
        None => f32::from_bits(0xffc0_0000),
    }
}

fn two(mnemonic: Mnemonic, a: u32, b: u32) -> Option<u32> {
    let (x, y) = (f32::from_bits(a), f32::from_bits(b));
    let float = |result: f32| Some(ruled(result, &[x, y]).to_bits());
    match mnemonic {
        Mnemonic::Vaddps => float(x + y),
        Mnemonic::Vsubps => float(x - y),
        Mnemonic::Vmulps => float(x * y),
        Mnemonic::Vdivps => float(x / y),
        // Exact as f64, for what is neither infinite nor NaN.
        Mnemonic::Vscalefps => float((f64::from(x) * f64::from(y.floor()).exp2()) as f32),
        Mnemonic::Vmaxps => Some(if x > y { a } else { b }),
        Mnemonic::Vminps => Some(if x < y { a } else { b }),
        Mnemonic::Vandps => Some(a & b),
        Mnemonic::Vorps => Some(a | b),
        Mnemonic::Vxorps => Some(a ^ b),
        Mnemonic::Vpaddd => Some(a.wrapping_add(b)),
        Mnemonic::Vpsubd => Some(a.wrapping_sub(b)),
        Mnemonic::Vpmulld => Some(a.wrapping_mul(b)),
        Mnemonic::Vpmaxsd => Some((a as i32).max(b as i32) as u32),
        Mnemonic::Vpminsd => Some((a as i32).min(b as i32) as u32),
        Mnemonic::Vpmaddwd => {
            let product = |shift: u32| {
                let half = |v: u32| i32::from((v >> shift) as u16 as i16);
                half(a).wrapping_mul(half(b))
            };
            Some(product(0).wrapping_add(product(16)) as u32)
        }
        _ => None,
    }
}

fn one(mnemonic: Mnemonic, a: u32, byte: u8) -> Option<u32> {
    let x = f32::from_bits(a);
    let float = |result: f32| Some(ruled(result, &[x]).to_bits());
    match mnemonic {
        Mnemonic::Vsqrtps => float(x.sqrt()),
        Mnemonic::Vcvtdq2ps => Some((a as i32 as f32).to_bits()),
        Mnemonic::Vpslld => Some(a.checked_shl(byte.into()).unwrap_or(0)),
        Mnemonic::Vpsrad => Some((a as i32 >> byte.min(31)) as u32),
        Mnemonic::Vcvttps2dq => {
            let whole = f64::from(x).trunc();
            let fits = (-2147483648.0..2147483648.0).contains(&whole);
            Some(if fits { whole as i32 as u32 } else { 1 << 31 })
        }
        Mnemonic::Vpsrld => Some(a.checked_shr(byte.into()).unwrap_or(0)),
        // Without a scale, and exceptions off.
        Mnemonic::Vroundps | Mnemonic::Vrndscaleps => match byte {
            8 => float(x.round_ties_even()),
            9 => float(x.floor()),
            10 => float(x.ceil()),
            _ => None,
        },
        _ => None,
    }
}

fn holds(predicate: u8, a: u32, b: u32) -> Option<bool> {
    let (x, y) = (f32::from_bits(a), f32::from_bits(b));
    let unordered = x.is_nan() || y.is_nan();
    match predicate {
        0 => Some(x == y),
        3 => Some(unordered),
        4 => Some(x != y),
        12 => Some(!unordered && x != y),
        17 => Some(x < y),
        18 => Some(x <= y),
        29 => Some(x >= y),
        30 => Some(x > y),
        _ => None,
    }
}

impl Processor<'_> {
    fn vector_register(&self, register: Register) -> Result<Lanes, Fault> {
        let (number, _) = place(register).ok_or_else(|| format!("{register:?} is no vector"))?;
        self.vectors[number].ok_or_else(|| format!("{register:?} has no value yet"))
    }

    fn floats(&self, address: u64, lanes: usize) -> Result<Lanes, Fault> {
        let mut all = [0; 16];
        for (lane, bytes) in all.iter_mut().zip(self.read(address, 4 * lanes)?.chunks_exact(4)) {
            *lane = u32::from_le_bytes(bytes.try_into().expect("chunks of 4"));
        }
        Ok(all)
    }

    /// An operand of as many lanes, from a register or from memory.
    fn lanes(&self, i: &Instruction, k: u32, lanes: usize) -> Result<Lanes, Fault> {
        if !is_memory(i, k) {
            return self.vector_register(i.op_register(k));
        }
        let address = self.address(i)?;
        match i.is_broadcast() {
            true => Ok([self.floats(address, 1)?[0]; 16]),
            false => self.floats(address, lanes),
        }
    }

    /// Writes the low lanes of a register; the others become 0.
    fn set_vector(&mut self, i: &Instruction, value: Lanes, lanes: usize) -> Result<(), Fault> {
        let register = i.op_register(0);
        let (number, _) = place(register).ok_or_else(|| format!("{register:?} is no vector"))?;
        let mut whole = [0; 16];
        whole[..lanes].copy_from_slice(&value[..lanes]);
        self.vectors[number] = Some(whole);
        Ok(())
    }

    fn mask(&self, register: Register) -> Result<u64, Fault> {
        let known = number(register, Register::K0, 8).and_then(|n| self.masks[n]);
        known.ok_or_else(|| format!("{register:?} has no value yet"))
    }

    fn moved(&mut self, i: &Instruction, lanes: usize) -> Result<(), Fault> {
        if i.mnemonic() == Mnemonic::Vmovaps && (is_memory(i, 0) || is_memory(i, 1)) {
            let address = self.address(i)?;
            if !address.is_multiple_of(4 * lanes as u64) {
                return Err(format!("{address:x} is not aligned"));
            }
        }
        let value = self.lanes(i, 1, lanes)?;
        if !is_memory(i, 0) {
            return self.set_vector(i, value, lanes);
        }
        let bytes: Vec<u8> = value[..lanes].iter().flat_map(|lane| lane.to_le_bytes()).collect();
        let address = self.address(i)?;
        self.write(address, &bytes)
    }

    fn moved_mask(&mut self, i: &Instruction) -> Result<(), Fault> {
        let value = match i.op_register(1) {
            _ if is_memory(i, 1) => {
                let bytes = self.read(self.address(i)?, 8)?;
                u64::from_le_bytes(bytes.try_into().expect("8 bytes were read"))
            }
            register if number(register, Register::K0, 8).is_some() => self.mask(register)?,
            register => self.general(register)?,
        };
        if is_memory(i, 0) {
            let address = self.address(i)?;
            return self.write(address, &value.to_le_bytes());
        }
        let to = number(i.op_register(0), Register::K0, 8).ok_or("a mask goes elsewhere")?;
        self.masks[to] = Some(value);
        Ok(())
    }

    fn compared(&mut self, i: &Instruction, lanes: usize) -> Result<(), Fault> {
        let (a, b) = (self.lanes(i, 1, lanes)?, self.lanes(i, 2, lanes)?);
        let mut mask = 0;
        for lane in 0..lanes {
            let holds = holds(i.immediate8(), a[lane], b[lane]).ok_or("an unknown predicate")?;
            mask |= u64::from(holds) << lane;
        }
        match number(i.op_register(0), Register::K0, 8) {
            Some(to) => {
                self.masks[to] = Some(mask);
                Ok(())
            }
            None => {
                let all = std::array::from_fn(|lane| if mask >> lane & 1 == 1 { !0 } else { 0 });
                self.set_vector(i, all, lanes)
            }
        }
    }

    /// `register`: a mask register, or `None` where the last operand has the mask.
    fn blended(&mut self, i: &Instruction, lanes: usize, under: bool) -> Result<(), Fault> {
        let (no, yes) = (self.lanes(i, 1, lanes)?, self.lanes(i, 2, lanes)?);
        let mask = match under {
            true => self.mask(i.op_mask())?,
            false => {
                let signs = self.vector_register(i.op_register(3))?;
                signs
                    .iter()
                    .enumerate()
                    .fold(0, |mask, (k, sign)| mask | u64::from(sign >> 31) << k)
            }
        };
        let pick = |lane: usize| if mask >> lane & 1 == 1 { yes[lane] } else { no[lane] };
        self.set_vector(i, std::array::from_fn(pick), lanes)
    }

    fn fused(&mut self, i: &Instruction, lanes: usize) -> Result<(), Fault> {
        let [a, b, c] = [
            self.vector_register(i.op_register(0))?,
            self.vector_register(i.op_register(1))?,
            self.lanes(i, 2, lanes)?,
        ];
        let result = std::array::from_fn(|lane| {
            let [a, b, c] = [a, b, c].map(|v| f32::from_bits(v[lane]));
            let [x, y, z] = match i.mnemonic() {
                Mnemonic::Vfmadd213ps => [b, a, c],
                _ => [b, c, a],
            };
            ruled(x.mul_add(y, z), &[x, y, z]).to_bits()
        });
        self.set_vector(i, result, lanes)
    }

    /// The products of the parts of 32 bits, and what the result held, added without saturation.
    fn dotted(&mut self, i: &Instruction, lanes: usize) -> Result<(), Fault> {
        let sum = self.vector_register(i.op_register(0))?;
        let (x, y) = (self.lanes(i, 1, lanes)?, self.lanes(i, 2, lanes)?);
        let bytes = i.mnemonic() == Mnemonic::Vpdpbusd;
        let product = |x: u32, y: u32, k: u32| match bytes {
            true => i32::from((x >> (8 * k)) as u8) * i32::from((y >> (8 * k)) as i8),
            false => i32::from((x >> (16 * k)) as i16).wrapping_mul((y >> (16 * k)) as i16 as i32),
        };
        let result = std::array::from_fn(|lane| {
            let products = (0..if bytes { 4 } else { 2 }).map(|k| product(x[lane], y[lane], k));
            products.fold(sum[lane], |sum, p| sum.wrapping_add(p as u32))
        });
        self.set_vector(i, result, lanes)
    }

    /// The products of the bf16 of 32 bits, added one by one, the upper ones first; numbers below
    /// the least normal one are 0.
    fn dotted_halves(&mut self, i: &Instruction, lanes: usize) -> Result<(), Fault> {
        let sum = self.vector_register(i.op_register(0))?;
        let (x, y) = (self.lanes(i, 1, lanes)?, self.lanes(i, 2, lanes)?);
        let flushed = |v: f32| if v.is_subnormal() { 0f32.copysign(v) } else { v };
        let result = std::array::from_fn(|lane| {
            let parts = [(x[lane], y[lane]), (x[lane] << 16, y[lane] << 16)];
            let sum = parts.into_iter().fold(flushed(f32::from_bits(sum[lane])), |sum, (x, y)| {
                let [x, y] = [x, y].map(|bits| flushed(f32::from_bits(bits & 0xffff_0000)));
                flushed(ruled(x.mul_add(y, sum), &[x, y, sum]))
            });
            sum.to_bits()
        });
        self.set_vector(i, result, lanes)
    }

    fn extracted(&mut self, i: &Instruction) -> Result<(), Fault> {
        let (from, lanes) = (self.vector_register(i.op_register(1))?, width(i).unwrap_or(4));
        let at = lanes * usize::from(i.immediate8());
        let mut value = [0; 16];
        value[..lanes].copy_from_slice(from.get(at..at + lanes).ok_or("lanes that are not there")?);
        self.set_vector(i, value, lanes)
    }

    fn inserted(&mut self, i: &Instruction) -> Result<(), Fault> {
        let mut value = self.lanes(i, 1, 16)?;
        let (at, count) = match i.mnemonic() {
            // Lane 0 of what is read, and no lane is cleared.
            Mnemonic::Vinsertps if i.immediate8() & 0xcf == 0 => (i.immediate8() >> 4, 1),
            Mnemonic::Vinsertps => return Err("other lanes than one".into()),
            _ => (4 * i.immediate8(), 4),
        };
        let (at, part) = (usize::from(at), self.lanes(i, 2, count)?);
        let to = value.get_mut(at..at + count).ok_or("lanes that are not there")?;
        to.copy_from_slice(&part[..count]);
        self.set_vector(i, value, width(i).unwrap_or(4))
    }

    /// f16 of memory or of a register, a lane each.
    fn widened_floats(&mut self, i: &Instruction, lanes: usize) -> Result<(), Fault> {
        let bytes: Vec<u8> = match is_memory(i, 1) {
            true => self.read(self.address(i)?, 2 * lanes)?.to_vec(),
            false => {
                let words = self.vector_register(i.op_register(1))?;
                words.iter().flat_map(|word| word.to_le_bytes()).collect()
            }
        };
        let mut value = [0u32; 16];
        for (lane, short) in value[..lanes].iter_mut().zip(bytes.chunks_exact(2)) {
            let bits = u16::from_le_bytes([short[0], short[1]]);
            *lane = half::f16::from_bits(bits).to_f32().to_bits();
        }
        self.set_vector(i, value, lanes)
    }

    /// Short integers of memory, a lane each.
    fn widened(&mut self, i: &Instruction, lanes: usize) -> Result<(), Fault> {
        let (bytes, signed) = match i.mnemonic() {
            Mnemonic::Vpmovsxwd => (2, true),
            Mnemonic::Vpmovzxwd => (2, false),
            Mnemonic::Vpmovsxbd => (1, true),
            _ => (1, false),
        };
        let memory = self.read(self.address(i)?, bytes * lanes)?;
        let mut value = [0u32; 16];
        for (lane, short) in value.iter_mut().zip(memory.chunks_exact(bytes)) {
            *lane = match short {
                [low, high] => i32::from(i16::from_le_bytes([*low, *high])) as u32,
                [low] if signed => i32::from(*low as i8) as u32,
                short => short.iter().map(|&low| u32::from(low)).sum(),
            };
        }
        self.set_vector(i, value, lanes)
    }

    /// The low bytes of the first lanes to memory.
    fn shortened(&mut self, i: &Instruction, bytes: usize, lanes: usize) -> Result<(), Fault> {
        let value = self.vector_register(i.op_register(1))?;
        let low = value[..lanes].iter().flat_map(|v| v.to_le_bytes().into_iter().take(bytes));
        let low: Vec<u8> = low.collect();
        let address = self.address(i)?;
        self.write(address, &low)
    }

    /// Lanes of both operands with half the bits, saturated, in each 128 bits.
    fn packed(&mut self, i: &Instruction, lanes: usize) -> Result<(), Fault> {
        let [a, b] = [1, 2].map(|k| self.vector_register(i.op_register(k)));
        let (a, b, mut value) = (a?, b?, [0; 16]);
        for part in (0..lanes).step_by(4) {
            let both = a[part..part + 4].iter().chain(&b[part..part + 4]);
            let bytes: Vec<u8> = match i.mnemonic() {
                Mnemonic::Vpackssdw => both
                    .map(|&v| (v as i32).clamp(-0x8000, 0x7fff) as i16)
                    .flat_map(i16::to_le_bytes)
                    .collect(),
                packs => {
                    let range = if packs == Mnemonic::Vpackuswb { (0, 255) } else { (-128, 127) };
                    both.flat_map(|&v| [v as i16, (v >> 16) as i16])
                        .map(|v| v.clamp(range.0, range.1) as u8)
                        .collect()
                }
            };
            for (lane, four) in value[part..].iter_mut().zip(bytes.chunks_exact(4)) {
                *lane = u32::from_le_bytes(four.try_into().expect("chunks of 4"));
            }
        }
        self.set_vector(i, value, lanes)
    }

    /// Runs an instruction if it is one of these.
    pub fn vector(&mut self, i: &Instruction) -> Result<bool, Fault> {
        let mnemonic = i.mnemonic();
        if i.op_mask() != Register::None && mnemonic != Mnemonic::Vblendmps {
            return Ok(false);
        }
        let lanes = width(i).unwrap_or(16);
        match mnemonic {
            Mnemonic::Vzeroupper => {
                self.vectors[..16].iter_mut().flatten().for_each(|v| v[4..].fill(0));
            }
            Mnemonic::Vmovups | Mnemonic::Vmovaps => self.moved(i, lanes)?,
            Mnemonic::Vmovss => match is_memory(i, 0) || is_memory(i, 1) {
                true => self.moved(i, 1)?,
                false => return Ok(false),
            },
            Mnemonic::Vmovd => {
                let low = self.general(i.op_register(1))? as u32;
                self.set_vector(i, std::array::from_fn(|k| if k == 0 { low } else { 0 }), 4)?;
            }
            Mnemonic::Kmovd | Mnemonic::Kmovq => self.moved_mask(i)?,
            Mnemonic::Kmovw => {
                let mask = self.mask(i.op_register(1))? & 0xffff;
                self.set(i.op_register(0), mask)?;
            }
            Mnemonic::Vmovmskps => {
                let lanes = self.vector_register(i.op_register(1))?;
                let signs = lanes.iter().take(8).enumerate().map(|(k, v)| u64::from(v >> 31) << k);
                self.set(i.op_register(0), signs.sum())?;
            }
            Mnemonic::Vbroadcastss => {
                let lane = self.lanes(i, 1, 1)?[0];
                self.set_vector(i, [lane; 16], lanes)?;
            }
            Mnemonic::Vcvtph2ps => self.widened_floats(i, lanes)?,
            Mnemonic::Vpmovsxwd
            | Mnemonic::Vpmovzxwd
            | Mnemonic::Vpmovsxbd
            | Mnemonic::Vpmovzxbd => {
                self.widened(i, lanes)?;
            }
            Mnemonic::Vpmovdw => self.shortened(i, 2, lanes)?,
            Mnemonic::Vpmovdb => self.shortened(i, 1, lanes)?,
            Mnemonic::Vpextrw if is_memory(i, 0) => self.shortened(i, 2, 1)?,
            Mnemonic::Vpextrb if is_memory(i, 0) => self.shortened(i, 1, 1)?,
            Mnemonic::Vmovq if is_memory(i, 0) => self.shortened(i, 4, 2)?,
            Mnemonic::Vpackssdw | Mnemonic::Vpackuswb | Mnemonic::Vpacksswb => {
                self.packed(i, lanes)?;
            }
            Mnemonic::Vcmpps => self.compared(i, lanes)?,
            Mnemonic::Vblendvps => self.blended(i, lanes, false)?,
            Mnemonic::Vblendmps => self.blended(i, lanes, true)?,
            Mnemonic::Vfmadd213ps | Mnemonic::Vfmadd231ps => self.fused(i, lanes)?,
            Mnemonic::Vpdpwssd | Mnemonic::Vpdpbusd => self.dotted(i, lanes)?,
            Mnemonic::Vdpbf16ps => self.dotted_halves(i, lanes)?,
            Mnemonic::Vextractf128 | Mnemonic::Vextractf32x4 | Mnemonic::Vextractf32x8 => {
                self.extracted(i)?;
            }
            Mnemonic::Vinsertps | Mnemonic::Vinsertf128 | Mnemonic::Vinsertf32x4 => {
                self.inserted(i)?;
            }
            // Clears a register, whatever it holds.
            Mnemonic::Vxorps if i.op_register(1) == i.op_register(2) && !is_memory(i, 2) => {
                self.set_vector(i, [0; 16], lanes)?;
            }
            _ => return Ok(self.ordered(i, lanes)? || self.each(i, lanes)?),
        }
        Ok(true)
    }

    /// Instructions that change the order of lanes.
    fn ordered(&mut self, i: &Instruction, lanes: usize) -> Result<bool, Fault> {
        match i.mnemonic() {
            Mnemonic::Vpermq => {
                let (from, order) = (self.lanes(i, 1, lanes)?, i.immediate8());
                let pick = |k: usize| {
                    let quarter = usize::from(order >> (k / 2 % 4 * 2) & 3);
                    from[k / 8 * 8 + 2 * quarter + k % 2]
                };
                self.set_vector(i, std::array::from_fn(pick), lanes)?;
            }
            Mnemonic::Vpermt2ps => {
                let both = [self.lanes(i, 0, lanes)?, self.lanes(i, 2, lanes)?];
                let order = self.lanes(i, 1, lanes)?;
                let pick = |k: usize| {
                    let at = order[k] as usize % (2 * lanes);
                    both[at / lanes][at % lanes]
                };
                self.set_vector(i, std::array::from_fn(pick), lanes)?;
            }
            Mnemonic::Vpermps => {
                let (order, from) = (self.lanes(i, 1, lanes)?, self.lanes(i, 2, lanes)?);
                let pick = |k: usize| from[order[k] as usize % lanes];
                self.set_vector(i, std::array::from_fn(pick), lanes)?;
            }
            Mnemonic::Vblendps => {
                let (no, yes) = (self.lanes(i, 1, lanes)?, self.lanes(i, 2, lanes)?);
                let pick =
                    |k: usize| if i.immediate8() >> (k % 8) & 1 == 1 { yes[k] } else { no[k] };
                self.set_vector(i, std::array::from_fn(pick), lanes)?;
            }
            Mnemonic::Vpermilps => {
                let (from, order) = (self.lanes(i, 1, lanes)?, i.immediate8());
                let pick = |k: usize| from[k / 4 * 4 + usize::from(order >> (k % 4 * 2) & 3)];
                self.set_vector(i, std::array::from_fn(pick), lanes)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Lane by lane.
    fn each(&mut self, i: &Instruction, lanes: usize) -> Result<bool, Fault> {
        let mnemonic = i.mnemonic();
        let binary = two(mnemonic, 0, 0).is_some();
        if !binary && one(mnemonic, 0, 8).is_none() {
            return Ok(false);
        }
        let first = self.lanes(i, 1, lanes)?;
        let second = if binary { self.lanes(i, 2, lanes)? } else { first };
        let mut result = [0; 16];
        for lane in 0..lanes {
            let value = match binary {
                true => two(mnemonic, first[lane], second[lane]),
                false => one(mnemonic, first[lane], i.immediate8()),
            };
            result[lane] = value.ok_or("an unknown number")?;
        }
        self.set_vector(i, result, lanes)?;
        Ok(true)
    }
}
