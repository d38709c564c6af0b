//! The `kiln` command.

mod args;
mod commands;
mod device;
mod failure;
mod files;
mod input;
mod interrupt;
mod peak;
mod stats;
mod term;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use failure::{Failure, What};
use term::Term;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let term = Term::new(&cli.output);
    match dispatch(&cli.command, &term) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !matches!(failure.what, What::Said) {
                term.failure(&failure);
            }
            failure.into()
        }
    }
}

fn dispatch(command: &Command, term: &Term) -> Result<(), Failure> {
    match command {
        Command::Check(args) => commands::check::run(args, term),
        Command::Compile(args) => commands::compile::run(args, term),
        Command::Run(args) => commands::run::run(args, term),
        Command::Bench(args) => commands::bench::run(args, term),
        Command::Profile(args) => commands::profile::run(args, term),
        Command::Inspect(args) => commands::inspect::run(args, term),
        Command::Verify(args) => commands::verify::run(args, term),
        Command::Explain(args) => commands::explain::run(args, term),
        Command::Ops(args) => commands::ops::run(args, term),
        Command::Doctor(args) => commands::doctor::run(args, term),
        Command::Completions { shell } => commands::shell::completions(*shell, term),
        Command::Man { command } => commands::shell::man(command.as_deref(), term),
    }
}
