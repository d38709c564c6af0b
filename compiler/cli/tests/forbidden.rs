//! The command works where a service forbids itself what it does not need: sockets, and memory
//! that becomes executable.
#![cfg(target_os = "linux")]

mod common;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Output};

use common::{Folder, shipped};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

/// Calls that lead to other machines. (A pair of sockets within the process wakes the thread that
/// waits for interrupts.)
const SOCKETS: [i64; 2] = [libc::SYS_socket, libc::SYS_connect];

/// A filter that ends a process that asks for a socket.
fn filter() -> BpfProgram {
    let rules: BTreeMap<i64, Vec<_>> = SOCKETS.into_iter().map(|call| (call, Vec::new())).collect();
    let arch = std::env::consts::ARCH.try_into().expect("an architecture with a filter");
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::KillProcess, arch);
    filter.and_then(BpfProgram::try_from).expect("a filter")
}

/// Runs a program under the filter, and without the right to make memory executable where the
/// system has that (Linux 6.3: `PR_SET_MDWE`, `PR_MDWE_REFUSE_EXEC_GAIN`).
fn forbidden(program: &str, args: &[&str]) -> Output {
    const SET_MDWE: (i32, u64) = (65, 1);
    let filter = filter();
    let mut command = Command::new(program);
    // SAFETY: only system calls between fork and exec; the filter was made before.
    unsafe {
        command.args(args).pre_exec(move || {
            libc::prctl(SET_MDWE.0, SET_MDWE.1, 0, 0, 0);
            seccompiler::apply_filter(&filter).map_err(io::Error::other)
        });
    }
    command.output().expect("the program starts")
}

#[test]
fn commands_work_without_sockets_and_new_executable_memory() {
    let folder = Folder::new();
    let model = shipped("digits.onnx");
    let library = folder.path("digits.so");
    let cases: [&[&str]; 8] = [
        &["check", &model],
        &["inspect", &model],
        &["compile", &model, "--dim", "batch=1", "-o", &library],
        &["run", &model, "--dim", "batch=1", "-i", "random"],
        &["run", &library, "-i", "random"],
        &["verify", &model, "--dim", "batch=1", "--kernels"],
        &["bench", &model, "--dim", "batch=1", "--time", "100ms", "--warmup", "10ms"],
        &["doctor"],
    ];
    for args in cases {
        let output = forbidden(env!("CARGO_BIN_EXE_kiln"), args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {}: {said}", output.status);
    }
}

#[test]
fn a_socket_ends_the_process() {
    let output = forbidden("bash", &["-c", "exec 3<>/dev/tcp/127.0.0.1/9"]);
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{output:?}");
}
