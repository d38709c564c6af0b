//! Nothing runs between runs. One test in a process of its own: the clock counts all threads.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use std::time::Duration;

use common::{N, executable};
use kiln_runtime::tensor::Tensor;

/// Processor time of this process in ticks of 10 ms.
fn ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("times of this process");
    // Fields 14 and 15 of the line; the second, in brackets, is the name.
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split(' ').collect();
    fields[11..13].iter().map(|field| field.parse::<u64>().expect("a number")).sum()
}

#[test]
fn an_executable_at_rest_uses_no_processor() {
    let executable = executable(4, 16);
    let x = Tensor::from_slice(&[10, N / 10], &[1.0f32; N]);
    for _ in 0..100 {
        executable.run(&[("a", x.view()), ("b", x.view())]).expect("a run");
    }
    std::thread::sleep(Duration::from_millis(20));
    let before = ticks();
    std::thread::sleep(Duration::from_millis(500));
    // One thread that spins would show 50 ticks.
    assert!(ticks() - before <= 1, "threads are busy while nothing runs");
}
