//! What happens when a person ends a command early: no temporary file stays.

use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, Once, PoisonError};

/// Temporary files that may exist. Finished ones stay in the list under names that are gone.
static FILES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Makes a temporary file that goes away with the command, however that is ended.
pub fn guarded<T>(make: impl FnOnce() -> io::Result<(PathBuf, T)>) -> io::Result<T> {
    static WATCH: Once = Once::new();
    WATCH.call_once(watch);
    // Held while the file is made: an interrupt waits, and then finds it in the list.
    let mut files = FILES.lock().unwrap_or_else(PoisonError::into_inner);
    let (path, file) = make()?;
    files.push(path);
    Ok(file)
}

/// From now on an interrupt removes temporary files before it ends the process, with the exit
/// code that shells give to such an end. Without a thread for it, it ends the process as ever.
#[cfg(unix)]
fn watch() {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    use signal_hook::iterator::Signals;

    // Signals that are ignored, as under nohup, go on being so.
    let wanted: Vec<i32> = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|s| !ignored(*s)).collect();
    let (ready, begun) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new().name("signals".into());
    let started = thread.spawn(move || {
        let signals = Signals::new(wanted);
        let _ = ready.send(());
        let Some(signal) = signals.ok().and_then(|mut signals| signals.forever().next()) else {
            return;
        };
        let files = FILES.lock().unwrap_or_else(PoisonError::into_inner);
        files.iter().for_each(|path| drop(std::fs::remove_file(path)));
        std::process::exit(128 + signal);
    });
    if started.is_ok() {
        let _ = begun.recv();
    }
}

/// Whether whoever started this process wants it to ignore the signal.
#[cfg(target_os = "linux")]
fn ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}

#[cfg(all(unix, not(target_os = "linux")))]
fn ignored(_signal: i32) -> bool {
    false
}

#[cfg(not(unix))]
fn watch() {}
