//! Numbers that loops read from the pool of constants stay in registers where some are left. A
//! polynomial reads as many numbers as it has terms, and a core reads two in a cycle while it
//! multiplies twice.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use regalloc2::{Operand, OperandKind, RegClass, VReg};
use smallvec::smallvec;

use super::isa::{self, Level, Width};
use super::ssa::{Arg, Piece, What};

/// Registers that are left to the allocator, which moves values.
const SPARE: usize = 2;
/// How many turns a loop is taken to make.
const TURNS: u64 = 8;

/// Moves numbers of loops into registers before them, those first that are read most often and
/// in outer loops before inner ones. `fresh` makes registers.
pub fn keep(pieces: &mut [Piece], level: Level, mut fresh: impl FnMut() -> VReg) {
    let loops = loops(pieces);
    let mut instead = HashMap::new();
    for (own, before) in &loops {
        let numbers = ranked(pieces, own, &loops);
        if numbers.is_empty() {
            continue;
        }
        let free = level.registers().saturating_sub(SPARE + most_alive(pieces, own, &loops));
        for bits in numbers.into_iter().take(free) {
            let register = fresh();
            define(&mut pieces[*before], bits, register, level);
            replace(&mut pieces[own.clone()], bits, register, &mut instead);
        }
        rename(pieces, &mut instead);
    }
}

/// The blocks of each loop, and the block before it; outer ones first. Blocks that come in only
/// when a loop makes a turn count as its own.
fn loops(pieces: &[Piece]) -> Vec<(Range<usize>, usize)> {
    let mut ends = BTreeMap::new();
    for (from, piece) in pieces.iter().enumerate() {
        for to in piece.next().into_iter().filter(|&to| to <= from) {
            ends.insert(to, from + 1);
        }
    }
    let outside = |own: &Range<usize>| {
        let enters = |p: &usize| pieces[*p].next().iter().any(|to| own.contains(to));
        let mut all = (0..pieces.len()).filter(|p| !own.contains(p)).filter(enters);
        all.next().filter(|_| all.next().is_none())
    };
    ends.into_iter()
        .map(|(from, to)| from..to)
        .filter_map(|own| Some((own.clone(), outside(&own)?)))
        .collect()
}

/// What a step reads from the pool, and what a register for it would save: a read, or a step.
fn number(what: &What) -> Option<(u32, u64)> {
    let What::Plain(_, args) = what else { return None };
    args.iter().find_map(|arg| match arg {
        Arg::Pool(bits) => Some((*bits, 1)),
        Arg::Element(bits) => Some((*bits, 2)),
        _ => None,
    })
}

/// The numbers that a loop reads, those first that it reads most often.
fn ranked(pieces: &[Piece], own: &Range<usize>, loops: &[(Range<usize>, usize)]) -> Vec<u32> {
    let mut reads: BTreeMap<u32, u64> = BTreeMap::new();
    for block in own.clone() {
        let depth = loops.iter().filter(|(l, _)| l.contains(&block)).count() as u32;
        let turns = TURNS.saturating_pow(depth.min(16));
        for (bits, saved) in pieces[block].steps.iter().filter_map(|step| number(&step.what)) {
            let all = reads.entry(bits).or_default();
            *all = all.saturating_add(saved * turns);
        }
    }
    let mut numbers: Vec<(u32, u64)> = reads.into_iter().collect();
    numbers.sort_by_key(|&(_, reads)| std::cmp::Reverse(reads));
    numbers.into_iter().map(|(bits, _)| bits).collect()
}

/// Vector registers that are in use at the same time in a loop, at most.
fn most_alive(pieces: &[Piece], own: &Range<usize>, loops: &[(Range<usize>, usize)]) -> usize {
    // From the step that makes a register to the last one that uses it, in the order of blocks.
    let mut spans: HashMap<VReg, (usize, usize)> = HashMap::new();
    let (mut at, mut starts) = (0, Vec::new());
    for piece in pieces {
        starts.push(at);
        let mut touch = |register: VReg, at: usize| {
            if register.class() == RegClass::Float {
                spans.entry(register).or_insert((at, at)).1 = at;
            }
        };
        piece.params.iter().for_each(|&r| touch(r, at));
        for step in &piece.steps {
            step.operands.iter().for_each(|o| touch(o.vreg(), at));
            at += 1;
        }
        piece.args.iter().for_each(|&r| touch(r, at - 1));
    }
    starts.push(at);
    // What comes from before a loop and is used in it stays for all of its turns; inner ones first.
    for (inner, _) in loops.iter().rev() {
        let (start, end) = (starts[inner.start], starts[inner.end] - 1);
        for span in spans.values_mut().filter(|s| s.0 < start && (start..end).contains(&s.1)) {
            span.1 = end;
        }
    }
    let (start, end) = (starts[own.start], starts[own.end]);
    let mut changes = vec![0isize; end - start + 1];
    for &(from, to) in spans.values().filter(|s| s.0 < end && s.1 >= start) {
        changes[from.max(start) - start] += 1;
        changes[(to + 1).min(end) - start] -= 1;
    }
    let alive = changes.iter().scan(0, |alive, change| {
        *alive += change;
        Some(*alive)
    });
    alive.max().unwrap_or(0) as usize
}

/// Reads a number into every lane of a register, at the end of a block.
fn define(piece: &mut Piece, bits: u32, register: VReg, level: Level) {
    let code = isa::SPREAD.code(level, level.width());
    let what = What::Plain(code, smallvec![Arg::Vector(0, level.width()), Arg::Element(bits)]);
    piece.insert_last(what, smallvec![Operand::reg_def(register)]);
}

/// Takes a number from a register wherever it is read; registers that had it are in `instead`.
fn replace(pieces: &mut [Piece], bits: u32, register: VReg, instead: &mut HashMap<VReg, VReg>) {
    for piece in pieces {
        piece.steps.retain_mut(|step| {
            let What::Plain(_, args) = &mut step.what else { return true };
            if args.contains(&Arg::Element(bits)) {
                instead.insert(step.operands[0].vreg(), register);
                return false;
            }
            let width = args.iter().find_map(|arg| match arg {
                Arg::Vector(_, width) => Some(*width),
                _ => None,
            });
            let place = step.operands.len() as u8;
            for arg in args.iter_mut().filter(|arg| **arg == Arg::Pool(bits)) {
                *arg = Arg::Vector(place, width.unwrap_or(Width::Xmm));
                step.operands.push(Operand::reg_use(register));
            }
            true
        });
    }
}

/// Uses other registers in the place of some.
fn rename(pieces: &mut [Piece], instead: &mut HashMap<VReg, VReg>) {
    if instead.is_empty() {
        return;
    }
    for piece in pieces {
        let operands = piece.steps.iter_mut().flat_map(|step| &mut step.operands);
        for operand in operands.filter(|o| o.kind() == OperandKind::Use) {
            if let Some(&other) = instead.get(&operand.vreg()) {
                *operand = Operand::reg_use(other);
            }
        }
        for arg in &mut piece.args {
            *arg = instead.get(arg).copied().unwrap_or(*arg);
        }
    }
    instead.clear();
}
