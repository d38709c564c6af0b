//! Small graphs by name and sizes, and random normal data for them.

use kiln::graph::Graph;
use kiln::graph::op::{BinaryFn, Composite, Type, UnaryFn};
use kiln::tensor::{DType, Tensor};
use kiln_cases::Random;

/// Functions of one matrix, of rows and columns.
const MATRICES: [&str; 7] = ["tanh", "gelu", "add", "softmax", "layernorm", "sum", "transpose"];

/// A graph by words: `tanh ROWS COLUMNS` and the like, or `product M K N TYPE`.
pub fn graph(words: &[&str]) -> Result<Graph, String> {
    let number = |word: &&str| word.parse::<usize>().map_err(|_| format!("`{word}` is no size"));
    match words {
        ["product", sizes @ .., dtype] if sizes.len() == 3 => {
            let sizes: Vec<usize> = sizes.iter().map(number).collect::<Result<_, _>>()?;
            let dtype = DType::from_name(dtype).ok_or(format!("`{dtype}` is no type"))?;
            product([sizes[0], sizes[1], sizes[2]], dtype)
        }
        [name, rows, columns] if MATRICES.contains(name) => {
            matrix(name, [number(rows)?, number(columns)?])
        }
        _ => Err(format!(
            "`{}` is neither product M K N TYPE nor one of {MATRICES:?} with ROWS COLUMNS",
            words.join(" ")
        )),
    }
}

fn product([m, k, n]: [usize; 3], dtype: DType) -> Result<Graph, String> {
    let mut graph = Graph::default();
    let (x, y) = (Type::new(dtype, &[m, k]), Type::new(dtype, &[k, n]));
    let (x, y) = (graph.input("x", x), graph.input("y", y));
    let z = graph.matmul(x, y, &"product".into()).map_err(|e| e.to_string())?;
    graph.outputs.push(("z".into(), z));
    Ok(graph)
}

fn matrix(name: &str, shape: [usize; 2]) -> Result<Graph, String> {
    let (mut graph, origin) = (Graph::default(), name.into());
    let x = graph.input("x", Type::new(DType::F32, &shape));
    let y = match name {
        "tanh" => graph.unary(UnaryFn::Tanh, x, &origin),
        "gelu" => gelu(&mut graph, x, &origin),
        "add" => {
            let y = graph.input("y", Type::new(DType::F32, &shape));
            graph.binary(BinaryFn::Add, x, y, &origin)
        }
        "softmax" => graph.composite(Composite::Softmax(1), x, &origin),
        "layernorm" => graph.composite(Composite::LayerNorm(1, 1e-5f32.to_bits()), x, &origin),
        "sum" => graph.reduce(kiln::graph::op::ReduceFn::Sum, x, &[1], &origin),
        _ => graph.permute(x, &[1, 0], &origin),
    };
    graph.outputs.push(("y".into(), y.map_err(|e| e.to_string())?));
    Ok(graph)
}

/// x (1 + erf(x / sqrt 2)) / 2.
fn gelu(
    graph: &mut Graph,
    x: kiln::graph::NodeId,
    origin: &kiln::graph::Origin,
) -> Result<kiln::graph::NodeId, kiln::error::Diagnostic> {
    let scaled = graph.binary_number(BinaryFn::Mul, x, f64::sqrt(0.5), origin)?;
    let erf = graph.unary(UnaryFn::Erf, scaled, origin)?;
    let more = graph.binary_number(BinaryFn::Add, erf, 1.0, origin)?;
    let half = graph.binary_number(BinaryFn::Mul, x, 0.5, origin)?;
    graph.binary(BinaryFn::Mul, half, more, origin)
}

/// A tensor for an input: floats are random and normal, integers small and not negative.
pub fn tensor(ty: &Type, random: &mut Random) -> Tensor {
    let (shape, count) = (&ty.shape[..], ty.shape.iter().product::<usize>());
    if !ty.dtype.is_float() {
        let numbers: Vec<i64> = (0..count).map(|_| random.below(10) as i64).collect();
        return cast(&Tensor::from_slice(shape, &numbers), ty.dtype);
    }
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        // Box and Muller: two at a time. The first is in (0, 1].
        let (u, v) = ((1.0 - random.unit()) / 2.0, random.unit());
        let (radius, angle) = ((-2.0 * u.max(1e-12).ln()).sqrt(), std::f32::consts::PI * v);
        values.extend([radius * angle.cos(), radius * angle.sin()]);
    }
    values.truncate(count);
    cast(&Tensor::from_slice(shape, &values), ty.dtype)
}

/// The same numbers in another type.
fn cast(tensor: &Tensor, dtype: DType) -> Tensor {
    if tensor.dtype() == dtype {
        return tensor.clone();
    }
    let mut graph = Graph::default();
    let x = graph.input("x", Type::new(tensor.dtype(), tensor.shape()));
    let y = graph.cast(x, dtype, &"cast".into()).expect("types of numbers");
    graph.outputs.push(("y".into(), y));
    kiln::interpret(&graph, std::slice::from_ref(tensor)).swap_remove(0)
}
