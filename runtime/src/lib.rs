//! What a compiled Kiln model needs to run: tensors, plans, threads and memory.

pub mod tensor;
