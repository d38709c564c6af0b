//! What this processor can do, by the names that compiled files use.

/// Names of features in the order in which they are listed, and whether this processor has each
/// and the system saves its registers.
#[cfg(target_arch = "x86_64")]
fn table() -> Vec<(&'static str, bool)> {
    macro_rules! table {
        ($($name:tt),*) => { vec![$(($name, std::arch::is_x86_feature_detected!($name))),*] };
    }
    table!(
        "sse3",
        "ssse3",
        "cmpxchg16b",
        "sse4.1",
        "sse4.2",
        "movbe",
        "popcnt",
        "avx",
        "avx2",
        "fma",
        "bmi1",
        "bmi2",
        "lzcnt",
        "f16c",
        "avx512f",
        "avx512bw",
        "avx512dq",
        "avx512vl",
        "avx512cd",
        "avx512vnni",
        "avxvnni",
        "avx512bf16"
    )
}

/// Code for other processors uses what all of them have.
#[cfg(not(target_arch = "x86_64"))]
fn table() -> Vec<(&'static str, bool)> {
    Vec::new()
}

/// The names of all features.
pub fn names() -> Vec<&'static str> {
    table().into_iter().map(|(name, _)| name).collect()
}

/// Whether this processor has a feature; it has none without a name here.
pub fn has(name: &str) -> bool {
    table().contains(&(name, true))
}

/// The features that this processor has.
pub fn host() -> Vec<&'static str> {
    table().into_iter().filter(|(_, present)| *present).map(|(name, _)| name).collect()
}

/// Those of the features that this processor lacks; one that has no name here is lacking.
pub fn missing(required: &[String]) -> Vec<String> {
    required.iter().filter(|name| !has(name)).cloned().collect()
}

/// The triple of this machine.
pub fn triple() -> String {
    let rest = match std::env::consts::OS {
        "macos" => "apple-darwin".to_string(),
        "windows" => "pc-windows-msvc".to_string(),
        os => format!("unknown-{os}-gnu"),
    };
    format!("{}-{rest}", std::env::consts::ARCH)
}

/// Whether code for that triple can run on this machine, as far as its name tells.
pub fn runs(target: &str) -> bool {
    let mut parts = target.split('-');
    let arch = match parts.next().unwrap_or_default() {
        "riscv64gc" => "riscv64",
        "arm64" => "aarch64",
        arch => arch,
    };
    let os = match std::env::consts::OS {
        "macos" => "darwin",
        os => os,
    };
    arch == std::env::consts::ARCH && parts.any(|part| part.starts_with(os))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_runs_its_own_code_and_lacks_what_nobody_has() {
        assert!(runs(&triple()), "{}", triple());
        let other = if cfg!(target_arch = "x86_64") { "aarch64" } else { "x86_64" };
        assert!(!runs(&format!("{other}-unknown-linux-gnu")));
        assert!(!runs("") && !runs("x86_64"));
        let mut names: Vec<String> = host().into_iter().map(String::from).collect();
        assert_eq!(missing(&names), Vec::<String>::new());
        names.push("avx9000".into());
        assert_eq!(missing(&names), ["avx9000"]);
    }
}
