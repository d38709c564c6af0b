//! What is not allowed is found, and who does not wait gets wrong results.

use kiln_cuda::driver::{Driver, FaultKind, Grid, Resource};
use kiln_gpu::{Behaviour, Double};

/// A kernel that adds 1 to each byte of a buffer of 32.
const TEXT: &std::ffi::CStr = c"
.version 7.4
.target sm_80
.address_size 64

.visible .entry more(.param .u64 b0)
.maxntid 32, 1, 1
{
  .reg .b32 %r<3>;
  .reg .b64 %rd<4>;
  ld.param.u64 %rd0, [b0];
  mov.u32 %r0, %tid.x;
  cvt.s64.s32 %rd1, %r0;
  add.s64 %rd2, %rd0, %rd1;
  ld.global.u8 %r1, [%rd2+0];
  add.s32 %r2, %r1, 1;
  st.global.u8 [%rd2+0], %r2;
  ret;
}
";

const GRID: Grid = Grid { blocks: 1, threads: 32 };

fn double() -> std::sync::Arc<Double> {
    Double::new(Behaviour::default())
}

fn pinned(what: Resource) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(what.number() as usize)
}

/// Releases all of these, and says what was wrong.
fn end(double: &Double, all: &[Resource]) -> Vec<String> {
    all.iter().for_each(|what| double.release(*what));
    double.problems()
}

#[test]
fn what_is_allowed_is_done_in_the_order_of_events() {
    for early in [false, true] {
        let double = Double::new(Behaviour { early, ..Behaviour::default() });
        let module = double.load(TEXT).expect("text");
        let function = double.function(module, c"more").expect("a kernel");
        let (device, host) =
            (double.allocate(32).expect("memory"), double.pin(32).expect("pinned"));
        let [a, b] = [(); 2].map(|()| double.stream().expect("a stream"));
        let [given, made] = [(); 2].map(|()| double.event(false).expect("an event"));
        let at = device.number();
        // SAFETY: all of it is there, and waited for.
        unsafe {
            pinned(host).write_bytes(7, 32);
            double.upload(at, pinned(host), 32, a).expect("a copy");
            double.record(given, a).expect("an event");
            double.wait(given, b).expect("a stream");
            double.begin_capture(b).expect("a stream");
            double.launch(function, GRID, &[at], b).expect("a launch");
            let graph = double.end_capture(b).expect("a graph");
            double.replay(graph, b).expect("a graph");
            double.replay(graph, b).expect("a graph");
            double.record(made, b).expect("an event");
            double.wait(made, a).expect("a stream");
            double.download(pinned(host), at, 32, a).expect("a copy");
            double.synchronize(a).expect("a stream");
            assert_eq!(*pinned(host), 9, "the graph ran twice");
            let all = [graph, module, device, host, a, b, given, made];
            assert_eq!(end(&double, &all), [""; 0]);
        }
    }
}

#[test]
fn who_does_not_wait_reads_what_was_there_before() {
    let double = double();
    let module = double.load(TEXT).expect("text");
    let function = double.function(module, c"more").expect("a kernel");
    let (device, host) = (double.allocate(32).expect("memory"), double.pin(32).expect("pinned"));
    let [a, b] = [(); 2].map(|()| double.stream().expect("a stream"));
    let at = device.number();
    // SAFETY: this is the fault that is to be seen; the memory is there.
    unsafe {
        double.upload_now(at, &[1; 32]).expect("a copy");
        double.launch(function, GRID, &[at], a).expect("a launch");
        // The other stream does not wait for the kernel.
        double.download(pinned(host), at, 32, b).expect("a copy");
        assert_eq!(*pinned(host), 0xa5, "nothing is copied before somebody waits");
        double.synchronize(b).expect("a stream");
        assert_eq!(*pinned(host), 1, "the kernel has not run");
        // Memory that is written while its copy is under way.
        double.synchronize(a).expect("a stream");
        double.upload(at, pinned(host), 32, a).expect("a copy");
        pinned(host).write_bytes(3, 32);
        double.synchronize(a).expect("a stream");
        let mut bytes = [0; 32];
        double.download_now(&mut bytes, at).expect("a copy");
        assert_eq!(bytes, [3; 32]);
    }
    assert_eq!(end(&double, &[module, device, host, a, b]), [""; 0]);
}

/// What is wrong where this is done between a start and an end without fault.
fn problem(of: impl FnOnce(&Double, Resource, Resource, Resource)) -> String {
    let double = double();
    let (device, host) = (double.allocate(32).expect("memory"), double.pin(32).expect("pinned"));
    let stream = double.stream().expect("a stream");
    of(&double, device, host, stream);
    end(&double, &[device, host, stream]).join("; ")
}

#[test]
fn what_is_not_allowed_is_found() {
    // SAFETY of all: the driver without a device checks what it is given before it touches it.
    let mut other = [0; 32];
    let text = problem(|double, device, _, stream| unsafe {
        let at = device.number();
        assert!(double.upload(at, other.as_mut_ptr(), 32, stream).is_err());
    });
    assert!(text.contains("are not pinned"), "{text}");
    let text = problem(|double, device, host, stream| unsafe {
        assert!(double.upload(device.number() + 1, pinned(host), 32, stream).is_err());
    });
    assert!(text.contains("are not all given out"), "{text}");
    let text = problem(|double, device, host, stream| unsafe {
        double.release(device);
        assert!(double.upload(device.number(), pinned(host), 32, stream).is_err());
    });
    assert!(text.contains("are not all given out") && text.contains("is not there"), "{text}");
    let text = problem(|double, device, host, stream| unsafe {
        double.upload(device.number(), pinned(host), 32, stream).expect("a copy");
    });
    let both = ["Memory", "Pinned"].map(|what| text.contains(&format!("{what}(")));
    assert!(both == [true; 2] && text.contains("is in use") && text.contains("has work"), "{text}");
    let text = problem(|double, device, host, stream| unsafe {
        double.download(pinned(host), device.number(), 32, stream).expect("a copy");
        assert_eq!(double.synchronize(stream).expect_err("poison").kind, FaultKind::Broken);
    });
    assert!(text.contains("is never written"), "{text}");
    let text = problem(|double, device, _, stream| unsafe {
        let module = double.load(TEXT).expect("text");
        let function = double.function(module, c"more").expect("a kernel");
        assert!(double.function(module, c"less").is_err());
        double.release(module);
        assert!(double.launch(function, GRID, &[device.number()], stream).is_err());
    });
    assert!(text.contains("Module(") && text.contains("is not there"), "{text}");
    let text = problem(|double, device, _, stream| unsafe {
        let module = double.load(TEXT).expect("text");
        let function = double.function(module, c"more").expect("a kernel");
        double.upload_now(device.number(), &[0; 32]).expect("a copy");
        double.launch(function, GRID, &[device.number() + 16], stream).expect("a launch");
        assert_eq!(double.synchronize(stream).expect_err("a fault").kind, FaultKind::Broken);
        double.release(module);
    });
    assert!(text.contains("out of bounds"), "{text}");
    let text = problem(|double, _, _, _| {
        double.event(false).expect("an event");
    });
    assert!(text.contains("Event(") && text.contains("is not taken back"), "{text}");
}

#[test]
fn a_call_fails_when_it_is_told_to() {
    let fails = Some((1, FaultKind::Memory));
    let double = Double::new(Behaviour { fails, ..Behaviour::default() });
    let first = double.allocate(32).expect("memory");
    assert_eq!(double.allocate(32).expect_err("the second call").kind, FaultKind::Memory);
    let third = double.allocate(32).expect("memory");
    assert_eq!(end(&double, &[first, third]), [""; 0]);
    assert_eq!(double.calls(), ["allocate"; 3]);
}
