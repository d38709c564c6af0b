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
        "a border around nothing was refused",
        "constant 0 : f32[] = -0.5
         %0 = input 0 : f32[0,1] \"x\"
         %1 = expand [0,4] %0 : f32[0,4] \"n\"
         %2 = const 0 : f32[] \"n\"
         %3 = pad [0:0,1:1] %1 %2 : f32[0,6] \"n\"
         output \"y\" %3",
        &[&[]],
    ),
    (
        "a border with nothing inside was refused",
        "constant 0 : f32[] = -0.5
         %0 = input 0 : f32[1,0] \"x\"
         %1 = reshape [1,1,0] %0 : f32[1,1,0] \"n\"
         %2 = const 0 : f32[] \"n\"
         %3 = pad [0:2,0:1,2:2] %1 %2 : f32[3,2,4] \"n\"
         output \"y\" %3",
        &[&[]],
    ),
    (
        "a square of maxima was not turned",
        "%0 = input 0 : f32[1,1,3,12] \"x\"
         %1 = input 1 : f32[3,1,1,1] \"y\"
         %2 = mul %0 %1 : f32[3,1,3,12] \"n\"
         %3 = permute [0,2,1,3] %2 : f32[3,3,1,12] \"n\"
         %4 = reduce max [2,3] %3 : f32[3,3,1,1] \"n\"
         %5 = permute [1,0,3,2] %4 : f32[3,3,1,1] \"n\"
         output \"y\" %5",
        &[
            &[
                1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0,
                5.0, 6.0, 7.0, 8.0, 20.0, 1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0,
                30.0, 1.0, 1.0, 1.0,
            ],
            &[1.0, 2.0, 3.0],
        ],
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
        "sums of the largest integers overflowed in the interpreter",
        "constant 0 : u64[2,1] = 1 9223372036854775808
         %0 = input 0 : u64[1,2] \"x\"
         %1 = not %0 : u64[1,2] \"n\"
         %2 = const 0 : u64[2,1] \"n\"
         %3 = contract [1,1,2] 2 [+1*0,+1*2] [+1*2,+1*1] %1 %2 : u64[1,1] \"n\"
         output \"y\" %3",
        &[&[0.0, 0.0]],
    ),
    (
        "PTX had no attention of few keys whose values are wide",
        "%0 = input 0 : f32[2,43] \"x\"
         %1 = input 1 : f32[43,4] \"k\"
         %2 = input 2 : f32[4,43] \"v\"
         %3 = contract [2,4,43] 2 [+1*0,+1*2] [+1*2,+1*1] %0 %1 : f32[2,4] \"n\"
         %4 = softmax 1 %3 : f32[2,4] \"n\"
         %5 = contract [2,43,4] 2 [+1*0,+1*2] [+1*2,+1*1] %4 %2 : f32[2,43] \"n\"
         output \"y\" %5",
        &[&[0.25; 86], &[-0.5; 172], &[1.5; 172]],
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
    (
        "a row was scaled by the sum of another",
        "%0 = input 0 : f32[2,2,3] \"x\"
         %1 = input 1 : f32[2,2,3] \"y\"
         %2 = reduce max [2] %0 : f32[2,2,1] \"n\"
         %3 = sub %0 %2 : f32[2,2,3] \"n\"
         %4 = reduce sum [2] %1 : f32[2,2,1] \"n\"
         %5 = permute [1,0,2] %4 : f32[2,2,1] \"n\"
         %6 = mul %3 %5 : f32[2,2,3] \"n\"
         output \"y\" %6",
        &[
            &[1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 1.0, 4.0, 2.0, 8.0, 5.0, 1.0],
            &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 1.0, 0.0, 3.0],
        ],
    ),
    (
        "a reduction that is read through two rows of reshapes was refused",
        "%0 = input 0 : f32[3,20] \"x\"
         %1 = reduce max [0] %0 : f32[1,20] \"n\"
         %2 = reshape [1,2,10] %1 : f32[1,2,10] \"n\"
         %3 = reshape [2,2,5] %1 : f32[2,2,5] \"n\"
         %4 = reshape [1,2,10] %3 : f32[1,2,10] \"n\"
         %5 = mul %2 %4 : f32[1,2,10] \"n\"
         output \"y\" %5",
        &[&[2.0; 60]],
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
