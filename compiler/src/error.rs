//! What goes wrong, said to a person: which node, what was found, what was expected, what helps.
//!
//! ```
//! use kiln::error::Diagnostic;
//! let d = Diagnostic::new("K0201", "weight does not fit the input").node("/conv1").op("Conv", 13)
//!     .expected("32 input channels").found("64");
//! assert!(d.to_string().contains("/conv1"));
//! ```

use std::fmt;

/// One problem in a model, a file or a request; its [`Details`] are public through `Deref`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diagnostic(Box<Details>);

/// What a [`Diagnostic`] says. Boxed there, so that results on the good path stay small.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Details {
    /// Stable code, such as `K0201`.
    pub code: String,
    /// What is wrong, in one line.
    pub message: String,
    /// Name of the model's node.
    pub node: Option<String>,
    /// Operator type of the node.
    pub op: Option<String>,
    /// Opset in force.
    pub opset: Option<i64>,
    /// Tensor, file or flag at fault.
    pub tensor: Option<String>,
    /// What would have been right.
    pub expected: Option<String>,
    /// What was there.
    pub found: Option<String>,
    /// What to do about it.
    pub help: Option<String>,
}

impl std::ops::Deref for Diagnostic {
    type Target = Details;

    fn deref(&self) -> &Details {
        &self.0
    }
}

impl Diagnostic {
    /// A diagnostic with a code and a message.
    pub fn new(code: &str, message: impl Into<String>) -> Diagnostic {
        Diagnostic(Box::new(Details {
            code: code.to_string(),
            message: message.into(),
            ..Details::default()
        }))
    }

    /// Names the node.
    pub fn node(mut self, name: impl Into<String>) -> Self {
        self.0.node = Some(name.into());
        self
    }

    /// Names the operator and its opset.
    pub fn op(mut self, op: impl Into<String>, opset: i64) -> Self {
        self.0.op = Some(op.into());
        self.0.opset = Some(opset);
        self
    }

    /// Names the tensor, file or flag.
    pub fn tensor(mut self, name: impl Into<String>) -> Self {
        self.0.tensor = Some(name.into());
        self
    }

    /// Says what would have been right.
    pub fn expected(mut self, text: impl Into<String>) -> Self {
        self.0.expected = Some(text.into());
        self
    }

    /// Says what was there.
    pub fn found(mut self, text: impl Into<String>) -> Self {
        self.0.found = Some(text.into());
        self
    }

    /// Says what to do about it.
    pub fn help(mut self, text: impl Into<String>) -> Self {
        self.0.help = Some(text.into());
        self
    }
}

/// Names come from untrusted models: control characters could drive a terminal, so they go.
pub fn sanitize(name: &str) -> String {
    let clean: String = name.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    match clean.char_indices().nth(200) {
        Some((cut, _)) => format!("{}...", &clean[..cut]),
        None => clean,
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error[{}]: {}", self.code, sanitize(&self.message))?;
        if self.node.is_some() || self.op.is_some() {
            f.write_str("\n  at        ")?;
            if let Some(node) = &self.node {
                write!(f, "{}", sanitize(node))?;
            }
            match (&self.op, self.opset) {
                (Some(op), Some(opset)) => write!(f, " ({}, opset {opset})", sanitize(op))?,
                (Some(op), None) => write!(f, " ({})", sanitize(op))?,
                (None, _) => {}
            }
        }
        let lines = [
            ("tensor", &self.tensor),
            ("expected", &self.expected),
            ("found", &self.found),
            ("help", &self.help),
        ];
        for (label, text) in lines {
            if let Some(text) = text {
                write!(f, "\n  {label:<9} {}", sanitize(text))?;
            }
        }
        Ok(())
    }
}

/// What kind of failure an [`Error`] is; decides the exit code of the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request itself is wrong, such as an input that the model does not have.
    Usage,
    /// The model is invalid, or asks for what is not supported.
    Model,
    /// Results differ from the reference.
    Mismatch,
    /// The machine cannot run what was asked for.
    Incompatible,
    /// A limit was hit.
    Limit,
    /// A file could not be read or written.
    Io,
}

/// A failure with everything that is known about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// What kind of failure.
    pub kind: ErrorKind,
    /// All problems found, in the order of the model.
    pub diagnostics: Vec<Diagnostic>,
}

impl Error {
    /// An error with one diagnostic.
    pub fn new(kind: ErrorKind, diagnostic: Diagnostic) -> Error {
        Error { kind, diagnostics: vec![diagnostic] }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, diagnostic) in self.diagnostics.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{diagnostic}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// Result with Kiln's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
