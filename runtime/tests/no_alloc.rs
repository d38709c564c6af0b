//! `run_into` does not allocate. One test in a process of its own: the allocator counts all.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{N, executable};
use kiln_runtime::tensor::{DType, Tensor};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn run_into_does_not_allocate() {
    let a = Tensor::from_slice(&[10, N / 10], &[1.0f32; N]);
    let mut y = Tensor::zeros(DType::F32, &[10, N / 10]);
    for (threads, chunks) in [(1, 1), (2, 8)] {
        let executable = executable(threads, chunks);
        let mut session = executable.session();
        let mut outputs = [y.view_mut()];
        let inputs = [a.view(), a.view()];
        // The first run makes the scratch memory; workers may still be starting.
        executable.run_into(&inputs, &mut outputs).expect("a run");
        std::thread::sleep(std::time::Duration::from_millis(50));
        let before = ALLOCATIONS.load(Ordering::SeqCst);
        for _ in 0..1000 {
            executable.run_into(&inputs, &mut outputs).expect("a run");
            session.run_into(&inputs, &mut outputs).expect("a run");
        }
        let after = ALLOCATIONS.load(Ordering::SeqCst);
        assert_eq!(after - before, 0, "allocations in 2000 runs on {threads} threads");
    }
    assert_eq!(y.as_slice::<f32>().expect("f32"), [2.5; N]);
}
