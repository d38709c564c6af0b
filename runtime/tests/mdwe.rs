//! Code loads in a process that may not make memory executable.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use std::ffi::{c_int, c_ulong};
use std::process::Command;

use common::{N, executable};
use kiln_runtime::tensor::Tensor;

unsafe extern "C" {
    fn prctl(option: c_int, a: c_ulong, b: c_ulong, c: c_ulong, d: c_ulong) -> c_int;
}

/// Not in any header that Rust sees: `PR_SET_MDWE` and `PR_MDWE_REFUSE_EXEC_GAIN`.
const SET_MDWE: (c_int, c_ulong) = (65, 1);
const CHILD: &str = "KILN_TEST_MDWE_CHILD";

#[test]
fn code_loads_where_memory_may_not_become_executable() {
    if std::env::var_os(CHILD).is_some() {
        return child();
    }
    // The right cannot be taken back, so a process of its own gives it up.
    let output = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "code_loads_where_memory_may_not_become_executable", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .expect("this program starts again");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn child() {
    // SAFETY: the call takes numbers only.
    let status = unsafe { prctl(SET_MDWE.0, SET_MDWE.1, 0, 0, 0) };
    if status != 0 {
        eprintln!("skipped: this kernel is older than 6.3");
        return;
    }
    let x = Tensor::from_slice(&[10, N / 10], &[1.0f32; N]);
    let outputs = executable(2, 8).run(&[("a", x.view()), ("b", x.view())]).expect("a run");
    assert_eq!(outputs[0].1.as_slice::<f32>().expect("f32"), [2.5; N]);
}
