//! The library on the model that ships with Kiln: what a program that links it relies on.

use std::path::Path;

use kiln::error::ErrorKind;
use kiln::npz::read_npz;
use kiln::tensor::{DType, Tensor, TensorView, TensorViewMut};
use kiln::{Compiler, Executable, Form, Kind, Limits, Model};

const IMAGES: usize = 32;

fn shipped(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples").join(name)
}

fn executable(threads: usize) -> Executable {
    let model = Model::open(shipped("digits.onnx"), &Limits::default()).expect("the model");
    let compiler = Compiler::new().threads(threads).dim("batch", IMAGES);
    compiler.compile(&model).expect("it compiles")
}

fn images() -> Tensor {
    let file = std::fs::read(shipped("digits_test.npz")).expect("the data");
    let arrays = read_npz(&file).expect("a sound archive");
    let images = &arrays.iter().find(|(name, _)| name == "image").expect("images").1;
    let values = images.as_slice::<f32>().expect("f32");
    Tensor::from_slice(&[IMAGES, 1, 8, 8], &values[..IMAGES * 64])
}

fn run(executable: &Executable) -> Tensor {
    let mut outputs = executable.run(&[("image", images().view())]).expect("a run");
    outputs.remove(0).1
}

#[test]
fn results_are_equal_bit_for_bit_for_every_number_of_threads() {
    let one = run(&executable(1));
    for threads in [2, 3, 8] {
        assert!(run(&executable(threads)) == one, "{threads} threads");
    }
}

#[test]
fn a_model_is_compiled_for_the_shapes_it_meets() {
    let model = Model::open(shipped("digits.onnx"), &Limits::default()).expect("the model");
    let images = images();
    let expected = run(&executable(1));
    let on_demand = Compiler::new().dim_range("batch", 1..=IMAGES).on_demand(&model);
    let pixels = images.as_slice::<f32>().expect("f32");
    for batch in [1, 5, IMAGES, 5] {
        let some = Tensor::from_slice(&[batch, 1, 8, 8], &pixels[..batch * 64]);
        let outputs = on_demand.run(&[("image", some.view())]).expect("a run");
        assert_eq!(outputs[0].1.shape(), [batch, 10]);
        let got = outputs[0].1.as_slice::<f32>().expect("f32");
        let same = got.iter().zip(expected.as_slice::<f32>().expect("f32"));
        same.for_each(|(got, want)| assert!((got - want).abs() < 1e-5, "{got} {want}"));
    }
    assert_eq!(on_demand.kept(), 3);
    // No more are kept than there is room for.
    let limit = 8 * on_demand.kept_bytes() / on_demand.kept();
    let few = Compiler::new().dim("batch", 1).kept_bytes(limit).on_demand(&model);
    assert!(few.run(&[("image", images.view())]).is_err(), "a batch out of range");
    let few = Compiler::new().kept_bytes(limit).on_demand(&model);
    for batch in 1..=40 {
        let some = Tensor::zeros(DType::F32, &[batch, 1, 8, 8]);
        few.run(&[("image", some.view())]).expect("a run");
        assert!(few.kept_bytes() <= limit, "{} of {limit} bytes", few.kept_bytes());
    }
    assert!((2..30).contains(&few.kept()), "{}", few.kept());
    let refuse = |inputs: &[(&str, TensorView<'_>)], what: &str| {
        let error = on_demand.run(inputs).expect_err(what);
        assert_eq!(error.kind, ErrorKind::Usage);
        assert!(error.to_string().contains(what), "{error}");
    };
    let many = Tensor::zeros(DType::F32, &[IMAGES + 1, 1, 8, 8]);
    refuse(&[("image", many.view())], "outside of its range");
    let wide = Tensor::zeros(DType::F32, &[1, 1, 8, 9]);
    refuse(&[("image", wide.view())], "does not fit the input");
    let whole = Tensor::zeros(DType::I64, &[1, 1, 8, 8]);
    refuse(&[("image", whole.view())], "expected");
    refuse(&[("picture", wide.view())], "no such input");
    refuse(&[], "no tensor given");
    let typo = Compiler::new().dim("btach", 1).compile(&model).expect_err("no such dim");
    assert!(typo.to_string().contains("batch"), "{typo}");
}

#[test]
fn many_threads_share_one_executable() {
    let executable = executable(2);
    let expected = run(&executable);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            let (executable, expected) = (executable.clone(), &expected);
            scope.spawn(move || (0..50).for_each(|_| assert!(run(&executable) == *expected)));
        }
    });
}

#[test]
fn tensors_may_lie_at_any_address() {
    let executable = executable(2);
    let expected = run(&executable);
    let images = images();
    for offset in 1..8 {
        let mut input = vec![0; offset];
        input.extend_from_slice(images.bytes());
        let mut output = vec![0u8; offset + expected.bytes().len()];
        let (shape_in, shape_out) = (images.shape(), expected.shape());
        let view = TensorView { dtype: DType::F32, shape: shape_in, bytes: &input[offset..] };
        let target =
            TensorViewMut { dtype: DType::F32, shape: shape_out, bytes: &mut output[offset..] };
        executable.run_into(&[view], &mut [target]).expect("a run");
        assert!(&output[offset..] == expected.bytes(), "{offset} bytes off");
    }
}

#[test]
fn a_session_gives_what_the_executable_gives() {
    let executable = executable(2);
    let expected = run(&executable);
    let mut session = executable.session();
    for _ in 0..3 {
        let found = session.run(&[("image", images().view())]).expect("a run");
        assert!(found[0].1 == expected);
        session.reset();
    }
}

#[test]
fn an_executable_outlives_its_model_and_compiler() {
    let executable = executable(1);
    let clone = executable.clone();
    drop(executable);
    assert_eq!(run(&clone).shape(), [IMAGES, 10]);
}

#[test]
fn a_compiled_file_gives_what_the_model_gives() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("digits.so");
    let model = Model::open(shipped("digits.onnx"), &Limits::default()).expect("the model");
    let form = Form::new(Kind::Shared, "digits");
    let compiler = Compiler::new().dim("batch", IMAGES);
    let package = compiler.package(&model, &form).expect("it compiles");
    std::fs::write(&path, &package.file).expect("a file");
    let expected = run(&executable(1));
    for threads in [1, 2] {
        // SAFETY: the file was written above.
        let loaded = unsafe { kiln::load(&path, threads) }.expect("a sound file");
        assert!(loaded.artifact().constants.is_mapped());
        assert!(run(&loaded) == expected);
    }
    let file = kiln::open_artifact(&path).expect("a sound file");
    assert_eq!((file.file_bytes(), file.manifest.model_hash), (package.file.len(), model.hash()));
    std::fs::write(&path, &package.file[1..]).expect("a file");
    // SAFETY: it is refused.
    let error = unsafe { kiln::load(&path, 1) }.expect_err("a damaged file");
    assert!(error.kind == ErrorKind::Io && error.to_string().contains("digits.so"), "{error}");
}
