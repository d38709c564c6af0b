//! `kiln completions` and `kiln man`.

use clap::CommandFactory;

use crate::args::Cli;
use crate::failure::Failure;
use crate::term::Term;

/// Prints a completion script.
pub fn completions(shell: clap_complete::Shell, term: &Term) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "kiln", &mut script);
    term.result(&String::from_utf8_lossy(&script))
}

/// Prints a manual page in the language of `man`.
pub fn man(command: Option<&str>, term: &Term) -> Result<(), Failure> {
    let mut root = Cli::command();
    root.build();
    let command = match command {
        None => root,
        Some(name) => {
            let found = root.find_subcommand(name).cloned();
            found.ok_or_else(|| Failure::usage(format!("there is no command `{name}`")))?
        }
    };
    let mut page = Vec::new();
    let rendered = clap_mangen::Man::new(command).render(&mut page);
    rendered.map_err(|error| Failure::io("manual page", error))?;
    term.result(&String::from_utf8_lossy(&page))
}
