//! Products by all threads of a warp, on the units for matrices.

use std::collections::HashMap;

use kiln_runtime::tensor::DType;

use super::isa::{Class, Inst, Op, Operand, Reg, Ty};
use super::kernel::{Address, Ptx, Val};
use crate::backend::emit::{Emitted, Unsupported};
use crate::loops::ir::WARP_LINES;

/// What registers hold of rows or columns: from a base and an offset on, in steps from line to line
/// and from product to product, so many lines.
pub(super) type Fragments = HashMap<(Reg, i64, [i64; 2], usize), Vec<Reg>>;

/// Bytes of a row of a matrix.
const ROW: i64 = 16;

/// The type of elements that are multiplied.
fn element(dtype: DType) -> Emitted<Ty> {
    Ok(match dtype {
        DType::BF16 => Ty::BF16,
        DType::F16 => Ty::F16,
        DType::TF32 => Ty::TF32,
        DType::I8 => Ty::S8,
        DType::U8 => Ty::U8,
        _ => return Err(Unsupported(format!("products of {dtype} by a warp"))),
    })
}

impl Ptx {
    /// Adds the products of rows and columns to sums.
    pub(super) fn multiply_by_warp(
        &mut self,
        sides: &[(DType, Address, [i64; 2]); 2],
        sums: &[Val],
    ) -> Emitted<Vec<Val>> {
        let types = [element(sides[0].0)?, element(sides[1].0)?];
        let x = self.fragment(&sides[0], WARP_LINES[0])?;
        let y = self.fragment(&sides[1], WARP_LINES[1])?;
        let (ty, class) = match types[0] {
            Ty::S8 | Ty::U8 => (Ty::S32, Class::R),
            _ => (Ty::F32, Class::F),
        };
        let before: Vec<Operand> = sums.iter().map(Val::one).collect::<Emitted<_>>()?;
        let before = before.into_iter().map(|sum| self.held(ty, sum)).collect();
        let after: Vec<Reg> = sums.iter().map(|_| self.reg(class)).collect();
        let next = after.iter().map(|reg| Val::One(Operand::Reg(*reg))).collect();
        self.code.push(Inst::Multiply(types, [after, x, y, before]));
        Ok(next)
    }

    /// Rows or columns in registers. Where products are neighbours, a row of a matrix is a part of
    /// a line; else it is a part of what all lines have of one product, and is turned, or where
    /// elements are as long as registers these are loaded one by one.
    fn fragment(
        &mut self,
        (dtype, address, steps): &(DType, Address, [i64; 2]),
        lines: usize,
    ) -> Emitted<Vec<Reg>> {
        let at = address.at;
        let key = (at.base, at.offset, *steps, lines);
        if let Some(known) = self.fragments.get(&key) {
            return Ok(known.clone());
        }
        let bytes = dtype.bytes() as i64;
        if bytes == 4 && steps[0] == bytes {
            let to = self.words(address, steps[1], lines);
            self.fragments.insert(key, to.clone());
            return Ok(to);
        }
        let (step, turned) = match *steps {
            [line, product] if product == bytes => (line, false),
            [line, product] if line == bytes && bytes == 2 => (product, true),
            _ => return Err(Unsupported(format!("steps of {steps:?} by a warp"))),
        };
        if address.align() < ROW || step % ROW != 0 {
            return Err(Unsupported("rows of matrices that are not aligned".into()));
        }
        let mut bits = |from, mask| self.bits_of_lane(from, mask);
        // The line and the part of it that each lane gives the address of.
        let (line, part) = match (lines == WARP_LINES[0], turned) {
            (true, false) => (bits(0, 15), Some(bits(4, 1))),
            (false, false) => (bits(0, 7), Some(bits(3, 1))),
            (true, true) => {
                let (low, part, high) = (bits(0, 7), bits(3, 1), bits(4, 1));
                (self.calc(Op::Mad, Ty::S32, &[high, Operand::Int(8), low]), Some(part))
            }
            (false, true) => (bits(0, 15), None),
        };
        let mut own = self.calc(Op::Mul, Ty::S32, &[line, Operand::Int(step)]);
        if let Some(part) = part {
            own = self.calc(Op::Mad, Ty::S32, &[part, Operand::Int(ROW), own]);
        }
        let base = self.op(Op::Add, Ty::U32, &[Operand::Reg(at.base), own]);
        let to: Vec<Reg> = (0..lines / 4).map(|_| self.reg(Class::R)).collect();
        let at = super::isa::Address { base, ..at };
        self.code.push(Inst::Matrices(to.clone(), at, turned));
        self.fragments.insert(key, to.clone());
        Ok(to)
    }

    /// Some bits of the number of the lane.
    fn bits_of_lane(&mut self, from: i64, mask: i64) -> Operand {
        let lane = self.op(Op::Mov, Ty::U32, &[Operand::Thread]);
        let moved = self.calc(Op::Shr, Ty::U32, &[Operand::Reg(lane), Operand::Int(from)]);
        self.calc(Op::And, Ty::B32, &[moved, Operand::Int(mask)])
    }

    /// The same of words that are neighbours along lines: register `r` of lane `l` has product
    /// `l % 4` of line `l / 4`, or of one 8 lines or 4 products further.
    fn words(&mut self, address: &Address, product: i64, lines: usize) -> Vec<Reg> {
        let (line, first) = (self.bits_of_lane(2, 7), self.bits_of_lane(0, 3));
        let own = self.calc(Op::Mul, Ty::S32, &[first, Operand::Int(product)]);
        let own = self.calc(Op::Mad, Ty::S32, &[line, Operand::Int(4), own]);
        let base = self.op(Op::Add, Ty::U32, &[Operand::Reg(address.at.base), own]);
        let all = (0..2 * lines / 8).map(|register| {
            let (high, later) = (register % (lines / 8), register / (lines / 8));
            let further = (32 * high) as i64 + 4 * product * later as i64;
            let to = self.reg(Class::R);
            let at = super::isa::Address { base, align: 4, ..address.plus(further) };
            self.code.push(Inst::Load(address.space, Ty::B32, vec![to], at));
            to
        });
        all.collect()
    }
}
