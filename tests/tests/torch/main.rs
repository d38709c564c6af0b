//! Every operation of the graph, interpreted and compiled (wide, narrow, without the e-graph),
//! against libtorch, on shapes made by proptest and numbers made of a seed.
//!
//! Every operation has 256 cases of its main dtype (f32, i64 or bool) and a quarter as many of
//! each other one (of f64, an eighth). `KILN_CASES` changes the number, `KILN_SEED` the cases.
//! One graph in 8 is run on older CPUs and on other architectures too; `KILN_EMULATED=1` makes
//! that every one.

mod moves;
mod numbers;
mod pointwise;
mod refused;
mod rounded;
mod sums;
mod trial;

use kiln::tensor::DType;
use kiln_tests::environment;
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use tch::Kind;
use trial::Checked;

const FLOATS: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::F64];

/// The dtypes that libtorch computes with, and its names for them.
const KINDS: [(DType, Kind); 10] = [
    (DType::F32, Kind::Float),
    (DType::F16, Kind::Half),
    (DType::BF16, Kind::BFloat16),
    (DType::F64, Kind::Double),
    (DType::I64, Kind::Int64),
    (DType::I32, Kind::Int),
    (DType::I16, Kind::Int16),
    (DType::I8, Kind::Int8),
    (DType::U8, Kind::Uint8),
    (DType::Bool, Kind::Bool),
];

fn dtypes() -> impl Iterator<Item = DType> {
    KINDS.into_iter().map(|k| k.0)
}

/// How many cases an operation has in a dtype.
fn cases(dtype: DType) -> u32 {
    let all = environment("KILN_CASES", 256) as u32;
    match dtype {
        DType::F32 | DType::I64 | DType::Bool => all,
        // Functions of f64 are long code that is slow to compile.
        DType::F64 => all.div_ceil(8),
        _ => all.div_ceil(4),
    }
}

/// Checks a property on that many cases, which are the same in every run.
fn property<S: Strategy>(cases: u32, strategy: S, test: impl Fn(S::Value) -> Checked) {
    tch::set_num_threads(1);
    // Failures are printed; a seed file beside the sources would be one more thing to keep.
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let mut seed = [0u8; 32];
    seed[..8].copy_from_slice(&environment("KILN_SEED", 1).to_le_bytes());
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    if let Err(failure) = TestRunner::new_with_rng(config, random).run(&strategy, test) {
        panic!("{failure}");
    }
}

/// Checks a property of every dtype.
fn property_of_dtypes<S: Strategy>(
    dtypes: impl IntoIterator<Item = DType>,
    strategy: impl Fn() -> S,
    test: impl Fn(DType, S::Value) -> Checked,
) {
    for dtype in dtypes {
        property(cases(dtype), strategy(), |value| test(dtype, value));
    }
}

/// Any dtype that libtorch knows; f32 half of the time.
fn any_dtype() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), prop::sample::select(dtypes().collect::<Vec<_>>())]
}

/// Extents from `least` on, of so many axes; the last axis may be longer than a few vectors.
fn shape(
    least: usize,
    most: usize,
    ranks: std::ops::RangeInclusive<usize>,
) -> impl Strategy<Value = Vec<usize>> {
    (proptest::collection::vec(least..=most, ranks), any::<bool>()).prop_map(
        move |(mut s, long)| {
            if long && let Some(last) = s.last_mut() {
                *last = *last * 7 / 2;
            }
            s
        },
    )
}

fn longs(values: &[usize]) -> Vec<i64> {
    values.iter().map(|&v| v as i64).collect()
}
