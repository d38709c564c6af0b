//! The smallest graphs that were once wrong in some form, with inputs that show it.

use kiln::graph::eval::{Data, Value};
use kiln::graph::text::parse;
use kiln_tests::grown::Grown;
use kiln_tests::noise::expected;

use crate::{ways, wrong};

const INF: f64 = f64::INFINITY;

/// What was wrong, the graph, its inputs.
const FOUND: &[(&str, &str, &[&[f64]])] = &[
    (
        "powers of one half were square roots",
        "constant 0 : f32[1] = 0.5
         %0 = input 0 : f32[3] \"x\"
         %1 = const 0 : f32[1] \"n\"
         %2 = pow %0 %1 : f32[3] \"n\"
         output \"y\" %2",
        &[&[-INF, -0.0, 4.0]],
    ),
    (
        "sines of large numbers were infinite",
        "%0 = input 0 : f32[3] \"x\"
         %1 = sin %0 : f32[3] \"n\"
         %2 = abs %1 : f32[3] \"n\"
         %3 = floor %2 : f32[3] \"n\"
         output \"y\" %3",
        &[&[1e30, -3e38, 1.0]],
    ),
    (
        "a scatter into nothing was refused",
        "constant 0 : i64[2] = 0 -2
         constant 1 : i8[2] = -3 5
         %0 = input 0 : i8[0] \"x\"
         %1 = const 0 : i64[2] \"n\"
         %2 = const 1 : i8[2] \"n\"
         %3 = scatter max %0 %1 %2 : i8[0] \"n\"
         output \"y\" %3",
        &[&[]],
    ),
    (
        "bytes that do not change along lanes were refused by the narrow emitter",
        "%0 = input 0 : u8[2,22] \"x\"
         %1 = reduce max [1] %0 : u8[2,1] \"n\"
         %2 = min %1 %0 : u8[2,22] \"n\"
         output \"y\" %2",
        &[&[7.0; 44]],
    ),
    (
        "PTX did not wrap the complement of a byte",
        "%0 = input 0 : u8[3] \"x\"
         %1 = not %0 : u8[3] \"n\"
         %2 = cast i32 %1 : i32[3] \"n\"
         output \"y\" %2",
        &[&[0.0, 1.0, 255.0]],
    ),
    (
        "PTX had no fold of bools by several threads",
        "%0 = input 0 : bool[66] \"x\"
         %1 = reduce min [0] %0 : bool[1] \"n\"
         output \"y\" %1",
        &[&[1.0; 66]],
    ),
];

#[test]
fn what_was_found_is_right() {
    for (what, text, inputs) in FOUND {
        let graph = parse(text, &[]).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(graph.inputs.len(), inputs.len(), "{what}");
        let value = |((_, ty), numbers): (&(String, _), &&[f64])| {
            let ty: &kiln::graph::op::Type = ty;
            let data = match ty.dtype.is_float() {
                true => Data::Float(numbers.to_vec()),
                false => Data::Int(numbers.iter().map(|&v| v as i128).collect()),
            };
            Value { ty: ty.clone(), data }
        };
        let inputs = graph.inputs.iter().zip(*inputs).map(value).collect();
        let grown = Grown { graph, inputs };
        let expected = expected(&grown.graph, &grown.inputs);
        for (name, way) in ways(0) {
            if let Some(why) = wrong(&way, &grown.graph, &grown.inputs, &expected) {
                panic!("{what}: {name}: {why}");
            }
        }
    }
}
