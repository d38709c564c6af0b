//! Reductions along any axes, and caches that are appended to: there are enough threads for them.

use kiln::backend::cuda::Gpu;
use kiln::graph::Graph;
use kiln::graph::op::{BinaryFn, ReduceFn, Type, UnaryFn};
use kiln::loops::ir::{Param, Scope};
use kiln::plan::kernels::Launch;
use kiln::tensor::DType;
use kiln::{Compiler, Cuda, Limits, Model};
use kiln_tests::oracle;

use crate::agrees;

/// A reduction of a function of a tensor, and a function of that.
pub fn reduced(shape: &[usize], axes: &[usize], f: ReduceFn, dtype: DType) -> Graph {
    let (mut graph, o) = (Graph::default(), &"reduced".into());
    let x = graph.input("x", Type::new(dtype, shape));
    let x = match dtype {
        DType::F32 => graph.unary(UnaryFn::Abs, x, o).expect("a function"),
        _ => graph.cast(x, DType::F32, o).expect("a cast"),
    };
    let x = graph.reduce(f, x, axes, o).expect("a reduction");
    let x = graph.binary_number(BinaryFn::Mul, x, 0.125, o).expect("a product");
    graph.outputs.push(("y".into(), x));
    graph
}

#[test]
fn threads_share_the_sums_of_few_results() {
    let all: [(&[usize], &[usize], &str); 9] = [
        (&[300, 70], &[0], "st.shared"),
        (&[4, 500, 3], &[1], "st.shared"),
        (&[64, 33], &[0], "st.shared"),
        (&[6, 20, 10, 40], &[0, 2], "st.shared"),
        (&[2, 100, 1], &[1], "shfl"),
        (&[3, 24, 14, 14], &[0, 2, 3], "shfl"),
        (&[5, 12, 200], &[0, 2], "shfl"),
        (&[40, 9, 65], &[0, 2], "shfl"),
        (&[1, 1000, 130], &[1], "st.shared"),
    ];
    for (shape, axes, word) in all {
        for f in [ReduceFn::Sum, ReduceFn::Max] {
            for dtype in [DType::F32, DType::BF16, DType::I8] {
                let name = format!("{f:?} of {shape:?} along {axes:?} of {dtype}");
                let text = agrees(&name, &reduced(shape, axes, f, dtype));
                assert!(text.contains(word), "{name}");
            }
        }
    }
    // Loops that are joined for that, and then are not shared.
    let mut graph = reduced(&[4, 6, 3, 5], &[1], ReduceFn::Sum, DType::F32);
    agrees("few elements", &graph);
    graph = reduced(&[6, 6, 8, 3, 3], &[3, 4], ReduceFn::Max, DType::F32);
    agrees("few elements", &graph);
    // A thread for each of many results, and for each of those of few elements.
    for (shape, axes) in [(&[70, 70_000][..], &[0][..]), (&[20, 30], &[0])] {
        let text = agrees("many", &reduced(shape, axes, ReduceFn::Sum, DType::F32));
        assert!(!text.contains("bar.sync"), "{shape:?}");
    }
}

/// What a run appends to a cache has a thread for each element, or for four neighbours: a row of
/// each head, rotated or not.
#[test]
fn caches_are_appended_to_by_many_threads() {
    let Some(folder) = oracle("dynamic") else { return };
    for (name, past, states) in [
        ("language", 12, ("past_*", "present_*")),
        ("llama_step_opset20", 80, ("past_key_values*", "present*")),
        ("gpt2_step_opset23", 80, ("past_key_values*", "present*")),
    ] {
        let model = Model::open(folder.join(name).join("model.onnx"), &Limits::default());
        let compiler = Compiler::new().dim_range("past", 1..=past).state(states.0, states.1);
        let gpu = Gpu::of(80).expect("a GPU");
        let cuda = compiler.cuda(&model.expect("a model"), gpu).expect("a text");
        let mut appended = 0;
        for step in &cuda.program.launches {
            let entry = &cuda.module.entries[step.kernel];
            for state in cuda.kernels.states.iter().filter(|state| state.in_place) {
                if result(&cuda, step) == Some(cuda.program.outputs[state.output]) {
                    let whole = cuda.kernels.ty(cuda.kernels.outputs[state.output].1).numel();
                    let row = whole / (past + 1);
                    let threads = entry.blocks * entry.threads;
                    println!("{}: {threads} threads for {row} elements", step.name);
                    assert!(4 * threads >= row, "{name}: {}: {threads} for {row}", step.name);
                    appended += 1;
                }
            }
        }
        assert!(appended >= 4, "{name}: {appended} appends");
    }
}

/// Where a launch writes its result.
fn result(cuda: &Cuda, step: &Launch) -> Option<usize> {
    let all = cuda.program.kernels[step.kernel].buffers.iter();
    let mut memory = all.filter(|b| b.scope == Scope::Global);
    memory.position(|b| b.param == Param::Out).map(|at| step.slots[at])
}
