//! Blocks of well-known networks: few kernels, equal values, equal text.

use smallvec::smallvec;

use super::*;

struct Net {
    graph: Graph,
    rng: Rng,
    layer: usize,
}

impl Net {
    fn new(input: &[usize]) -> (Net, NodeId) {
        let mut net = Net { graph: Graph::default(), rng: Rng(77), layer: 0 };
        let x = net.graph.input("x", Type::new(DType::F32, input));
        (net, x)
    }

    fn weight(&mut self, shape: &[usize]) -> NodeId {
        let count: usize = shape.iter().product();
        let few = self.rng.numbers(64);
        let values: Vec<f32> =
            (0..count).map(|i| few[(i * 7 + i / 64) % 64] as f32 / 4.0).collect();
        self.graph.tensor(&Tensor::from_slice(shape, &values), &"weight".into())
    }

    fn origin(&mut self, what: &str) -> std::sync::Arc<str> {
        self.layer += 1;
        format!("/{what}{}", self.layer).into()
    }

    fn pad(&mut self, x: NodeId, border: usize) -> NodeId {
        let fill = self.graph.scalar(DType::F32, 0, 0.0, &"zero".into());
        let borders = smallvec![(0, 0), (0, 0), (border, border), (border, border)];
        self.graph.add(Op::Pad(borders), &[x, fill], &"pad".into()).expect("fits")
    }

    /// Convolution, batch norm as a scale and a shift.
    fn conv(
        &mut self,
        x: NodeId,
        out: usize,
        [kernel, stride]: [usize; 2],
        groups: usize,
    ) -> NodeId {
        let channels = self.graph.ty(x).shape[1];
        let origin = self.origin("conv");
        let padded = self.pad(x, kernel / 2);
        let w = self.weight(&[out, channels / groups, kernel, kernel]);
        let steps = (&[stride; 2][..], &[1, 1][..]);
        let y = self.graph.conv([padded, w], steps, groups, &origin).expect("fits");
        let (scale, shift) = (self.weight(&[1, out, 1, 1]), self.weight(&[1, out, 1, 1]));
        let y = self.graph.binary(BinaryFn::Mul, y, scale, &origin).expect("fits");
        self.graph.binary(BinaryFn::Add, y, shift, &origin).expect("fits")
    }

    fn relu(&mut self, x: NodeId) -> NodeId {
        self.graph.binary_number(BinaryFn::Max, x, 0.0, &"relu".into()).expect("fits")
    }

    fn add(&mut self, x: NodeId, y: NodeId) -> NodeId {
        self.graph.binary(BinaryFn::Add, x, y, &"add".into()).expect("fits")
    }

    fn bottleneck(&mut self, x: NodeId, [mid, out]: [usize; 2], stride: usize) -> NodeId {
        let y = self.conv(x, mid, [1, 1], 1);
        let y = self.relu(y);
        let y = self.conv(y, mid, [3, stride], 1);
        let y = self.relu(y);
        let y = self.conv(y, out, [1, 1], 1);
        let same = self.graph.ty(x).shape[1] == out;
        let short = if same { x } else { self.conv(x, out, [1, stride], 1) };
        let y = self.add(y, short);
        self.relu(y)
    }

    fn linear(&mut self, x: NodeId, out: usize) -> NodeId {
        let shape = self.graph.ty(x).shape.clone();
        let origin = self.origin("linear");
        let w = self.weight(&[1, shape[2], out]);
        let b = self.weight(&[1, 1, out]);
        let y = self.graph.matmul(x, w, &origin).expect("fits");
        self.graph.binary(BinaryFn::Add, y, b, &origin).expect("fits")
    }

    fn norm(&mut self, x: NodeId) -> NodeId {
        let width = self.graph.ty(x).shape[2];
        let origin = self.origin("norm");
        let f = Composite::LayerNorm(2, 1e-5f32.to_bits());
        let y = self.graph.composite(f, x, &origin).expect("fits");
        let (scale, shift) = (self.weight(&[1, 1, width]), self.weight(&[1, 1, width]));
        let y = self.graph.binary(BinaryFn::Mul, y, scale, &origin).expect("fits");
        self.graph.binary(BinaryFn::Add, y, shift, &origin).expect("fits")
    }

    fn heads(&mut self, x: NodeId, heads: usize, order: [usize; 4]) -> NodeId {
        let s = self.graph.ty(x).shape.clone();
        let y = self.graph.reshape(x, &[s[0], s[1], heads, s[2] / heads], &"heads".into());
        self.graph.permute(y.expect("fits"), &order, &"heads".into()).expect("fits")
    }

    fn encoder(&mut self, x: NodeId, heads: usize) -> NodeId {
        let shape = self.graph.ty(x).shape.clone();
        let width = shape[2];
        let [q, k, v] = [0, 1, 2].map(|_| self.linear(x, width));
        let q = self.heads(q, heads, [0, 2, 1, 3]);
        let k = self.heads(k, heads, [0, 2, 3, 1]);
        let v = self.heads(v, heads, [0, 2, 1, 3]);
        let origin = self.origin("attention");
        let scores = self.graph.matmul(q, k, &origin).expect("fits");
        let by = 1.0 / ((width / heads) as f64).sqrt();
        let scores = self.graph.binary_number(BinaryFn::Mul, scores, by, &origin).expect("fits");
        let weights = self.graph.composite(Composite::Softmax(3), scores, &origin).expect("fits");
        let mixed = self.graph.matmul(weights, v, &origin).expect("fits");
        let mixed = self.graph.permute(mixed, &[0, 2, 1, 3], &origin).expect("fits");
        let mixed = self.graph.reshape(mixed, &shape, &origin).expect("fits");
        let y = self.linear(mixed, width);
        let y = self.add(x, y);
        let x = self.norm(y);
        let y = self.linear(x, 2 * width);
        let y = self.graph.composite(Composite::Gelu, y, &"gelu".into()).expect("fits");
        let y = self.linear(y, width);
        let y = self.add(x, y);
        self.norm(y)
    }

    fn finish(mut self, y: NodeId) -> Graph {
        self.graph.outputs.push(("y".into(), y));
        self.graph
    }
}

#[test]
fn a_residual_block() {
    let (mut net, x) = Net::new(&[1, 8, 6, 6]);
    let y = net.bottleneck(x, [4, 16], 2);
    let y = net.bottleneck(y, [4, 16], 1);
    let graph = net.finish(y);
    check_compiled(&graph, 1e-3, "residual block");
    let graph = check_optimised(&graph, 1e-4, "residual block");
    // Seven convolutions with all that follows them, two borders, and the layout at one end.
    assert!(kernels(&graph) <= 10, "{} kernels\n{}", kernels(&graph), text::print(&graph));
}

#[test]
fn a_depthwise_block() {
    let (mut net, x) = Net::new(&[1, 8, 6, 6]);
    let y = net.conv(x, 16, [1, 1], 1);
    let y = net.relu(y);
    let y = net.conv(y, 16, [3, 1], 16);
    let y = net.relu(y);
    let y = net.conv(y, 8, [1, 1], 1);
    let y = net.add(y, x);
    let graph = net.finish(y);
    check_compiled(&graph, 1e-3, "depthwise block");
    let graph = check_optimised(&graph, 1e-4, "depthwise block");
    assert!(kernels(&graph) <= 5, "{} kernels\n{}", kernels(&graph), text::print(&graph));
}

#[test]
fn an_encoder_layer() {
    let (mut net, x) = Net::new(&[1, 6, 16]);
    let y = net.encoder(x, 2);
    let graph = net.finish(y);
    check_compiled(&graph, 1e-3, "encoder layer");
    let graph = check_optimised(&graph, 1e-3, "encoder layer");
    assert!(kernels(&graph) <= 8, "{} kernels\n{}", kernels(&graph), text::print(&graph));
}

/// Softmax attention of queries, some heads of which share keys and values, with a mask and the
/// guard of exporters where asked for.
fn attention([heads, group, queries, keys, depth]: [usize; 5], masked: bool) -> Graph {
    let (mut net, q) = Net::new(&[1, heads, group, queries, depth]);
    let o: std::sync::Arc<str> = "attention".into();
    let each = [1, heads, 1, keys, depth];
    let [k, v] = ["k", "v"].map(|name| net.graph.input(name, Type::new(DType::F32, &each)));
    let graph = &mut net.graph;
    let whole = Op::Expand(smallvec![1, heads, group, keys, depth]);
    let [k, v] = [k, v].map(|x| graph.add(whole.clone(), &[x], &o).expect("fits"));
    let k = graph.permute(k, &[0, 1, 2, 4, 3], &o).expect("fits");
    let mut scores = graph.matmul(q, k, &o).expect("fits");
    scores = graph.binary_number(BinaryFn::Mul, scores, 0.25, &o).expect("fits");
    if masked {
        let mask = graph.input("mask", Type::new(DType::F32, &[1, 1, 1, queries, keys]));
        scores = graph.binary(BinaryFn::Add, scores, mask, &o).expect("fits");
    }
    let mut weights = graph.composite(Composite::Softmax(4), scores, &o).expect("fits");
    if masked {
        let strange = graph.binary(BinaryFn::Ne, weights, weights, &o).expect("fits");
        let zero = graph.scalar(DType::F32, 5, 0.0, &o);
        weights = graph.add(Op::Select, &[strange, zero, weights], &o).expect("fits");
    }
    let mixed = graph.matmul(weights, v, &o).expect("fits");
    net.finish(mixed)
}

/// Rows in blocks and left over, keys packed and not, one query as in decoding.
#[test]
fn attention_is_one_kernel() {
    let sizes = [
        ([2, 1, 5, 24, 16], false),
        ([2, 1, 6, 19, 9], true),
        ([1, 1, 1, 40, 16], true),
        ([2, 4, 1, 24, 8], false),
        ([3, 1, 131, 25, 16], true),
        ([1, 2, 263, 17, 8], false),
    ];
    for (size, masked) in sizes {
        let graph = attention(size, masked);
        let what = format!("attention of {size:?}");
        check_compiled(&graph, 1e-4, &what);
        let graph = check_optimised(&graph, 1e-4, &what);
        let is_one = |b: &std::sync::Arc<crate::graph::Body>| {
            super::super::attention::find(&b.nodes).is_some()
        };
        let used = graph.nodes.iter().filter_map(|n| match n.op {
            Op::Fused(body) => Some(&graph.bodies[body as usize]),
            _ => None,
        });
        assert_eq!(used.filter(|b| is_one(b)).count(), 1, "{what}\n{}", text::print(&graph));
    }
}

fn resnet50() -> Graph {
    let (mut net, x) = Net::new(&[1, 3, 224, 224]);
    let y = net.conv(x, 64, [7, 2], 1);
    let y = net.relu(y);
    let y = net.pad(y, 1);
    let windows = smallvec![(3, 2, 1), (3, 2, 1)];
    let y = net.graph.add(Op::Window(windows), &[y], &"pool".into()).expect("fits");
    let y = net.graph.reduce(ReduceFn::Max, y, &[4, 5], &"pool".into()).expect("fits");
    let mut y = net.graph.reshape(y, &[1, 64, 56, 56], &"pool".into()).expect("fits");
    for (stage, blocks) in [3, 4, 6, 3].into_iter().enumerate() {
        let mid = 64 << stage;
        for block in 0..blocks {
            let stride = if block == 0 && stage > 0 { 2 } else { 1 };
            y = net.bottleneck(y, [mid, 4 * mid], stride);
        }
    }
    let y = net.graph.mean(y, &[2, 3], &"mean".into()).expect("fits");
    let y = net.graph.reshape(y, &[1, 1, 2048], &"flat".into()).expect("fits");
    let y = net.linear(y, 1000);
    net.finish(y)
}

#[test]
fn whole_models_take_little_time_and_give_equal_text() {
    let (mut net, mut x) = Net::new(&[1, 128, 768]);
    for _ in 0..12 {
        x = net.encoder(x, 12);
    }
    for (name, graph) in [("resnet", resnet50()), ("encoder", net.finish(x))] {
        let start = std::time::Instant::now();
        let first = optimise(&graph, Some(Budget::default()), Dots::default()).expect("optimises");
        println!(
            "{name}: {:?}, {} nodes, {} kernels",
            start.elapsed(),
            graph.nodes.len(),
            kernels(&first.graph)
        );
        let second = optimise(&graph, Some(Budget::default()), Dots::default()).expect("optimises");
        assert_eq!(text::print(&first.graph), text::print(&second.graph), "{name}");
        assert!(first.report.chosen_us <= first.report.greedy_us, "{name}");
    }
}
