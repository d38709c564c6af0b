//! try
use std::time::Instant;
fn main() {
    for dir in std::env::args().skip(1) {
        let t = Instant::now();
        let model = match kiln::Model::open(format!("{dir}/model.onnx"), &kiln::Limits::default()) {
            Ok(m) => m,
            Err(e) => {
                println!("{dir}: {e}");
                continue;
            }
        };
        let c = kiln::Compiler::new().wide(std::env::var("NARROW").is_err());
        let graph = match c.graph(&model) {
            Ok(m) => m,
            Err(e) => {
                println!("{dir}: {e}");
                continue;
            }
        };
        let t1 = t.elapsed();
        if std::env::var("REPORT").is_ok() {
            println!("{:?}", kiln::rules::optimise(&graph, true).unwrap().report);
        }
        let k = match c.optimise(&graph) {
            Ok(m) => m,
            Err(e) => {
                println!("{dir}: {e}");
                continue;
            }
        };
        let t2 = t.elapsed();
        let exe = match c.build(&k) {
            Ok(m) => m,
            Err(e) => {
                println!("{dir}: {e}");
                continue;
            }
        };
        let t3 = t.elapsed();
        let mut ins = vec![];
        for (i, p) in exe.inputs().iter().enumerate() {
            let b = std::fs::read(format!("{dir}/input_{i}.pb")).unwrap();
            ins.push((p.name.clone(), kiln::read_tensor_pb(&b).unwrap().1));
        }
        let named: Vec<_> = ins.iter().map(|(n, t)| (n.as_str(), t.view())).collect();
        let out = exe.run(&named).unwrap();
        let mut best = f64::MAX;
        for _ in 0..5 {
            let t = Instant::now();
            exe.run(&named).unwrap();
            best = best.min(t.elapsed().as_secs_f64());
        }
        let mut worst = 0f64;
        let mut top = 0f64;
        for (i, (_, o)) in out.iter().enumerate() {
            let b = std::fs::read(format!("{dir}/output_{i}.pb")).unwrap();
            let e = kiln::read_tensor_pb(&b).unwrap().1;
            let (o, e) = (o.as_slice::<f32>().unwrap(), e.as_slice::<f32>().unwrap());
            for (a, b) in o.iter().zip(e) {
                worst = worst.max((a - b).abs() as f64);
                if a.is_nan() {
                    worst = f64::NAN;
                }
                top = top.max(b.abs() as f64);
            }
        }
        println!(
            "{dir}: import {t1:?} optimise {:?} build {:?} run {:.2} ms, worst {worst:e} of {top}, kernels {}",
            t2 - t1,
            t3 - t2,
            best * 1e3,
            exe.plan().steps.len()
        );
        if std::env::var("PROFILE").is_ok() {
            let views: Vec<_> = ins.iter().map(|(_, t)| t.view()).collect();
            let mut outs: Vec<kiln::tensor::Tensor> = exe
                .outputs()
                .iter()
                .map(|p| kiln::tensor::Tensor::zeros(p.dtype, &p.shape))
                .collect();
            let mut vs: Vec<_> = outs.iter_mut().map(|t| t.view_mut()).collect();
            let mut p = exe.profile(&views, &mut vs).unwrap();
            p.sort_by_key(|x| std::cmp::Reverse(x.1));
            for (n, t) in p.iter().take(25) {
                println!("  {:>9} us {n:.100}", {
                    let x = *t;
                    format!("{:?}", x)
                });
            }
        }
    }
}
