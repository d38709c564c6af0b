"""Makes cache.onnx: a row is put behind those before it, and all are added up."""
import onnx
from onnx import TensorProto, helper

F = TensorProto.FLOAT


def port(name, *shape):
    return helper.make_tensor_value_info(name, F, shape)


axes = helper.make_tensor("axes", TensorProto.INT64, [1], [0])
nodes = [
    helper.make_node("Concat", ["past_rows", "row"], ["present_rows"], axis=0),
    helper.make_node("ReduceSum", ["present_rows", "axes"], ["total"], keepdims=0),
    helper.make_node("Add", ["count", "one"], ["next_count"]),
]
one = helper.make_tensor("one", F, [1], [1.0])
inputs = [port("row", 1, 2), port("past_rows", "past", 2), port("count", 1)]
outputs = [port("total", 2), port("present_rows", "past + 1", 2), port("next_count", 1)]
graph = helper.make_graph(nodes, "cache", inputs, outputs, [axes, one])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
onnx.checker.check_model(model)
onnx.save(model, "cache.onnx")
