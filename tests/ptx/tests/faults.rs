//! What the interpreter computes and what it reports, on small kernels written by hand.

use kiln_ptx::{Copies, Memory, launch, parse};

/// A kernel of one buffer, with these lines.
fn kernel(lines: &str) -> String {
    format!(
        ".version 7.4\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 b0)\n\
         .maxntid 64, 1, 1\n.minnctapersm 1\n{{\n\
         .reg .pred %p<4>;\n.reg .b16 %h<4>;\n.reg .u32 %r<8>;\n\
         .reg .u64 %d<4>;\n.reg .f32 %f<8>;\n.reg .f64 %g<4>;\n\
         .shared .align 16 .b8 shared_memory[256];\n\
         ld.param.u64 %d0, [b0];\ncvta.to.global.u64 %d1, %d0;\nmov.u32 %r0, %tid.x;\n\
         mad.wide.s32 %d2, %r0, 4, %d1;\nmov.u32 %r1, shared_memory;\n\
         mad.lo.s32 %r2, %r0, 4, %r1;\n{lines}\nret;\n}}\n"
    )
}

/// Runs that with two blocks of so many threads on 64 numbers; gives these or what went wrong.
fn run_blocks(lines: &str, blocks: usize, threads: usize) -> Result<Vec<f32>, String> {
    let module = parse(&kernel(lines))?;
    let bytes: Vec<u8> = (0..64u8).flat_map(|i| f32::from(i).to_le_bytes()).collect();
    let number = |c: &[u8]| f32::from_le_bytes(c.try_into().expect("four bytes"));
    let once = |copies| -> Result<Vec<f32>, String> {
        let mut memory = [Memory::given(&bytes)];
        let grid = (blocks, threads);
        launch(&module.kernels[0], grid, copies, &mut memory, &[0]).map_err(|f| f.to_string())?;
        Ok(memory[0].bytes()?.chunks(4).map(number).collect())
    };
    let (early, late) = (once(Copies::Early)?, once(Copies::Late)?);
    let bits = |all: &[f32]| all.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
    assert_eq!(bits(&early), bits(&late), "{lines}");
    Ok(early)
}

fn run(lines: &str) -> Result<Vec<f32>, String> {
    run_blocks(lines, 1, 64)
}

#[track_caller]
fn refused(lines: &str, why: &str) {
    let found = run(lines).expect_err(why);
    assert!(found.contains(why), "{found}");
}

#[test]
fn every_thread_has_its_element() {
    let twice =
        "ld.global.f32 %f0, [%d2+0];\nadd.rn.f32 %f1, %f0, %f0;\nst.global.f32 [%d2+0], %f1;";
    let got = run(twice).unwrap();
    assert!(got.iter().enumerate().all(|(i, v)| *v == 2.0 * i as f32), "{got:?}");
}

#[test]
fn a_warp_folds_by_shuffles() {
    let mut lines = "ld.global.f32 %f0, [%d2+0];\n".to_string();
    for mask in [16, 8, 4, 2, 1] {
        lines +=
            &format!("shfl.sync.bfly.b32 %f1, %f0, {mask}, 31, -1;\nadd.rn.f32 %f0, %f0, %f1;\n");
    }
    lines += "st.global.f32 [%d2+0], %f0;";
    let got = run(&lines).unwrap();
    assert_eq!([got[0], got[31], got[32], got[63]], [496.0, 496.0, 1520.0, 1520.0]);
    let some = "setp.lt.u32 %p0, %r0, 20;\n@%p0 shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1;";
    refused(some, "a lane does not come to the shuffle");
}

#[test]
fn shared_memory_is_handed_on_at_barriers() {
    let write = "ld.global.f32 %f0, [%d2+0];\nst.shared.f32 [%r2+0], %f0;\n";
    let read = "sub.u32 %r3, 63, %r0;\nmad.lo.s32 %r4, %r3, 4, %r1;\nld.shared.f32 %f1, [%r4+0];\n\
                st.global.f32 [%d2+0], %f1;";
    let got = run(&format!("{write}bar.sync 0;\n{read}")).unwrap();
    assert!(got.iter().enumerate().all(|(i, v)| *v == 63.0 - i as f32), "{got:?}");
    // Without a barrier it is a race, or nothing is there yet.
    let race = run(&format!("{write}{read}")).unwrap_err();
    assert!(race.contains("race") || race.contains("before it is written"), "{race}");
    refused(&format!("{write}st.shared.f32 [%r1+0], %f0;"), "a race");
    refused("ld.shared.f32 %f0, [%r2+0];", "read before it is written");
    refused("setp.lt.u32 %p0, %r0, 33;\n@%p0 bar.sync 0;", "does not come to the barrier");
}

#[test]
fn copies_are_there_once_they_are_waited_for() {
    let copy = "cp.async.ca.shared.global [%r2+0], [%d2+0], 4;\n";
    let wait = "cp.async.wait_all;\n";
    let read = "ld.shared.f32 %f1, [%r2+0];\nst.global.f32 [%d2+0], %f1;";
    assert_eq!(run(&format!("{copy}{wait}{read}")).unwrap()[5], 5.0);
    refused(&format!("{copy}{read}\n{wait}"), "before a copy to it is waited for");
    refused(&format!("{copy}bar.sync 0;\n{read}\n{wait}"), "before a copy to it is waited for");
    refused(&format!("{copy}st.shared.u32 [%r2+0], %r0;\n{wait}"), "before a copy to it");
    refused(copy, "before it has waited");
    // Other threads have to be told.
    let beside = "xor.b32 %r3, %r0, 1;\nmad.lo.s32 %r4, %r3, 4, %r1;\nld.shared.f32 %f1, [%r4+0];\n\
                  st.global.f32 [%d2+0], %f1;";
    assert!(run(&format!("{copy}{wait}{beside}")).is_err());
    assert_eq!(run(&format!("{copy}{wait}bar.sync 0;\n{beside}")).unwrap()[5], 4.0);
    // What others still read must not be copied over.
    refused(&format!("{copy}{wait}bar.sync 0;\n{beside}\n{copy}{wait}"), "a race");
    for line in [
        "cp.async.cg.shared.global [%r2+0], [%d2+0], 4;",
        "cp.async.ca.shared.global [%r2+0], [%d2+0], 2;",
        "cp.async.ca.shared.global [%d2+0], [%r2+0], 4;",
    ] {
        assert!(parse(&kernel(line)).is_err(), "{line}");
    }
    let wide = "cp.async.cg.shared.global [%r2+0], [%d2+0], 16;";
    refused(&format!("{wide}\n{wait}"), "not aligned");
}

#[test]
fn blocks_do_not_wait_for_each_other() {
    let own = "st.global.f32 [%d2+0], 0f00000000;";
    assert!(parse(&kernel(own)).is_err(), "a number is no register");
    let write = "mov.f32 %f0, 0f3F800000;\nst.global.f32 [%d2+0], %f0;";
    assert!(run(write).is_ok());
    assert!(run_blocks(write, 2, 64).unwrap_err().contains("a race"));
    let read = "ld.global.f32 %f0, [%d1+0];\nsetp.eq.u32 %p0, %r0, 0;\n\
                mov.u32 %r3, %ctaid.x;\nsetp.eq.u32 %p1, %r3, 1;\nand.pred %p2, %p0, %p1;\n\
                @%p2 st.global.f32 [%d1+0], %f0;";
    assert!(run_blocks(read, 2, 32).unwrap_err().contains("a race"));
}

#[test]
fn places_and_registers_are_checked() {
    refused("ld.global.f32 %f0, [%d2+4];", "out of bounds");
    refused("ld.global.f32 %f0, [%d2+-4];", "out of bounds");
    refused("ld.global.f32 %f0, [%d2+2];", "not aligned");
    refused("ld.global.v2.f32 {%f0, %f1}, [%d2+0];", "not aligned");
    refused("ld.global.f32 %f0, [%d3+0];", "a register is read before it is written");
    refused("add.rn.f32 %f1, %f0, %f0;", "a register is read before it is written");
    refused("ld.shared.f32 %f0, [%r1+256];", "out of bounds");
    refused("div.s32 %r3, %r0, 0;", "divided by zero");
}

#[test]
fn what_is_not_known_is_refused() {
    for line in [
        "add.f32 %f0, %f1, %f2;",
        "add.rn.f32 %f0, %f1;",
        "add.rn.f32 %f0, %f1, %r0;",
        "add.u32 %f0, %r0, %r1;",
        "ex2.approx.f32 %f0, %f1;",
        "ld.global.f32 %f9, [%d2+0];",
        "ld.global.f32 %f0, [%r0+0];",
        "ld.local.f32 %f0, [%d2+0];",
        "bra L9;",
        "cvt.f32.s32 %f0, %r0;",
        "setp.lt.f32 %r0, %f0, %f1;",
        "mov.u32 %r0, %r1",
    ] {
        assert!(parse(&kernel(line)).is_err(), "{line}");
    }
}

#[test]
fn numbers_are_those_of_the_machine() {
    let cases = [
        // What is kept of a subnormal number, a product and sum rounded once, NaN that spreads.
        ("mov.f32 %f0, 0f00000003;\nadd.rn.f32 %f1, %f0, %f0;", f32::from_bits(6)),
        ("mov.f32 %f0, 0f3F800001;\nfma.rn.f32 %f1, %f0, %f0, 0fBF800002;", 2f32.powi(-46)),
        ("mov.f32 %f0, 0f7FC00000;\nmax.NaN.f32 %f1, %f0, 0f3F800000;", f32::NAN),
        ("mov.f32 %f0, 0f40200000;\ncvt.rni.f32.f32 %f1, %f0;", 2.0),
        // Saturated, and NaN as 0; what goes beyond an i32 as floats of other types.
        (
            "mov.f32 %f0, 0f60000000;\ncvt.rzi.s32.f32 %r3, %f0;\ncvt.rn.f32.s32 %f1, %r3;",
            2f32.powi(31),
        ),
        ("mov.f32 %f0, 0f7FC00000;\ncvt.rzi.s32.f32 %r3, %f0;\ncvt.rn.f32.s32 %f1, %r3;", 0.0),
        ("mov.f32 %f0, 0fC0600000;\ncvt.rzi.s32.f32 %r3, %f0;\ncvt.rn.f32.s32 %f1, %r3;", -3.0),
        ("mov.u32 %r3, -1;\ncvt.rn.f32.u32 %f1, %r3;", 2f32.powi(32)),
        ("mov.u32 %r3, -8;\nshr.s32 %r4, %r3, 1;\ncvt.rn.f32.s32 %f1, %r4;", -4.0),
        ("mov.u32 %r3, 1;\nshl.b32 %r4, %r3, 32;\ncvt.rn.f32.u32 %f1, %r4;", 0.0),
        ("mov.f32 %f0, 0f45002800;\ncvt.rn.f16.f32 %h0, %f0;\ncvt.f32.f16 %f1, %h0;", 2050.0),
        ("mov.f64 %g0, 0d3FF0000000000001;\ncvt.rn.f32.f64 %f1, %g0;", 1.0),
    ];
    for (lines, want) in cases {
        let got = run(&format!("{lines}\nst.global.f32 [%d2+0], %f1;")).unwrap()[0];
        assert!(got == want || got.is_nan() && want.is_nan(), "{lines}: {got:e}, not {want:e}");
    }
}
