//! Why a command failed, and with which exit code.

use std::fmt;
use std::io;
use std::process::ExitCode;

use kiln::error::{Diagnostic, Error, ErrorKind, sanitize};
use serde_json::{Value, json};

/// Exit codes of the command; 2 is also what clap uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// Any other failure.
    Other = 1,
    /// The request is wrong.
    Usage = 2,
    /// The model is invalid or not supported.
    Model = 3,
    /// Results differ.
    Mismatch = 4,
    /// The machine cannot run it.
    Incompatible = 5,
    /// A limit was hit.
    Limit = 6,
    /// A file could not be read or written.
    Io = 7,
}

/// Name in JSON of an exit code.
fn name(exit: Exit) -> &'static str {
    match exit {
        Exit::Other => "other",
        Exit::Usage => "usage",
        Exit::Model => "model",
        Exit::Mismatch => "mismatch",
        Exit::Incompatible => "incompatible",
        Exit::Limit => "limit",
        Exit::Io => "io",
    }
}

/// A failure of a command.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// What is wrong.
    pub what: What,
}

/// What is wrong.
#[derive(Debug)]
pub enum What {
    /// One line, and what to do about it.
    Text(String, Option<String>),
    /// Problems that the compiler found.
    Diagnostics(Vec<Diagnostic>),
    /// Something that was said already.
    Said,
}

impl Failure {
    /// A failure in one line.
    pub fn new(exit: Exit, text: impl Into<String>) -> Failure {
        Failure { exit, what: What::Text(text.into(), None) }
    }

    /// A wrong request.
    pub fn usage(text: impl Into<String>) -> Failure {
        Failure::new(Exit::Usage, text)
    }

    /// A file that could not be read or written. Damaged content counts as well.
    pub fn io(path: impl fmt::Display, error: io::Error) -> Failure {
        Failure::new(Exit::Io, format!("{path}: {error}"))
    }

    /// Adds what to do about it.
    pub fn help(mut self, help: impl Into<String>) -> Failure {
        if let What::Text(_, old) = &mut self.what {
            *old = Some(help.into());
        }
        self
    }

    /// A failure that was reported as a result.
    pub fn said(exit: Exit) -> Failure {
        Failure { exit, what: What::Said }
    }

    /// As a JSON object without its schema.
    pub fn json(&self) -> Value {
        let diagnostics = match &self.what {
            What::Text(text, help) => vec![json!({ "message": text, "help": help })],
            What::Diagnostics(list) => list.iter().map(diagnostic_json).collect(),
            What::Said => vec![],
        };
        let error = json!({ "kind": name(self.exit), "exit": self.exit as u8 });
        json!({ "ok": false, "error": error, "diagnostics": diagnostics })
    }
}

/// A diagnostic as JSON; absent parts are null.
fn diagnostic_json(d: &Diagnostic) -> Value {
    json!({
        "code": d.code, "message": d.message, "node": d.node, "op": d.op, "opset": d.opset,
        "tensor": d.tensor, "expected": d.expected, "found": d.found, "help": d.help,
    })
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let exit = match error.kind {
            ErrorKind::Usage => Exit::Usage,
            ErrorKind::Model => Exit::Model,
            ErrorKind::Mismatch => Exit::Mismatch,
            ErrorKind::Incompatible => Exit::Incompatible,
            ErrorKind::Limit => Exit::Limit,
            ErrorKind::Io => Exit::Io,
        };
        Failure { exit, what: What::Diagnostics(error.diagnostics) }
    }
}

impl From<Failure> for ExitCode {
    fn from(failure: Failure) -> ExitCode {
        ExitCode::from(failure.exit as u8)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.what {
            What::Text(text, help) => {
                write!(f, "error: {}", sanitize(text))?;
                help.iter().try_for_each(|help| write!(f, "\n  help      {}", sanitize(help)))
            }
            What::Diagnostics(list) => {
                for (index, diagnostic) in list.iter().enumerate() {
                    write!(f, "{}{diagnostic}", if index == 0 { "" } else { "\n" })?;
                }
                if list.len() > 1 {
                    write!(f, "\n{} problems", list.len())?;
                }
                Ok(())
            }
            What::Said => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_error_has_the_code_that_is_promised() {
        let kinds = [
            (ErrorKind::Usage, 2),
            (ErrorKind::Model, 3),
            (ErrorKind::Mismatch, 4),
            (ErrorKind::Incompatible, 5),
            (ErrorKind::Limit, 6),
            (ErrorKind::Io, 7),
        ];
        for (kind, code) in kinds {
            let failure = Failure::from(Error::new(kind, Diagnostic::new("K0000", "test")));
            assert_eq!(failure.exit as u8, code, "{kind:?}");
        }
    }
}
