//! Loops of which data decide whether a turn is the last: what they repeat is a model of its own,
//! which runs between two stages of the model.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use super::asks::{Work, names_read};
use super::call::not_supported;
use super::control::{Made, Site, not_known};
use super::proto::{
    GraphProto, ModelProto, OperatorSetIdProto, TensorProto, TypeProto, ValueInfoProto, type_proto,
};
use super::tensor::number_of;
use super::{Held, Import, tensor_type};
use crate::error::Diagnostic;
use crate::graph::op::{Shape, Type};
use crate::graph::{Constant, NodeId, Origin};

/// What a loop repeats.
pub struct Body {
    /// The node of the loop, and its opset.
    pub node: (Origin, i64),
    /// A model. Its outputs are whether to go on, what is carried into the next turn, and rows that
    /// are collected.
    pub model: Bytes,
    /// Its inputs: the number of the turn, whether there is one, what is carried, and what the
    /// loop reads besides.
    pub inputs: Vec<String>,
    /// Whether the loop is told how many turns there are at most, and whether there is a first.
    pub told: [bool; 2],
    /// How many values are carried.
    pub carried: usize,
    /// Types of the rows, where the model says them.
    pub rows: Vec<Option<Type>>,
}

impl Body {
    /// The axis of each result that is as long as there were turns.
    pub fn counted(&self) -> Vec<Option<u8>> {
        let carried = std::iter::repeat_n(None, self.carried);
        carried.chain(self.rows.iter().map(|_| Some(0))).collect()
    }
}

/// The results of a loop that runs between two stages.
pub(super) fn between_stages(import: &mut Import, site: &Site, body: &GraphProto) -> Made {
    let carried: Vec<NodeId> =
        (2..site.inputs.len()).map(|i| site.input(i)).collect::<Result<_, _>>()?;
    let told = [0, 1].map(|i: usize| site.inputs.get(i).copied().flatten());
    let (constants, read) = outside(import, body)?;
    let types = carried.iter().chain(read.iter().map(|(_, id)| id));
    let types: Vec<Type> = types.map(|&id| import.graph.ty(id).clone()).collect();
    let operands: Vec<NodeId> =
        told.into_iter().flatten().chain(carried.clone()).chain(read.iter().map(|r| r.1)).collect();
    let names: Vec<String> = read.into_iter().map(|(name, _)| name).collect();
    let node = (site.origin.clone(), import.opsets.get("").copied().unwrap_or(0));
    let mut opsets: Vec<(String, i64)> = import.opsets.clone().into_iter().collect();
    opsets.sort_unstable();
    let work = || {
        Work::Loop(Arc::new(made(
            (node, body),
            &names,
            (constants, types),
            opsets,
            told.map(|t| t.is_some()),
        )))
    };
    let results = import.asks.results(&site.origin, &operands, work);
    let results = results.ok_or_else(|| not_known("whether a turn is the last"))?;
    Ok(results.into_iter().map(Held::Tensor).collect())
}

/// Constants, and values by name.
type Outside = (Vec<TensorProto>, Vec<(String, NodeId)>);

/// What a body reads from outside of it.
fn outside(import: &Import, body: &GraphProto) -> Result<Outside, Option<Diagnostic>> {
    let mut names = HashSet::new();
    body.node.iter().for_each(|node| names_read(node, &mut names));
    names.extend(body.output.iter().filter_map(|output| output.name.as_deref()));
    let own = body.input.iter().filter_map(|input| input.name.as_deref());
    let own = own.chain(body.initializer.iter().filter_map(|tensor| tensor.name.as_deref()));
    let own = own.chain(body.node.iter().flat_map(|node| node.output.iter().map(String::as_str)));
    for name in own {
        names.remove(name);
    }
    let mut names: Vec<&str> = names.into_iter().collect();
    names.sort_unstable();
    let (mut constants, mut values) = (Vec::new(), Vec::new());
    for name in names {
        match import.values.get(name) {
            Some(Held::Tensor(id)) => {
                match import.graph.constant(*id).and_then(|c| tensor(name, c)) {
                    Some(tensor) => constants.push(tensor),
                    None => values.push((name.to_string(), *id)),
                }
            }
            Some(Held::Refused) => return Err(None),
            Some(Held::Sequence(_)) => {
                let what = "a sequence in a loop whose turns data decide";
                return Err(Some(not_supported(what).tensor(name)));
            }
            // A name of a graph within it.
            None => {}
        }
    }
    Ok((constants, values))
}

/// A constant as it is in a file; none for codes, of which a file has several in a byte.
fn tensor(name: &str, constant: &Constant) -> Option<TensorProto> {
    let Constant { ty, bytes } = constant;
    (ty.dtype.bits() >= 8 && ty.dtype.stored() == ty.dtype).then(|| TensorProto {
        name: Some(name.to_string()),
        dims: ty.shape.iter().map(|&extent| extent as i64).collect(),
        data_type: Some(number_of(ty.dtype)),
        raw_data: Some(bytes.clone()),
        ..TensorProto::default()
    })
}

/// An input of any shape.
fn input(name: &str, number: i32) -> ValueInfoProto {
    let tensor = type_proto::Tensor { elem_type: Some(number), shape: None };
    let value = Some(type_proto::Value::TensorType(tensor));
    let ty = TypeProto { value, ..TypeProto::default() };
    ValueInfoProto { name: Some(name.to_string()), r#type: Some(ty), ..ValueInfoProto::default() }
}

/// A body as a model, for values of those types that it carries and reads.
fn made(
    (node, body): ((Origin, i64), &GraphProto),
    read: &[String],
    (constants, types): (Vec<TensorProto>, Vec<Type>),
    opsets: Vec<(String, i64)>,
    told: [bool; 2],
) -> Body {
    const FIRST: [i32; 2] = [7, 9];
    let own = body.input.iter().map(|input| input.name.clone().unwrap_or_default());
    let inputs: Vec<String> = own.chain(read.iter().cloned()).collect();
    let numbers = FIRST.into_iter().chain(types.iter().map(|ty| number_of(ty.dtype)));
    let ports = inputs.iter().zip(numbers).map(|(name, number)| input(name, number)).collect();
    let carried = types.len() - read.len();
    let rows = body.output.iter().skip(1 + carried).map(|row| {
        let ty = tensor_type(row)?;
        let dims = &ty.shape.as_ref()?.dim;
        let extents = dims.iter().map(|dim| match dim.value {
            Some(super::DimensionValue::DimValue(n)) => usize::try_from(n).ok(),
            _ => None,
        });
        let dtype = super::dtype_of(ty.elem_type?).ok()?;
        Some(Type::of(dtype, extents.collect::<Option<Shape>>()?))
    });
    let rows = rows.collect();
    let mut graph = GraphProto { input: ports, ..body.clone() };
    graph.initializer.extend(constants);
    let opset =
        |(domain, version)| OperatorSetIdProto { domain: Some(domain), version: Some(version) };
    let opset_import = opsets.into_iter().map(opset).collect();
    let model = ModelProto { graph: Some(graph), opset_import, ..ModelProto::default() };
    Body { node, model: Bytes::from(model.encode_to_vec()), inputs, told, carried, rows }
}
