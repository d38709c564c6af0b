//! Kernels of a graph in order: what each reads and writes. Kernels that hang on constants only
//! are set apart; they run once, when the model is compiled.

use std::collections::HashMap;

use kiln_runtime::tensor::DType;
use kiln_runtime::work::Work;

use super::border::{Way, border};
use super::work;
use crate::error::{Diagnostic, Error, ErrorKind, Result};
use crate::graph::op::{Op, Type};
use crate::graph::verify::Verified;
use crate::graph::{Graph, NodeId};
use crate::loops::ir::{DIMS, Loops, Number, Param, Scope};
use crate::loops::lower::{Arguments, Lowered, Target, lower, one_number};
use crate::loops::nest::writes;

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// Input of that number.
    Input(usize),
    /// Constant of that number.
    Const(usize),
    /// The lengths of dims.
    Dims,
    /// Written by kernels.
    Made,
}

/// A piece of memory while kernels are put in order.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Where it comes from.
    pub source: Source,
    /// Its size.
    pub bytes: usize,
    /// Whether it is known when the model is compiled.
    pub constant: bool,
}

/// One launch: a kernel and the slots of its global buffers, in order.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Index of the kernel.
    pub kernel: usize,
    /// Index of what it does, alone or with others.
    pub work: usize,
    /// Name for people.
    pub name: String,
    /// Slots, one for each global buffer of the kernel.
    pub slots: Vec<usize>,
    /// Whether it hangs on constants only.
    pub constant: bool,
}

/// All kernels of a graph.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// Kernels, each once.
    pub kernels: Vec<Loops>,
    /// Launches in order.
    pub launches: Vec<Launch>,
    /// What they do.
    pub work: Vec<Work>,
    /// Memory.
    pub slots: Vec<Slot>,
    /// Slot of each output.
    pub outputs: Vec<usize>,
    /// Slot of each node of the graph.
    pub values: Vec<usize>,
}

/// Lowers every kernel of a graph.
pub fn program(graph: &Verified<Graph>, target: Target) -> Result<Program> {
    program_folded(graph, target, target)
}

/// The same where what hangs on constants only is computed by another machine, `folds`. Kernels
/// that make ready constants for others are loops of the target; that machine runs them too.
pub fn program_folded(graph: &Verified<Graph>, target: Target, folds: Target) -> Result<Program> {
    let mut build = Build {
        graph,
        target,
        folds,
        program: Program::default(),
        known: HashMap::new(),
        dims: None,
        problems: Vec::new(),
    };
    for id in graph.ids() {
        let slot = build.node(id);
        build.program.values.push(slot);
    }
    for (i, (_, id)) in graph.outputs.iter().enumerate() {
        let slot = build.output(i, *id)?;
        build.program.outputs.push(slot);
    }
    if !build.problems.is_empty() {
        return Err(Error { kind: ErrorKind::Model, diagnostics: build.problems });
    }
    Ok(build.program)
}

struct Build<'a> {
    graph: &'a Graph,
    target: Target,
    folds: Target,
    program: Program,
    known: HashMap<[u8; 32], usize>,
    /// The slot of the dims' lengths, once a kernel asks for it.
    dims: Option<usize>,
    problems: Vec<Diagnostic>,
}

impl Build<'_> {
    fn slot(&mut self, source: Source, bytes: usize, constant: bool) -> usize {
        self.program.slots.push(Slot { source, bytes, constant });
        self.program.slots.len() - 1
    }

    fn node(&mut self, id: NodeId) -> usize {
        let node = self.graph.node(id);
        let bytes = node.ty.size_bytes();
        match &node.op {
            Op::Input(i) => {
                let given = self.slot(Source::Input(*i as usize), bytes, false);
                if node.ty.used.is_empty() || self.graph.grows(*i as usize).is_some() {
                    return given;
                }
                let inside = self.slot(Source::Made, bytes, false);
                match border(&node.ty, Way::In, self.target) {
                    Ok(kernel) => self.copy(&node.ty, kernel, given, inside),
                    Err(refused) => self.problems.push(Diagnostic::new("K0602", refused.0)),
                }
                inside
            }
            Op::Const(i) => self.slot(Source::Const(*i as usize), bytes, true),
            Op::Reshape(_) | Op::Bits(_) => self.program.values[node.args[0].index()],
            Op::Fused(body) => {
                let constant = node
                    .args
                    .iter()
                    .all(|a| self.program.slots[self.program.values[a.index()]].constant);
                let out = self.slot(Source::Made, bytes, constant);
                match self.lower(id, *body as usize) {
                    Ok(lowered) => {
                        let body = &self.graph.bodies[*body as usize];
                        let work = work::work(body, &node.origin, self.appended(id));
                        self.program.work.push(work);
                        self.launches(id, lowered, out);
                    }
                    Err(problem) => self.problems.push(problem),
                }
                out
            }
            op => {
                let text = crate::graph::text::op_text(op);
                let problem = Diagnostic::new("K0601", format!("{text} outside of a kernel"));
                self.problems.push(problem.node(node.origin.as_ref()));
                self.slot(Source::Made, bytes, false)
            }
        }
    }

    fn lower(&self, id: NodeId, body: usize) -> std::result::Result<Lowered, Diagnostic> {
        let node = self.graph.node(id);
        let scalar = |a: &NodeId| self.graph.constant(*a).and_then(one_number);
        let scalars: Vec<Option<Number>> = node.args.iter().map(scalar).collect();
        let constant_args: Vec<bool> = node
            .args
            .iter()
            .map(|a| self.program.slots[self.program.values[a.index()]].constant)
            .collect();
        let body = &self.graph.bodies[body];
        let args =
            Arguments { scalars: &scalars, constant: &constant_args, appended: self.appended(id) };
        let constant = constant_args.iter().all(|constant| *constant);
        let target = if constant { self.folds } else { self.target };
        lower(body, &self.graph.constants, args, target, &node.origin).map_err(|refused| {
            let ops: Vec<String> = body
                .nodes
                .iter()
                .filter(|n| !matches!(n.op, Op::Input(_)))
                .map(|n| crate::graph::text::op_text(&n.op))
                .collect();
            Diagnostic::new("K0602", "a kernel cannot be lowered to loops")
                .node(node.origin.as_ref())
                .found(format!("{} in {}", refused.0, ops.join("; ")))
                .help("--no-egraph compiles without this fusion; please report the model")
        })
    }

    /// The argument whose memory the result of a node is written behind.
    fn appended(&self, id: NodeId) -> Option<usize> {
        let state = self.graph.states.iter().find(|state| {
            let mut output = self.graph.outputs[state.output].1;
            while let Op::Reshape(_) = self.graph.node(output).op {
                output = self.graph.node(output).args[0];
            }
            state.in_place && output == id
        })?;
        let source = Source::Input(state.input);
        let lies =
            |arg: &NodeId| self.program.slots[self.program.values[arg.index()]].source == source;
        self.graph.node(id).args.iter().position(lies)
    }

    fn launches(&mut self, id: NodeId, lowered: Lowered, out: usize) {
        let node = self.graph.node(id);
        let scratch: Vec<usize> = lowered
            .scratch
            .iter()
            .map(|&(dtype, len)| self.slot(Source::Made, len * DType::bytes(dtype), false))
            .collect();
        for kernel in lowered.kernels {
            let dims = self.dims_of(&kernel);
            let slots: Vec<usize> = kernel
                .buffers
                .iter()
                .filter(|b| b.scope == Scope::Global)
                .map(|b| match b.param {
                    Param::Arg(i) => self.program.values[node.args[i].index()],
                    Param::Scratch(i) => scratch[i],
                    Param::Dims => dims,
                    Param::Out | Param::None => out,
                })
                .collect();
            // A kernel over nothing writes nothing; it counts as one that writes its result.
            let written = written_slot(&kernel, &slots).unwrap_or(out);
            // Threads of a block are for the target alone.
            let constant = slots.iter().all(|&s| s == written || self.program.slots[s].constant)
                && (written != out || self.program.slots[out].constant)
                && (self.folds == self.target || !kernel.has_blocks());
            if constant && written != out {
                self.program.slots[written].constant = true;
            }
            let name = kernel.name.clone();
            let kernel = self.kernel(kernel);
            let work = self.program.work.len() - 1;
            self.program.launches.push(Launch { kernel, work, name, slots, constant });
        }
    }

    /// The number of a kernel; equal ones (but for their names) are kept once.
    fn kernel(&mut self, kernel: Loops) -> usize {
        let text = format!("{:?}{:?}{:?}", kernel.buffers, kernel.ranges, kernel.body);
        let key = *blake3::hash(text.as_bytes()).as_bytes();
        if let Err(unproven) = crate::loops::verify::verify(&kernel) {
            let problem = Diagnostic::new("K0603", "a kernel could read or write out of bounds");
            let problem = problem.node(kernel.name.clone()).found(unproven.0);
            self.problems.push(problem.help("this is a bug of Kiln; please report the model"));
        }
        let next = self.program.kernels.len();
        *self.known.entry(key).or_insert_with(|| {
            self.program.kernels.push(kernel);
            next
        })
    }

    /// The slot of an output: its own memory, written by a kernel. Inputs, constants and values
    /// that are output twice are copied.
    fn output(&mut self, output: usize, id: NodeId) -> Result<usize> {
        let slot = self.program.values[id.index()];
        // What has room inside has it outside as well where it is kept in place.
        let kept = self.graph.states.iter().any(|state| state.in_place && state.output == output);
        let own = (kept || self.graph.ty(id).used.is_empty())
            && self.program.slots[slot].source == Source::Made
            && !self.program.slots[slot].constant
            && !self.program.outputs.contains(&slot);
        if own {
            return Ok(slot);
        }
        let ty = self.graph.ty(id).clone();
        let out = self.slot(Source::Made, ty.size_bytes(), false);
        if ty.numel() > 0 {
            let kernel = border(&ty, Way::Out, self.target)
                .map_err(|e| Error::new(ErrorKind::Model, Diagnostic::new("K0602", e.0)))?;
            self.copy(&ty, kernel, slot, out);
        }
        Ok(out)
    }

    /// Launches a kernel that copies a value.
    fn copy(&mut self, ty: &Type, kernel: Loops, from: usize, to: usize) {
        let dims = self.dims_of(&kernel);
        let name = kernel.name.clone();
        let kernel = self.kernel(kernel);
        let buffers = self.program.kernels[kernel].buffers.iter();
        let slot = |param| match param {
            Param::Out => to,
            Param::Dims => dims,
            Param::Arg(_) | Param::Scratch(_) | Param::None => from,
        };
        let global = buffers.filter(|b| b.scope == Scope::Global);
        let slots = global.map(|b| slot(b.param)).collect();
        self.program.work.push(work::copy(ty, &name));
        let work = self.program.work.len() - 1;
        self.program.launches.push(Launch { kernel, work, name, slots, constant: false });
    }

    /// The slot of the dims' lengths, made where a kernel asks for it.
    fn dims_of(&mut self, kernel: &Loops) -> usize {
        let asks = kernel.buffers.iter().any(|b| b.param == Param::Dims);
        match self.dims {
            Some(slot) => slot,
            None if asks => {
                let slot = self.slot(Source::Dims, DIMS * 8, false);
                self.dims = Some(slot);
                slot
            }
            None => 0,
        }
    }
}

/// The slot that a kernel writes: of its result, or of scratch memory.
pub fn written_slot(kernel: &Loops, slots: &[usize]) -> Option<usize> {
    let global = (0..kernel.buffers.len()).filter(|&b| kernel.buffers[b].scope == Scope::Global);
    let written = global.zip(slots).find(|(b, _)| writes(&kernel.body, *b));
    written.map(|(_, slot)| *slot)
}
