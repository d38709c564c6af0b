//! Why a run did not begin.

use std::fmt;

use crate::plan::{PlanDim, Port};
use crate::tensor::DType;

/// Why a run did not begin. A run that begins succeeds.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A name that is no input.
    #[error("the model has no input `{found}`; its inputs are {expected}")]
    UnknownInput {
        /// The name given.
        found: String,
        /// Names of all inputs.
        expected: Names,
    },
    /// An input without a tensor.
    #[error("no tensor given for input {expected}")]
    MissingInput {
        /// The input.
        expected: Port,
    },
    /// An input with two tensors.
    #[error("two tensors given for input `{0}`")]
    DuplicateInput(String),
    /// Too few or too many tensors.
    #[error("{found} {what} given, the model has {expected}")]
    Count {
        /// `inputs` or `outputs`.
        what: &'static str,
        /// Number of tensors given.
        found: usize,
        /// Number of ports of the model.
        expected: usize,
    },
    /// A tensor of another type.
    #[error("`{}` is {found}, expected {expected}", expected.name)]
    DType {
        /// The type given.
        found: DType,
        /// The input or output.
        expected: Port,
    },
    /// A tensor of another shape.
    #[error("`{}` has shape {found:?}, expected {expected}", expected.name)]
    Shape {
        /// The shape given.
        found: Vec<usize>,
        /// The input or output.
        expected: Port,
    },
    /// An extent that the model was not compiled for.
    #[error("axis {axis} of `{port}` makes dim `{}` {found}, expected {} to {}", dim.name,
        dim.least, dim.most)]
    Range {
        /// The axis.
        axis: usize,
        /// The length of the dim that it gives.
        found: i64,
        /// The dim.
        dim: PlanDim,
        /// The name of the input.
        port: String,
    },
    /// Inputs that do not agree.
    #[error("axis {axis} of `{port}` makes dim `{dim}` {found}, an earlier input made it {before}")]
    Differ {
        /// The axis.
        axis: usize,
        /// The length of the dim that it gives.
        found: i64,
        /// What an earlier input gave.
        before: i64,
        /// The dim.
        dim: String,
        /// The name of the input.
        port: String,
    },
    /// A state that the model cannot have, or one without a value.
    #[error("state `{input}` from output `{output}`: {why}")]
    State {
        /// The input.
        input: String,
        /// The output.
        output: String,
        /// What is wrong.
        why: String,
    },
    /// States that never were that long, or are not kept in place.
    #[error(
        "no state can go back to where dim `{dim}` was {length}: none that is kept in place \
        has it, or one is shorter"
    )]
    Rewind {
        /// The dim.
        dim: String,
        /// The length to go back to.
        length: usize,
    },
    /// A tensor with another number of bytes than its shape says.
    #[error("`{}` has {found} bytes, expected {expected_bytes} for {expected}", expected.name)]
    Bytes {
        /// Number of bytes given.
        found: usize,
        /// Number of bytes of the type and shape.
        expected_bytes: usize,
        /// The input or output.
        expected: Port,
    },
}

/// A list of names, printed with commas.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Names(pub Vec<String>);

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, name) in self.0.iter().enumerate() {
            write!(f, "{}`{name}`", if index == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}
