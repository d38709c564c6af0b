//! Benchmarks of Kiln: `cargo bench -p kiln-benches` times the stages of the compiler and what it
//! makes; `benches/compare` sets whole models beside other engines.
