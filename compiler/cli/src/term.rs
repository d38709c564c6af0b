//! The three streams of a command: results, messages and progress.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::args::{Output, ProgressForm, When};
use crate::failure::Failure;

/// Version of everything that is printed as JSON.
pub const SCHEMA: &str = "kiln/1";

/// How to say things, decided once from the flags and the environment.
#[derive(Clone, Debug)]
pub struct Term {
    /// Results are JSON.
    pub json: bool,
    quiet: bool,
    verbose: bool,
    color: bool,
    progress: ProgressForm,
}

impl Term {
    /// From the flags, the environment and what standard error is.
    pub fn new(output: &Output) -> Term {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let terminal = io::stderr().is_terminal();
        let color = match output.color {
            When::Always => true,
            When::Never => false,
            When::Auto => !set("NO_COLOR") && (terminal || set("CLICOLOR_FORCE")),
        };
        // Bars are for people who watch: not for files, pipes and those who asked for quiet.
        let progress = match output.progress {
            ProgressForm::Auto if output.quiet || !terminal => ProgressForm::Never,
            form => form,
        };
        let Output { json, quiet, verbose, .. } = *output;
        Term { json, quiet, verbose, color, progress }
    }

    /// Prints a result on standard output. A reader that has gone away is no failure.
    pub fn result(&self, text: &str) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        match written {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(Failure::io("standard output", error))
            }
            _ => Ok(()),
        }
    }

    /// Prints a result: an object with the schema first, or the text.
    pub fn report(&self, value: Value, text: &str) -> Result<(), Failure> {
        if self.json {
            self.result(&format!("{}\n", with_schema(value)))
        } else {
            self.result(text)
        }
    }

    /// A message for people on standard error.
    pub fn note(&self, text: impl fmt::Display) {
        if !self.quiet {
            // Nothing can be done about a closed standard error.
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    /// A message for people who asked for more.
    pub fn detail(&self, text: impl fmt::Display) {
        if self.verbose {
            self.note(text);
        }
    }

    /// An error, on standard error; with `--json` as an object on standard output.
    pub fn failure(&self, failure: &Failure) {
        if self.json {
            let _ = self.result(&format!("{}\n", with_schema(failure.json())));
            return;
        }
        let text = failure.to_string();
        let text = match text.strip_prefix("error") {
            Some(rest) if self.color => format!("\x1b[1;31merror\x1b[0m{rest}"),
            _ => text,
        };
        let _ = writeln!(io::stderr(), "{text}");
    }

    /// Text in green where there is colour on standard error.
    pub fn green(&self, text: &str) -> String {
        if self.color { format!("\x1b[32m{text}\x1b[0m") } else { text.to_string() }
    }

    /// Does some work and shows that it goes on, after a second. `length` is how long it will
    /// take, where that is known.
    pub fn during<T>(&self, phase: &str, length: Option<Duration>, work: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        self.event(phase, "begin", None);
        let shown = (self.progress == ProgressForm::Auto).then(|| Shown::new(phase, length));
        let result = work();
        drop(shown);
        self.event(phase, "end", Some(begin.elapsed()));
        self.detail(format_args!("{phase}: {}", milliseconds(begin.elapsed())));
        result
    }

    fn event(&self, phase: &str, event: &str, elapsed: Option<Duration>) {
        if self.progress == ProgressForm::Json {
            let mut value = json!({ "event": event, "phase": phase });
            if let Some(elapsed) = elapsed {
                value["ms"] = json!(elapsed.as_secs_f64() * 1e3);
            }
            let _ = writeln!(io::stderr(), "{}", with_schema(value));
        }
    }
}

/// Puts the schema in front of an object.
pub fn with_schema(value: Value) -> Value {
    let mut result = json!({ "schema": SCHEMA });
    if let (Some(result), Value::Object(fields)) = (result.as_object_mut(), value) {
        result.extend(fields);
    }
    result
}

/// A time in a unit that fits.
pub fn milliseconds(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1e3;
    match ms {
        _ if ms < 1.0 => format!("{:.1} us", ms * 1e3),
        _ if ms < 10_000.0 => format!("{ms:.2} ms"),
        _ => format!("{:.2} s", ms / 1e3),
    }
}

/// A number of bytes in a unit that fits.
pub fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (count as f64, 0);
    while value >= 1024.0 && unit + 1 < units.len() {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// A bar or spinner that appears after a second and goes away on drop.
struct Shown {
    done: Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Shown {
    fn new(phase: &str, length: Option<Duration>) -> Shown {
        let (done, waiting) = channel();
        let phase = phase.to_string();
        let thread = std::thread::spawn(move || show(&phase, length, &waiting));
        Shown { done, thread: Some(thread) }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        let _ = self.done.send(());
        self.thread.take().map(JoinHandle::join);
    }
}

fn show(phase: &str, length: Option<Duration>, done: &Receiver<()>) {
    let begin = Instant::now();
    if done.recv_timeout(Duration::from_secs(1)) != Err(RecvTimeoutError::Timeout) {
        return;
    }
    let bar = match length {
        Some(length) => ProgressBar::new(length.as_millis() as u64),
        None => ProgressBar::new_spinner(),
    };
    let template = match length {
        Some(_) => "{msg} [{bar:30}] {percent}%",
        None => "{spinner} {msg} {elapsed}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(phase.to_string());
    while done.recv_timeout(Duration::from_millis(100)) == Err(RecvTimeoutError::Timeout) {
        match length {
            Some(_) => bar.set_position(begin.elapsed().as_millis() as u64),
            None => bar.tick(),
        }
    }
    bar.finish_and_clear();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_fit() {
        assert_eq!(milliseconds(Duration::from_nanos(1500)), "1.5 us");
        assert_eq!(milliseconds(Duration::from_micros(1500)), "1.50 ms");
        assert_eq!(milliseconds(Duration::from_secs(12)), "12.00 s");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(3 << 20), "3.0 MiB");
        assert_eq!(with_schema(json!({ "ok": true })), json!({ "schema": "kiln/1", "ok": true }));
    }
}
