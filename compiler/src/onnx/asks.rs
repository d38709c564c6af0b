//! What the importer asks for where shapes hang on data that the model computes.
//!
//! A node that needs such data is put off, with all that hangs on it. What is left is a graph, the
//! first stage: its outputs are the data that were asked for, and the values that later nodes read.
//! Once it has run, the model is imported again with the answers, and so on until nothing is asked.
//! An answer is a value where it decides a shape by itself; where it is a result of data, such as
//! the indices of what is not zero, only its type is needed, and it is an input of the next stage.
//! How many results there are is a dim of that stage with a range, as long as a power of two, so
//! that it is compiled for other numbers too; if nothing in it needs the number itself.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use kiln_runtime::plan::{DIMS, PlanDim};
use kiln_runtime::tensor::Tensor;

use super::proto::{GraphProto, NodeProto};
use super::turns::Body;
use super::{Held, Import};
use crate::error::{Diagnostic, Error, ErrorKind};
use crate::graph::eval::Value;
use crate::graph::op::{Op, Type};
use crate::graph::used::{Span, Used};
use crate::graph::{Graph, NodeId, Origin};

/// Elements of a value that may decide a shape.
const MOST: usize = 1 << 16;
/// Results that there is room for at least.
const LEAST_ROOM: usize = 16;

/// Who asks: a node of the model, by its place in the list, and the name of that node or of one
/// within it; and how often it has asked, or found known, before. So it is the same question in
/// every stage, whatever is known there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    node: usize,
    asker: Origin,
    count: usize,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Key { node, asker, count } = self;
        write!(f, "{asker} ({node}.{count})")
    }
}

/// A function of data, computed between two stages.
#[derive(Clone)]
pub struct Compute {
    /// The axis of each result, in order, that is as long as data say; all are equally long.
    pub counted: &'static [Option<u8>],
    /// The results.
    pub results: Arc<Function>,
}

/// A function of values.
pub type Function = dyn Fn(&[Value]) -> Result<Vec<Tensor>, Diagnostic> + Send + Sync;

/// What is done with operands between two stages.
#[derive(Clone)]
pub enum Work {
    /// They are the answer.
    Value,
    /// A function of them.
    Function(Compute),
    /// A loop.
    Loop(Arc<Body>),
}

/// What earlier stages have made, as far as code hangs on it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Known {
    /// Numbers of results, which types hang on.
    dims: Vec<PlanDim>,
    /// Values of the model: several types are those of a sequence's elements.
    made: Vec<(String, Shelf)>,
    answers: Vec<(Key, Answer)>,
}

#[derive(Clone, Debug, PartialEq)]
enum Shelf {
    Tensor(Type),
    Sequence(Vec<Type>),
}

impl Shelf {
    fn types(&self) -> &[Type] {
        match self {
            Shelf::Tensor(ty) => std::slice::from_ref(ty),
            Shelf::Sequence(types) => types,
        }
    }

    fn types_mut(&mut self) -> &mut [Type] {
        match self {
            Shelf::Tensor(ty) => std::slice::from_mut(ty),
            Shelf::Sequence(types) => types,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Answer {
    /// The value that was asked for.
    Value(Tensor),
    /// Types of the results of a function.
    Results(Vec<Type>),
}

impl Known {
    /// Numbers of results that are dims with a range.
    pub fn dims(&self) -> &[PlanDim] {
        &self.dims
    }

    /// Types of all inputs that hold what is known, with their names.
    fn ports_mut(&mut self) -> impl Iterator<Item = (String, &mut Type)> {
        let made = self.made.iter_mut().flat_map(|(name, shelf)| {
            let names = port_names(name, shelf);
            names.into_iter().zip(shelf.types_mut())
        });
        let results = self.answers.iter_mut().flat_map(|(key, answer)| {
            let types = match answer {
                Answer::Results(types) => &mut types[..],
                Answer::Value(_) => &mut [],
            };
            types.iter_mut().enumerate().map(|(i, ty)| (result_name(key, i), ty))
        });
        made.chain(results)
    }

    /// The same with dims that are longer, by lengths in the order of the dims.
    pub fn lengthened(&self, lengths: &[usize]) -> Known {
        let mut known = self.clone();
        for (_, ty) in known.ports_mut() {
            for (axis, span) in ty.used.clone() {
                if let Span::Dim { dim, more } = span {
                    let length = lengths[usize::from(dim)] as i64 + i64::from(more);
                    ty.shape[usize::from(axis)] = usize::try_from(length).unwrap_or(0);
                }
            }
        }
        known
    }

    /// The same for these tensors and no others.
    pub fn exactly(&self, tensors: &[(String, Tensor)]) -> Known {
        let mut known = self.clone();
        for (name, ty) in known.ports_mut() {
            if let Some((_, tensor)) = tensors.iter().find(|(made, _)| *made == name) {
                *ty = Type::new(tensor.dtype(), tensor.shape());
            }
        }
        known.dims.clear();
        known
    }

    /// Types of results of so many elements along an axis each, which is that of a new dim.
    fn counted(&mut self, key: &Key, results: &[Tensor], axes: &[Option<u8>]) -> Vec<Type> {
        let mut types: Vec<Type> =
            results.iter().map(|result| Type::new(result.dtype(), result.shape())).collect();
        let axes = types.iter_mut().zip(axes);
        let mut axes: Vec<(&mut Type, u8)> =
            axes.filter_map(|(ty, axis)| Some((ty, (*axis)?))).collect();
        let Some((first, axis)) = axes.first() else { return types };
        let most = first.shape[usize::from(*axis)].max(LEAST_ROOM).next_power_of_two();
        if self.dims.len() < DIMS {
            let dim = self.dims.len() as u8;
            for (ty, axis) in &mut axes {
                ty.shape[usize::from(*axis)] = most;
                ty.used = Used::from_slice(&[(*axis, Span::Dim { dim, more: 0 })]);
            }
            let name = format!("results of {key}");
            self.dims.push(PlanDim { name, least: 0, most });
        }
        types
    }
}

/// A question that the first outputs of a stage answer.
#[derive(Clone)]
struct Asked {
    key: Key,
    operands: Vec<NodeId>,
    work: Work,
}

/// What follows a stage: the questions that its outputs answer, in order, and the values of the
/// model that are its other outputs.
#[derive(Clone)]
pub struct Later {
    asked: Vec<Asked>,
    crossing: Vec<(String, Shelf)>,
}

impl fmt::Debug for Later {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.keys()).finish()
    }
}

impl Later {
    /// Which questions are asked.
    pub fn keys(&self) -> Vec<Key> {
        self.asked.iter().map(|asked| asked.key.clone()).collect()
    }

    /// What is known after the stage has given `outputs`, and the tensors that are new inputs of
    /// the stages that follow. `turns` gives the results of a loop.
    ///
    /// # Errors
    /// Where a function refuses its data, and those of `turns`.
    pub fn after<E: From<Error>>(
        &self,
        known: &Known,
        outputs: Vec<Tensor>,
        mut turns: impl FnMut(&Arc<Body>, Vec<Tensor>) -> Result<Vec<Tensor>, E>,
    ) -> Result<(Known, Vec<(String, Tensor)>), E> {
        let (mut known, mut tensors) = (known.clone(), Vec::new());
        let mut outputs = outputs.into_iter();
        for Asked { key, operands, work } in &self.asked {
            let given: Vec<Tensor> = outputs.by_ref().take(operands.len()).collect();
            let (results, counted) = match work {
                Work::Value => {
                    let value = given.into_iter().map(|value| (key.clone(), Answer::Value(value)));
                    known.answers.extend(value);
                    continue;
                }
                Work::Function(compute) => {
                    let values: Vec<Value> = given.iter().map(Value::from_tensor).collect();
                    let results = (compute.results)(&values);
                    let results = results.map_err(|d| Error::new(ErrorKind::Model, d))?;
                    (results, compute.counted.to_vec())
                }
                Work::Loop(body) => (turns(body, given)?, body.counted()),
            };
            let types = known.counted(key, &results, &counted);
            let named = results.into_iter().enumerate();
            tensors.extend(named.map(|(i, tensor)| (result_name(key, i), tensor)));
            known.answers.push((key.clone(), Answer::Results(types)));
        }
        for (name, shelf) in &self.crossing {
            let names = port_names(name, shelf);
            tensors.extend(names.into_iter().zip(outputs.by_ref()));
            known.made.push((name.clone(), shelf.clone()));
        }
        Ok((known, tensors))
    }
}

/// The name of an input that is a result.
fn result_name(key: &Key, result: usize) -> String {
    format!("result {result} of {key}")
}

/// Names of the inputs that hold a value of the model.
fn port_names(name: &str, shelf: &Shelf) -> Vec<String> {
    match shelf {
        Shelf::Tensor(_) => vec![name.to_string()],
        Shelf::Sequence(types) => (0..types.len()).map(|i| format!("{name}[{i}]")).collect(),
    }
}

/// The questions of an import. Without earlier stages to know of, nothing can be asked.
pub struct Asks {
    known: Option<Arc<Known>>,
    /// Inputs of the graph that hold results.
    results: HashMap<Key, Vec<NodeId>>,
    /// The node that is imported, and how often nodes within it have needed to know something.
    now: usize,
    counts: HashMap<Origin, usize>,
    asked: Vec<Asked>,
}

impl Asks {
    pub fn new(known: Option<Arc<Known>>) -> Asks {
        let (results, counts) = Default::default();
        Asks { known, results, now: 0, counts, asked: Vec::new() }
    }

    fn begin(&mut self, node: usize) {
        self.now = node;
        self.counts.clear();
    }

    /// Whether the node has a question that is not answered. It has one at a time.
    fn waits(&self) -> bool {
        self.asked.last().is_some_and(|asked| asked.key.node == self.now)
    }

    /// Whether questions may be asked.
    pub fn may_ask(&self) -> bool {
        self.known.is_some()
    }

    fn key(&mut self, asker: &Origin) -> Key {
        let count = self.counts.entry(asker.clone()).or_default();
        *count += 1;
        Key { node: self.now, asker: asker.clone(), count: *count - 1 }
    }

    /// A value that follows from constants or from an answer; else it is asked for.
    pub fn value(&mut self, graph: &Graph, asker: &Origin, id: NodeId) -> Option<Value> {
        let key = self.key(asker);
        if let Some(value) = graph.value(id) {
            return Some(value);
        }
        let known = self.known.as_ref()?;
        let answer = known.answers.iter().find(|(answered, _)| *answered == key);
        if let Some((_, Answer::Value(tensor))) = answer {
            return Some(Value::from_tensor(tensor));
        }
        // Of a constant that hangs on dims, there is none to ask for.
        let there = !self.waits() && graph.constant(id).is_none() && graph.ty(id).numel() <= MOST;
        if there && answer.is_none() {
            self.asked.push(Asked { key, operands: vec![id], work: Work::Value });
        }
        None
    }

    /// The results of work with operands, as inputs of the graph; else they are asked for.
    pub fn results(
        &mut self,
        asker: &Origin,
        operands: &[NodeId],
        work: impl FnOnce() -> Work,
    ) -> Option<Vec<NodeId>> {
        let key = self.key(asker);
        self.known.as_ref()?;
        if let Some(results) = self.results.get(&key) {
            return Some(results.clone());
        }
        if !self.waits() {
            self.asked.push(Asked { key, operands: operands.to_vec(), work: work() });
        }
        None
    }

    /// Notes that results were made at once.
    pub fn made(&mut self, asker: &Origin) {
        self.key(asker);
    }
}

/// Names that nodes read, those of graphs within them too.
pub fn names_read<'n>(node: &'n NodeProto, names: &mut HashSet<&'n str>) {
    names.extend(node.input.iter().map(String::as_str));
    let graphs = node.attribute.iter().flat_map(|a| a.g.as_deref().into_iter().chain(&a.graphs));
    for graph in graphs {
        graph.node.iter().for_each(|node| names_read(node, names));
        names.extend(graph.output.iter().filter_map(|output| output.name.as_deref()));
    }
}

impl Import<'_> {
    /// Makes inputs of what earlier stages have made.
    pub(super) fn shelves(&mut self) {
        let Some(known) = self.asks.known.clone() else { return };
        self.graph.dims.extend_from_slice(&known.dims);
        for (name, shelf) in &known.made {
            let names = port_names(name, shelf);
            let ids: Vec<NodeId> =
                names.iter().zip(shelf.types()).map(|(name, ty)| self.port(name, ty)).collect();
            let held = match shelf {
                Shelf::Tensor(_) => Held::Tensor(ids[0]),
                Shelf::Sequence(_) => Held::Sequence(ids),
            };
            self.values.insert(name.clone(), held);
        }
        for (key, answer) in &known.answers {
            let Answer::Results(types) = answer else { continue };
            let named = types.iter().enumerate();
            let ids = named.map(|(i, ty)| self.port(&result_name(key, i), ty)).collect();
            self.asks.results.insert(key.clone(), ids);
        }
    }

    /// An input that holds what is known.
    fn port(&mut self, name: &str, ty: &Type) -> NodeId {
        if let Err(problem) = self.room(ty) {
            self.problems.push(problem.tensor(name));
        }
        self.graph.input(name, ty.clone())
    }

    /// Whether an earlier stage has made a value.
    pub(super) fn is_made(&self, name: &str) -> bool {
        let known = self.asks.known.as_ref();
        known.is_some_and(|known| known.made.iter().any(|(made, _)| made == name))
    }

    /// A node of the model's own graph, unless its outputs are made already. It is put off where
    /// all that is wrong is that it waits for an answer.
    pub(super) fn node_in_stage(&mut self, number: usize, node: &NodeProto) {
        let mut outputs = node.output.iter().filter(|name| !name.is_empty()).peekable();
        if outputs.peek().is_some() && outputs.all(|name| self.is_made(name)) {
            return;
        }
        self.asks.begin(number);
        let problems = self.problems.len();
        self.node(node);
        let new = &self.problems[problems..];
        if self.asks.waits() && new.iter().all(|problem| problem.code == super::NEEDS_VALUE) {
            self.problems.truncate(problems);
        }
    }

    /// What follows this stage, whose outputs become what is asked for and what is read later;
    /// none where everything is known.
    pub(super) fn later(&mut self, model: &GraphProto) -> Option<Later> {
        if self.asks.asked.is_empty() || !self.problems.is_empty() {
            return None;
        }
        let put_off = |node: &&NodeProto| {
            let held = |name: &String| matches!(self.values.get(name), Some(Held::Refused));
            node.output.iter().any(held)
        };
        let mut read = HashSet::new();
        model.node.iter().filter(put_off).for_each(|node| names_read(node, &mut read));
        read.extend(model.output.iter().filter_map(|output| output.name.as_deref()));
        let mut read: Vec<&str> = read.into_iter().collect();
        read.sort_unstable();
        let given = |id: NodeId| matches!(self.graph.node(id).op, Op::Input(_));
        let (mut crossing, mut ids) = (Vec::new(), Vec::new());
        for name in read {
            let ty = |id: NodeId| self.graph.ty(id).clone();
            match self.values.get(name) {
                // What is known, and inputs, are there in every stage.
                Some(Held::Tensor(id)) if given(*id) || self.graph.value(*id).is_some() => {}
                Some(Held::Tensor(id)) => {
                    crossing.push((name.to_string(), Shelf::Tensor(ty(*id))));
                    ids.push(*id);
                }
                Some(Held::Sequence(all)) if !self.is_made(name) => {
                    let types = all.iter().map(|&id| ty(id)).collect();
                    crossing.push((name.to_string(), Shelf::Sequence(types)));
                    ids.extend(all);
                }
                Some(Held::Sequence(_) | Held::Refused) | None => {}
            }
        }
        let asked = std::mem::take(&mut self.asks.asked);
        let operands = asked.iter().flat_map(|asked| asked.operands.clone());
        let outputs = operands.chain(ids).enumerate();
        self.graph.outputs = outputs.map(|(i, id)| (format!("value {i}"), id)).collect();
        Some(Later { asked, crossing })
    }
}
