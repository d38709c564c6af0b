//! `benches/cuda` goes all the way on the driver without a device, and says so where there is none.

use std::path::Path;
use std::process::{Command, Output};

fn script(args: &[&str]) -> Option<Output> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let mut command = Command::new("python3");
    command.arg(path).args(["--binary", env!("CARGO_BIN_EXE_kiln-gpu")]).args(args);
    match command.output() {
        Ok(output) => Some(output),
        Err(error) => {
            println!("skipped: python3: {error}");
            None
        }
    }
}

#[test]
fn the_script_goes_all_the_way_without_a_device() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/digits.onnx:batch=1");
    let Some(output) = script(&["--check", "--rounds", "2", model]) else { return };
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    for part in ["20 have the bits of the interpreter", "0 are wrong", "tanh 8 64", "digits.onnx"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let Some(output) = script(&["--check", "nothing.onnx"]) else { return };
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.code() == Some(1) && text.contains("nothing.onnx"), "{text}");
}

#[test]
fn a_device_that_is_not_there_is_said() {
    let Some(output) = script(&["--device", "77"]) else { return };
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.code() == Some(5) && text.contains("no GPU was measured"), "{text}");
}
