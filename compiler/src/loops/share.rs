//! Loops that are shared out to threads: enough pieces of them, cut so that a thread finds what it
//! wrote before.
//!
//! The loops around a kernel's statements, one in another, may run in any order and at once where
//! the kernel reads no memory that it writes: nothing passes from one turn to the next, as all
//! that a turn keeps in registers it has to set first.

use std::ops::RangeInclusive;
use std::sync::Arc;

use kiln_runtime::tensor::DType;

use super::contract::widened;
use super::ir::{
    Buffer, BufferId, Expr, Kind, Loops, Number, Param, Place, Scope, Stmt, Var, work,
};
use super::rewrite::{prune, substitute};
use crate::graph::op::{Affine, BinaryFn};

/// Pieces that a kernel of much work is cut into at least, where that can be.
const PIECES: usize = 64;
/// Work of a turn that is a piece by itself: to find the indices of a piece of several loops
/// takes some divisions.
const LEAST_WORK: u64 = 100;
/// Blocks of rows at least, where each of them goes through all panels.
const BLOCKS: usize = 8;
/// Bytes of all panels at most for that: they stay in the cache of a core.
const PANEL_BYTES: usize = 256 << 10;

/// Work that makes a chunk: some 20 us where it is sums of products. A thread that is done waits no
/// longer for another.
const CHUNK_WORK: u64 = 300_000;

/// Work below which a kernel is not worth sharing out: one or two us.
const SERIAL_WORK: u64 = 20_000;

/// How many chunks a kernel of that much work is cut into at most.
pub fn chunks(work: u64) -> usize {
    match work {
        0..SERIAL_WORK => 1,
        work => (work / CHUNK_WORK).clamp(16, 128) as usize,
    }
}

/// A loop around everything.
#[derive(Clone, Copy)]
struct Outer {
    var: Var,
    extent: usize,
    kind: Kind,
}

/// The loops around statements, outermost first, as far as their turns may run in any order.
#[derive(Clone)]
struct Nest<'a> {
    buffers: &'a [Buffer],
    outer: Vec<Outer>,
    body: Vec<Stmt>,
    /// The first number that no variable has.
    free: usize,
}

/// Shares the loops of a kernel out anew where they make too few pieces. Those of a contraction go
/// through blocks of rows first, where their panels fit into a cache: the kernels before and after
/// are cut along rows as well.
pub fn share(kernel: Loops, contraction: bool) -> Loops {
    if chunks(kernel.work()) == 1 {
        return kernel;
    }
    let Some(mut nest) = Nest::of(&kernel) else { return kernel };
    if contraction && let Some(rows_first) = nest.rows_first() {
        nest = rows_first;
    }
    nest.cut();
    let body = nest.wrapped();
    Loops { body, ..kernel }
}

/// Work of a turn that is too much for one thread of a GPU: a launch more takes less time.
const LONG_TURN: u64 = 1 << 14;

/// Makes all outer loops parallel whose turns may run in any order: for machines that have a thread
/// for every turn. Loops one after another, in which other elements are stored, become kernels of
/// their own: then each of them has threads for its turns.
pub fn spread(kernel: Loops) -> Vec<Loops> {
    let Some(mut nest) = Nest::any(&kernel) else { return vec![kernel] };
    while nest.join_beside(&kernel, true) {}
    let long = work(nest.buffers, &nest.body) >= LONG_TURN;
    let alone = nest.body.iter().all(|stmt| stores_alone(nest.buffers, stmt));
    if nest.body.len() > 1 && long && alone && kernel.ranges.is_empty() {
        let pieces = std::mem::take(&mut nest.body).into_iter().enumerate();
        let piece = |(n, stmt)| {
            let body = Nest { body: vec![stmt], ..nest.clone() }.wrapped();
            let (buffers, body) = prune(kernel.buffers.clone(), body);
            Loops { name: format!("{}.{n}", kernel.name), buffers, body, ranges: Vec::new() }
        };
        return pieces.map(piece).flat_map(spread).collect();
    }
    nest.join_beside(&kernel, false);
    nest.outer.iter_mut().for_each(|outer| outer.kind = Kind::Parallel);
    let body = nest.wrapped();
    vec![Loops { body, ..kernel }]
}

/// Whether a statement is a loop that keeps nothing in registers.
fn stores_alone(buffers: &[Buffer], stmt: &Stmt) -> bool {
    let used = uses(buffers.len(), std::slice::from_ref(stmt));
    let mut registers = buffers.iter().zip(used).filter(|(b, _)| b.scope == Scope::Register);
    matches!(stmt, Stmt::For { .. }) && registers.all(|(_, used)| !used.read && !used.written)
}

fn number(n: usize) -> Expr {
    Expr::Const(DType::I64, Number::Int(n as i128))
}

/// Whether a variable is less than a number.
fn less(var: Var, bound: usize) -> Expr {
    let index = Arc::new(Expr::Index(Affine::axis(var.into())));
    Expr::Binary(BinaryFn::Lt, index, Arc::new(number(bound)))
}

impl<'a> Nest<'a> {
    /// The loops of a kernel, where they can be cut.
    fn of(kernel: &'a Loops) -> Option<Nest<'a>> {
        if kernel.ranges.is_empty() { Nest::any(kernel) } else { None }
    }

    /// The loops of a kernel, as far as they can be made parallel.
    fn any(kernel: &'a Loops) -> Option<Nest<'a>> {
        let buffers = &kernel.buffers[..];
        if !apart(buffers, &kernel.body) {
            return None;
        }
        let (mut outer, mut body) = (Vec::new(), &kernel.body[..]);
        // Emitters pass over turns beyond those that a run makes, not over those before.
        let first = |var: Var| kernel.range(var).is_none_or(|range| range.from.is_none());
        while let [Stmt::For { var, extent, kind, body: inner }] = body
            && (*kind == Kind::Parallel || *kind == Kind::Serial && moves(buffers, inner, *var))
            && first(*var)
        {
            outer.push(Outer { var: *var, extent: *extent, kind: *kind });
            body = inner;
        }
        let free = most(&kernel.body) + 1;
        // Two loops are cut at most.
        let enough = free + 4 <= usize::from(Var::MAX);
        enough.then(|| Nest { buffers, outer, body: body.to_vec(), free })
    }

    fn wrapped(self) -> Vec<Stmt> {
        self.outer.into_iter().rev().fold(self.body, |body, Outer { var, extent, kind }| {
            vec![Stmt::For { var, extent, kind, body }]
        })
    }

    /// Shares out one more loop where there are too few pieces.
    fn cut(&mut self) {
        let count = self.outer.iter().take_while(|o| o.kind == Kind::Parallel).count();
        let pieces: usize = self.outer[..count].iter().map(|o| o.extent).product();
        let all = work(self.buffers, &self.clone().wrapped());
        let enough = chunks(all).min(PIECES);
        if pieces >= enough || (count == self.outer.len() && !self.join_rest()) {
            return;
        }
        let next = self.outer[count].extent;
        let wanted = enough.div_ceil(pieces);
        match divisor(next, wanted..=4 * wanted) {
            Some(blocks) if blocks < next => self.split(count, blocks),
            _ if pieces > 1 && self.turn(count) < LEAST_WORK => return,
            _ => {}
        }
        self.outer[count].kind = Kind::Parallel;
    }

    /// Work of one turn of a loop.
    fn turn(&self, at: usize) -> u64 {
        let inside = Nest { outer: self.outer[at + 1..].to_vec(), ..self.clone() };
        work(self.buffers, &inside.wrapped())
    }

    /// Cuts a loop into blocks: a loop over these, and one inside of a block.
    fn split(&mut self, at: usize, blocks: usize) {
        let Outer { var, extent, kind } = self.outer[at];
        let width = extent / blocks;
        let [block, inside] = [self.free, self.free + 1];
        self.free += 2;
        let index = Affine::scaled(block, width as i64).plus(inside, 1);
        self.body = substitute(&self.body, var, &index);
        self.outer[at] = Outer { var: block as Var, extent: blocks, kind };
        let inside = Outer { var: inside as Var, extent: width, kind: Kind::Serial };
        self.outer.insert(at + 1, inside);
    }

    /// Loops one after another become one loop, an outer one: it makes as many turns as the longest
    /// of them, in which the others do something as far as they go. Says whether there are such
    /// loops; `equal` where all of them have to be as long.
    fn join_beside(&mut self, kernel: &Loops, equal: bool) -> bool {
        let mut all = Vec::new();
        for stmt in &self.body {
            let Stmt::For { var, extent, kind: Kind::Serial, body } = stmt else { return false };
            let apart = stores_alone(self.buffers, stmt) && moves(self.buffers, body, *var);
            if !apart || kernel.range(*var).is_some() {
                return false;
            }
            all.push((*var, *extent, body));
        }
        let Some(&(var, longest, _)) = all.iter().max_by_key(|l| l.1) else { return false };
        if equal && all.iter().any(|l| l.1 != longest) {
            return false;
        }
        let mut joined = Vec::new();
        for (own, extent, body) in all {
            let body = substitute(body, own, &Affine::axis(var.into()));
            joined.extend(match extent == longest {
                true => body,
                false => vec![Stmt::If { condition: less(var, extent), then: body, other: vec![] }],
            });
        }
        self.outer.push(Outer { var, extent: longest, kind: Kind::Serial });
        self.body = joined;
        true
    }

    /// Where a loop is followed by statements for what is left of its axis, these become part of
    /// its last turn. Says whether there is such a loop.
    fn join_rest(&mut self) -> bool {
        let [Stmt::For { var, extent, kind: Kind::Serial, body }, rest @ ..] = &self.body[..]
        else {
            return false;
        };
        let (var, extent) = (*var, *extent);
        let register = |b: &usize| self.buffers[*b].scope == Scope::Register;
        let [first, second] = [&body[..], rest].map(|part| uses(self.buffers.len(), part));
        let mut registers = (0..self.buffers.len()).filter(register);
        let own = registers.all(|b| !(first[b].any() && second[b].any()));
        // The last turn is not to take much longer than others.
        let little =
            work(self.buffers, rest).saturating_mul(4) <= work(self.buffers, &self.body[..1]);
        if rest.is_empty() || !little || !own || !moves(self.buffers, body, var) {
            return false;
        }
        let [index, last] = [Expr::Index(Affine::axis(var.into())), number(extent - 1)];
        let condition = Expr::Binary(BinaryFn::Le, Arc::new(last), Arc::new(index));
        let mut joined = body.clone();
        joined.push(Stmt::If { condition, then: rest.to_vec(), other: Vec::new() });
        self.outer.push(Outer { var, extent, kind: Kind::Serial });
        self.body = joined;
        true
    }

    /// With blocks of rows outside of the loop over panels.
    fn rows_first(&self) -> Option<Nest<'a>> {
        let mut nest = self.clone();
        if nest.outer.len() == 1 {
            nest.join_rest();
        }
        let [panels, rows, ..] = nest.outer[..] else { return None };
        let [x, y] = operands(&nest.body)?;
        let step = |operand: (BufferId, &Affine), var: Var| operand.1.coefficient(var.into());
        let (panel, other) = if step(x, panels.var) != 0 { (x, y) } else { (y, x) };
        let bytes = |b: usize| self.buffers[b].len.saturating_mul(self.buffers[b].dtype.bytes());
        let uses = uses(self.buffers.len(), &nest.body);
        let memory = |b: &usize| self.buffers[*b].scope == Scope::Global && uses[*b].written;
        let results: usize = (0..self.buffers.len()).filter(memory).map(bytes).sum();
        let fits = [(panel, panels.var, true), (panel, rows.var, false)]
            .into_iter()
            .chain([(other, panels.var, false), (other, rows.var, true)])
            .all(|(operand, var, moves)| (step(operand, var) != 0) == moves)
            && bytes(panel.0) <= PANEL_BYTES.min(bytes(other.0) + results);
        let blocks = divisor(rows.extent, BLOCKS..=4 * BLOCKS).filter(|_| fits)?;
        // A panel is read again for every block: that should have several tiles.
        let tiles = matches!(nest.body[0], Stmt::For { kind: Kind::Serial, .. });
        match blocks < rows.extent {
            true => nest.split(1, blocks),
            false if tiles || nest.outer.len() > 2 => {}
            false => return None,
        }
        nest.outer.swap(0, 1);
        for (at, outer) in nest.outer.iter_mut().enumerate() {
            outer.kind = if at < 2 { Kind::Parallel } else { Kind::Serial };
        }
        Some(nest)
    }
}

/// What statements do with a buffer.
#[derive(Clone, Copy, Default)]
pub struct Use {
    /// Whether they load from it.
    pub read: bool,
    /// Whether they store to it.
    pub written: bool,
}

impl Use {
    fn any(self) -> bool {
        self.read || self.written
    }
}

/// What statements do with each buffer.
pub fn uses(buffers: usize, body: &[Stmt]) -> Vec<Use> {
    fn expr(e: &Expr, uses: &mut [Use]) {
        match e {
            Expr::Load(buffer, place) | Expr::Word(buffer, place) => {
                uses[*buffer].read = true;
                place.dynamic.iter().for_each(|e| expr(e, uses));
            }
            Expr::Fold(_, buffer) => uses[*buffer].read = true,
            Expr::Index(_) | Expr::Const(..) => {}
            Expr::Unary(_, x) | Expr::Cast(_, x) => expr(x, uses),
            Expr::Binary(_, x, y) => [x, y].into_iter().for_each(|e| expr(e, uses)),
            Expr::Select(x, y, z) | Expr::Fma(x, y, z) | Expr::Dot(_, x, y, z) => {
                [x, y, z].into_iter().for_each(|e| expr(e, uses));
            }
        }
    }
    fn block(body: &[Stmt], uses: &mut [Use]) {
        for stmt in body {
            match stmt {
                Stmt::For { body, .. } => block(body, uses),
                Stmt::Store { buffer, place, value } => {
                    uses[*buffer].written = true;
                    place.dynamic.iter().for_each(|e| expr(e, uses));
                    expr(value, uses);
                }
                Stmt::If { condition, then, other } => {
                    expr(condition, uses);
                    block(then, uses);
                    block(other, uses);
                }
                Stmt::Multiply(m) => {
                    uses[m.sums.0] = Use { read: true, written: true };
                    m.sides.iter().for_each(|side| uses[side.buffer].read = true);
                }
                Stmt::Prefetch { .. } => {}
            }
        }
    }
    let mut uses = vec![Use::default(); buffers];
    block(body, &mut uses);
    uses
}

/// Calls a function with every store.
fn each_store<'a>(body: &'a [Stmt], visit: &mut dyn FnMut(BufferId, &'a Place, &'a Expr)) {
    for stmt in body {
        match stmt {
            Stmt::For { body, .. } => each_store(body, visit),
            Stmt::Store { buffer, place, value } => visit(*buffer, place, value),
            Stmt::If { then, other, .. } => {
                each_store(then, visit);
                each_store(other, visit);
            }
            Stmt::Prefetch { .. } | Stmt::Multiply(_) => {}
        }
    }
}

/// Whether a value is the same for all turns of all loops: what the lengths of dims make of it.
fn settled(buffers: &[Buffer], e: &Expr) -> bool {
    match e {
        Expr::Const(..) => true,
        Expr::Load(buffer, place) => {
            let fixed = place.affine.terms.is_empty() && place.dynamic.is_none();
            buffers[*buffer].param == Param::Dims && fixed
        }
        Expr::Unary(_, x) | Expr::Cast(_, x) => settled(buffers, x),
        Expr::Binary(_, x, y) => [x, y].into_iter().all(|e| settled(buffers, e)),
        Expr::Select(x, y, z) | Expr::Fma(x, y, z) | Expr::Dot(_, x, y, z) => {
            [x, y, z].into_iter().all(|e| settled(buffers, e))
        }
        Expr::Index(_) | Expr::Fold(..) | Expr::Word(..) => false,
    }
}

/// Whether no memory is read that is written, and data does not decide where.
fn apart(buffers: &[Buffer], body: &[Stmt]) -> bool {
    let memory = |b: BufferId| buffers[b].scope == Scope::Global;
    let uses = uses(buffers.len(), body);
    let mut apart = (0..buffers.len()).all(|b| !(memory(b) && uses[b].read && uses[b].written));
    each_store(body, &mut |buffer, place, _| {
        let known = place.dynamic.as_ref().is_none_or(|e| settled(buffers, e));
        apart &= !memory(buffer) || known;
    });
    apart
}

/// Whether every turn of a loop writes other memory.
fn moves(buffers: &[Buffer], body: &[Stmt], var: Var) -> bool {
    let mut moves = true;
    each_store(body, &mut |buffer, place, _| {
        let memory = buffers[buffer].scope == Scope::Global;
        moves &= !memory || place.affine.coefficient(var.into()) != 0;
    });
    moves
}

/// The operands of the first sum of products.
fn operands(body: &[Stmt]) -> Option<[(BufferId, &Affine); 2]> {
    let mut found = None;
    each_store(body, &mut |_, _, value| {
        if let (None, Expr::Fma(x, y, _) | Expr::Dot(_, x, y, _)) = (found, value) {
            found = widened(x).zip(widened(y));
        }
    });
    found.map(|(x, y)| [x, y])
}

/// The greatest number of a loop variable.
fn most(body: &[Stmt]) -> usize {
    let inside = |stmt: &Stmt| match stmt {
        Stmt::For { var, body, .. } => most(body).max((*var).into()),
        Stmt::Store { .. } | Stmt::Prefetch { .. } | Stmt::Multiply(_) => 0,
        Stmt::If { then, other, .. } => most(then).max(most(other)),
    };
    body.iter().map(inside).max().unwrap_or(0)
}

/// The least divisor of a number in a range.
fn divisor(number: usize, mut range: RangeInclusive<usize>) -> Option<usize> {
    range.find(|&d| number.is_multiple_of(d))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::eval::Data;
    use crate::loops::eval::eval;
    use crate::loops::text::parse;
    use crate::loops::verify::verify;

    /// The extents and kinds of the loops of a kernel that has been shared out anew. Its results
    /// are those of before.
    fn shared(text: &str, contraction: bool) -> Vec<(usize, Kind)> {
        let before = parse(text).expect("a kernel").remove(0);
        let after = share(before.clone(), contraction);
        verify(&after).expect("a kernel that keeps to its memory");
        let numbers = |len: usize| (0..len).map(|i| ((i * 7) % 23) as f64 - 11.0).collect();
        let memory = before.buffers.iter().filter(|b| b.scope == Scope::Global);
        let given: Vec<Data> = memory.map(|b| Data::Float(numbers(b.len))).collect();
        let [first, second] = [&before, &after].map(|kernel| {
            let mut buffers = given.clone();
            eval(kernel, &mut buffers).expect("a run");
            buffers
        });
        assert_eq!(first, second);
        let (mut outer, mut body) = (Vec::new(), &after.body[..]);
        while let [Stmt::For { extent, kind, body: inner, .. }] = body {
            outer.push((*extent, *kind));
            body = inner;
        }
        outer
    }

    /// Tiles of 5 rows and one of 3, by panels of 4: with a loop over panels where there are some.
    fn product(panels: usize, tiles: usize) -> String {
        let (rows, columns) = (5 * tiles + 3, 4 * panels);
        let tile = |register: usize, height: usize, [from, to]: [String; 2]| {
            format!(
                "unroll i2 in {height} {{ vector i3 in 4 {{ b{register}[4*i2 + i3] = 0.0:f32 }} }}
                for i4 in 40 {{ unroll i2 in {height} {{ vector i3 in 4 {{
                  b{register}[4*i2 + i3] = fma(b0[40*i2 + i4 + {from}],
                    b1[160*i0 + 4*i4 + i3], b{register}[4*i2 + i3])
                }} }} }}
                unroll i2 in {height} {{ vector i3 in 4 {{
                  b2[4*i0 + {columns}*i2 + i3 + {to}] = b{register}[4*i2 + i3]
                }} }}"
            )
        };
        let whole = tile(3, 5, ["200*i1".into(), format!("{}*i1", 5 * columns)]);
        let [from, to] = [40, columns].map(|row| (5 * tiles * row).to_string());
        let rest = tile(4, 3, [from, to]);
        format!(
            "kernel \"product\" {{
              b0 : f32[{}] arg 0
              b1 : f32[{}] arg 1
              b2 : f32[{}] out
              b3 : f32[20] register
              b4 : f32[12] register
              parallel i0 in {panels} {{ for i1 in {tiles} {{ {whole} }} {rest} }}
            }}",
            40 * rows,
            40 * columns,
            rows * columns
        )
    }

    #[test]
    fn what_is_left_of_an_axis_is_part_of_the_last_turn() {
        use Kind::{Parallel, Serial};
        // One panel: the rows are all that there is to share out.
        let outer = shared(&product(1, 48), false);
        assert_eq!(outer, [(1, Parallel), (16, Parallel), (3, Serial)]);
        // 47 has no divisors, so every turn is a piece.
        assert_eq!(shared(&product(2, 47), false), [(2, Parallel), (47, Parallel)]);
        // There are enough panels, and nothing changes.
        assert_eq!(shared(&product(16, 3), false), [(16, Parallel)]);
    }

    #[test]
    fn blocks_of_rows_go_through_all_panels() {
        use Kind::{Parallel, Serial};
        let outer = shared(&product(4, 48), true);
        assert_eq!(outer, [(8, Parallel), (4, Parallel), (6, Serial)]);
        // More weights than rows: those are shared out.
        assert_eq!(shared(&product(32, 3), true), [(32, Parallel)]);
    }

    #[test]
    fn turns_that_hang_on_one_another_stay_in_order() {
        let long = |store: &str| {
            format!(
                "kernel \"k\" {{
                  b0 : f32[4096] arg 0
                  b1 : f32[4096] out
                  for i0 in 64 {{ for i1 in 64 {{ {store} }} }}
                }}"
            )
        };
        let blocks = shared(&long("b1[64*i0 + i1] = tanh(b0[64*i0 + i1])"), false);
        assert_eq!(blocks[0], (16, Kind::Parallel));
        for store in ["b1[i1] = b0[64*i0 + i1]", "b1[64*i0 + i1] = add(b0[i0], b1[i1])"] {
            let outer = shared(&long(store), false);
            assert!(outer.iter().all(|o| o.1 == Kind::Serial), "{store}: {outer:?}");
        }
        let scattered = "b1[0 + i64(index(i0))] = b0[64*i0 + i1]";
        let kernel = parse(&long(scattered)).expect("a kernel").remove(0);
        assert_eq!(share(kernel.clone(), false), kernel);
    }
}
