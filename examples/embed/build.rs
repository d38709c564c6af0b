fn main() {
    println!("cargo::rustc-link-arg={}/digits.o", env!("CARGO_MANIFEST_DIR"));
    println!("cargo::rerun-if-changed=digits.o");
}
