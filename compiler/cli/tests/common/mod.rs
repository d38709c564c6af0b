//! The command, run as a person runs it.
// Each test binary uses a part.
#![allow(dead_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// The path of a file in `examples`.
pub fn shipped(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    folder.join(name).display().to_string()
}

/// Runs the command.
pub fn kiln(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
    command.args(args).env_remove("NO_COLOR").env_remove("CLICOLOR_FORCE");
    command.output().expect("the command starts")
}

/// Standard output and standard error of a command that ends with that code.
pub fn expect(code: i32, args: &[&str]) -> (String, String) {
    let output = kiln(args);
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "kiln {args:?}\n{out}\n{err}");
    (out, err)
}

/// The object that a command prints with `--json`.
pub fn json(code: i32, args: &[&str]) -> Value {
    let (out, _) = expect(code, &[args, &["--json"]].concat());
    let value: Value = serde_json::from_str(&out).expect("one JSON object");
    assert_eq!(value["schema"], "kiln/1", "{args:?}");
    value
}

/// A folder that is removed at the end.
pub struct Folder(tempfile::TempDir);

impl Folder {
    /// An empty one.
    pub fn new() -> Folder {
        Folder(tempfile::tempdir().expect("a folder"))
    }

    /// The path of a file in it.
    pub fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// Writes a file and gives its path.
    pub fn write(&self, name: &str, bytes: &[u8]) -> String {
        fs::write(self.path(name), bytes).expect("a file");
        self.path(name)
    }

    /// The names of its files.
    pub fn names(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.0.path()).expect("the folder");
        let mut names: Vec<_> = entries.flatten().map(|e| PathBuf::from(e.file_name())).collect();
        names.sort();
        names
    }
}

/// A `.pb` file: TensorProto with dims, data_type f32 and raw_data.
pub fn pb(shape: &[u8], values: &[f32]) -> Vec<u8> {
    let mut bytes: Vec<u8> = shape.iter().flat_map(|&extent| [0x08, extent]).collect();
    bytes.extend([0x10, 1, 0x4a]);
    let mut length = values.len() * 4;
    while length >= 128 {
        bytes.push(length as u8 | 128);
        length >>= 7;
    }
    bytes.push(length as u8);
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    bytes
}

/// A field of a message of protobuf that holds bytes.
pub fn field(number: u8, content: &[u8]) -> Vec<u8> {
    assert!(content.len() < 128, "one byte holds the length");
    [&[number << 3 | 2, content.len() as u8], content].concat()
}

/// A field that is a small number.
pub fn number(number: u8, value: u8) -> Vec<u8> {
    vec![number << 3, value]
}

/// A `ValueInfoProto` of one axis.
pub fn port(name: &str, dtype: u8, extent: u8) -> Vec<u8> {
    let shape = field(1, &number(1, extent));
    let tensor = [number(1, dtype), field(2, &shape)].concat();
    [field(1, name.as_bytes()), field(2, &field(1, &tensor))].concat()
}
