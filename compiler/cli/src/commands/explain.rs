//! `kiln explain`: what became of a node of the model.

use std::collections::BTreeMap;

use kiln::error::sanitize;
use kiln::graph::op::Op;
use kiln::graph::text::{op_text, type_text};
use kiln::graph::{Graph, NodeId};
use kiln::rules::{self, Report};
use serde_json::{Value, json};

use crate::args::ExplainArgs;
use crate::commands::{compiler, model_name, open};
use crate::failure::Failure;
use crate::term::Term;

/// Prints the operations that the node was read as, and the kernels that it went into.
pub fn run(args: &ExplainArgs, term: &Term) -> Result<(), Failure> {
    let (model, _) = open(&args.model, term)?;
    let compiler = compiler(&args.model, &args.build);
    let graph = compiler.graph(&model)?;
    let (budget, dots) = (compiler.budget(), compiler.cpu().wanted_dots());
    let optimised = term.during("optimise", None, || rules::optimise(&graph, budget, dots))?;
    let fused: &Graph = &optimised.graph;
    let before = touching(&graph, &args.node);
    let after = touching(fused, &args.node);
    if before.is_empty() && after.is_empty() {
        let text = format!("no node has `{}` in its name", args.node);
        return Err(Failure::usage(text).help("names are listed by kiln compile --emit graph"));
    }
    let mut text = String::from("read as\n");
    before.iter().for_each(|line| text += &format!("  {line}\n"));
    text += "compiled into\n";
    after.iter().for_each(|line| text += &format!("  {line}\n"));
    if after.is_empty() {
        text += "  nothing of its own: folded into constants, views or other nodes\n";
    }
    let Report { fired, greedy_us, chosen_us, .. } = optimised.report;
    let by_rule = fired.into_iter().map(|(rule, origins)| {
        let here = origins.iter().filter(|(origin, _)| origin.contains(&args.node));
        (rule, here.map(|(_, count)| count).sum::<usize>())
    });
    let fired: BTreeMap<&str, usize> = by_rule.filter(|(_, count)| *count > 0).collect();
    if !fired.is_empty() {
        text += "rules that found other forms of it\n";
        fired.iter().for_each(|(rule, count)| text += &format!("  {count:>6} {rule}\n"));
    }
    text += &format!("modelled cost of the model {chosen_us:.1} us");
    text += &format!(", without the rules {greedy_us:.1} us\n");
    let name = model_name(&args.model.model);
    let value: Value = json!({
        "model": name, "node": args.node, "read_as": before, "compiled_into": after,
        "rules": fired, "cost_us": chosen_us, "greedy_cost_us": greedy_us,
    });
    term.report(value, &text)
}

/// Lines of the graph's text about nodes with that part of a name in their origin.
fn touching(graph: &Graph, part: &str) -> Vec<String> {
    let wanted = |id: &NodeId| {
        let node = graph.node(*id);
        !matches!(node.op, Op::Input(_) | Op::Const(_)) && node.origin.contains(part)
    };
    let line = |id: NodeId| {
        let node = graph.node(id);
        let args: String = node.args.iter().map(|arg| format!(" %{}", arg.0)).collect();
        let (op, ty) = (op_text(&node.op), type_text(&node.ty));
        format!("%{} = {op}{args} : {ty} \"{}\"", id.0, sanitize(&node.origin))
    };
    graph.ids().filter(wanted).map(line).collect()
}
