//! Rows that the threads of a GPU keep in registers: memory is read once for all passes over a row,
//! and what several of them ask for is computed once.

use std::collections::BTreeSet;

use kiln_runtime::tensor::DType;

use super::gpu::VECTOR;
use super::lower::{Lower, Lowering, Refused};
use crate::graph::op::Op;

/// Elements of a row for each of its threads at most.
const EACH: usize = 32;
/// Values of all rows that a thread keeps at most. What is computed of one that nobody asks for any
/// more takes its registers.
const ROOM: usize = 2 * EACH;

/// In which way all passes go through a row, so that every thread finds what it has kept.
#[derive(Clone, Debug)]
pub struct Form {
    /// Neighbours that a thread takes at once.
    pub near: usize,
    /// Extents of the loops of a pass, once there was one.
    loops: Option<Vec<usize>>,
    /// Values of the row that a thread may still keep.
    room: usize,
}

impl Form {
    /// The ways that are tried, the best first.
    pub fn all() -> [Form; 2] {
        [VECTOR, 1].map(|near| Form { near, loops: None, room: ROOM })
    }

    /// Says that a pass has loops of these extents, of which each thread makes so many turns.
    pub fn goes(&mut self, loops: Vec<usize>, turns: usize) -> Lowering<()> {
        if turns * self.near > EACH {
            return Err(Refused("a row of more elements than threads keep".into()));
        }
        match self.loops.get_or_insert_with(|| loops.clone()) {
            known if *known == loops => Ok(()),
            _ => Err(Refused("passes that go through a row in ways of their own".into())),
        }
    }
}

/// Values that a pass makes on its way to a node and that passes to other nodes, which come after
/// it, ask for at the same element of a row of so many: as many as there is room for.
pub fn kept(lower: &mut Lower, row: usize, pass: usize, later: &[usize]) -> Vec<usize> {
    let Some(form) = &lower.form else { return Vec::new() };
    let shape = &lower.ty(pass).shape;
    let each = row.div_ceil(lower.row_threads * form.near) * form.near;
    let mut walk = Walk { lower, shape, made: BTreeSet::new(), seen: BTreeSet::new() };
    walk.makes(pass);
    let mut asked = [BTreeSet::new(), BTreeSet::new()];
    later.iter().for_each(|&node| walk.asks(node, true, &mut asked));
    let [elsewhere, here] = asked;
    let all: Vec<usize> = here.difference(&elsewhere).copied().collect();
    let count = all.len().min(form.room / each);
    if let Some(form) = &mut lower.form {
        form.room -= count * each;
    }
    all[..count].to_vec()
}

/// A walk from nodes to what they are computed of.
struct Walk<'a, 'b> {
    lower: &'a Lower<'b>,
    shape: &'a [usize],
    /// What the pass makes.
    made: BTreeSet<usize>,
    seen: BTreeSet<(usize, bool)>,
}

impl Walk<'_, '_> {
    /// Operands of a node, and whether its elements are computed of theirs at the same places.
    fn operands(&self, node: usize) -> impl Iterator<Item = (usize, bool)> + use<'_> {
        let node = &self.lower.body.nodes[node];
        let pointwise = matches!(node.op, Op::Unary(_) | Op::Binary(_) | Op::Select | Op::Cast(_));
        let same = move |arg: usize| pointwise && self.lower.ty(arg).shape[..] == *self.shape;
        node.args.iter().map(move |arg| (arg.index(), same(arg.index())))
    }

    /// Whether a node's value is at hand, or there is a pass of its own for it.
    fn ends(&self, node: usize) -> bool {
        self.lower.is_bound(node) || matches!(self.lower.body.nodes[node].op, Op::Reduce(..))
    }

    fn makes(&mut self, node: usize) {
        if self.ends(node) || !self.made.insert(node) {
            return;
        }
        let all: Vec<usize> = self.operands(node).filter(|x| x.1).map(|x| x.0).collect();
        all.into_iter().for_each(|node| self.makes(node));
    }

    /// Finds what is asked for of that, elsewhere in a row and at the same place.
    fn asks(&mut self, node: usize, same: bool, found: &mut [BTreeSet<usize>; 2]) {
        if self.ends(node) || !self.seen.insert((node, same)) {
            return;
        }
        let ty = self.lower.ty(node);
        let fits = ty.dtype != DType::Bool && ty.dtype.bytes() <= 4;
        let cheap = matches!(self.lower.body.nodes[node].op, Op::Iota(..) | Op::Const(_));
        if self.made.contains(&node) && fits && !cheap {
            found[usize::from(same)].insert(node);
            if same {
                return;
            }
        }
        let all: Vec<(usize, bool)> = self.operands(node).collect();
        all.into_iter().for_each(|(arg, there)| self.asks(arg, same && there, found));
    }
}
