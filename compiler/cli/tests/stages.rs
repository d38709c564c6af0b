//! A model whose shapes hang on data that it computes, through the command.

mod common;

use common::{Folder, expect, field, json, number, port};
use kiln::npz::{read_npz, write_npy};
use kiln::tensor::{DType, Tensor};

fn node(from: &str, to: &str, op: &str) -> Vec<u8> {
    let names = [field(1, from.as_bytes()), field(2, to.as_bytes())].concat();
    field(1, &[names, field(4, op.as_bytes())].concat())
}

/// Where 6 floats are not 0, as a column.
fn places() -> Vec<u8> {
    let nodes = [node("x", "r", "Relu"), node("r", "z", "NonZero"), node("z", "y", "Transpose")];
    let ports = [field(11, &port("x", 1, 6)), field(12, &field(1, b"y"))].concat();
    let graph = [nodes.concat(), ports].concat();
    [field(7, &graph), field(8, &number(2, 17)), number(1, 8)].concat()
}

#[test]
fn such_a_model_is_run_and_verified_and_not_compiled_into_a_file() {
    let folder = Folder::new();
    let model = folder.write("places.onnx", &places());
    let x = Tensor::from_slice(&[6], &[0.0f32, 2.0, -1.0, 3.0, 0.0, 0.5]);
    let mut file = Vec::new();
    write_npy(&mut file, x.view()).expect("memory does not fail");
    let (x, out) = (folder.write("x.npy", &file), folder.path("out.npz"));
    expect(0, &["run", &model, "-i", &x, "-o", &out, "--steps", "2"]);
    let arrays = read_npz(&std::fs::read(&out).expect("a file")).expect("an archive");
    assert_eq!((arrays[0].0.as_str(), arrays[0].1.dtype()), ("y", DType::I64));
    assert_eq!(arrays[0].1.shape(), [3, 1]);
    assert_eq!(arrays[0].1.as_slice::<i64>(), Some(&[1, 3, 5][..]));
    let (said, _) = expect(0, &["verify", &model, "-i", &x]);
    assert!(said.contains("stage 1, value 0") && said.contains("stage 2, y"), "{said}");
    expect(0, &["verify", &model]);
    let checked = json(0, &["check", &model]);
    assert_eq!((&checked["ok"], &checked["staged"]), (&true.into(), &true.into()));
    let (_, why) = expect(2, &["bench", &model]);
    assert!(why.contains("it runs in stages") && why.contains("kiln run"), "{why}");
    let target = folder.path("places.so");
    let (_, why) = expect(3, &["compile", &model, "-o", &target]);
    assert!(why.contains("NonZero") && why.contains("kiln run"), "{why}");
    assert!(!std::path::Path::new(&target).exists());
    let (_, why) = expect(2, &["run", &model]);
    assert!(why.contains("no tensor given"), "{why}");
}
