//! Types of 8 bits and fewer, through the command: from files of NumPy and back, and in a compiled
//! file.

mod common;

use common::{Folder, expect, field, number, port};
use kiln::npz::{read_npz, write_npy};
use kiln::tensor::{DType, Tensor};

/// A model that casts x, of so many elements, to y.
fn cast(from: u8, to: u8, extent: u8) -> Vec<u8> {
    let attribute = [field(1, b"to"), number(3, to)].concat();
    let node = [field(1, b"x"), field(2, b"y"), field(4, b"Cast"), field(5, &attribute)].concat();
    let ports = [field(11, &port("x", from, extent)), field(12, &port("y", to, extent))].concat();
    let graph = [field(1, &node), ports].concat();
    [field(7, &graph), field(8, &number(2, 24))].concat()
}

#[test]
fn codes_are_bytes_in_files_of_numpy() {
    let folder = Folder::new();
    let numbers = Tensor::from_slice(&[5], &[0.0f32, 1.0, -448.0, 1000.0, 0.3]);
    let mut file = Vec::new();
    write_npy(&mut file, numbers.view()).expect("memory does not fail");
    let (x, coded) = (folder.write("x.npy", &file), folder.path("coded.npz"));
    let narrow = folder.write("narrow.onnx", &cast(1, 17, 5));
    expect(0, &["run", &narrow, "-i", &x, "-o", &coded]);
    let codes = read_npz(&std::fs::read(&coded).expect("a file")).expect("an archive").remove(0);
    assert_eq!(codes.1.dtype(), DType::U8);
    assert_eq!(codes.1.bytes(), [0, 0x38, 0xfe, 0x7e, 0x2a]);
    // The same codes go back into numbers, read by a compiled file as well.
    let wide = folder.write("wide.onnx", &cast(17, 1, 5));
    let mut file = Vec::new();
    write_npy(&mut file, codes.1.view()).expect("memory does not fail");
    let (x, out) = (folder.write("codes.npy", &file), folder.path("out.npz"));
    let compiled = folder.path("wide.so");
    expect(0, &["compile", &wide, "-o", &compiled]);
    for model in [&wide, &compiled] {
        expect(0, &["run", model, "-i", &x, "-o", &out]);
        let found = read_npz(&std::fs::read(&out).expect("a file")).expect("an archive").remove(0);
        assert_eq!(found.1.as_slice::<f32>(), Some(&[0.0, 1.0, -448.0, 448.0, 0.3125][..]));
    }
    let (text, _) = expect(0, &["inspect", &wide]);
    assert!(text.contains("f8e4m3fn[5]") && text.contains("f8e4m3fn is u8"), "{text}");
    expect(0, &["verify", &wide, "-i", "random"]);
    expect(0, &["verify", &folder.write("four.onnx", &cast(22, 1, 5))]);
    let mut file = Vec::new();
    let words = Tensor::from_slice(&[5], &[1u16; 5]);
    write_npy(&mut file, words.view()).expect("memory does not fail");
    let words = folder.write("words.npy", &file);
    let (_, err) = expect(2, &["run", &wide, "-i", &words, "-o", &out]);
    assert!(err.contains("does not fit input x: f8e4m3fn[5]; given: u16[5]"), "{err}");
}
