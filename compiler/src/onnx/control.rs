//! Operators that have graphs of their own. Such a graph is imported where it stands, and that of
//! a loop once for every turn, where it is known how many there are (else see `turns.rs`).

use smallvec::SmallVec;

use super::attention::flexible;
use super::call::{Call, not_supported};
use super::proto::{GraphProto, NodeProto};
use super::recurrent::MOST_STEPS;
use super::sequence::SEQUENCES;
use super::table::full_name;
use super::{Held, Import, NEEDS_VALUE, scan, turns};
use crate::error::Diagnostic;
use crate::graph::op::{Composite, Op};
use crate::graph::text::type_text;
use crate::graph::{NodeId, Origin};

/// What a node gives; without a diagnostic where something has been refused before.
pub(super) type Made = Result<Vec<Held>, Option<Diagnostic>>;

/// A node with its operands.
pub(super) struct Site<'n> {
    pub node: &'n NodeProto,
    pub origin: Origin,
    pub inputs: Vec<Option<NodeId>>,
    /// The operands that are sequences, in order.
    pub sequences: Vec<Vec<NodeId>>,
}

/// An operator of this kind.
pub(super) struct Flow {
    pub name: &'static str,
    /// First opset.
    pub since: i64,
    /// The attributes that it has.
    pub attributes: &'static [&'static str],
    /// Whether it takes sequences.
    pub sequences: bool,
    pub import: fn(&mut Import, &Site) -> Made,
}

static FLOWS: &[Flow] = &[
    Flow {
        name: "If",
        since: 1,
        attributes: &["then_branch", "else_branch"],
        sequences: false,
        import: choice,
    },
    Flow { name: "Loop", since: 1, attributes: &["body"], sequences: false, import: repetition },
    Flow {
        name: "Scan",
        since: 9,
        attributes: &[
            "body",
            "num_scan_inputs",
            "scan_input_axes",
            "scan_input_directions",
            "scan_output_axes",
            "scan_output_directions",
        ],
        sequences: false,
        import: scan::scan,
    },
    Flow {
        name: "Scan",
        since: 8,
        attributes: &["body", "num_scan_inputs", "directions"],
        sequences: false,
        import: scan::scan_of_batches,
    },
    Flow {
        name: "ai.onnx.preview.FlexAttention",
        since: 1,
        attributes: &["score_mod", "prob_mod", "scale", "softmax_precision"],
        sequences: false,
        import: flex_attention,
    },
];

/// All of them, and those of sequences.
pub(super) fn flows() -> impl Iterator<Item = &'static Flow> {
    FLOWS.iter().chain(SEQUENCES)
}

/// The newest one of that name that the opset has.
pub(super) fn find(domain: &str, name: &str, opset: i64) -> Option<&'static Flow> {
    let full = full_name(domain, name);
    flows().find(|f| f.name == full && opset >= f.since)
}

impl Flow {
    /// Adds the node to the graph.
    pub fn import(&self, import: &mut Import, site: &Site) -> Made {
        let names = site.node.attribute.iter().filter_map(|a| a.name.as_deref());
        let strange: Vec<&str> = names.filter(|name| !self.attributes.contains(name)).collect();
        if !strange.is_empty() {
            let diagnostic =
                Diagnostic::new("K0108", "attributes that this operator does not have");
            return Err(Some(diagnostic.found(strange.join(", "))));
        }
        (self.import)(import, site)
    }
}

impl<'n> Site<'n> {
    pub fn graph(&self, name: &str) -> Result<&'n GraphProto, Option<Diagnostic>> {
        let named = self.node.attribute.iter().find(|a| a.name.as_deref() == Some(name));
        let graph = named.and_then(|a| a.g.as_deref());
        graph.ok_or_else(|| Some(not_supported(format!("a node without the graph {name}"))))
    }

    pub fn ints(&self, name: &str) -> Vec<i64> {
        let named = self.node.attribute.iter().find(|a| a.name.as_deref() == Some(name));
        named.map_or(Vec::new(), |a| a.ints.clone())
    }

    pub fn int(&self, name: &str) -> Option<i64> {
        let named = self.node.attribute.iter().find(|a| a.name.as_deref() == Some(name));
        named.map(|a| a.i.unwrap_or(0))
    }

    pub fn input(&self, index: usize) -> Result<NodeId, Option<Diagnostic>> {
        let input = self.inputs.get(index).copied().flatten();
        input.ok_or_else(|| Some(Diagnostic::new("K0120", format!("operand {index} is missing"))))
    }
}

pub(super) fn not_known(what: &str) -> Option<Diagnostic> {
    let help = "export the model without it, or say the value of the input that it hangs on";
    Some(Diagnostic::new(NEEDS_VALUE, format!("{what} is not known")).help(help))
}

impl Import<'_> {
    /// A node of the graph, where there is room for it.
    pub fn put(
        &mut self,
        op: Op,
        args: &[NodeId],
        origin: &Origin,
    ) -> Result<NodeId, Option<Diagnostic>> {
        let id = self.graph.add(op, args, origin).map_err(Some)?;
        let ty = self.graph.ty(id).clone();
        self.room(&ty).map(|()| id).map_err(Some)
    }

    /// A number that is known.
    fn known(&self, id: NodeId) -> Option<f64> {
        self.graph.value(id).and_then(|v| v.as_f64s().first().copied())
    }

    /// A number that decides what there is to compute. Where it is not known, it is asked for.
    fn number(&mut self, id: NodeId, asker: &Origin) -> Option<f64> {
        self.asks.value(&self.graph, asker, id).and_then(|v| v.as_f64s().first().copied())
    }

    /// The outputs of a graph within a node, for these inputs. Its names are its own.
    pub fn within(
        &mut self,
        graph: &GraphProto,
        inputs: &[NodeId],
    ) -> Result<Vec<NodeId>, Option<Diagnostic>> {
        let (given, wanted) = (inputs.len(), graph.input.len());
        if given != wanted {
            let what = format!("a graph of {wanted} inputs for {given} values");
            return Err(Some(not_supported(what)));
        }
        if self.depth >= self.options.limits.depth {
            let (limit, found) = (self.options.limits.depth, self.depth + 1);
            let help = "--max-depth raises it";
            let what = "graphs within each other";
            return Err(Some(self.limit(what, limit.to_string(), found.to_string(), help)));
        }
        self.nodes = self.nodes.saturating_add(graph.node.len());
        if self.nodes > self.options.limits.nodes {
            let limit = self.options.limits.nodes.to_string();
            let (found, help) = (self.nodes.to_string(), "--max-nodes raises it");
            return Err(Some(self.limit("nodes", limit, found, help)));
        }
        let names = graph.initializer.iter().filter_map(|t| t.name.as_ref());
        let names = names.chain(graph.input.iter().filter_map(|i| i.name.as_ref()));
        let names = names.chain(graph.node.iter().flat_map(|n| &n.output));
        let outside: Vec<_> = names.map(|n| (n.clone(), self.values.remove(n))).collect();
        let problems = self.problems.len();
        self.depth += 1;
        self.constants(&graph.initializer);
        for (input, &id) in graph.input.iter().zip(inputs) {
            self.values.insert(input.name.clone().unwrap_or_default(), Held::Tensor(id));
        }
        for node in &graph.node {
            if !self.limited {
                self.node(node);
            }
        }
        self.depth -= 1;
        let result = |output: &super::ValueInfoProto| {
            let name = output.name.clone().unwrap_or_default();
            match self.values.get(&name) {
                Some(Held::Tensor(id)) => Ok(*id),
                Some(Held::Refused) => Err(None),
                Some(Held::Sequence(_)) => {
                    Err(Some(not_supported("a graph that gives a sequence").tensor(name)))
                }
                None => Err(Some(
                    Diagnostic::new("K0103", "no node makes this output of a graph").tensor(name),
                )),
            }
        };
        let outputs: Result<Vec<NodeId>, _> = graph.output.iter().map(result).collect();
        // The last of the same names is put back first.
        for (name, value) in outside.into_iter().rev() {
            match value {
                Some(value) => self.values.insert(name, value),
                None => self.values.remove(&name),
            };
        }
        if self.limited || self.problems.len() > problems { Err(None) } else { outputs }
    }

    /// Values side by side along a new axis.
    pub fn stacked(
        &mut self,
        rows: &[NodeId],
        axis: usize,
        origin: &Origin,
    ) -> Result<NodeId, Option<Diagnostic>> {
        let Some(&first) = rows.first() else {
            return Err(Some(not_supported("a loop of no turns that collects values")));
        };
        let mut shape = self.graph.ty(first).shape.clone();
        if axis > shape.len() {
            return Err(Some(not_supported(format!("rows of {shape:?} along axis {axis}"))));
        }
        shape.insert(axis, 1);
        let mut tall = Vec::with_capacity(rows.len());
        for &row in rows {
            tall.push(self.put(Op::Reshape(shape.clone()), &[row], origin)?);
        }
        self.put(Op::Concat(axis as u8), &tall, origin)
    }
}

/// One of two graphs, where the condition is known; else both, and a choice between their values.
fn choice(import: &mut Import, site: &Site) -> Made {
    let condition = site.input(0)?;
    let (yes, no) = (site.graph("then_branch")?, site.graph("else_branch")?);
    if let Some(holds) = import.known(condition).map(|c| c != 0.0) {
        let outputs = import.within(if holds { yes } else { no }, &[])?;
        return Ok(outputs.into_iter().map(Held::Tensor).collect());
    }
    let (yes, no) = (import.within(yes, &[])?, import.within(no, &[])?);
    let same =
        |import: &Import, (x, y): (&NodeId, &NodeId)| import.graph.ty(*x) == import.graph.ty(*y);
    if yes.len() != no.len() || !yes.iter().zip(&no).all(|pair| same(import, pair)) {
        let what = "which of two graphs with results of other types is meant";
        let holds = import.number(condition, &site.origin).ok_or_else(|| not_known(what))? != 0.0;
        let outputs = if holds { yes } else { no };
        return Ok(outputs.into_iter().map(Held::Tensor).collect());
    }
    let mut outputs = Vec::new();
    for (&x, &y) in yes.iter().zip(&no) {
        let rank = import.graph.ty(x).rank();
        let shape = SmallVec::from_elem(1, rank);
        let condition = import.put(Op::Reshape(shape), &[condition], &site.origin)?;
        let all = import.graph.ty(x).shape.clone();
        let condition = import.put(Op::Expand(all), &[condition], &site.origin)?;
        outputs.push(Held::Tensor(import.put(Op::Select, &[condition, x, y], &site.origin)?));
    }
    Ok(outputs)
}

/// Turns of a graph, as long as its condition holds; what it makes besides is collected.
fn repetition(import: &mut Import, site: &Site) -> Made {
    let body = site.graph("body")?;
    let (inputs, outputs) = (site.inputs.len().max(2), body.output.len());
    if outputs + 1 < inputs {
        return Err(Some(not_supported("a loop that gives less than it is given")));
    }
    if body.input.len() != inputs {
        let what = format!("a graph of {} inputs for {inputs} values", body.input.len());
        return Err(Some(not_supported(what)));
    }
    match unrolled(import, site, body) {
        Err(Some(problem)) if problem.code == NEEDS_VALUE && import.asks.may_ask() => {
            turns::between_stages(import, site, body)
        }
        made => made,
    }
}

/// All turns one after another, where it is known how many there are.
fn unrolled(import: &mut Import, site: &Site, body: &GraphProto) -> Made {
    let most = match site.inputs.first().copied().flatten() {
        Some(most) => import.known(most).ok_or_else(|| not_known("the number of turns"))?,
        None => f64::INFINITY,
    };
    let origin = &site.origin;
    let mut again = match site.inputs.get(1).copied().flatten() {
        Some(condition) => condition,
        None => import.graph.scalar(kiln_runtime::tensor::DType::Bool, 0, 1.0, origin),
    };
    let mut carried: Vec<NodeId> =
        (2..site.inputs.len()).map(|i| site.input(i)).collect::<Result<_, _>>()?;
    let mut rows = vec![Vec::new(); body.output.len() - 1 - carried.len()];
    let mut turn = 0;
    while (turn as f64) < most {
        let holds = import.known(again).ok_or_else(|| not_known("whether a turn is the last"))?;
        if holds == 0.0 {
            break;
        }
        if turn == MOST_STEPS {
            let message = format!("a loop of more than {MOST_STEPS} turns");
            return Err(Some(not_supported(message)));
        }
        let number = import.graph.i64s(&[], &[turn as i64], origin);
        let inputs: Vec<NodeId> = [number, again].into_iter().chain(carried.clone()).collect();
        let outputs = import.within(body, &inputs)?;
        let (next, made) = outputs.split_at(1 + carried.len());
        (again, carried) = (next[0], next[1..].to_vec());
        rows.iter_mut().zip(made).for_each(|(rows, &row)| rows.push(row));
        turn += 1;
    }
    for rows in rows {
        carried.push(import.stacked(&rows, 0, origin)?);
    }
    Ok(carried.into_iter().map(Held::Tensor).collect())
}

/// Attention whose scores, and whose weights, graphs may change.
fn flex_attention(import: &mut Import, site: &Site) -> Made {
    let before = import.graph.nodes.len();
    let (inputs, origin) = (site.inputs.clone(), &site.origin);
    let state = (&mut import.graph, &mut import.files, &mut import.asks);
    let mut call = Call::new(state, site.node, inputs, 1, origin.as_ref());
    let (scores, values, dtype) = flexible(&mut call).map_err(Some)?;
    import.all_fit(before).map_err(Some)?;
    let scores = changed(import, site, "score_mod", scores)?;
    let weights = import.put(Op::Composite(Composite::Softmax(3)), &[scores], origin)?;
    let weights = changed(import, site, "prob_mod", weights)?;
    let before = import.graph.nodes.len();
    let y = import.graph.matmul(weights, values, origin).map_err(Some)?;
    let y = import.graph.cast(y, dtype, origin).map_err(Some)?;
    import.all_fit(before).map_err(Some)?;
    Ok(vec![Held::Tensor(y)])
}

/// What the graph of that name makes of a value, where there is one; its type stays.
fn changed(
    import: &mut Import,
    site: &Site,
    name: &str,
    x: NodeId,
) -> Result<NodeId, Option<Diagnostic>> {
    if site.node.attribute.iter().all(|a| a.name.as_deref() != Some(name)) {
        return Ok(x);
    }
    let outputs = import.within(site.graph(name)?, &[x])?;
    match outputs[..] {
        [y] if import.graph.ty(y) == import.graph.ty(x) => Ok(y),
        _ => {
            let (made, ty) = (outputs.len(), type_text(import.graph.ty(x)));
            Err(Some(not_supported(format!("{made} results of {name}, not one {ty}"))))
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use bytes::Bytes;
    use kiln_runtime::tensor::{DType, Tensor};
    use prost::Message;

    use super::super::proto::{
        AttributeProto, ModelProto, OperatorSetIdProto, ValueInfoProto, tensor_shape_proto as dims,
        type_proto,
    };
    use super::super::proto::{TensorShapeProto, TypeProto};
    use super::super::{ImportOptions, Limits, import};
    use super::*;
    use crate::graph::Graph;
    use crate::graph::eval::{Data, Value, eval};
    use crate::graph::op::Type;

    /// An input or output.
    pub fn port(name: &str, shape: &[i64], dtype: i32) -> ValueInfoProto {
        let dim = |&n: &i64| dims::Dimension {
            value: Some(dims::dimension::Value::DimValue(n)),
            ..Default::default()
        };
        let shape = TensorShapeProto { dim: shape.iter().map(dim).collect() };
        let tensor = type_proto::Tensor { elem_type: Some(dtype), shape: Some(shape) };
        let value = Some(type_proto::Value::TensorType(tensor));
        let r#type = Some(TypeProto { value, ..Default::default() });
        ValueInfoProto { name: Some(name.into()), r#type, ..Default::default() }
    }

    /// A node; what stands before the last dot of its operator is the domain.
    pub fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
        let names = |names: &[&str]| names.iter().map(|n| n.to_string()).collect();
        let (domain, op) = op.rsplit_once('.').unwrap_or(("", op));
        let (domain, op_type) = (Some(domain.into()), Some(op.into()));
        let (input, output) = (names(inputs), names(outputs));
        NodeProto { domain, op_type, input, output, ..Default::default() }
    }

    /// An attribute of integers: one number is a number, others are a list.
    pub fn ints(name: &str, list: &[i64]) -> AttributeProto {
        let name = Some(name.into());
        match list {
            [i] => AttributeProto { name, i: Some(*i), ints: vec![*i], ..Default::default() },
            _ => AttributeProto { name, ints: list.to_vec(), ..Default::default() },
        }
    }

    pub fn with(mut node: NodeProto, name: &str, graph: GraphProto) -> NodeProto {
        let attribute = AttributeProto {
            name: Some(name.into()),
            g: Some(Box::new(graph)),
            ..Default::default()
        };
        node.attribute.push(attribute);
        node
    }

    pub fn graph(inputs: &[ValueInfoProto], nodes: &[NodeProto], outputs: &[&str]) -> GraphProto {
        let output = outputs.iter().map(|name| port(name, &[], 1)).collect();
        GraphProto { input: inputs.to_vec(), node: nodes.to_vec(), output, ..Default::default() }
    }

    /// The model of a graph, or why there is none. `m` is 5 where it is given.
    pub fn model(graph: GraphProto, known: bool) -> Result<Graph, String> {
        model_at(26, graph, known)
    }

    /// The same at an opset.
    pub fn model_at(newest: i64, graph: GraphProto, known: bool) -> Result<Graph, String> {
        within_limits(newest, graph, known, Limits::default())
    }

    fn within_limits(
        newest: i64,
        graph: GraphProto,
        known: bool,
        limits: Limits,
    ) -> Result<Graph, String> {
        let domains = ["", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training"];
        let opset = |(domain, version): (&str, i64)| OperatorSetIdProto {
            domain: Some(domain.into()),
            version: Some(version),
        };
        let opset_import = domains.into_iter().zip([newest, 5, 1, 1]).map(opset).collect();
        let model = ModelProto { graph: Some(graph), opset_import, ..Default::default() };
        let mut options = ImportOptions { limits, ..Default::default() };
        if known {
            options.values.push(("m".into(), Tensor::from_slice(&[], &[5i64])));
        }
        import(Bytes::from(model.encode_to_vec()), &options).map_err(|e| e.to_string())
    }

    pub fn outputs(graph: &Graph, inputs: &[Tensor]) -> Vec<Vec<f64>> {
        let inputs: Vec<Value> = inputs.iter().map(Value::from_tensor).collect();
        eval(graph, &inputs).iter().map(Value::as_f64s).collect()
    }

    /// x twice as large in every turn, and what it was; `again` says whether to go on.
    fn doubling(again: &[NodeProto]) -> GraphProto {
        let inputs = [port("i", &[], 7), port("going", &[], 9), port("y", &[2], 1)];
        let mut nodes = vec![node("Add", &["y", "y"], &["z"]), node("Identity", &["y"], &["was"])];
        nodes.extend(again.to_vec());
        let body = graph(&inputs, &nodes, &["next", "z", "was"]);
        let made = with(node("Loop", &["m", "", "x"], &["last", "all"]), "body", body);
        let inputs = [port("m", &[], 7), port("x", &[2], 1)];
        graph(&inputs, &[made], &["last", "all"])
    }

    #[test]
    fn loops_are_unrolled() {
        let on = [node("Identity", &["going"], &["next"])];
        let x = Tensor::from_slice(&[2], &[1f32, -3.0]);
        let made = model(doubling(&on), true).expect("a model");
        let rows = [1.0, -3.0, 2.0, -6.0, 4.0, -12.0, 8.0, -24.0, 16.0, -48.0];
        assert_eq!(outputs(&made, std::slice::from_ref(&x)), [vec![32.0, -96.0], rows.to_vec()]);
        // A condition that hangs on the number of the turn.
        let few = [node("Size", &["y"], &["most"]), node("Less", &["i", "most"], &["next"])];
        let made = model(doubling(&few), true).expect("a model");
        assert_eq!(outputs(&made, &[x])[0], [8.0, -24.0]);
    }

    #[test]
    fn loops_that_are_not_known_or_do_not_end_are_refused() {
        let on = [node("Identity", &["going"], &["next"])];
        let problem = model(doubling(&on), false).expect_err("turns that are not known");
        assert!(problem.contains(NEEDS_VALUE) && problem.contains("number of turns"), "{problem}");
        let mut endless = doubling(&on);
        endless.node[0].input[0] = String::new();
        let problem = model(endless, true).expect_err("no end");
        assert!(problem.contains("more than 4096 turns"), "{problem}");
        let data = [node("ReduceMax", &["y"], &["top"]), node("Less", &["top", "top"], &["next"])];
        let problem = model(doubling(&data), true).expect_err("a condition of data");
        assert!(problem.contains("whether a turn is the last"), "{problem}");
    }

    #[test]
    fn a_choice_takes_what_holds() {
        let branch = |op: &str| graph(&[], &[node(op, &["x"], &["r"])], &["r"]);
        let whole = |condition: ValueInfoProto, no: GraphProto| {
            let choice = node("If", &["c"], &["y"]);
            let choice = with(with(choice, "then_branch", branch("Neg")), "else_branch", no);
            graph(&[condition, port("x", &[2], 1)], &[choice], &["y"])
        };
        let made = model(whole(port("c", &[], 9), branch("Abs")), false).expect("a model");
        let x = Tensor::from_slice(&[2], &[1f32, -3.0]);
        for (c, expected) in [(true, [-1.0, 3.0]), (false, [1.0, 3.0])] {
            let data = Data::Int(vec![i128::from(c)]);
            let c = Value { ty: Type::new(DType::Bool, &[]), data }.to_tensor();
            assert_eq!(outputs(&made, &[c, x.clone()]), [expected]);
        }
        let problem = model(whole(port("c", &[], 9), branch("Size")), false).expect_err("types");
        assert!(problem.contains("results of other types"), "{problem}");
    }

    #[test]
    fn graphs_within_graphs_have_a_limit() {
        let mut nested = (0..ImportOptions::default().limits.depth + 1).fold(
            graph(&[], &[], &["x"]),
            |inner, _| {
                let choice = with(node("If", &["c"], &["x2"]), "then_branch", inner);
                graph(&[], &[with(choice, "else_branch", graph(&[], &[], &["x"]))], &["x2"])
            },
        );
        nested.input = vec![port("c", &[], 9), port("x", &[2], 1)];
        let problem = model(nested, false).expect_err("too deep");
        assert!(problem.contains("graphs within each other"), "{problem}");
        assert!(problem.contains("at        x2 (If, opset 26)"), "{problem}");
    }

    #[test]
    fn limits_say_what_goes_beyond_them() {
        let plain = |op: &str, inputs: &[&str]| {
            graph(&[port("x", &[2], 1)], &[node(op, inputs, &["y"])], &["y"])
        };
        let turns = || doubling(&[node("Identity", &["going"], &["next"])]);
        let limits = Limits::default;
        let cases = [
            (plain("Neg", &["x"]), Limits { rank: 0, ..limits() }, "axes", "tensor    x"),
            (plain("Neg", &["x"]), Limits { bytes: 7, ..limits() }, "bytes", "tensor    x"),
            (plain("Flatten", &["x"]), Limits { rank: 1, ..limits() }, "axes", "y (Flatten, "),
            (plain("Add", &["x", "x"]), Limits { bytes: 15, ..limits() }, "bytes", "y (Add, "),
            (turns(), Limits { bytes: 30, ..limits() }, "bytes", "z (Add, "),
            (turns(), Limits { rank: 1, ..limits() }, "axes", "last (Loop, "),
            (turns(), Limits { nodes: 7, ..limits() }, "nodes", "last (Loop, "),
        ];
        for (graph, limits, what, at) in cases {
            let problem = within_limits(26, graph, true, limits).expect_err("beyond a limit");
            assert!(problem.contains(&format!("too many {what}")), "{problem}");
            assert!(problem.contains(at), "{problem} does not say {at}");
            assert_eq!(problem.matches("error[").count(), 1, "{problem}");
        }
    }
}
