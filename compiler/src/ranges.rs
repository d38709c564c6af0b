//! Models for ranges of dims. A model is imported twice, for the most that its dims may be and for
//! a little more: whatever number differs then hangs on a dim. Shapes may; a number that is
//! computed with may not, because it would be that of the longest run in every run. That shapes
//! hang on dims in proportion is looked after while the model is imported (`graph/lengths.rs`).

use kiln_runtime::plan::PlanDim;

use crate::error::{Diagnostic, Error, ErrorKind, Result};
use crate::graph::apart::apart;
use crate::graph::op::{Op, Type};
use crate::graph::text::{op_text, type_text};
use crate::graph::used::{Span, is_mixed, iteration, span};
use crate::graph::{Constant, Graph, Node, NodeId};

/// How much longer each dim is in the second import: no two alike.
const STEPS: [usize; 16] = [7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67];

/// What helps where a node needs the length of a dim as a number.
pub const ONE_LENGTH: &str = "compile for one length (--dim NAME=N); `kiln run`, and `on_demand` in \
                              process, compile for the lengths that they meet";

/// Lengths of the second import.
pub fn longer(dims: &[PlanDim]) -> Vec<(String, usize)> {
    let step =
        |(i, dim): (usize, &PlanDim)| (dim.name.clone(), dim.most.saturating_add(STEPS[i % 16]));
    dims.iter().enumerate().map(step).collect()
}

/// The graph for the most that dims may be, proved to be right for all of their lengths; `longer`
/// is the same model with longer dims.
///
/// # Errors
/// All nodes that need a number where there is a range, at once.
pub fn prove(graph: Graph, longer: &Graph) -> Result<Graph> {
    let (beyond, hanging) = (bounds(&graph, longer), hanging(&graph));
    let written = |graph: &Graph| apart(&graph.live()).live();
    let (graph, longer) = (written(&graph), written(longer));
    let proof = Proof { graph: &graph, longer: &longer };
    let mut problems = match (beyond, graph.nodes.len() == longer.nodes.len()) {
        (Some(problem), _) => vec![problem],
        (None, true) => proof.problems(),
        (None, false) => vec![proof.parting()],
    };
    if problems.is_empty() {
        problems = hanging;
    }
    if problems.is_empty() {
        return Ok(graph);
    }
    let problems = problems.into_iter().map(|problem| problem.help(ONE_LENGTH));
    Err(Error { kind: ErrorKind::Model, diagnostics: problems.collect() })
}

/// The first slice with a bound that hangs on a dim and lies beyond the slice's axis. Runs of other
/// lengths may have it within, so the slice is another piece for them.
fn bounds(graph: &Graph, longer: &Graph) -> Option<Diagnostic> {
    let (some, more) = (&graph.beyond, &longer.beyond);
    let differs = (0..some.len().max(more.len())).find(|&i| some.get(i) != more.get(i))?;
    let (origin, bound) = some.get(differs).or(more.get(differs))?;
    let problem = Diagnostic::new("K0110", "which of two lengths is shorter decides a slice");
    let found = format!("a bound of {bound} for the longest dims, beyond the axis");
    Some(problem.node(origin.as_ref()).found(found))
}

/// Constants that are read, and are others for other lengths.
fn hanging(graph: &Graph) -> Vec<Diagnostic> {
    let live = graph.live();
    let hangs = |op: &Op| matches!(op, Op::Const(constant) if graph.lengths.hangs(*constant));
    let nodes = live.nodes.iter().filter(|node| hangs(&node.op));
    let problem = |node: &Node| {
        let problem = Diagnostic::new("K0110", "the length of a dim is computed with");
        let found = "a constant that is another one for another length";
        problem.node(node.origin.as_ref()).found(found)
    };
    nodes.map(problem).collect()
}

/// An operation in a message; the number of a constant would say nothing.
fn said(op: &Op) -> String {
    match op {
        Op::Const(_) => "a constant".to_string(),
        op => op_text(op),
    }
}

struct Proof<'a> {
    graph: &'a Graph,
    longer: &'a Graph,
}

impl Proof<'_> {
    /// Where graphs of other nodes part.
    fn parting(&self) -> Diagnostic {
        let problem = Diagnostic::new("K0110", "the length of a dim decides what is computed");
        let mut pairs = self.graph.nodes.iter().zip(&self.longer.nodes);
        let parts = |(a, b): &(&Node, &Node)| a.args != b.args || !self.same(&a.op, &b.op);
        let Some((a, b)) = pairs.find(parts) else {
            let last = self.graph.nodes.last();
            return problem.node(last.map_or("", |node| node.origin.as_ref()));
        };
        let found = format!("{}, and {} where it is longer", said(&a.op), said(&b.op));
        problem.node(a.origin.as_ref()).found(found)
    }

    fn problems(&self) -> Vec<Diagnostic> {
        let nodes = self.graph.nodes.iter().zip(&self.longer.nodes);
        let mut problems: Vec<Diagnostic> = nodes
            .filter_map(|(node, other)| {
                let problem = self.node(node, other).err()?;
                Some(problem.node(node.origin.as_ref()))
            })
            .collect();
        for (name, id) in &self.graph.outputs {
            if (0..self.graph.ty(*id).rank()).any(|axis| self.hidden(*id, axis)) {
                let what = "an output is as long as a dim that it does not depend on";
                let problem = Diagnostic::new("K0110", what).tensor(name.clone());
                problems.push(problem.found(type_text(self.graph.ty(*id))));
            }
        }
        problems
    }

    /// Whether an axis is as long as a dim, though nothing that is in use in part went into it: it
    /// is whole, and longer than the model means it to be.
    fn hidden(&self, id: NodeId, axis: usize) -> bool {
        let (ty, other) = (self.graph.ty(id), self.longer.ty(id));
        ty.shape[axis] != other.shape[axis] && span(ty, axis).is_none()
    }

    fn node(&self, node: &Node, other: &Node) -> std::result::Result<(), Diagnostic> {
        let differ = |what: &str| Err(Diagnostic::new("K0110", what));
        if node.args != other.args || node.ty.rank() != other.ty.rank() {
            return differ("the length of a dim decides what is computed");
        }
        if !self.same(&node.op, &other.op) {
            let problem = Diagnostic::new("K0110", "the length of a dim is computed with");
            let found = match &node.op {
                Op::Const(_) => "a constant that is another one for another length".to_string(),
                op => format!("{}, and {} where it is longer", op_text(op), op_text(&other.op)),
            };
            return Err(problem.found(found));
        }
        // What follows from it is not said again.
        if is_mixed(&node.ty) && !node.args.iter().any(|&arg| is_mixed(self.graph.ty(arg))) {
            let what = "what is in use of an axis cannot be told any more";
            return Err(Diagnostic::new("K0110", what).found(type_text(&node.ty)));
        }
        if let Op::Slice(axes) = &node.op {
            let Op::Slice(longer) = &other.op else { return Ok(()) };
            self.slice(node.args[0], axes, longer)?;
        }
        let hidden = |arg: usize, axis: usize| self.hidden(node.args[arg], axis);
        let involved = match &node.op {
            Op::Reduce(_, axes) => axes.iter().any(|&axis| hidden(0, axis.into())),
            Op::Scan(_, axis) => hidden(0, (*axis).into()),
            Op::Concat(axis) => (0..node.args.len()).any(|arg| hidden(arg, (*axis).into())),
            Op::Pad(borders) => (0..borders.len()).any(|a| borders[a] != (0, 0) && hidden(0, a)),
            Op::Window(axes) => {
                let lead = node.ty.rank() - 2 * axes.len();
                (0..axes.len()).any(|a| axes[a].0 != 1 && hidden(0, lead + a))
            }
            Op::Contract(contract) => {
                let args = [0, 1].map(|k: usize| self.graph.ty(node.args[k]));
                let spans = iteration(contract, args);
                let Op::Contract(longer) = &other.op else { return Ok(()) };
                let extents = contract.extents.iter().zip(&longer.extents).zip(spans);
                let mut summed = extents.skip(contract.n_out);
                summed.any(|((a, b), span)| a != b && span.is_none())
            }
            Op::Scatter(_) | Op::Composite(_) => (0..node.args.len())
                .any(|arg| (0..self.graph.ty(node.args[arg]).rank()).any(|axis| hidden(arg, axis))),
            Op::Input(_) | Op::Const(_) | Op::Iota(..) | Op::Unary(_) | Op::Binary(_) => false,
            Op::Select | Op::Cast(_) | Op::Reshape(_) | Op::Permute(_) | Op::Expand(_) => false,
            Op::Slice(_) | Op::Gather(_) | Op::Bits(_) | Op::Fused(_) => false,
        };
        match involved {
            true => differ("an axis is as long as a dim that it does not depend on"),
            false => Ok(()),
        }
    }

    /// A slice of an axis in use in part has all that is in use, or the first element, which is
    /// there in every run.
    fn slice(
        &self,
        x: NodeId,
        axes: &[(i64, i64, usize)],
        longer: &[(i64, i64, usize)],
    ) -> std::result::Result<(), Diagnostic> {
        let (ty, other) = (self.graph.ty(x), self.longer.ty(x));
        for (axis, &(_, step, extent)) in axes.iter().enumerate() {
            let Some(Span::Dim { dim, more }) = span(ty, axis) else { continue };
            let PlanDim { name, least, most } = &self.graph.dims[usize::from(dim)];
            let more = i64::from(more);
            // As much is left out where the dim is longer: what is left in is as long as this dim.
            let left_out = |all: usize, extent: usize| all as i64 - extent as i64;
            let same =
                left_out(ty.shape[axis], extent) == left_out(other.shape[axis], longer[axis].2);
            let whole = step == 1 && same && *most as i64 + more <= extent as i64;
            if !whole && (extent > 1 || *least as i64 + more < 1) {
                let what = match extent > 1 {
                    true => "a piece of an axis whose length is that of a dim",
                    false => "the first element of an axis that may be 0 long",
                };
                let found = format!("axis {axis} of {}", type_text(ty));
                let range = format!("dim `{name}` is {least} to {most} long");
                return Err(Diagnostic::new("K0110", what).found(found).expected(range));
            }
        }
        Ok(())
    }

    /// Whether operations differ in extents only.
    fn same(&self, op: &Op, other: &Op) -> bool {
        match (op, other) {
            (Op::Reshape(a), Op::Reshape(b)) | (Op::Expand(a), Op::Expand(b)) => a.len() == b.len(),
            (Op::Iota(a, x), Op::Iota(b, y)) => a.len() == b.len() && x == y,
            (Op::Slice(a), Op::Slice(b)) => {
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a.0, a.1) == (b.0, b.1))
            }
            (Op::Contract(a), Op::Contract(b)) => a.n_out == b.n_out && a.maps == b.maps,
            (Op::Const(a), Op::Const(b)) => {
                let (a, b) = (*a as usize, *b as usize);
                is_corner(&self.graph.constants[a], &self.longer.constants[b])
            }
            (a, b) => a == b,
        }
    }
}

/// Whether a constant is the first part of another along every axis: positions, masks.
fn is_corner(small: &Constant, large: &Constant) -> bool {
    if small.ty == large.ty {
        let same = small.bytes.as_ptr() == large.bytes.as_ptr();
        return same || small.bytes == large.bytes;
    }
    let (a, b): (&Type, &Type) = (&small.ty, &large.ty);
    let fits = a.dtype == b.dtype && a.rank() == b.rank();
    if !fits || a.shape.iter().zip(&b.shape).any(|(a, b)| a > b) || a.numel() == 0 {
        return false;
    }
    let row = a.shape[a.rank() - 1] * a.dtype.bytes();
    let mut index = vec![0; a.rank()];
    small.bytes.chunks_exact(row).all(|found| {
        let at = index.iter().zip(&b.shape).fold(0, |at, (i, extent)| at * extent + i);
        let at = at * a.dtype.bytes();
        // The next row of the small one.
        for axis in (0..a.rank() - 1).rev() {
            index[axis] += 1;
            if index[axis] < a.shape[axis] {
                break;
            }
            index[axis] = 0;
        }
        large.bytes[at..at + row] == *found
    })
}

/// The type of an input one of whose axes is as long as a dim and some more, with what is in use.
pub fn in_use(ty: Type, axis: usize, (name, more): (&str, usize), dims: &[PlanDim]) -> Type {
    let mut ty = ty;
    if let Some(dim) = dims.iter().position(|dim| dim.name == name)
        && ty.shape[axis] > 1
    {
        ty.used.push((axis as u8, Span::Dim { dim: dim as u8, more: more as i32 }));
    }
    ty
}
