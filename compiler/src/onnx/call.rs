//! One node of a model while it is imported: its operands and typed getters for its attributes.
//! An attribute that nobody reads is an error, so that none is ignored in silence.

use std::cell::RefCell;
use std::sync::Arc;

use kiln_runtime::tensor::{DType, Tensor};

use super::asks::{Asks, Compute, Work};
use super::proto::{AttributeProto, NodeProto};
use super::tensor::Files;
use crate::error::Diagnostic;
use crate::graph::build::Added;
use crate::graph::eval::Value;
use crate::graph::op::{Op, Shape, Type};
use crate::graph::{Constant, Graph, NodeId, Origin};
use crate::ranges::ONE_LENGTH;

/// What an importer function gives: a value for each output, `None` for those that it cannot make.
pub type Outputs = Result<Vec<Option<NodeId>>, Diagnostic>;

/// A node of the model with its operands.
pub struct Call<'a> {
    /// The graph that grows.
    pub graph: &'a mut Graph,
    /// Opset in force.
    pub opset: i64,
    /// Origin of all nodes that are added.
    pub origin: Origin,
    files: &'a mut Files,
    asks: RefCell<&'a mut Asks>,
    node: &'a NodeProto,
    inputs: Vec<Option<NodeId>>,
    read: RefCell<Vec<bool>>,
}

impl<'a> Call<'a> {
    /// A call of a node.
    pub fn new(
        (graph, files, asks): (&'a mut Graph, &'a mut Files, &'a mut Asks),
        node: &'a NodeProto,
        inputs: Vec<Option<NodeId>>,
        opset: i64,
        name: &str,
    ) -> Call<'a> {
        let read = RefCell::new(vec![false; node.attribute.len()]);
        let asks = RefCell::new(asks);
        Call { graph, opset, origin: Origin::from(name), files, asks, node, inputs, read }
    }

    /// Operator type.
    pub fn op(&self) -> &str {
        self.node.op_type.as_deref().unwrap_or("")
    }

    /// Number of outputs that the node names.
    pub fn n_outputs(&self) -> usize {
        self.node.output.len()
    }

    /// Number of operands, absent ones at the end not counted.
    pub fn n_inputs(&self) -> usize {
        self.inputs.iter().rposition(|i| i.is_some()).map_or(0, |i| i + 1)
    }

    /// An operand that must be there.
    pub fn input(&self, index: usize) -> Result<NodeId, Diagnostic> {
        self.optional(index)
            .ok_or_else(|| Diagnostic::new("K0120", format!("operand {index} is missing")))
    }

    /// An operand that may be absent.
    pub fn optional(&self, index: usize) -> Option<NodeId> {
        self.inputs.get(index).copied().flatten()
    }

    /// The type of a value.
    pub fn ty(&self, id: NodeId) -> Type {
        self.graph.ty(id).clone()
    }

    /// The shape of a value.
    pub fn shape(&self, id: NodeId) -> Shape {
        self.graph.ty(id).shape.clone()
    }

    /// The integers of an operand that decides shapes; absent is `None`.
    pub fn ints_input(&self, index: usize) -> Result<Option<Vec<i64>>, Diagnostic> {
        let Some(id) = self.optional(index) else { return Ok(None) };
        let known = self.asked(id).and_then(|v| v.as_i64s());
        known.map(Some).ok_or_else(|| self.not_known(index, id))
    }

    /// The value of an operand that decides shapes.
    pub fn known_input(&self, index: usize) -> Result<Value, Diagnostic> {
        let id = self.input(index)?;
        self.asked(id).ok_or_else(|| self.not_known(index, id))
    }

    /// A value that decides shapes. Where it is not known, the model asks for it.
    fn asked(&self, id: NodeId) -> Option<Value> {
        self.asks.borrow_mut().value(self.graph, &self.origin, id)
    }

    /// The results of a function of operands: computed now where these are known, else between the
    /// stages of the model. `counted` is the axis of each result that is as long as data say.
    pub fn computed(
        &mut self,
        operands: &[usize],
        counted: &'static [Option<u8>],
        compute: impl Fn(&[Value]) -> Result<Vec<Tensor>, Diagnostic> + Send + Sync + 'static,
    ) -> Result<Vec<NodeId>, Diagnostic> {
        let ids: Vec<NodeId> = operands.iter().map(|&i| self.input(i)).collect::<Result<_, _>>()?;
        let known: Option<Vec<Value>> = ids.iter().map(|&id| self.graph.value(id)).collect();
        if let Some(values) = known {
            self.asks.borrow_mut().made(&self.origin);
            let results = compute(&values)?;
            return Ok(results.iter().map(|r| self.graph.tensor(r, &self.origin)).collect());
        }
        let (node, op, opset) = (self.origin.clone(), self.op().to_string(), self.opset);
        let named = move |d: Diagnostic| d.node(node.as_ref()).op(op.clone(), opset);
        let results = Arc::new(move |values: &[Value]| compute(values).map_err(&named));
        let work = || Work::Function(Compute { counted, results });
        let results = self.asks.borrow_mut().results(&self.origin, &ids, work);
        results.ok_or_else(|| self.not_known(operands[0], ids[0]))
    }

    fn not_known(&self, index: usize, id: NodeId) -> Diagnostic {
        if self.graph.constant(id).is_some() {
            let what = format!("operand {index} is not in proportion to the length of a dim");
            return Diagnostic::new("K0110", what).help(ONE_LENGTH);
        }
        Diagnostic::new(
            super::NEEDS_VALUE,
            format!("operand {index} decides what is computed and is not known"),
        )
        .found(format!("a value that the model computes ({})", self.graph.node(id).origin))
        .help(
            "`kiln run`, and `on_demand` in process, compile such a model in stages; for one file \
             shapes must follow from the shapes of inputs",
        )
    }

    fn attribute(&self, name: &str) -> Option<&'a AttributeProto> {
        let at = self.node.attribute.iter().position(|a| a.name.as_deref() == Some(name))?;
        self.read.borrow_mut()[at] = true;
        Some(&self.node.attribute[at])
    }

    /// Names of the attributes that nobody has read.
    pub fn unread(&self) -> Vec<String> {
        let read = self.read.borrow();
        self.node
            .attribute
            .iter()
            .zip(read.iter())
            .filter(|(a, read)| !**read && a.name.as_deref() != Some("doc_string"))
            .map(|(a, _)| a.name.clone().unwrap_or_default())
            .collect()
    }

    /// An attribute that changes nothing here.
    pub fn ignore(&self, name: &str) {
        self.attribute(name);
    }

    /// An integer attribute.
    pub fn int(&self, name: &str) -> Option<i64> {
        self.attribute(name).map(|a| a.i.unwrap_or(0))
    }

    /// An integer attribute or its default.
    pub fn int_or(&self, name: &str, default: i64) -> i64 {
        self.int(name).unwrap_or(default)
    }

    /// A float attribute or its default.
    pub fn float_or(&self, name: &str, default: f32) -> f32 {
        self.attribute(name).map_or(default, |a| a.f.unwrap_or(0.0))
    }

    /// A float attribute.
    pub fn float(&self, name: &str) -> Option<f32> {
        self.attribute(name).map(|a| a.f.unwrap_or(0.0))
    }

    /// A list of integers.
    pub fn ints(&self, name: &str) -> Option<Vec<i64>> {
        self.attribute(name).map(|a| a.ints.clone())
    }

    /// A list of floats.
    pub fn floats(&self, name: &str) -> Option<Vec<f32>> {
        self.attribute(name).map(|a| a.floats.clone())
    }

    /// A string attribute or its default.
    pub fn string_or(&self, name: &str, default: &str) -> String {
        self.attribute(name)
            .map(|a| String::from_utf8_lossy(a.s.as_deref().unwrap_or(b"")).into_owned())
            .unwrap_or_else(|| default.to_string())
    }

    /// A list of strings.
    pub fn strings(&self, name: &str) -> Option<Vec<String>> {
        let text = |s: &bytes::Bytes| String::from_utf8_lossy(s).into_owned();
        self.attribute(name).map(|a| a.strings.iter().map(text).collect())
    }

    /// A tensor attribute.
    pub fn tensor(&mut self, name: &str) -> Result<Option<Constant>, Diagnostic> {
        match self.attribute(name).and_then(|a| a.t.as_ref()) {
            Some(tensor) => self.files.constant(tensor).map(Some),
            None => Ok(None),
        }
    }

    /// An axis that may count from the end.
    pub fn axis(&self, axis: i64, rank: usize) -> Result<usize, Diagnostic> {
        let from_end = if axis < 0 { axis + rank as i64 } else { axis };
        usize::try_from(from_end).ok().filter(|&a| a < rank).ok_or_else(|| {
            Diagnostic::new("K0122", "an axis that the operand does not have")
                .expected(format!("-{rank}..{rank}"))
                .found(axis.to_string())
        })
    }

    /// Axes that may count from the end.
    pub fn axes(&self, axes: &[i64], rank: usize) -> Result<Vec<usize>, Diagnostic> {
        axes.iter().map(|&a| self.axis(a, rank)).collect()
    }

    /// x at `start + step * i` of one axis, the others whole.
    pub fn cut(&mut self, x: NodeId, axis: usize, range: (i64, i64, usize)) -> Added {
        let shape = self.shape(x);
        let ranges = shape.iter().enumerate().map(|(d, &e)| match d == axis {
            true if range.2 == 0 => (0, 1, 0),
            true => range,
            false => (0, 1, e),
        });
        self.graph.add(Op::Slice(ranges.collect()), &[x], &self.origin)
    }

    /// A number of a dtype with all extents 1.
    pub fn number(&mut self, dtype: DType, rank: usize, value: f64) -> NodeId {
        let origin = self.origin.clone();
        self.graph.scalar(dtype, rank, value, &origin)
    }
}

/// One output.
pub fn one(id: NodeId) -> Outputs {
    Ok(vec![Some(id)])
}

/// A diagnostic about a variant of an operator that is not supported.
pub fn not_supported(what: impl Into<String>) -> Diagnostic {
    Diagnostic::new("K0130", format!("not supported: {}", what.into()))
}
