#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| drop(kiln_cases::readers::pb(bytes)));
