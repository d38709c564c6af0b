//! Compiled files that are loaded and run.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;
#[path = "common/file.rs"]
mod file;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{ADD, N, executable};
use file::artifact;
use kiln_runtime::cpu;
use kiln_runtime::manifest::{ArtifactError, Manifest, Weights};
use kiln_runtime::pool::Pool;
use kiln_runtime::session::Executable;
use kiln_runtime::tensor::Tensor;

/// A folder that is removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("kiln-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a folder");
        Folder(path)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, bytes).expect("a file");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn weights() -> Vec<u8> {
    bytemuck::cast_slice(&[0.5f32; N]).to_vec()
}

fn manifest() -> Manifest {
    Manifest {
        producer: "a test".into(),
        target: cpu::triple(),
        features: cpu::host().into_iter().map(String::from).collect(),
        model_hash: [0; 32],
        name: "sum".into(),
        plan: executable(1, 4).plan().clone(),
        entries: vec![0],
        faster: Vec::new(),
        modules: Vec::new(),
        weights: Weights::Inside { bytes: 4 * N },
    }
}

fn external(bytes: &[u8]) -> Weights {
    let hash = *blake3::hash(bytes).as_bytes();
    Weights::External { file: "sum.weights".into(), bytes: bytes.len(), hash }
}

fn load(path: &Path) -> Result<Executable, ArtifactError> {
    let pool = Arc::new(Pool::new(2).expect("threads"));
    // SAFETY: the file was written by this test and holds the kernel of its plan.
    unsafe { Executable::load(path, pool) }
}

fn run(executable: &Executable) {
    let values: Vec<f32> = (0..N).map(|i| i as f32).collect();
    let x = Tensor::from_slice(&[10, N / 10], &values);
    let outputs = executable.run(&[("a", x.view()), ("b", x.view())]).expect("a run");
    let expected: Vec<f32> = values.iter().map(|x| x + x + 0.5).collect();
    assert_eq!(outputs[0].1.as_slice::<f32>().expect("f32"), expected);
}

#[test]
fn weights_are_mapped_from_inside_and_from_beside() {
    let folder = Folder::new("mapped");
    let inside = folder.write("inside.so", &artifact(&manifest(), ADD, &weights()));
    folder.write("sum.weights", &weights());
    let beside = Manifest { weights: external(&weights()), ..manifest() };
    let beside = folder.write("beside.so", &artifact(&beside, ADD, &[]));
    for path in [inside, beside] {
        let executable = load(&path).expect("an executable");
        // A new file in its place does not change what was loaded.
        fs::remove_file(&path).expect("the file");
        assert!(executable.artifact().constants.is_mapped());
        run(&executable);
    }
}

#[test]
fn other_machines_and_missing_files_are_errors() {
    let folder = Folder::new("refused");
    let refused = |manifest: &Manifest| {
        let path = folder.write("refused.so", &artifact(manifest, ADD, &weights()));
        load(&path).expect_err("an error").to_string()
    };
    let text = refused(&Manifest { target: "riscv64gc-unknown-linux-gnu".into(), ..manifest() });
    assert!(text.contains("compiled for riscv64gc-unknown-linux-gnu, this machine is x86_64"));
    let features = vec!["avx2".into(), "avx9000".into()];
    let text = refused(&Manifest { features, ..manifest() });
    assert!(text.contains("a processor with `avx9000`, which this one lacks"), "{text}");
    let text = refused(&Manifest { weights: external(&weights()), ..manifest() });
    assert!(text.contains("sum.weights: No such file"), "{text}");
    folder.write("sum.weights", &weights()[1..]);
    let text = refused(&Manifest { weights: external(&weights()), ..manifest() });
    assert!(text.contains("has 3999 bytes, expected 4000"), "{text}");
    folder.write("sum.weights", &[1; 4 * N]);
    let text = refused(&Manifest { weights: external(&weights()), ..manifest() });
    assert!(text.contains("sum.weights has the hash"), "{text}");
    let none = load(&folder.0.join("none.so")).expect_err("an error").to_string();
    assert!(none.contains("none.so: No such file"), "{none}");
    assert!(load(&folder.0).is_err() && load(&folder.write("empty", b"")).is_err());
}
