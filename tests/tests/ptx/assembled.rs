//! The texts of whole models before the assembler: it accepts them without a warning, and no
//! register is spilled. `KILN_BLESS=1` writes `golden/ptx.txt` anew.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, PoisonError};

use kiln::backend::cuda::{Gpu, emit_all};
use kiln::graph::Graph;
use kiln::graph::op::{Composite, ReduceFn};
use kiln::onnx::{ImportOptions, import};
use kiln::tensor::DType;
use kiln::{Compiler, Precision};
use kiln_tests::cases::{folders, name_of, read};
use kiln_tests::small::{MODELS, graph};
use kiln_tests::{oracle, ptx, suite};

use crate::moves::permuted;
use crate::sums::reduced;
use crate::{rows, short_attention};

/// Versions of instruction sets: that of the text, and those that it is assembled for.
const VERSIONS: [(u32, &[&str]); 2] = [(80, &["80", "89", "120"]), (90, &["90a"])];

/// The greatest of the numbers before a word.
fn most(said: &str, word: &str) -> usize {
    let before = |at: usize| said[..at].rsplit([' ', '\n']).next().and_then(|n| n.parse().ok());
    said.match_indices(word).filter_map(|(at, _)| before(at)).max().unwrap_or(0)
}

/// What the assembler says of a text for a target; of models that differ in their weights only the
/// text is the same.
fn assemble(ptxas: &Path, text: &str, target: &str) -> Result<String, String> {
    type Known = HashMap<(String, String), Result<String, String>>;
    static KNOWN: LazyLock<Mutex<Known>> = LazyLock::new(Mutex::default);
    let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (text.to_string(), target.to_string());
    if let Some(said) = known().get(&key) {
        return said.clone();
    }
    let said = ptx::assemble(ptxas, text, target);
    known().insert(key, said.clone());
    said
}

/// Kernels of a graph, and for each version the registers and the shared memory that the largest of
/// them take.
fn line(graph: &Graph, compiler: &Compiler) -> Result<String, String> {
    let ptxas = ptx::assembler().ok_or("no assembler")?;
    let of = |sm| Gpu::of(sm).ok_or("no GPU");
    let cuda = compiler.cuda_of(graph, of(VERSIONS[0].0)?).map_err(|e| e.to_string())?;
    let mut line = String::new();
    for (sm, targets) in VERSIONS {
        let module = emit_all(&cuda.program.kernels, of(sm)?).map_err(|e| e.to_string())?;
        for (n, target) in targets.iter().enumerate() {
            let said = assemble(&ptxas, &module.text, target);
            let said = said.map_err(|e| format!("sm_{target}: {e}"))?;
            if n == 0 {
                let (registers, shared) = (most(&said, " registers"), most(&said, " bytes smem"));
                let kernels = said.matches("Used ").count();
                let _ = write!(line, " sm_{target}: {kernels} {registers} {shared}");
            }
        }
    }
    Ok(line)
}

fn check_model(folder: &Path) -> Result<String, String> {
    let options = ImportOptions { folder: Some(folder.to_path_buf()), ..ImportOptions::default() };
    let graph = import(read(&folder.join("model.onnx")), &options).map_err(|e| e.to_string())?;
    line(&graph, &Compiler::new())
}

#[test]
fn texts_assemble_without_spills() {
    if ptx::assembler().is_none() {
        return;
    }
    let mut problems = Vec::new();
    let mut table = String::from(
        "# model, and of each version: kernels, registers and bytes of shared memory at most\n",
    );
    for ((name, make), precision) in MODELS.iter().flat_map(|m| Precision::ALL.map(|p| (m, p))) {
        let (compiler, of) = (Compiler::new().precision(precision), precision.name());
        match line(&compiler.rounded(graph(*make)), &compiler) {
            Ok(line) => _ = writeln!(table, "{name} in {of}{line}"),
            Err(why) => problems.push(format!("{name} in {of}: {why}")),
        }
    }
    for dtype in [DType::F16, DType::BF16] {
        for sizes in [[2, 64, 100, 64, 64], [2, 64, 100, 128, 128], [2, 1, 100, 64, 64]] {
            let name = format!("attention of {dtype} {sizes:?}");
            match line(&short_attention(sizes, dtype), &Compiler::new()) {
                Ok(line) => _ = writeln!(table, "{name}{line}"),
                Err(why) => problems.push(format!("{name}: {why}")),
            }
        }
    }
    if let Some(models) = oracle("models") {
        let all: Vec<(String, PathBuf)> =
            folders(&models).into_iter().map(|folder| (name_of(&folder), folder)).collect();
        for (name, result) in suite::run_all(&all, check_model) {
            match result {
                Ok(line) => _ = writeln!(table, "{name}{line}"),
                Err(why) => problems.push(format!("{name}: {why}")),
            }
        }
    }
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/ptx.txt");
    if std::env::var_os("KILN_BLESS").is_some() {
        std::fs::write(&golden, &table).expect("a file beside the tests");
    }
    let want = std::fs::read_to_string(&golden).unwrap_or_default();
    for got in table.lines().filter(|got| want.lines().all(|want| want != *got)) {
        problems.push(format!("not in golden/ptx.txt: {got}"));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// Rows that threads keep in registers, as many as they may; squares, and shared sums.
#[test]
fn kernels_of_rows_and_moves_do_not_spill() {
    if ptx::assembler().is_none() {
        return;
    }
    let (norm, plain) = (Composite::LayerNorm(1, 1e-5f32.to_bits()), Compiler::new());
    let mut problems = Vec::new();
    for (count, columns) in
        [(3, 8192), (2, 32768), (3, 5000), (64, 1023), (4096, 64), (8, 16), (2, 33000)]
    {
        for f in [Composite::Softmax(1), norm] {
            let name = format!("{f:?} of {count} {columns}");
            let wrong = line(&rows(f, count, columns), &plain).err();
            problems.extend(wrong.map(|why| format!("{name}: {why}")));
        }
    }
    for dtype in [DType::F32, DType::F16, DType::I8] {
        let moved = permuted(&[2, 70, 100], &[0, 2, 1], dtype);
        let few = reduced(&[300, 70], &[0], ReduceFn::Sum, dtype);
        let all = [line(&moved, &plain), line(&few, &plain)];
        problems.extend(all.into_iter().filter_map(|line| line.err()));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
