//! Bodies of kernels, each kept once: their numbers stand for them in e-nodes. Arguments are
//! numbered by first use, walking from the result, so that equal bodies are equal however they
//! came about.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use super::attention;
use super::cost::{body_us, parts_read};
use super::kind::{Kind, MAX_ARGS, MAX_OPS, classify};
use crate::graph::op::{Op, Type};
use crate::graph::scalar::Dots;
use crate::graph::{Args, Body, Node, NodeId};

/// Arguments of a kernel: indices of whatever it is about.
pub type Places = SmallVec<[u32; 6]>;

/// Arguments by their place among those of two bodies.
type Order = SmallVec<[u8; 12]>;
/// A fusion that was tried: consumer, argument, producer, and which arguments they share.
type Tried = (u32, u8, u32, Order);

/// Three fused bodies: the places where they meet, and their arguments by a common number.
type Three = ([u32; 3], [usize; 2], [Order; 3]);

/// All bodies, with what has been found out about them.
#[derive(Default)]
pub struct Bodies {
    /// What the target has.
    dots: Dots,
    list: Vec<Arc<Body>>,
    kinds: Vec<Kind>,
    parts: Vec<SmallVec<[f64; 6]>>,
    known: FxHashMap<Vec<(Op, Args, Type)>, u32>,
    costs: FxHashMap<(u32, u32), f64>,
    fused: FxHashMap<Tried, Option<(u32, Order)>>,
    threes: FxHashMap<Three, Option<(u32, Order)>>,
}

impl Bodies {
    /// No bodies yet, for a target with these dot products.
    pub fn for_machine(dots: Dots) -> Bodies {
        Bodies { dots, ..Bodies::default() }
    }

    /// All bodies, by number.
    pub fn list(&self) -> &[Arc<Body>] {
        &self.list
    }

    /// The body of that number.
    pub fn get(&self, body: u32) -> &Arc<Body> {
        &self.list[body as usize]
    }

    /// The kind of a body.
    pub fn kind(&self, body: u32) -> Kind {
        self.kinds[body as usize]
    }

    /// How much of each argument a body reads, where it only takes parts of it; else 1.
    pub fn parts(&self, body: u32) -> &[f64] {
        &self.parts[body as usize]
    }

    /// Number of operations of a body.
    pub fn ops(&self, body: u32) -> usize {
        let nodes = &self.get(body).nodes;
        nodes.iter().filter(|n| !matches!(n.op, Op::Input(_))).count()
    }

    /// The number of a body in canonical form, and its arguments in their new order.
    pub fn intern(&mut self, body: &Body, args: &[u32]) -> (u32, Places) {
        let mut copy = Copy::new([&body.nodes, &[]], None, |_, k| k);
        copy.visit(0, body.nodes.len() - 1);
        let (body, order) = copy.finish();
        let args = order.iter().map(|&k| args[k as usize]).collect();
        (self.number(body), args)
    }

    fn number(&mut self, body: Body) -> u32 {
        let key = body.nodes.iter().map(|n| (n.op.clone(), n.args.clone(), n.ty.clone()));
        let next = self.list.len() as u32;
        let number = *self.known.entry(key.collect()).or_insert(next);
        if number == next {
            self.parts.push(parts_read(&body).collect());
            self.kinds.push(classify(&body.nodes).unwrap_or(Kind::Alone));
            self.list.push(Arc::new(body));
        }
        number
    }

    /// Modelled time of a body, where the arguments of these bits are constants.
    pub fn us(&mut self, body: u32, constant: u32) -> f64 {
        let nodes = &self.list[body as usize];
        *self.costs.entry((body, constant)).or_insert_with(|| {
            let flags: Vec<bool> = (0..MAX_ARGS.max(32)).map(|k| constant >> k & 1 == 1).collect();
            body_us(nodes, &flags, self.dots)
        })
    }

    /// The consumer with its argument `at` computed inside, by the producer; where that has loops.
    pub fn fuse(
        &mut self,
        (consumer, consumer_args): (u32, &[u32]),
        at: usize,
        (producer, producer_args): (u32, &[u32]),
    ) -> Option<(u32, Places)> {
        // Arguments of both by their place in the consumer, then in the producer.
        let place = |k: usize, arg: &u32| {
            let shared = consumer_args.iter().position(|a| a == arg);
            shared.unwrap_or(consumer_args.len() + k) as u8
        };
        let places: Order = producer_args.iter().enumerate().map(|(k, a)| place(k, a)).collect();
        let key = (consumer, at as u8, producer, places);
        if !self.fused.contains_key(&key) {
            let made = self.compose(consumer, at, producer, &key.3);
            self.fused.insert(key.clone(), made);
        }
        let (body, order) = self.fused[&key].as_ref()?;
        let arg = |&k: &u8| {
            let k = k as usize;
            let own = consumer_args.get(k);
            *own.unwrap_or_else(|| &producer_args[k - consumer_args.len()])
        };
        Some((*body, order.iter().map(arg).collect()))
    }

    /// A kernel with its argument `at` computed inside by a second one, and that one's argument
    /// `inner_at` by a third; where the three have loops.
    pub fn fuse_three(
        &mut self,
        [first, second, third]: [(u32, &[u32]); 3],
        [at, inner_at]: [usize; 2],
    ) -> Option<(u32, Places)> {
        let mut args: Places = SmallVec::new();
        let mut place = |arg: u32| {
            let known = args.iter().position(|&a| a == arg);
            known.unwrap_or_else(|| {
                args.push(arg);
                args.len() - 1
            }) as u8
        };
        let [outer, middle, inner] =
            [first, second, third].map(|k| k.1.iter().map(|&a| place(a)).collect::<Order>());
        let key = ([first.0, second.0, third.0], [at, inner_at], [outer, middle, inner]);
        if !self.threes.contains_key(&key) {
            let made = self.compose_three(&key);
            self.threes.insert(key.clone(), made);
        }
        let (body, order) = self.threes[&key].as_ref()?;
        Some((*body, order.iter().map(|&k| args[k as usize]).collect()))
    }

    fn compose_three(&mut self, (bodies, [at, inner_at], orders): &Three) -> Option<(u32, Order)> {
        if bodies.iter().map(|&b| self.ops(b)).sum::<usize>() > MAX_OPS {
            return None;
        }
        let [outer, middle, inner] = orders;
        let nodes = bodies.map(|b| self.get(b).nodes.as_slice());
        let both = [nodes[0], nodes[1]];
        let place = |part: usize, k: u8| [outer, middle][part][k as usize];
        let mut copy = Copy::new(both, Some(*at as u32), place);
        copy.visit(0, nodes[0].len() - 1);
        let (pair, order) = copy.finish();
        let inside = order.iter().position(|&k| k == middle[*inner_at])?;
        let both = [pair.nodes.as_slice(), nodes[2]];
        let place = |part: usize, k: u8| [&order, inner][part][k as usize];
        let mut copy = Copy::new(both, Some(inside as u32), place);
        copy.visit(0, pair.nodes.len() - 1);
        let (body, order) = copy.finish();
        let moves_again = body.nodes.iter().any(|n| repeats_a_move(&body.nodes, n));
        let fits = order.len() <= MAX_ARGS && !moves_again;
        (fits && self.kind_of(&body) == Some(Kind::Attention)).then(|| (self.number(body), order))
    }

    /// The kind of a body, where the target has loops for it.
    fn kind_of(&self, body: &Body) -> Option<Kind> {
        let runs = |kind: &Kind| {
            *kind != Kind::Attention || self.dots.warps || !attention::is_short(&body.nodes)
        };
        classify(&body.nodes).filter(runs)
    }

    fn compose(
        &mut self,
        consumer: u32,
        at: usize,
        producer: u32,
        places: &[u8],
    ) -> Option<(u32, Order)> {
        if self.ops(consumer) + self.ops(producer) > MAX_OPS {
            return None;
        }
        let nodes = [self.get(consumer), self.get(producer)].map(|b| b.nodes.as_slice());
        let mut copy = Copy::new(nodes, Some(at as u32), |part, k| match part {
            0 => k,
            _ => places[k as usize],
        });
        copy.visit(0, nodes[0].len() - 1);
        let (body, order) = copy.finish();
        if order.len() > MAX_ARGS {
            return None;
        }
        if body.nodes.iter().any(|n| repeats_a_move(&body.nodes, n)) {
            return None;
        }
        self.kind_of(&body)?;
        Some((self.number(body), order))
    }
}

/// A permutation of a permutation, or a reshape of a reshape: rules have made one of both, and the
/// body with that one is tried as well.
fn repeats_a_move(nodes: &[Node], node: &Node) -> bool {
    let inner = node.args.first().map(|a| &nodes[a.index()].op);
    matches!(
        (&node.op, inner),
        (Op::Permute(_), Some(Op::Permute(_))) | (Op::Reshape(_), Some(Op::Reshape(_)))
    )
}

/// Copies a body in canonical form, another one in the place of one of its arguments.
struct Copy<'a, F> {
    parts: [&'a [Node]; 2],
    /// The argument of the first part that the second part computes.
    inner: Option<u32>,
    /// The common number of an argument of a part.
    common: F,
    done: [Vec<Option<NodeId>>; 2],
    /// Common numbers of arguments, and their nodes, in the order of first use.
    args: Order,
    arg_nodes: Vec<Node>,
    nodes: Vec<Node>,
}

/// Operations are numbered from here until it is known how many arguments come before them.
const OPS: u32 = 1 << 16;

impl<'a, F: Fn(usize, u8) -> u8> Copy<'a, F> {
    fn new(parts: [&'a [Node]; 2], inner: Option<u32>, common: F) -> Self {
        let done = parts.map(|p| vec![None; p.len()]);
        let (args, arg_nodes, nodes) = (SmallVec::new(), Vec::new(), Vec::new());
        Copy { parts, inner, common, done, args, arg_nodes, nodes }
    }

    /// Adds a node after its operands. A body is shallow enough to recurse.
    fn visit(&mut self, part: usize, at: usize) -> NodeId {
        if let Some(id) = self.done[part][at] {
            return id;
        }
        let node = &self.parts[part][at];
        let id = match node.op {
            Op::Input(k) if part == 0 && self.inner == Some(k) => {
                self.visit(1, self.parts[1].len() - 1)
            }
            Op::Input(k) => self.argument((self.common)(part, k as u8), node),
            _ => {
                let args: Args = node.args.iter().map(|a| self.visit(part, a.index())).collect();
                let known = self.nodes.iter().position(|n| n.args == args && n.op == node.op);
                let index = known.unwrap_or_else(|| {
                    self.nodes.push(Node { args, ..node.clone() });
                    self.nodes.len() - 1
                });
                NodeId(OPS + index as u32)
            }
        };
        self.done[part][at] = Some(id);
        id
    }

    fn argument(&mut self, common: u8, node: &Node) -> NodeId {
        let known = self.args.iter().position(|&a| a == common);
        let index = known.unwrap_or_else(|| {
            let op = Op::Input(self.args.len() as u32);
            self.args.push(common);
            self.arg_nodes.push(Node { op, ..node.clone() });
            self.args.len() - 1
        });
        NodeId(index as u32)
    }

    /// The body, and the common numbers of its arguments.
    fn finish(self) -> (Body, Order) {
        let count = self.args.len() as u32;
        let mut nodes = self.arg_nodes;
        nodes.extend(self.nodes.into_iter().map(|mut node| {
            for arg in &mut node.args {
                if arg.0 >= OPS {
                    arg.0 = arg.0 - OPS + count;
                }
            }
            node
        }));
        (Body { nodes }, self.args)
    }
}
