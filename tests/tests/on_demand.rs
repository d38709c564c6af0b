//! Models whose shapes hang on the values of inputs are compiled for the values they meet.

use kiln::tensor::Tensor;
use kiln::{Compiler, Limits, Model};
use kiln_tests::{environment, oracle};

#[test]
fn the_shape_of_a_reshape_is_an_input() {
    let Some(data) = oracle("onnx-1.22.0") else { return };
    let path = data.join("node/test_reshape_extended_dims/model.onnx");
    let model = Model::open(path, &Limits::default()).expect("the model");
    let names: Vec<String> = model.inputs().iter().map(|port| port.name.clone()).collect();
    let x: Vec<f32> = (0..24).map(|i| i as f32).collect();
    let x = Tensor::from_slice(&[2, 3, 4], &x);
    let on_demand = Compiler::new().on_demand(&model);
    let shapes: [[i64; 4]; 3] = [[2, 3, 2, 2], [1, 4, 3, 2], [2, 3, 2, 2]];
    for shape in shapes {
        let to = Tensor::from_slice(&[4], &shape);
        let inputs = [(names[0].as_str(), x.view()), (names[1].as_str(), to.view())];
        let outputs = on_demand.run(&inputs).expect("a run");
        let expected: Vec<usize> = shape.iter().map(|&e| e as usize).collect();
        assert_eq!(outputs[0].1.shape(), expected);
        assert_eq!(outputs[0].1.bytes(), x.bytes());
    }
    assert_eq!(on_demand.kept(), 2);
}

/// Resident memory of this process in bytes.
#[cfg(target_os = "linux")]
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").expect("the size of this process");
    let pages: usize = status.split(' ').nth(1).and_then(|n| n.parse().ok()).expect("a number");
    pages * 4096
}

/// `KILN_SHAPES=10000` for all that is promised: a few minutes.
#[test]
#[cfg(target_os = "linux")]
fn memory_stays_for_any_number_of_shapes() {
    let Some(data) = oracle("dynamic") else { return };
    let path = data.join("decoder/model.onnx");
    let model = Model::open(path, &Limits::default()).expect("the model");
    let shapes = environment("KILN_SHAPES", 300);
    let limit = 4 << 20;
    let on_demand = Compiler::new().kept_bytes(limit).on_demand(&model);
    let mut random = kiln_tests::Random::new(5);
    let mut before = 0;
    for shape in 0..shapes {
        let (batch, past) = (1 + random.below(3), 1 + random.below(2000));
        let x = random.tensor(&[batch, 1, 32]);
        let cache = random.tensor(&[batch, 2, past, 16]);
        let inputs = [("x", x.view()), ("past_k", cache.view()), ("past_v", cache.view())];
        on_demand.run(&inputs).expect("a run");
        assert!(on_demand.kept() > 0 && on_demand.kept_bytes() <= limit);
        if shape == shapes / 2 {
            before = resident();
        }
    }
    let after = resident();
    println!("{} MB after half of {shapes} shapes, {} MB after all", before >> 20, after >> 20);
    assert!(after < before + (24 << 20), "{before} bytes, then {after}");
}
