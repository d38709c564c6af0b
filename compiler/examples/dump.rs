//! dump
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let model = kiln::Model::open(&a[1], &kiln::Limits::default()).unwrap();
    let c = kiln::Compiler::new().wide(std::env::var("NARROW").is_err());
    if a[2] == "opt" {
        let g = c.graph(&model).unwrap();
        let r = kiln::rules::optimise(&g, true).unwrap();
        println!("{:?}", r.report);
        return;
    }
    let s = c.stages(&model).unwrap();
    match a[2].as_str() {
        "loops" => println!("{}", s.loops),
        "fused" => println!("{}", s.fused),
        "asm" => println!("{}", s.asm),
        "graph" => println!("{}", s.graph),
        _ => println!("{}", s.plan),
    }
}
