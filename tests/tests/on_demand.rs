//! Models whose shapes hang on the values of inputs are compiled for the values they meet.

use kiln::tensor::Tensor;
use kiln::{Compiler, Limits, Model};
use kiln_tests::oracle;

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
