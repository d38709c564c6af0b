//! Features of x86-64 CPUs, each with everything that Kiln has to know of it, and the levels that
//! the psABI gives names to.

/// A register that `cpuid` answers in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Register {
    /// eax
    Eax,
    /// ebx
    Ebx,
    /// ecx
    Ecx,
    /// edx
    Edx,
}

/// Where `cpuid` says that a CPU has something.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Bit {
    /// eax of the question.
    pub leaf: u32,
    /// ecx of the question.
    pub subleaf: u32,
    /// Where the answer is.
    pub register: Register,
    /// Its bit there.
    pub bit: u8,
}

/// What a CPU may have.
#[derive(Clone, Copy, Debug)]
pub struct Feature {
    /// Its name for people, that of rustc and gcc.
    pub name: &'static str,
    /// Where the CPU says that it has it.
    pub bit: Bit,
    /// State that the system has to save, as bits of XCR0; none where registers are of 128 bits.
    pub state: u32,
    /// Cranelift's flag, where it makes use of it.
    pub clif: Option<&'static str>,
    /// The features that it builds on, or that every CPU has which has it.
    pub needs: &'static [&'static str],
}

impl Feature {
    /// Whether this machine has it and the system saves its state.
    pub fn here(&self) -> bool {
        kiln_runtime::cpu::has(self.name)
    }
}

impl PartialEq for Feature {
    fn eq(&self, other: &Feature) -> bool {
        self.name == other.name
    }
}

impl Eq for Feature {}

/// xmm and ymm registers in XCR0.
const YMM: u32 = 0x6;
/// The same, masks, and zmm registers.
const ZMM: u32 = 0xe6;

/// Tells the system's part of a feature of wide registers: `xgetbv` may be asked.
pub const OSXSAVE: Bit = Bit { leaf: 1, subleaf: 0, register: Register::Ecx, bit: 27 };

macro_rules! features {
    ($($name:tt $leaf:literal $subleaf:literal $register:ident $bit:literal $state:expr, $clif:expr,
        [$($needs:literal),*];)*) => {
        /// Every feature, those first that others build on.
        pub const FEATURES: &[Feature] = &[$(Feature {
            name: $name,
            bit: Bit { leaf: $leaf, subleaf: $subleaf, register: Register::$register, bit: $bit },
            state: $state,
            clif: $clif,
            needs: &[$($needs),*],
        }),*];
    };
}

features! {
    "sse3" 1 0 Ecx 0 0, Some("has_sse3"), [];
    "ssse3" 1 0 Ecx 9 0, Some("has_ssse3"), ["sse3"];
    "cmpxchg16b" 1 0 Ecx 13 0, None, [];
    "sse4.1" 1 0 Ecx 19 0, Some("has_sse41"), ["ssse3"];
    "sse4.2" 1 0 Ecx 20 0, Some("has_sse42"), ["sse4.1"];
    "movbe" 1 0 Ecx 22 0, None, [];
    "popcnt" 1 0 Ecx 23 0, Some("has_popcnt"), [];
    "avx" 1 0 Ecx 28 YMM, Some("has_avx"), ["sse4.2"];
    "fma" 1 0 Ecx 12 YMM, Some("has_fma"), ["avx"];
    "f16c" 1 0 Ecx 29 YMM, None, ["avx"];
    "lzcnt" 0x8000_0001 0 Ecx 5 0, Some("has_lzcnt"), [];
    "bmi1" 7 0 Ebx 3 0, Some("has_bmi1"), [];
    "avx2" 7 0 Ebx 5 YMM, Some("has_avx2"), ["avx", "f16c"];
    "bmi2" 7 0 Ebx 8 0, Some("has_bmi2"), [];
    "avx512f" 7 0 Ebx 16 ZMM, None, ["avx2", "fma"];
    "avx512dq" 7 0 Ebx 17 ZMM, None, ["avx512f"];
    "avx512cd" 7 0 Ebx 28 ZMM, None, ["avx512f"];
    "avx512bw" 7 0 Ebx 30 ZMM, None, ["avx512f"];
    "avx512vl" 7 0 Ebx 31 ZMM, None, ["avx512f"];
    "avx512vnni" 7 0 Ecx 11 ZMM, None, ["avx512f"];
    "avx512bf16" 7 1 Eax 5 ZMM, None, ["avx512bw"];
    "avxvnni" 7 1 Eax 4 YMM, None, ["avx2"];
}

/// What vectors of 256 bits need.
pub const AVX2: &[&str] = &["avx2", "fma", "f16c"];
/// What vectors of 512 bits need.
pub const AVX512: &[&str] = &["avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"];

/// What vectors of 256 bits need for dot products of words, and what those of 512 bits need.
pub const DOTS: [&str; 2] = ["avxvnni", "avx512vnni"];
/// What vectors of 512 bits need for dot products of bf16.
pub const HALVES: &str = "avx512bf16";

/// Names of the psABI for what CPUs of a time have: each level adds to the one before it. LAHF is
/// left out, which no code here uses and which the standard library does not know.
pub const LEVELS: &[(&str, &[&str])] = &[
    ("x86-64-v2", &["cmpxchg16b", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3"]),
    ("x86-64-v3", &["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe"]),
    ("x86-64-v4", &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]),
];

/// The feature of a name.
pub fn feature(name: &str) -> Option<&'static Feature> {
    FEATURES.iter().find(|f| f.name == name)
}

/// These features and all that they build on, in the order of the table.
pub fn closure(names: &[&str]) -> Vec<&'static Feature> {
    let mut wanted = names.to_vec();
    for f in FEATURES.iter().rev() {
        if wanted.contains(&f.name) {
            wanted.extend(f.needs);
        }
    }
    FEATURES.iter().filter(|f| wanted.contains(&f.name)).collect()
}

/// The features of a level, those of the levels below it included.
pub fn level(name: &str) -> Option<Vec<&'static Feature>> {
    let at = LEVELS.iter().position(|l| l.0 == name)?;
    let names: Vec<&str> = LEVELS[..=at].iter().flat_map(|l| l.1).copied().collect();
    Some(closure(&names))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_build_on_earlier_ones() {
        for (i, f) in FEATURES.iter().enumerate() {
            for need in f.needs {
                assert!(FEATURES[..i].iter().any(|e| e.name == *need), "{} on {need}", f.name);
            }
            assert_eq!(FEATURES.iter().filter(|o| o.bit == f.bit).count(), 1, "{}", f.name);
        }
        let named = LEVELS.iter().flat_map(|l| l.1).chain(AVX2).chain(AVX512);
        for name in named {
            assert!(feature(name).is_some(), "{name}");
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_runtime_knows_every_feature() {
        let known = kiln_runtime::cpu::names();
        assert!(FEATURES.iter().all(|f| known.contains(&f.name)), "{known:?}");
    }

    #[test]
    fn levels_grow() {
        let sizes: Vec<usize> = LEVELS.iter().map(|l| level(l.0).unwrap().len()).collect();
        assert_eq!(sizes, [6, 14, 19]);
        assert!(level("x86-64-v5").is_none());
        let names: Vec<&str> = closure(&["fma"]).iter().map(|f| f.name).collect();
        assert_eq!(names, ["sse3", "ssse3", "sse4.1", "sse4.2", "avx", "fma"]);
    }
}
