//! ONNX models into graphs. Every operator is a function over graph operations; `table` has one
//! line for each. All problems of a model are reported at once.

mod asks;
pub mod attention;
pub mod call;
pub mod contraction;
mod control;
pub mod grid;
mod known;
pub mod loss;
mod microsoft;
mod ngrams;
pub mod norm;
mod place;
pub mod pointwise;
#[rustfmt::skip]
pub mod proto;
pub mod quant;
pub mod recurrent;
pub mod reduce;
pub mod resize;
mod sampled;
mod scan;
mod sequence;
pub mod shape;
mod small;
pub mod special;
pub mod spectrum;
pub mod table;
pub mod tensor;
mod training;
mod trees;
mod turns;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use kiln_runtime::plan::PlanDim;
use kiln_runtime::tensor::size_bytes;
use prost::Message;

use crate::error::{Diagnostic, Error, ErrorKind, Result};
use crate::graph::lengths::Lengths;
use crate::graph::op::{Shape, Type};
use crate::graph::{Graph, NodeId, Origin};
use crate::ranges::in_use;
use asks::Asks;
pub use asks::{Known, Later};
use call::Call;
use proto::tensor_shape_proto::{Dimension, dimension::Value as DimensionValue};
use proto::{ModelProto, NodeProto, TensorProto, ValueInfoProto, type_proto};
use tensor::{Files, dtype_of};
pub use turns::Body;

/// Code of the diagnostic for an operand whose value decides a shape and is not known.
pub const NEEDS_VALUE: &str = "K0121";

/// Limits that hold before anything is allocated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Nodes of a model.
    pub nodes: usize,
    /// Axes of a tensor.
    pub rank: usize,
    /// Bytes of all tensors of a model together.
    pub bytes: usize,
    /// Graphs within each other.
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { nodes: 1_000_000, rank: 16, bytes: 16 << 30, depth: 16 }
    }
}

/// What the caller knows about a model beyond its file.
#[derive(Clone, Debug, Default)]
pub struct ImportOptions {
    /// Limits.
    pub limits: Limits,
    /// Extents of named dims.
    pub dims: Vec<(String, usize)>,
    /// Shapes of inputs, which fit their types.
    pub shapes: Vec<(String, Vec<usize>)>,
    /// The folder of the model, beneath which external data may lie.
    pub folder: Option<PathBuf>,
    /// Inputs that are constants for this compilation.
    pub values: Vec<(String, kiln_runtime::tensor::Tensor)>,
    /// Dims that `dims` gives the greatest length of: runs decide theirs.
    pub ranges: Vec<PlanDim>,
    /// What earlier stages have made, where the model may be compiled in stages.
    pub known: Option<Arc<Known>>,
}

/// Reads a model. Weights stay slices of `bytes`.
///
/// # Errors
/// All problems of the model, at once.
pub fn import(bytes: Bytes, options: &ImportOptions) -> Result<Graph> {
    Ok(import_stage(bytes, options)?.0)
}

/// The same of what can be compiled without data that the model computes: with what follows, where
/// that is not all, and options allow for stages.
///
/// # Errors
/// All problems of the model, at once.
pub fn import_stage(bytes: Bytes, options: &ImportOptions) -> Result<(Graph, Option<Later>)> {
    let model = ModelProto::decode(bytes).map_err(|e| {
        let diagnostic = Diagnostic::new("K0101", "the file is not an ONNX model")
            .found(e.to_string())
            .help("a .onnx file, complete: was a download cut off?");
        Error::new(ErrorKind::Model, diagnostic)
    })?;
    let mut graph = Graph::default();
    graph.dims.clone_from(&options.ranges);
    let mut import = Import {
        graph,
        values: HashMap::new(),
        opsets: HashMap::new(),
        problems: Vec::new(),
        limited: false,
        bytes: 0,
        nodes: 0,
        depth: 0,
        options,
        files: Files::new(options.folder.as_deref()),
        asks: Asks::new(options.known.clone()),
    };
    let later = import.model(&model);
    if import.problems.is_empty() {
        return Ok((import.graph, later));
    }
    let kind = if import.limited { ErrorKind::Limit } else { ErrorKind::Model };
    Err(Error { kind, diagnostics: import.problems })
}

/// What a name of the model stands for.
#[derive(Clone)]
enum Held {
    /// What makes it was refused.
    Refused,
    Tensor(NodeId),
    /// A sequence; how long it is, is known.
    Sequence(Vec<NodeId>),
}

impl From<Option<NodeId>> for Held {
    fn from(value: Option<NodeId>) -> Held {
        value.map_or(Held::Refused, Held::Tensor)
    }
}

struct Import<'a> {
    graph: Graph,
    /// Values by name.
    values: HashMap<String, Held>,
    opsets: HashMap<String, i64>,
    problems: Vec<Diagnostic>,
    limited: bool,
    bytes: usize,
    /// Nodes of all graphs that were imported, and how deep the present one lies.
    nodes: usize,
    depth: usize,
    options: &'a ImportOptions,
    files: Files,
    asks: Asks,
}

impl Import<'_> {
    /// The whole model, or what of it can be compiled now and what follows.
    fn model(&mut self, model: &ModelProto) -> Option<Later> {
        for opset in &model.opset_import {
            let domain = normal_domain(opset.domain.as_deref().unwrap_or(""));
            self.opsets.insert(domain.to_string(), opset.version.unwrap_or(1));
        }
        let Some(graph) = &model.graph else {
            self.problems.push(
                Diagnostic::new("K0102", "the model has no graph")
                    .help("a .onnx file, complete: was a download cut off?"),
            );
            return None;
        };
        if self.opsets.is_empty() {
            self.problems.push(Diagnostic::new("K0102", "the model names no opset"));
            return None;
        }
        if graph.node.len() > self.options.limits.nodes {
            let limit = self.options.limits.nodes.to_string();
            let found = graph.node.len().to_string();
            let problem = self.limit("nodes", limit, found, "--max-nodes raises it");
            self.problems.push(problem);
            return None;
        }
        self.nodes = graph.node.len();
        self.constants(&graph.initializer);
        for input in &graph.input {
            let name = input.name.clone().unwrap_or_default();
            if !self.values.contains_key(&name) {
                let value = self.input(input, &name);
                self.values.insert(name, value.into());
            }
        }
        self.shelves();
        self.graph.lengths = Lengths::new(&self.graph.dims);
        for (number, node) in graph.node.iter().enumerate() {
            self.node_in_stage(number, node);
            if self.limited {
                return None;
            }
        }
        let later = self.later(graph);
        if later.is_some() {
            return later;
        }
        for output in &graph.output {
            let name = output.name.clone().unwrap_or_default();
            match self.values.get(&name) {
                Some(Held::Tensor(id)) => self.graph.outputs.push((name, *id)),
                Some(Held::Refused) => {}
                Some(Held::Sequence(all)) => {
                    let what = Diagnostic::new("K0105", "an output that is no tensor");
                    let found = format!("a sequence of {}", all.len());
                    let help = "give its elements, or what ConcatFromSequence makes of them";
                    self.problems.push(what.tensor(name).found(found).help(help));
                }
                None => self.problems.push(
                    Diagnostic::new("K0103", "no node makes this output of the model").tensor(name),
                ),
            }
        }
        None
    }

    fn constants(&mut self, tensors: &[TensorProto]) {
        for tensor in tensors {
            let name = tensor.name.clone().unwrap_or_default();
            let constant = self.files.constant(tensor);
            let value = match constant.and_then(|c| self.room(&c.ty).map(|()| c)) {
                Ok(constant) => {
                    let origin = Origin::from(name.as_str());
                    Some(self.graph.constant_bytes(constant.ty, constant.bytes, &origin))
                }
                Err(problem) => {
                    self.problems.push(problem.tensor(name.clone()));
                    None
                }
            };
            self.values.insert(name, value.into());
        }
    }

    /// The problem that a limit is; nothing is imported after it.
    fn limit(&mut self, what: &str, expected: String, found: String, help: &str) -> Diagnostic {
        self.limited = true;
        let message = format!("the model has too many {what}");
        let limit = Diagnostic::new("K0104", message).expected(format!("at most {expected}"));
        limit.found(found).help(help)
    }

    /// Takes what a value needs of what is left of the memory limit, where it fits into it.
    fn room(&mut self, ty: &Type) -> std::result::Result<(), Diagnostic> {
        let limits = &self.options.limits;
        let size = size_bytes(ty.dtype, &ty.shape).unwrap_or(usize::MAX);
        self.bytes = self.bytes.saturating_add(size);
        let found = || crate::graph::text::type_text(ty);
        if ty.rank() > limits.rank {
            let (expected, help) = (limits.rank.to_string(), "--max-rank raises it");
            return Err(self.limit("axes", expected, found(), help));
        }
        if self.bytes > limits.bytes {
            let (expected, help) = (limits.bytes.to_string(), "--max-memory raises it");
            return Err(self.limit("bytes", expected, found(), help));
        }
        Ok(())
    }

    /// The same for all nodes from one on.
    fn all_fit(&mut self, first: usize) -> std::result::Result<(), Diagnostic> {
        (first..self.graph.nodes.len()).try_for_each(|i| {
            let ty = self.graph.nodes[i].ty.clone();
            self.room(&ty)
        })
    }

    fn input(&mut self, input: &ValueInfoProto, name: &str) -> Option<NodeId> {
        if let Some((_, value)) = self.options.values.iter().find(|v| v.0 == name) {
            return Some(self.graph.tensor(value, &Origin::from(name)));
        }
        let ty = self.input_type(input, name);
        match ty.and_then(|ty| self.room(&ty).map(|()| ty)) {
            Ok(ty) => Some(self.graph.input(name, ty)),
            Err(problem) => {
                self.problems.push(problem.tensor(name));
                None
            }
        }
    }

    fn input_type(
        &self,
        input: &ValueInfoProto,
        name: &str,
    ) -> std::result::Result<Type, Diagnostic> {
        let tensor = tensor_type(input);
        let tensor = tensor.ok_or_else(|| {
            Diagnostic::new("K0105", "an input that is no tensor")
                .help("sequences, maps and optionals are not supported")
        })?;
        let dtype = dtype_of(tensor.elem_type.unwrap_or(0))?;
        let extents = match self.options.shapes.iter().find(|s| s.0 == name) {
            Some((_, shape)) => Shape::from_slice(shape),
            None => self.extents(tensor)?,
        };
        match size_bytes(dtype, &extents) {
            Some(_) => Ok(self.in_use(Type::of(dtype, extents), tensor)),
            None => Err(Diagnostic::new("K0105", "an input too large for memory")
                .found(format!("{extents:?}"))),
        }
    }

    /// The type of an input with the axes that are as long as dims with a range.
    fn in_use(&self, ty: Type, tensor: &type_proto::Tensor) -> Type {
        let dims = tensor.shape.iter().flat_map(|shape| &shape.dim).enumerate();
        dims.fold(ty, |ty, (axis, dim)| match &dim.value {
            Some(DimensionValue::DimParam(text)) => {
                let (name, more) = self.sum(text);
                in_use(ty, axis, (name, more), &self.options.ranges)
            }
            Some(DimensionValue::DimValue(_)) | None => ty,
        })
    }

    fn extents(&self, tensor: &type_proto::Tensor) -> std::result::Result<Shape, Diagnostic> {
        let shape = tensor.shape.as_ref().ok_or_else(|| {
            Diagnostic::new("K0105", "an input of unknown rank")
                .help("export the model with the shapes of its inputs")
        })?;
        let extent = |(axis, dim): (usize, &Dimension)| match &dim.value {
            Some(DimensionValue::DimValue(n)) => usize::try_from(*n)
                .map_err(|_| Diagnostic::new("K0105", "a negative extent").found(n.to_string())),
            Some(DimensionValue::DimParam(name)) => self.dim(name, axis),
            None => self.dim("", axis),
        };
        shape.dim.iter().enumerate().map(extent).collect()
    }

    /// A dim and how much longer than it an axis is, as in `past + 1`; a name that is known as it
    /// stands is no sum.
    fn sum<'t>(&self, text: &'t str) -> (&'t str, usize) {
        let known = self.options.dims.iter().any(|d| d.0 == text);
        let sum = text.split_once(" + ").filter(|_| !known);
        match sum.map(|(name, more)| (name, more.parse::<u16>())) {
            Some((name, Ok(more))) => (name, more.into()),
            Some((_, Err(_))) | None => (text, 0),
        }
    }

    fn dim(&self, name: &str, axis: usize) -> std::result::Result<usize, Diagnostic> {
        let (known, more) = self.sum(name);
        let known = self.options.dims.iter().find(|d| !name.is_empty() && d.0 == known);
        known.and_then(|d| d.1.checked_add(more)).ok_or_else(|| {
            let help = match name {
                "" => "export the model with a name or a number for it".to_string(),
                name => format!("say it: --dim {name}=1"),
            };
            Diagnostic::new("K0106", format!("axis {axis} has no extent"))
                .expected("a number")
                .found(if name.is_empty() { "nothing" } else { name })
                .help(help)
        })
    }

    fn node(&mut self, node: &NodeProto) {
        let op = node.op_type.clone().unwrap_or_default();
        let name = match node.name.as_deref() {
            Some(name) if !name.is_empty() => name.to_string(),
            _ => node.output.first().cloned().unwrap_or_else(|| op.clone()),
        };
        let domain = normal_domain(node.domain.as_deref().unwrap_or(""));
        let opset = self.opsets.get(domain).copied().unwrap_or(0);
        let outputs = self.outputs_of(node, &op, &name, domain, opset);
        let results: Vec<Held> = match outputs {
            Ok(outputs) => outputs,
            Err(problem) => {
                if let Some(problem) = problem {
                    self.problems.push(problem);
                }
                Vec::new()
            }
        };
        for (i, output) in node.output.iter().enumerate() {
            if output.is_empty() {
                continue;
            }
            if self.is_made(output) && self.depth == 0 {
                continue;
            }
            let value = results.get(i).cloned().unwrap_or(Held::Refused);
            if !results.is_empty() && matches!(value, Held::Refused) {
                self.problems.push(
                    Diagnostic::new(
                        "K0107",
                        format!("output {i} of this operator is not supported"),
                    )
                    .node(name.clone())
                    .op(op.clone(), opset)
                    .tensor(output.clone()),
                );
            }
            self.values.insert(output.clone(), value);
        }
    }

    /// The results of a node, or why there are none (nothing where an operand has been refused).
    fn outputs_of(
        &mut self,
        node: &NodeProto,
        op: &str,
        name: &str,
        domain: &str,
        opset: i64,
    ) -> std::result::Result<Vec<Held>, Option<Diagnostic>> {
        let (entry, flow) = (table::find(domain, op, opset), control::find(domain, op, opset));
        if entry.is_none() && flow.is_none() {
            return Err(Some(table::unsupported(domain, op, opset).node(name)));
        }
        let mut inputs = Vec::with_capacity(node.input.len());
        let mut sequences = Vec::new();
        for input in &node.input {
            inputs.push(match (input.as_str(), self.values.get(input)) {
                ("", _) => None,
                (_, Some(Held::Tensor(id))) => Some(*id),
                (_, Some(Held::Sequence(all))) if flow.is_some_and(|f| f.sequences) => {
                    sequences.push(all.clone());
                    None
                }
                (_, Some(Held::Sequence(_))) => {
                    let what = "a sequence where this operator takes a tensor";
                    let problem = Diagnostic::new("K0105", what).node(name).op(op, opset);
                    return Err(Some(problem.tensor(input.clone())));
                }
                (_, Some(Held::Refused)) => return Err(None),
                (_, None) => {
                    return Err(Some(
                        Diagnostic::new("K0103", "no node makes this operand before it is used")
                            .node(name)
                            .op(op, opset)
                            .tensor(input.clone()),
                    ));
                }
            });
        }
        let Some(entry) = entry else {
            let site = control::Site { node, origin: Origin::from(name), inputs, sequences };
            let made = flow.map_or(Err(None), |flow| flow.import(self, &site));
            return made.map_err(|problem| problem.map(|d| d.node(name).op(op, opset)));
        };
        let before = self.graph.nodes.len();
        let state = (&mut self.graph, &mut self.files, &mut self.asks);
        let mut call = Call::new(state, node, inputs, opset, name);
        let outputs = (entry.import)(&mut call);
        let unread = call.unread();
        let outputs = outputs.map_err(|d| Some(d.node(name).op(op, opset)))?;
        if !unread.is_empty() {
            return Err(Some(
                Diagnostic::new("K0108", "attributes that this operator does not have")
                    .node(name)
                    .op(op, opset)
                    .found(unread.join(", ")),
            ));
        }
        self.all_fit(before).map_err(|d| Some(d.node(name).op(op, opset)))?;
        Ok(outputs.into_iter().map(Held::from).collect())
    }
}

/// The default domain has two names.
fn normal_domain(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}

/// A tensor of a `.pb` file.
pub fn read_tensor(bytes: Bytes) -> Result<kiln_runtime::tensor::Tensor> {
    let fail = |d| Error::new(ErrorKind::Model, d);
    let tensor = proto::TensorProto::decode(bytes).map_err(|e| {
        fail(Diagnostic::new("K0101", "the file is not an ONNX tensor").found(e.to_string()))
    })?;
    let constant = Files::new(None::<&Path>).constant(&tensor).map_err(fail)?;
    Ok(crate::graph::eval::Value::from_constant(&constant).to_tensor())
}

/// A row of the table of operators.
pub struct OpRow {
    /// Operator type.
    pub name: &'static str,
    /// First opset.
    pub since: i64,
    /// Last opset.
    pub until: i64,
}

/// The operators that are read.
pub fn ops() -> Vec<OpRow> {
    let row = |(name, since)| OpRow { name, since, until: table::NEWEST };
    let plain = table::OPERATORS.iter().map(|o| (o.name, o.since));
    let flows = control::flows().map(|f| (f.name, f.since));
    let mut rows: Vec<OpRow> = plain.chain(flows).map(row).collect();
    rows.sort_by_key(|row| (row.name, row.since));
    // Of one that has changed, the oldest is said.
    rows.dedup_by_key(|row| row.name);
    rows
}

/// The tensor type of an input or output, where it is one.
pub fn tensor_type(value: &ValueInfoProto) -> Option<&type_proto::Tensor> {
    match value.r#type.as_ref()?.value.as_ref()? {
        type_proto::Value::TensorType(tensor) => Some(tensor),
        type_proto::Value::SequenceType(_)
        | type_proto::Value::MapType(_)
        | type_proto::Value::OptionalType(_)
        | type_proto::Value::SparseTensorType(_) => None,
    }
}
