//! A model file: opened, mapped, listed, and imported when it is compiled.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use kiln_runtime::plan::{DIMS, PlanDim};
use kiln_runtime::tensor::Tensor;
use prost::Message;

use crate::error::{Diagnostic, Error, ErrorKind, Result, sanitize};
use crate::graph::Graph;
use crate::onnx::proto::tensor_shape_proto::{Dimension, dimension::Value as DimensionValue};
use crate::onnx::proto::{ModelProto, TensorProto, ValueInfoProto};
use crate::onnx::{self, ImportOptions, Known, Later};
use crate::ranges;
use crate::rules::Budget;

/// Limits on a model, checked before memory is taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Nodes.
    pub max_nodes: usize,
    /// Bytes of all its tensors.
    pub max_bytes: u64,
    /// Axes of a tensor.
    pub max_rank: usize,
    /// Graphs within each other, as those of `If` and `Loop` are.
    pub max_depth: usize,
    /// Nodes of the e-graph: with fewer, less is optimised, and nothing is refused.
    pub max_egraph: usize,
    /// Kernels, which all take about as long to compile.
    pub max_kernels: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        let onnx::Limits { nodes, bytes, rank, depth } = onnx::Limits::default();
        Limits {
            max_nodes: nodes,
            max_bytes: bytes as u64,
            max_rank: rank,
            max_depth: depth,
            max_egraph: Budget::default().nodes,
            max_kernels: 100_000,
        }
    }
}

/// A node of the model as it is written in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelNode {
    /// Operator type.
    pub op: String,
    /// Name; the first output's where the node has none.
    pub name: String,
}

/// An input or output of the model; extents may be names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelPort {
    /// Name.
    pub name: String,
    /// dtype and shape as text, such as `f32[batch,3]`.
    pub ty: String,
    /// Extents, where the rank is known.
    pub dims: Option<Vec<Dim>>,
}

/// An extent in the types of a model: a number or a symbol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dim {
    /// A number.
    Known(usize),
    /// A name, the same number wherever it stands.
    Symbol(String),
    /// Neither.
    Unknown,
}

/// What a symbol may stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DimRange {
    /// The least.
    pub least: usize,
    /// The most.
    pub most: usize,
    /// What to compile for where nothing settles it.
    pub typical: usize,
}

impl From<std::ops::RangeInclusive<usize>> for DimRange {
    fn from(range: std::ops::RangeInclusive<usize>) -> DimRange {
        DimRange { least: *range.start(), most: *range.end(), typical: *range.end() }
    }
}

impl std::fmt::Display for ModelPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} : {}", sanitize(&self.name), self.ty)
    }
}

/// An ONNX model. Weights stay in the file's mapping.
#[derive(Clone, Debug)]
pub struct Model {
    bytes: Bytes,
    folder: Option<PathBuf>,
    nodes: Vec<ModelNode>,
    inputs: Vec<ModelPort>,
    outputs: Vec<ModelPort>,
    opset: i64,
    weight_bytes: u64,
}

impl Model {
    /// The blake3 hash of the model's file, without the files that it refers to.
    pub fn hash(&self) -> [u8; 32] {
        kiln_runtime::hash::hashes(&[&self.bytes])[0]
    }

    /// Maps a file and reads its lists of nodes, inputs and outputs.
    pub fn open(path: impl AsRef<Path>, limits: &Limits) -> Result<Model> {
        let path = path.as_ref();
        let fail = |e: std::io::Error| {
            let diagnostic = Diagnostic::new("K0001", "the model cannot be read")
                .tensor(path.display().to_string())
                .found(e.to_string());
            Error::new(ErrorKind::Io, diagnostic)
        };
        let file = File::open(path).map_err(fail)?;
        let size = file.metadata().map_err(fail)?;
        if !size.is_file() {
            return Err(fail(std::io::Error::other("not a regular file")));
        }
        if size.len() > limits.max_bytes {
            let diagnostic = Diagnostic::new("K0104", "the model is larger than the memory limit")
                .expected(format!("at most {} bytes", limits.max_bytes))
                .found(size.len().to_string())
                .help("--max-memory raises it");
            return Err(Error::new(ErrorKind::Limit, diagnostic));
        }
        let bytes = if size.len() == 0 {
            Bytes::new()
        } else {
            // SAFETY: the map is read only; a file that is cut short while it is compiled is
            // outside of what any reader of a mapping can guard against.
            Bytes::from_owner(unsafe { memmap2::Mmap::map(&file) }.map_err(fail)?)
        };
        let mut model = Model::from_bytes(bytes, limits)?;
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
        model.folder = Some(parent.unwrap_or(Path::new(".")).to_path_buf());
        Ok(model)
    }

    /// A model in memory that is part of this one: its external data lie beside.
    pub(crate) fn part(&self, bytes: Bytes, limits: &Limits) -> Result<Model> {
        let folder = self.folder.clone();
        Ok(Model { folder, ..Model::from_bytes(bytes, limits)? })
    }

    /// A model in memory; it has no folder, so no external data.
    pub fn from_bytes(bytes: Bytes, limits: &Limits) -> Result<Model> {
        let fail = |d| Error::new(ErrorKind::Model, d);
        let proto = ModelProto::decode(bytes.clone()).map_err(|e| {
            fail(
                Diagnostic::new("K0101", "the file is not an ONNX model")
                    .found(e.to_string())
                    .help("a .onnx file, complete: was a download cut off?"),
            )
        })?;
        let Some(graph) = &proto.graph else {
            return Err(fail(
                Diagnostic::new("K0102", "the file has no graph")
                    .help("a .onnx file, complete: was a download cut off?"),
            ));
        };
        if graph.node.len() > limits.max_nodes {
            let diagnostic = Diagnostic::new("K0104", "the model has too many nodes")
                .expected(format!("at most {}", limits.max_nodes))
                .found(graph.node.len().to_string())
                .help("--max-nodes raises it");
            return Err(Error::new(ErrorKind::Limit, diagnostic));
        }
        let nodes = graph.node.iter().map(|n| ModelNode {
            op: n.op_type.clone().unwrap_or_default(),
            name: match n.name.as_deref() {
                Some(name) if !name.is_empty() => name.to_string(),
                _ => n.output.first().cloned().unwrap_or_default(),
            },
        });
        let weights: Vec<&str> =
            graph.initializer.iter().filter_map(|t| t.name.as_deref()).collect();
        let is_weight =
            |v: &&ValueInfoProto| v.name.as_deref().is_some_and(|name| weights.contains(&name));
        let opset = proto
            .opset_import
            .iter()
            .find(|o| matches!(o.domain.as_deref(), None | Some("" | "ai.onnx")));
        Ok(Model {
            nodes: nodes.collect(),
            inputs: graph.input.iter().filter(|v| !is_weight(v)).map(port).collect(),
            outputs: graph.output.iter().map(port).collect(),
            opset: opset.and_then(|o| o.version).unwrap_or(1),
            weight_bytes: graph.initializer.iter().map(weight_size).sum(),
            bytes,
            folder: None,
        })
    }

    /// Nodes as they are written in the file.
    pub fn nodes(&self) -> &[ModelNode] {
        &self.nodes
    }

    /// Inputs, without those that are weights.
    pub fn inputs(&self) -> &[ModelPort] {
        &self.inputs
    }

    /// Outputs.
    pub fn outputs(&self) -> &[ModelPort] {
        &self.outputs
    }

    /// Opset of the default domain.
    pub fn opset(&self) -> i64 {
        self.opset
    }

    /// Bytes of the weights that the file names.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// Names of all symbols in the types of inputs, each once.
    pub fn symbols(&self) -> Vec<&str> {
        let mut symbols = Vec::new();
        for dim in self.inputs.iter().flat_map(|p| p.dims.iter().flatten()) {
            if let Dim::Symbol(name) = dim
                && !symbols.contains(&name.as_str())
            {
                symbols.push(name);
            }
        }
        symbols
    }

    /// The number of each symbol that shapes or ranges settle. All that does not fit at once.
    pub(crate) fn settle(
        &self,
        shapes: &[(String, Vec<usize>)],
        ranges: &[(String, DimRange)],
    ) -> Result<Vec<(String, usize)>> {
        let mut problems = Vec::new();
        let symbols = self.symbols();
        for (name, _) in ranges.iter().filter(|(name, _)| !symbols.contains(&name.as_str())) {
            let problem = Diagnostic::new("K0109", "the inputs of the model have no such dim");
            problems.push(problem.tensor(name.clone()).expected(match symbols.is_empty() {
                true => "no dim has a name".to_string(),
                false => symbols.join(", "),
            }));
        }
        let mut settled: Vec<(String, usize)> = Vec::new();
        for (input, shape) in shapes {
            let Some(port) = self.inputs.iter().find(|p| p.name == *input) else { continue };
            let Some(dims) = &port.dims else { continue };
            let misfit = Diagnostic::new("K0109", "a shape that does not fit the input")
                .tensor(input.clone())
                .expected(port.ty.clone())
                .found(format!("{shape:?}"));
            if dims.len() != shape.len() {
                problems.push(misfit);
                continue;
            }
            for (dim, &extent) in dims.iter().zip(shape) {
                let Dim::Symbol(name) = dim else {
                    if matches!(dim, Dim::Known(n) if *n != extent) {
                        problems.push(misfit.clone());
                    }
                    continue;
                };
                match settled.iter().find(|(known, _)| known == name) {
                    None => settled.push((name.clone(), extent)),
                    Some((_, other)) if *other == extent => {}
                    Some((_, other)) => {
                        let text = format!("{name} is {other} in another input");
                        problems.push(misfit.clone().help(text));
                    }
                }
            }
        }
        for (name, range) in ranges {
            match settled.iter().find(|(known, _)| known == name) {
                None => settled.push((name.clone(), range.typical)),
                Some((_, extent)) if (range.least..=range.most).contains(extent) => {}
                Some((_, extent)) => problems.push(
                    Diagnostic::new("K0109", "a dim outside of its range")
                        .tensor(name.clone())
                        .expected(format!("{} to {}", range.least, range.most))
                        .found(extent.to_string()),
                ),
            }
        }
        match problems.is_empty() {
            true => Ok(settled),
            false => Err(Error { kind: ErrorKind::Usage, diagnostics: problems }),
        }
    }

    /// The graph of the model, or of a stage of it after what is known; with what follows.
    pub(crate) fn import(
        &self,
        limits: &Limits,
        dims: Vec<(String, usize)>,
        shapes: &[(String, Vec<usize>)],
        values: &[(String, Tensor)],
        known: Option<Arc<Known>>,
    ) -> Result<(Graph, Option<Later>)> {
        let import = |known| {
            let options = self.options(limits, dims.clone(), values);
            let options = ImportOptions { shapes: shapes.to_vec(), known, ..options };
            onnx::import_stage(self.bytes.clone(), &options)
        };
        let (graph, later) = import(known.clone())?;
        let Some(known) = known.filter(|known| !known.dims().is_empty()) else {
            return Ok((graph, later));
        };
        let longer = ranges::longer(known.dims());
        let lengths: Vec<usize> = longer.iter().map(|(_, length)| *length).collect();
        let longer = import(Some(Arc::new(known.lengthened(&lengths))))?.0;
        Ok((ranges::prove(graph, &longer)?, later))
    }

    /// How the model is imported, where nothing is said of shapes and ranges.
    fn options(
        &self,
        limits: &Limits,
        dims: Vec<(String, usize)>,
        values: &[(String, Tensor)],
    ) -> ImportOptions {
        let bytes = usize::try_from(limits.max_bytes).unwrap_or(usize::MAX);
        ImportOptions {
            limits: onnx::Limits {
                nodes: limits.max_nodes,
                bytes,
                rank: limits.max_rank,
                depth: limits.max_depth,
            },
            dims,
            folder: self.folder.clone(),
            values: values.to_vec(),
            ..ImportOptions::default()
        }
    }

    /// The graph of the model for all lengths of dims within their ranges.
    pub(crate) fn import_ranges(
        &self,
        limits: &Limits,
        settled: Vec<(String, usize)>,
        ranges: &[(String, DimRange)],
        values: &[(String, Tensor)],
    ) -> Result<Graph> {
        let dims: Vec<PlanDim> = ranges
            .iter()
            .filter(|(_, range)| range.least < range.most)
            .map(|(name, r)| PlanDim { name: name.clone(), least: r.least, most: r.most })
            .collect();
        if dims.len() > DIMS {
            let problem = Diagnostic::new("K0109", "too many dims with a range");
            let problem = problem.expected(format!("{DIMS} at most"));
            return Err(Error::new(ErrorKind::Usage, problem.found(dims.len().to_string())));
        }
        let import = |lengths: Vec<(String, usize)>| {
            let fixed = settled.iter().filter(|s| !dims.iter().any(|dim| dim.name == s.0));
            let options = self.options(limits, fixed.cloned().chain(lengths).collect(), values);
            onnx::import(self.bytes.clone(), &ImportOptions { ranges: dims.clone(), ..options })
        };
        let most = dims.iter().map(|dim| (dim.name.clone(), dim.most)).collect();
        let mut graph = import(most)?;
        graph.dims = dims.clone();
        ranges::prove(graph, &import(ranges::longer(&dims))?)
    }
}

fn port(value: &ValueInfoProto) -> ModelPort {
    let name = value.name.clone().unwrap_or_default();
    let Some(tensor) = onnx::tensor_type(value) else {
        return ModelPort { name, ty: "not a tensor".to_string(), dims: None };
    };
    let dtype = onnx::tensor::dtype_of(tensor.elem_type.unwrap_or(0))
        .map_or("unsupported".to_string(), |d| d.to_string());
    let dims: Option<Vec<Dim>> = tensor.shape.as_ref().map(|s| s.dim.iter().map(dim).collect());
    let text = |dim: &Dim| match dim {
        Dim::Known(n) => n.to_string(),
        Dim::Symbol(name) => sanitize(name),
        Dim::Unknown => "?".to_string(),
    };
    let list: Vec<String> = dims.iter().flatten().map(text).collect();
    let list = if dims.is_some() { list.join(",") } else { "...".to_string() };
    ModelPort { name, ty: format!("{dtype}[{list}]"), dims }
}

fn dim(dim: &Dimension) -> Dim {
    match &dim.value {
        Some(DimensionValue::DimValue(n)) => usize::try_from(*n).map_or(Dim::Unknown, Dim::Known),
        Some(DimensionValue::DimParam(name)) if !name.is_empty() => Dim::Symbol(name.clone()),
        Some(DimensionValue::DimParam(_)) | None => Dim::Unknown,
    }
}

fn weight_size(tensor: &TensorProto) -> u64 {
    let bits = onnx::tensor::dtype_of(tensor.data_type.unwrap_or(0)).map_or(0, |d| d.bits());
    let extents = tensor.dims.iter().map(|&d| u64::try_from(d).unwrap_or(0));
    extents.fold(bits as u64, u64::saturating_mul).div_ceil(8)
}

/// The name and the tensor of a `.pb` file.
pub fn read_tensor_pb(bytes: &[u8]) -> Result<(String, Tensor)> {
    let bytes = Bytes::copy_from_slice(bytes);
    let name = TensorProto::decode(bytes.clone()).ok().and_then(|t| t.name).unwrap_or_default();
    Ok((name, onnx::read_tensor(bytes)?))
}
