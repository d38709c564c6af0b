//! The text form of a graph; [`parse`] reads back what [`print`] writes.
//!
//! ```text
//! constant 0 : f32[1,1] = 2.0
//! %0 = input 0 : f32[2,3] "x"
//! %1 = const 0 : f32[1,1] "two"
//! %2 = mul %0 %1 : f32[2,3] "scaled"
//! output "y" %2
//! ```
//! Constants of more than 64 elements are named by a hash of their bytes; [`parse`] takes those
//! from a table.

use std::fmt::Write as _;
use std::sync::Arc;

use bytes::Bytes;
use kiln_runtime::tensor::{DType, size_bytes};
use smallvec::SmallVec;

use super::eval::{Data, Value};
use super::op::{Affine, Axes, BinaryFn, Composite, Contract, Op, ReduceFn, Shape, Type, UnaryFn};
use super::used::{self, Span, Used};
use super::{Args, Body, Constant, Graph, Node, NodeId};
use crate::error::{Diagnostic, Error, ErrorKind, Result, sanitize};

/// Constants with more elements are named by a hash.
const INLINE_ELEMENTS: usize = 64;

fn list<T: std::fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|i| i.to_string()).collect();
    format!("[{}]", items.join(","))
}

/// A type, such as `f32[1,3]`. `f32[512<d1]` has room for 512 elements and uses as many as dim 1
/// says; `<d1+1` is one more, `<?` any.
pub fn type_text(ty: &Type) -> String {
    let extent = |(axis, extent): (usize, &usize)| match used::span(ty, axis) {
        None => extent.to_string(),
        Some(Span::Mixed) => format!("{extent}<?"),
        Some(Span::Dim { dim, more: 0 }) => format!("{extent}<d{dim}"),
        Some(Span::Dim { dim, more }) => format!("{extent}<d{dim}{more:+}"),
    };
    format!("{}{}", ty.dtype, list(ty.shape.iter().enumerate().map(extent)))
}

fn affine_text(index: &Affine) -> String {
    let mut text = String::new();
    for &(axis, coefficient) in &index.terms {
        let _ = write!(text, "{coefficient:+}*{axis}");
    }
    if index.offset != 0 || text.is_empty() {
        let _ = write!(text, "{:+}", index.offset);
    }
    text
}

/// An operation with its attributes, without operands.
pub fn op_text(op: &Op) -> String {
    match op {
        Op::Input(i) => format!("input {i}"),
        Op::Const(i) => format!("const {i}"),
        Op::Iota(shape, axis) => format!("iota {} {axis}", list(shape)),
        Op::Unary(f) => f.name().into(),
        Op::Binary(f) => f.name().into(),
        Op::Select => "select".into(),
        Op::Cast(dtype) => format!("cast {dtype}"),
        Op::Bits(dtype) => format!("bits {dtype}"),
        Op::Reshape(shape) => format!("reshape {}", list(shape)),
        Op::Permute(axes) => format!("permute {}", list(axes)),
        Op::Expand(shape) => format!("expand {}", list(shape)),
        Op::Slice(axes) => {
            format!("slice {}", list(axes.iter().map(|a| format!("{}:{}:{}", a.0, a.1, a.2))))
        }
        Op::Pad(axes) => format!("pad {}", list(axes.iter().map(|a| format!("{}:{}", a.0, a.1)))),
        Op::Window(axes) => {
            format!("window {}", list(axes.iter().map(|a| format!("{}:{}:{}", a.0, a.1, a.2))))
        }
        Op::Concat(axis) => format!("concat {axis}"),
        Op::Gather(axis) => format!("gather {axis}"),
        Op::Scatter(f) => format!("scatter {}", f.map_or("replace", ReduceFn::name)),
        Op::Reduce(f, axes) => format!("reduce {} {}", f.name(), list(axes)),
        Op::Scan(f, axis) => format!("scan {} {axis}", f.name()),
        Op::Contract(c) => format!(
            "contract {} {} {} {}",
            list(&c.extents),
            c.n_out,
            list(c.maps[0].iter().map(affine_text)),
            list(c.maps[1].iter().map(affine_text))
        ),
        Op::Composite(Composite::Sigmoid) => "sigmoid".into(),
        Op::Composite(Composite::Silu) => "silu".into(),
        Op::Composite(Composite::Gelu) => "gelu".into(),
        Op::Composite(Composite::Softmax(axis)) => format!("softmax {axis}"),
        Op::Composite(Composite::LayerNorm(axis, e)) => {
            format!("layer_norm {axis} {:?}", f32::from_bits(*e))
        }
        Op::Composite(Composite::RmsNorm(axis, e)) => {
            format!("rms_norm {axis} {:?}", f32::from_bits(*e))
        }
        Op::Fused(body) => format!("fused {body}"),
    }
}

fn node_line(number: usize, node: &Node) -> String {
    let args: String = node.args.iter().map(|a| format!(" %{}", a.0)).collect();
    let origin = sanitize(&node.origin).replace('"', "'");
    format!("%{number} = {}{args} : {} \"{origin}\"", op_text(&node.op), type_text(&node.ty))
}

fn constant_line(number: usize, constant: &Constant) -> String {
    let value = if constant.ty.numel() <= INLINE_ELEMENTS {
        match Value::from_constant(constant).data {
            Data::Float(v) => v.iter().map(|x| format!(" {x:?}")).collect::<String>(),
            Data::Int(v) => v.iter().map(|x| format!(" {x}")).collect::<String>(),
        }
    } else {
        format!(" @{}", &blake3::hash(&constant.bytes).to_hex()[..16])
    };
    format!("constant {number} : {} ={value}", type_text(&constant.ty))
}

/// The text of a graph. Only constants that are used are written.
pub fn print(graph: &Graph) -> String {
    let mut text = String::new();
    let bodies = graph.bodies.iter().flat_map(|b| &b.nodes);
    let mut used: Vec<u32> = graph
        .nodes
        .iter()
        .chain(bodies)
        .filter_map(|n| if let Op::Const(i) = n.op { Some(i) } else { None })
        .collect();
    used.sort_unstable();
    used.dedup();
    for i in used {
        let _ = writeln!(text, "{}", constant_line(i as usize, &graph.constants[i as usize]));
    }
    for (i, body) in graph.bodies.iter().enumerate() {
        let _ = writeln!(text, "body {i} {{");
        for (k, node) in body.nodes.iter().enumerate() {
            let _ = writeln!(text, "  {}", node_line(k, node));
        }
        let _ = writeln!(text, "}}");
    }
    for (i, node) in graph.nodes.iter().enumerate() {
        let _ = writeln!(text, "{}", node_line(i, node));
    }
    for (name, id) in &graph.outputs {
        let _ = writeln!(text, "output \"{}\" %{}", sanitize(name).replace('"', "'"), id.0);
    }
    text
}

type Parsed<T> = std::result::Result<T, String>;

/// Reads a graph. Constants that the text names by hash come from `table` by their number; they
/// are zero where the table lacks them.
pub fn parse(text: &str, table: &[Constant]) -> Result<Graph> {
    let mut graph = Graph { constants: Arc::new(table.to_vec()), ..Graph::default() };
    let mut body: Option<Vec<Node>> = None;
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        parse_line(&mut graph, &mut body, line).map_err(|why| {
            let place = format!("line {}", number + 1);
            let diagnostic = Diagnostic::new("K0902", why).tensor(place).found(line);
            Error::new(ErrorKind::Model, diagnostic)
        })?;
    }
    Ok(graph)
}

fn parse_line(graph: &mut Graph, body: &mut Option<Vec<Node>>, line: &str) -> Parsed<()> {
    if line == "}" {
        let nodes = body.take().ok_or("a body ends that did not begin")?;
        if nodes.is_empty() {
            return Err("a body has at least one node".into());
        }
        graph.bodies.push(Arc::new(Body { nodes }));
    } else if line.starts_with("body ") {
        *body = Some(Vec::new());
    } else if let Some(rest) = line.strip_prefix("constant ") {
        parse_constant(graph, rest)?;
    } else if let Some(rest) = line.strip_prefix("output ") {
        let (name, id) = rest.rsplit_once(' ').ok_or("an output has a name and a node")?;
        let id = node_id(id)?;
        if id.index() >= graph.nodes.len() {
            return Err(format!("no node {}", id.0));
        }
        graph.outputs.push((name.trim_matches('"').to_string(), id));
    } else {
        let node = parse_node(line)?;
        match body {
            Some(nodes) => nodes.push(node),
            None => {
                if let Op::Input(i) = node.op {
                    if i as usize != graph.inputs.len() {
                        return Err(format!("input {i} is out of order"));
                    }
                    graph.inputs.push((node.origin.to_string(), node.ty.clone()));
                }
                graph.push(node.op, node.args, node.ty, &node.origin);
            }
        }
    }
    Ok(())
}

fn parse_constant(graph: &mut Graph, rest: &str) -> Parsed<()> {
    let (number, rest) = rest.split_once(" : ").ok_or("a constant has a number and a type")?;
    let (ty, values) = rest.split_once(" =").ok_or("a constant has a value")?;
    let (number, ty) = (parse_number::<usize>(number)?, parse_type(ty)?);
    if number > 1 << 16 || ty.size_bytes() > 1 << 32 {
        return Err("the constant is too large for text".into());
    }
    let known = graph.constants.get(number).is_some_and(|c| c.ty == ty);
    let words: Vec<&str> = values.split_whitespace().collect();
    let bytes = if words.first().is_some_and(|w| w.starts_with('@')) {
        if known {
            return Ok(());
        }
        Bytes::from(vec![0; ty.size_bytes()])
    } else {
        let data = match ty.dtype.is_float() {
            true => Data::Float(words.iter().map(|w| parse_number(w)).collect::<Parsed<_>>()?),
            false => Data::Int(words.iter().map(|w| parse_number(w)).collect::<Parsed<_>>()?),
        };
        if words.len() != ty.numel() {
            return Err(format!("{} values for {}", words.len(), type_text(&ty)));
        }
        Bytes::copy_from_slice(Value { ty: ty.clone(), data }.to_tensor().bytes())
    };
    let table = Arc::make_mut(&mut graph.constants);
    let filler = Constant { ty: Type::new(DType::Bool, &[0]), bytes: Bytes::new() };
    table.resize(table.len().max(number + 1), filler);
    table[number] = Constant { ty, bytes };
    Ok(())
}

fn parse_node(line: &str) -> Parsed<Node> {
    let (_, rest) = line.split_once(" = ").ok_or("a node has an operation")?;
    let (rest, origin) = match rest.split_once('"') {
        Some((rest, origin)) => (rest, origin.trim_end_matches('"')),
        None => (rest, ""),
    };
    let (operation, ty) = rest.rsplit_once(" : ").ok_or("a node has a type")?;
    let words: Vec<&str> = operation.split_whitespace().collect();
    let split = words.iter().position(|w| w.starts_with('%')).unwrap_or(words.len());
    let args: Args = words[split..].iter().map(|w| node_id(w)).collect::<Parsed<_>>()?;
    let op = parse_op(&words[..split])?;
    Ok(Node { op, args, ty: parse_type(ty.trim())?, origin: origin.into() })
}

fn node_id(word: &str) -> Parsed<NodeId> {
    let digits = word.strip_prefix('%').ok_or_else(|| format!("{word} is no node"))?;
    Ok(NodeId(parse_number(digits)?))
}

fn parse_number<T: std::str::FromStr>(word: &str) -> Parsed<T> {
    word.trim().parse().map_err(|_| format!("{word} is no number"))
}

fn parse_type(word: &str) -> Parsed<Type> {
    let at = word.find('[').ok_or_else(|| format!("{word} is no type"))?;
    let dtype = DType::from_name(&word[..at]).ok_or_else(|| format!("{word} is no type"))?;
    let (mut shape, mut used) = (Shape::new(), Used::new());
    for (axis, item) in items(&word[at..])?.into_iter().enumerate() {
        let (extent, span) = item.split_once('<').unwrap_or((item, ""));
        shape.push(parse_number(extent)?);
        if !span.is_empty() {
            used.push((axis as u8, parse_span(span)?));
        }
    }
    match size_bytes(dtype, &shape) {
        Some(_) => Ok(Type { used, ..Type::of(dtype, shape) }),
        None => Err(format!("{word} does not fit in memory")),
    }
}

fn parse_span(word: &str) -> Parsed<Span> {
    if word == "?" {
        return Ok(Span::Mixed);
    }
    let dim = word.strip_prefix('d').ok_or_else(|| format!("{word} is no dim"))?;
    let digits = dim.find(|c: char| !c.is_ascii_digit()).unwrap_or(dim.len());
    let more = if digits == dim.len() { 0 } else { parse_number(&dim[digits..])? };
    Ok(Span::Dim { dim: parse_number(&dim[..digits])?, more })
}

fn items(word: &str) -> Parsed<Vec<&str>> {
    let inner = word.strip_prefix('[').and_then(|w| w.strip_suffix(']'));
    let inner = inner.ok_or_else(|| format!("{word} is no list"))?;
    Ok(if inner.is_empty() { Vec::new() } else { inner.split(',').collect() })
}

fn parse_list<T: std::str::FromStr, L: FromIterator<T>>(word: &str) -> Parsed<L> {
    items(word)?.into_iter().map(parse_number).collect()
}

/// A list of tuples such as `[0:1:3,2:1:4]`, as rows of numbers.
fn parse_rows(word: &str, width: usize) -> Parsed<Vec<Vec<i64>>> {
    let row = |item: &str| -> Parsed<Vec<i64>> {
        let row: Vec<i64> = item.split(':').map(parse_number).collect::<Parsed<_>>()?;
        if row.len() == width { Ok(row) } else { Err(format!("{item} has not {width} numbers")) }
    };
    items(word)?.into_iter().map(row).collect()
}

fn extent(value: i64) -> Parsed<usize> {
    usize::try_from(value).map_err(|_| format!("{value} is no extent"))
}

fn parse_affine(word: &str) -> Parsed<Affine> {
    let mut index = Affine::default();
    let starts: Vec<usize> =
        word.char_indices().filter(|c| c.1 == '+' || c.1 == '-').map(|c| c.0).collect();
    for (i, &start) in starts.iter().enumerate() {
        let term = &word[start..starts.get(i + 1).copied().unwrap_or(word.len())];
        match term.split_once('*') {
            Some((c, axis)) => {
                index = index.plus(parse_number::<u8>(axis)? as usize, parse_number(c)?)
            }
            None => index.offset = parse_number(term)?,
        }
    }
    Ok(index)
}

fn reduce_fn(word: &str) -> Parsed<ReduceFn> {
    let found = ReduceFn::ALL.iter().find(|e| e.1 == word);
    found.map(|e| e.0).ok_or_else(|| format!("{word} is no reduction"))
}

fn parse_op(words: &[&str]) -> Parsed<Op> {
    let name = *words.first().ok_or("a node has an operation")?;
    let word =
        |i: usize| words.get(i).copied().ok_or_else(|| format!("{name} lacks attribute {i}"));
    if let Some(entry) = UnaryFn::ALL.iter().find(|e| e.1 == name) {
        return Ok(Op::Unary(entry.0));
    }
    if let Some(entry) = BinaryFn::ALL.iter().find(|e| e.1 == name) {
        return Ok(Op::Binary(entry.0));
    }
    let epsilon = |i: usize| Ok::<u32, String>(parse_number::<f32>(word(i)?)?.to_bits());
    Ok(match name {
        "input" => Op::Input(parse_number(word(1)?)?),
        "const" => Op::Const(parse_number(word(1)?)?),
        "iota" => Op::Iota(parse_list(word(1)?)?, parse_number(word(2)?)?),
        "select" => Op::Select,
        "cast" => Op::Cast(DType::from_name(word(1)?).ok_or("no such dtype")?),
        "bits" => Op::Bits(DType::from_name(word(1)?).ok_or("no such dtype")?),
        "reshape" => Op::Reshape(parse_list(word(1)?)?),
        "permute" => Op::Permute(parse_list::<u8, Axes>(word(1)?)?),
        "expand" => Op::Expand(parse_list(word(1)?)?),
        "slice" => {
            let rows = parse_rows(word(1)?, 3)?;
            Op::Slice(rows.iter().map(|r| Ok((r[0], r[1], extent(r[2])?))).collect::<Parsed<_>>()?)
        }
        "pad" => {
            let rows = parse_rows(word(1)?, 2)?;
            let borders = rows.iter().map(|r| Ok((extent(r[0])?, extent(r[1])?)));
            Op::Pad(borders.collect::<Parsed<_>>()?)
        }
        "window" => {
            let rows = parse_rows(word(1)?, 3)?;
            let axes = rows.iter().map(|r| Ok((extent(r[0])?, extent(r[1])?, extent(r[2])?)));
            Op::Window(axes.collect::<Parsed<_>>()?)
        }
        "concat" => Op::Concat(parse_number(word(1)?)?),
        "gather" => Op::Gather(parse_number(word(1)?)?),
        "scatter" if word(1)? == "replace" => Op::Scatter(None),
        "scatter" => Op::Scatter(Some(reduce_fn(word(1)?)?)),
        "reduce" => Op::Reduce(reduce_fn(word(1)?)?, parse_list(word(2)?)?),
        "scan" => Op::Scan(reduce_fn(word(1)?)?, parse_number(word(2)?)?),
        "contract" => {
            let map = |i: usize| -> Parsed<SmallVec<[Affine; 4]>> {
                items(word(i)?)?.into_iter().map(parse_affine).collect()
            };
            Op::Contract(Box::new(Contract {
                extents: parse_list(word(1)?)?,
                n_out: parse_number(word(2)?)?,
                maps: [map(3)?, map(4)?],
            }))
        }
        "sigmoid" => Op::Composite(Composite::Sigmoid),
        "silu" => Op::Composite(Composite::Silu),
        "gelu" => Op::Composite(Composite::Gelu),
        "softmax" => Op::Composite(Composite::Softmax(parse_number(word(1)?)?)),
        "layer_norm" => Op::Composite(Composite::LayerNorm(parse_number(word(1)?)?, epsilon(2)?)),
        "rms_norm" => Op::Composite(Composite::RmsNorm(parse_number(word(1)?)?, epsilon(2)?)),
        "fused" => Op::Fused(parse_number(word(1)?)?),
        other => return Err(format!("no operation is called {other}")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::eval::eval;
    use crate::graph::verify::verify;

    #[test]
    fn text_parses_back() {
        let mut graph = Graph::default();
        let origin = "layer".into();
        let x = graph.input("x", Type::new(DType::F32, &[1, 2, 5, 5]));
        let w = graph.tensor(
            &kiln_runtime::tensor::Tensor::from_slice(&[3, 2, 3, 3], &[0.5f32; 54]),
            &origin,
        );
        let y = graph.conv([x, w], (&[2, 1], &[1, 1]), 1, &origin).unwrap();
        let y = graph.composite(Composite::Softmax(1), y, &origin).unwrap();
        let y = graph.binary_number(BinaryFn::Max, y, 0.25, &origin).unwrap();
        graph.outputs.push(("y".into(), y));
        let text = print(&graph);
        let again = parse(&text, &[]).unwrap();
        assert_eq!(print(&again), text);
        verify(again.clone()).unwrap();
        let input = Value::splat(DType::F32, &[1, 2, 5, 5], 1.5);
        assert_eq!(eval(&graph, std::slice::from_ref(&input)), eval(&again, &[input]));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["%0 = foo : f32[1]", "%0 = input 0", "output \"y\" %3", "constant x", "}"] {
            assert!(parse(text, &[]).is_err(), "{text}");
        }
    }
}
