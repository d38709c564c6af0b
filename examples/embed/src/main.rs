//! Says what digit a drawing shows, by a network that was compiled into this program.

use std::ffi::{c_int, c_void};

// See digits.h, which `kiln compile` writes beside digits.o.
unsafe extern "C" {
    fn digits_run(
        inputs: *const *const c_void,
        outputs: *const *mut c_void,
        scratch: *mut c_void,
        scratch_size: usize,
    ) -> c_int;
    fn digits_scratch_size() -> usize;
}

const DRAWING: [&str; 8] = [
    "  .#+   ",
    "  +#.   ",
    "  #+    ",
    "  #.    ",
    " .##++. ",
    " .#++++ ",
    "  #+.#+ ",
    "  .##+. ",
];

/// The network's answer for 8 rows of 8 pixels, from 0 (paper) to 1 (ink).
fn classify(pixels: &[f32; 64]) -> Result<usize, c_int> {
    let mut probabilities = [0f32; 10];
    // SAFETY: takes nothing, returns a number.
    let mut scratch = vec![0u8; unsafe { digits_scratch_size() }];
    let inputs = [pixels.as_ptr().cast()];
    let outputs = [probabilities.as_mut_ptr().cast()];
    // SAFETY: one input of 64 and one output of 10 floats, and scratch of the size that was asked
    // for, none of which anyone else uses.
    let status = unsafe {
        digits_run(
            inputs.as_ptr(),
            outputs.as_ptr(),
            scratch.as_mut_ptr().cast(),
            scratch.len(),
        )
    };
    let best = (0..10).max_by(|&a, &b| probabilities[a].total_cmp(&probabilities[b]));
    if status == 0 { Ok(best.unwrap_or(0)) } else { Err(status) }
}

fn main() -> Result<(), String> {
    let ink = |c: u8| match c {
        b'#' => 1.0,
        b'+' => 0.7,
        b'.' => 0.2,
        _ => 0.0,
    };
    let mut pixels = [0.0; 64];
    let drawn = DRAWING.iter().flat_map(|row| row.bytes());
    pixels.iter_mut().zip(drawn).for_each(|(pixel, c)| *pixel = ink(c));
    let digit = classify(&pixels).map_err(|status| format!("the network returned {status}"))?;
    println!("{}\nis a {digit}", DRAWING.join("\n"));
    Ok(())
}
