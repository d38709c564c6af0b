//! Limits that keep the code readable, as a test.

use std::path::{Path, PathBuf};

/// Files longer than the guide, each with its reason.
const LONG_FILES: &[(&str, &str)] = &[
    ("compiler/src/backend/cpu/clif.rs", "one emitter: an instruction or two for each operation"),
    ("compiler/src/loops/nest.rs", "every kind of nest, over one set of rewrites"),
    ("compiler/src/onnx/proto.rs", "made by prost"),
    ("compiler/src/rules/table.rs", "all rules, with their table"),
];
const FILE_LINES: usize = 600;
const LINE_COLUMNS: usize = 100;

/// Folders of the compiler in the order of the pipeline: each imports only from those before it.
const ORDER: &[&[&str]] = &[
    &["error"],
    &["graph"],
    &["onnx", "rules"],
    &["loops"],
    &["plan"],
    &["backend"],
    &["package", "compile"],
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
    let entries = std::fs::read_dir(folder).expect("a folder of the project");
    for entry in entries.map(|e| e.expect("an entry").path()) {
        let name = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if entry.is_dir() && !name.starts_with('.') && name != "target" {
            rust_files(&entry, files);
        } else if name.ends_with(".rs") {
            files.push(entry);
        }
    }
}

fn sources() -> Vec<(String, String)> {
    let mut files = Vec::new();
    for folder in ["compiler/src", "compiler/cli", "runtime", "tests", "benches", "examples"] {
        rust_files(&root().join(folder), &mut files);
    }
    files.sort();
    files
        .into_iter()
        .map(|file| {
            let text = std::fs::read_to_string(&file).expect("source is text");
            let name = file.strip_prefix(root()).expect("below the root").display().to_string();
            (name, text)
        })
        .collect()
}

#[test]
fn files_and_lines_are_short() {
    let mut problems = Vec::new();
    for (name, text) in sources() {
        let excused = LONG_FILES.iter().any(|l| l.0 == name);
        let lines = text.lines().count();
        if lines > FILE_LINES && !excused {
            problems.push(format!("{name}: {lines} lines"));
        }
        for (i, line) in text.lines().enumerate() {
            // Text in quotes may be as long as it is.
            if line.chars().count() > LINE_COLUMNS && !line.contains('"') {
                problems.push(format!("{name}:{}: {} columns", i + 1, line.chars().count()));
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn excuses_are_needed() {
    let sources = sources();
    for (name, reason) in LONG_FILES {
        let text = &sources.iter().find(|s| s.0 == *name).expect("the file is there").1;
        assert!(text.lines().count() > FILE_LINES * 9 / 10, "{name} is short now: {reason}");
    }
}

#[test]
fn nothing_is_left_for_later() {
    let marks = ["todo", "unimplemented", "dbg"].map(|m| format!("{m}!("));
    let mut problems = Vec::new();
    for (name, text) in sources() {
        for (i, line) in text.lines().enumerate() {
            if marks.iter().any(|m| line.contains(m.as_str())) {
                problems.push(format!("{name}:{}: {}", i + 1, line.trim()));
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn imports_go_one_way() {
    let stage_of = |module: &str| ORDER.iter().position(|group| group.contains(&module));
    let mut problems = Vec::new();
    for (name, text) in sources() {
        let Some(inside) = name.strip_prefix("compiler/src/") else { continue };
        let folder = inside.split(['/', '.']).next().unwrap_or_default();
        let Some(own) = stage_of(folder) else { continue };
        // Tests may look at everything.
        if inside.ends_with("tests.rs") {
            continue;
        }
        for (i, line) in text.lines().enumerate() {
            for part in line.split("crate::").skip(1) {
                let module: String =
                    part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let stage = stage_of(&module);
                let allowed = module == folder || stage.is_none_or(|s| s < own);
                if !allowed {
                    problems.push(format!("{name}:{}: {folder} imports {module}", i + 1));
                }
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn the_product_does_not_depend_on_oracles() {
    for manifest in ["compiler/Cargo.toml", "compiler/cli/Cargo.toml", "runtime/Cargo.toml"] {
        let text = std::fs::read_to_string(root().join(manifest)).expect("a manifest");
        for banned in ["tch", "torch-sys", "reqwest", "curl", "openssl"] {
            let line = text.lines().find(|l| l.trim_start().starts_with(&format!("{banned}.")));
            assert!(line.is_none(), "{manifest}: {line:?}");
        }
    }
}
