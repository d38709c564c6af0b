//! Stored cases: a folder with a model and its inputs and outputs as `.pb` files.

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use kiln::onnx::read_tensor;
use kiln::tensor::Tensor;

/// A model with one set of inputs and the outputs that belong to them.
pub struct Case {
    /// The bytes of the model.
    pub model: Bytes,
    /// Inputs in the order of the model.
    pub inputs: Vec<Tensor>,
    /// Outputs in the order of the model.
    pub outputs: Vec<Tensor>,
}

/// Folders of a folder, in order of their names.
pub fn folders(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).expect("a folder of cases that is there");
    let mut folders: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry that can be read").path())
        .filter(|path| path.is_dir())
        .collect();
    folders.sort();
    folders
}

/// The name of a folder or file, without what leads to it.
pub fn name_of(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// A file as bytes.
pub fn read(path: &Path) -> Bytes {
    let read = fs::read(path);
    Bytes::from(read.unwrap_or_else(|e| panic!("{}: {e}", path.display())))
}

/// Tensors `<kind>_0.pb`, `<kind>_1.pb`, ... of a folder, or why one is no tensor.
fn tensors(folder: &Path, kind: &str) -> Result<Vec<Tensor>, String> {
    let files = (0..).map(|k| folder.join(format!("{kind}_{k}.pb"))).take_while(|f| f.is_file());
    let tensor = |file: PathBuf| {
        read_tensor(read(&file)).map_err(|e| {
            let first = &e.diagnostics[0];
            let found = first.found.clone().unwrap_or_default();
            format!("{kind} data: {} ({found})", first.message)
        })
    };
    files.map(tensor).collect()
}

/// Reads a case: `model.onnx` in one folder, the data in another.
pub fn read_case(model: &Path, data: &Path) -> Result<Case, String> {
    let (inputs, outputs) = (tensors(data, "input")?, tensors(data, "output")?);
    Ok(Case { model: read(&model.join("model.onnx")), inputs, outputs })
}
