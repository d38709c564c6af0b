//! The messages that Kiln reads agree with the `onnx.proto` of the ONNX project, field by field.

use std::collections::HashMap;

use kiln_tests::oracle;

/// Number and kind of each field, by `Message.field`.
type Fields = HashMap<String, (i32, String)>;

/// Fields as ONNX declares them.
fn declared(folder: &std::path::Path) -> Fields {
    let files = protox::compile(["onnx.proto"], [folder]).expect("onnx.proto compiles");
    let mut fields = Fields::new();
    let mut messages: Vec<_> = files.file.iter().flat_map(|f| &f.message_type).collect();
    while let Some(message) = messages.pop() {
        for field in &message.field {
            let kind = format!("{:?}", field.r#type()).to_lowercase();
            let name = format!("{}.{}", short(message.name()), field.name());
            fields.insert(name, (field.number(), kind));
        }
        messages.extend(&message.nested_type);
    }
    fields
}

/// Nested messages lose their suffix where Kiln gives them one (`Tensor`, `Dimension`).
fn short(name: &str) -> &str {
    name.strip_suffix("Proto").unwrap_or(name)
}

/// Fields as `proto.rs` declares them.
fn read() -> Vec<(String, i32, String)> {
    let source = include_str!("../../compiler/src/onnx/proto.rs");
    let (mut message, mut attribute) = ("", "");
    let mut fields = Vec::new();
    for line in source.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("pub struct ") {
            message = short(rest.trim_end_matches(" {"));
        } else if line.starts_with("#[prost(") {
            attribute = line;
        } else if let Some(rest) = line.strip_prefix("pub ")
            && let Some((name, _)) = rest.split_once(':')
            && let Some((_, tag)) = attribute.split_once(" tag = \"")
        {
            let name = name.trim_start_matches("r#");
            let number = tag.split('"').next().and_then(|n| n.parse().ok()).expect("a number");
            let kind = attribute["#[prost(".len()..].split([',', ' ']).next().expect("a kind");
            fields.push((format!("{message}.{name}"), number, kind.to_string()));
        }
    }
    fields
}

#[test]
fn fields_are_those_of_onnx() {
    let Some(folder) = oracle("onnx-1.22.0") else { return };
    let declared = declared(&folder);
    // The nested `TypeProto.Tensor` has the fields of a type, not those of a tensor.
    let alias = |name: &str| match name.split_once('.') {
        Some(("TensorType", field)) => format!("Tensor.{field}"),
        _ => name.to_string(),
    };
    let fields = read();
    assert!(fields.len() > 40, "proto.rs has {} fields", fields.len());
    for (name, number, kind) in fields {
        let (want, declared_kind) = &declared
            .get(&alias(&name))
            .unwrap_or_else(|| panic!("onnx.proto has no field {name}"));
        assert_eq!(number, *want, "number of {name}");
        // Enums are read as numbers.
        let as_read = if declared_kind == "enum" { "int32" } else { declared_kind };
        assert_eq!(kind, as_read, "type of {name}");
    }
}
