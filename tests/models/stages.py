"""Models whose shapes hang on data that they compute, with what onnxruntime says of several inputs."""
import os
import shutil

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from common import MODELS, Builder, run

RANDOM = np.random.default_rng(20261128)


class Staged(Builder):
    """Nodes of several outputs, outputs of any type, and inputs that are given by case."""

    def take(self, name, *shape, dtype=TensorProto.FLOAT):
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def scalar(self, value):
        """A constant of no axes."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(value), name))
        return name

    def ops(self, kind, count, *args, **attributes):
        self.op(kind, *args, **attributes)
        node = self.nodes[-1]
        node.output[:] = [f"{node.output[0]}_{k}" for k in range(count)]
        return list(node.output)

    def column(self, x, index):
        return self.op("Squeeze", self.op("Slice", x, self.ints(index), self.ints(index + 1),
                                          self.ints(1)), self.ints(1))

    def write(self, cases, **outputs):
        infos = []
        for name, (value, dtype) in outputs.items():
            self.nodes.append(helper.make_node("Identity", [value], [name], f"/{name}"))
            infos.append(helper.make_tensor_value_info(name, dtype, None))
        graph = helper.make_graph(self.nodes, self.name, self.inputs, infos, self.weights)
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, ir_version=9, opset_imports=opsets)
        folder = os.path.join(MODELS, self.name)
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        onnx.save(model, os.path.join(folder, "model.onnx"))
        for k, arrays in enumerate(cases):
            feed = dict(zip([i.name for i in self.inputs], arrays))
            found = run(model.SerializeToString(), list(outputs), feed)
            place = os.path.join(folder, f"set_{k}")
            os.makedirs(place)
            for kind, named in (("input", feed.items()), ("output", zip(outputs, found))):
                for i, (name, array) in enumerate(named):
                    with open(os.path.join(place, f"{kind}_{i}.pb"), "wb") as file:
                        tensor = numpy_helper.from_array(np.asarray(array), name)
                        file.write(tensor.SerializeToString())
        print(f"  {self.name}: {len(self.nodes)} nodes, {len(cases)} cases", flush=True)


FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def normal(*shape, scale=1.0):
    return (RANDOM.standard_normal(shape) * scale).astype(np.float32)


def detector():
    """Boxes and scores by convolutions, the best boxes, and what a program wants of them."""
    b = Staged("detector")
    x = b.take("x", 1, 3, 32, 32)
    for inner, outer in ((3, 8), (8, 16)):
        x = b.op("Conv", x, b.weight(outer, inner, 3, 3, fan_in=9 * inner),
                 b.weight(outer, scale=0.1), kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2])
        x = b.op("Relu", x)
    head = b.op("Conv", x, b.weight(7, 16, 1, 1, fan_in=16), b.weight(7, scale=0.1))
    head = b.op("Transpose", b.op("Reshape", head, b.ints(1, 7, 64)), perm=[0, 2, 1])
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8), indexing="ij"), -1).reshape(1, 64, 2)
    offset, size, scores = b.ops("Split", 3, head, b.ints(2, 2, 3), axis=2)
    middle = b.op("Add", b.constant(grid.astype(np.float32)), b.op("Sigmoid", offset))
    half = b.op("Add", b.op("Abs", size), b.number(0.6))
    boxes = b.op("Concat", b.op("Sub", middle, half), b.op("Add", middle, half), axis=2)
    scores = b.op("Transpose", b.op("Sigmoid", scores), perm=[0, 2, 1])
    found = b.op("NonMaxSuppression", boxes, scores, b.ints(12), b.number(0.3), b.number(0.7))
    which = b.column(found, 2)
    boxes = b.op("Gather", b.op("Squeeze", boxes, b.ints(0)), which, axis=0)
    best = b.op("GatherND", scores, found)
    cases = [[normal(1, 3, 32, 32, scale=s)] for s in (1.0, 0.5, 0.01, 1.5, 2.0, 0.8)]
    b.write(cases, boxes=(boxes, FLOAT), scores=(best, FLOAT), classes=(b.column(found, 1), INT))


def places():
    b = Staged("places")
    x = b.take("x", 6, 5)
    where = b.op("NonZero", b.op("Greater", x, b.number(1.0)))
    where = b.op("Transpose", where, perm=[1, 0])
    values = b.op("GatherND", x, where)
    cases = [[normal(6, 5)], [normal(6, 5, scale=0.1)], [normal(6, 5, scale=9.0)]]
    b.write(cases, where=(where, INT), values=(values, FLOAT),
            total=(b.op("ReduceSum", values, keepdims=0), FLOAT))


def rows():
    b = Staged("rows")
    x = b.take("x", "n", 16)
    large = b.op("Greater", b.op("ReduceSum", x, b.ints(1), keepdims=0), b.number(0.0))
    some = b.op("Compress", x, large, axis=0)
    y = b.op("MatMul", some, b.weight(16, 8, fan_in=16))
    y = b.op("Softmax", b.op("Add", y, b.weight(8, scale=0.3)), axis=-1)
    cases = [[normal(n, 16)] for n in (9, 9, 12, 40)] + [[-np.ones((5, 16), np.float32)]]
    b.write(cases, y=(y, FLOAT))


def words():
    b = Staged("words")
    x = b.take("x", 24)
    codes = b.op("Floor", b.op("Mul", x, b.number(2.0)))
    each, _, which, counts = b.ops("Unique", 4, codes, sorted=1)
    often = b.op("Gather", counts, which, axis=0)
    b.write([[normal(24)], [normal(24, scale=4.0)], [np.zeros(24, np.float32)]],
            each=(each, FLOAT), counts=(counts, INT), often=(often, INT),
            mean=(b.op("ReduceMean", each, keepdims=0), FLOAT))


def twice():
    """What is left of what is left, and of it as many as there may be."""
    b = Staged("twice")
    x = b.take("x", 60)
    first = b.op("Compress", x, b.op("Greater", x, b.number(0.0)), axis=0)
    rest = b.op("Mul", first, b.weight(1, scale=1.0))
    second = b.op("Compress", rest, b.op("Less", first, b.number(1.0)), axis=0)
    count = b.op("Min", b.op("Shape", second), b.ints(3))
    best, _ = b.ops("TopK", 2, second, count, axis=0)
    b.write([[normal(60)], [normal(60)], [np.full(60, -1, np.float32)], [normal(60, scale=0.1)]],
            second=(second, FLOAT), best=(best, FLOAT))


def numbers():
    """A shape that is the value of data, not their number."""
    b = Staged("numbers")
    x = b.take("x", 4, 3)
    above = b.op("Cast", b.op("Greater", x, b.number(0.0)), to=INT)
    count = b.op("ReduceSum", above, keepdims=0)
    steps = b.op("Range", b.scalar(np.int64(0)), count, b.scalar(np.int64(1)))
    wide = b.op("Mul", b.op("Cast", steps, to=FLOAT), b.op("ReduceMax", x, keepdims=0))
    b.write([[normal(4, 3)], [normal(4, 3)], [-np.ones((4, 3), np.float32)]], y=(wide, FLOAT))


def branches():
    b = Staged("branches")
    x = b.take("x", 2, 6)
    condition = b.op("Greater", b.op("ReduceSum", x, keepdims=0), b.number(0.0))
    info = [helper.make_tensor_value_info("r", FLOAT, None)]
    neg = helper.make_graph([helper.make_node("Neg", [x], ["r"])], "neg", [], info)
    longest = helper.make_node("ReduceMax", [x], ["r"], keepdims=0)
    y = b.op("If", condition, then_branch=neg, else_branch=helper.make_graph([longest], "max", [], info))
    y = b.op("Exp", y)
    b.write([[np.ones((2, 6), np.float32)], [-np.ones((2, 6), np.float32)], [normal(2, 6)]],
            y=(y, FLOAT))


def turns():
    """Doubled until it is large, with what it was in every turn."""
    b = Staged("turns")
    x = b.take("x", 4)
    start = b.op("Mul", x, x)
    step = b.weight(4, scale=0.5)
    value = lambda name, kind, shape: helper.make_tensor_value_info(name, kind, shape)
    nodes = [
        helper.make_node("Add", ["y", "y"], ["twice"]),
        helper.make_node("Add", ["twice", step], ["next"]),
        helper.make_node("ReduceMax", ["next"], ["top"], keepdims=0),
        helper.make_node("Less", ["top", "limit"], ["again"]),
        helper.make_node("Identity", ["y"], ["was"]),
    ]
    limit = numpy_helper.from_array(np.array(50, np.float32), "limit")
    body = helper.make_graph(
        nodes, "body",
        [value("i", INT, []), value("going", TensorProto.BOOL, []), value("y", FLOAT, [4])],
        [value("again", TensorProto.BOOL, []), value("next", FLOAT, [4]), value("was", FLOAT, [4])],
        [limit])
    last, all_of_them = b.ops("Loop", 2, "", b.scalar(np.bool_(True)), start, body=body)
    b.write([[np.full(4, v, np.float32)] for v in (0.3, 1.0, 3.0, 9.0)],
            last=(last, FLOAT), rows=(all_of_them, FLOAT))


VALUE = helper.make_tensor_value_info


def steps():
    """As many turns as data say, over a weight and a value from outside."""
    b = Staged("steps")
    x = b.take("x", 3, 8)
    count = b.op("ReduceSum", b.op("Cast", b.op("Greater", x, b.number(0.0)), to=INT), keepdims=0)
    weight, bias = b.weight(8, 8, scale=0.3), b.op("Tanh", x)
    nodes = [
        helper.make_node("MatMul", ["h", weight], ["product"]),
        helper.make_node("Add", ["product", bias], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["next"]),
        helper.make_node("Identity", ["going"], ["again"]),
        helper.make_node("ReduceSum", ["next"], ["row"], keepdims=0),
    ]
    body = helper.make_graph(
        nodes, "body", [VALUE("i", INT, []), VALUE("going", TensorProto.BOOL, []), VALUE("h", FLOAT, [3, 8])],
        [VALUE("again", TensorProto.BOOL, []), VALUE("next", FLOAT, [3, 8]), VALUE("row", FLOAT, [])])
    last, rows_ = b.ops("Loop", 2, count, "", x, body=body)
    b.write([[normal(3, 8)], [normal(3, 8)], [np.full((3, 8), -0.5, np.float32)]],
            last=(last, FLOAT), rows=(rows_, FLOAT), mean=(b.op("ReduceSum", rows_, keepdims=0), FLOAT))


def growth():
    """What is carried grows by what is large, until there is enough of it."""
    b = Staged("growth")
    x = b.take("x", 6)
    nodes = [
        helper.make_node("Cast", ["i"], ["number"], to=FLOAT),
        helper.make_node("Sub", [x, "number"], ["less"]),
        helper.make_node("Greater", ["less", "limit"], ["large"]),
        helper.make_node("Compress", ["less", "large"], ["some"], axis=0),
        helper.make_node("Concat", ["list", "some"], ["more"], axis=0),
        helper.make_node("Size", ["more"], ["size"]),
        helper.make_node("Less", ["size", "enough"], ["small"]),
        helper.make_node("Less", ["i", "turns"], ["early"]),
        helper.make_node("And", ["small", "early"], ["again"]),
    ]
    weights = [numpy_helper.from_array(np.array(v), n)
               for n, v in (("limit", np.float32(-2)), ("enough", np.int64(12)), ("turns", np.int64(9)))]
    body = helper.make_graph(
        nodes, "body", [VALUE("i", INT, []), VALUE("going", TensorProto.BOOL, []), VALUE("list", FLOAT, ["n"])],
        [VALUE("again", TensorProto.BOOL, []), VALUE("more", FLOAT, ["m"])], weights)
    start = b.op("Greater", b.op("ReduceMax", x, keepdims=0), b.scalar(np.float32(-1)))
    last = b.op("Loop", "", start, b.op("Neg", x), body=body)
    b.write([[normal(6)], [normal(6, scale=3.0)], [np.full(6, -3, np.float32)], [np.zeros(6, np.float32)]],
            y=(b.op("Abs", last), FLOAT))


def bounds():
    """Bounds of which one is known in some stages only, beside results whose number varies."""
    b = Staged("bounds")
    x = b.take("x", 4, 20)
    where = b.op("Transpose", b.op("NonZero", b.op("Greater", x, b.number(1.0))), perm=[1, 0])
    above = b.op("Cast", b.op("Greater", x, b.number(0.5)), to=INT)
    count = b.op("Min", b.op("ReduceSum", above, keepdims=0), b.ints(20))
    starts = b.op("ConstantOfShape", b.ints(2), value=helper.make_tensor("v", INT, [1], [0]))
    ends = b.op("Concat", b.ints(4), count, axis=0)
    y = b.op("Mul", b.op("Slice", x, starts, ends), b.number(2.0))
    b.write([[normal(4, 20)], [normal(4, 20)], [normal(4, 20, scale=0.4)], [normal(4, 20, scale=0.01)]],
            y=(y, FLOAT), values=(b.op("GatherND", x, where), FLOAT))


def maybe():
    """A loop over rows, of which there may be none: then nothing hangs on data."""
    b = Staged("maybe")
    x = b.take("x", "n", 3)
    count = b.op("Gather", b.op("Shape", x), b.scalar(np.int64(0)), axis=0)
    start = b.op("ReduceSum", b.op("Concat", x, b.weight(1, 3, scale=1.0), axis=0), b.ints(0),
                 keepdims=0)
    nodes = [
        helper.make_node("Add", ["y", "y"], ["next"]),
        helper.make_node("ReduceMax", ["next"], ["top"], keepdims=0),
        helper.make_node("Less", ["top", "limit"], ["again"]),
    ]
    body = helper.make_graph(
        nodes, "body", [VALUE("i", INT, []), VALUE("going", TensorProto.BOOL, []), VALUE("y", FLOAT, [3])],
        [VALUE("again", TensorProto.BOOL, []), VALUE("next", FLOAT, [3])],
        [numpy_helper.from_array(np.float32(6), "limit")])
    y = b.op("Loop", count, "", start, body=body)
    b.write([[normal(n, 3)] for n in (0, 5, 0, 9)], y=(b.op("Neg", y), FLOAT))


def pieces():
    """One of several values, of which data say the place."""
    b = Staged("pieces")
    x = b.take("x", 3, 4)
    parts = b.op("SplitToSequence", b.op("Exp", x), axis=0, keepdims=0)
    best = b.op("ArgMax", b.op("ReduceMax", x, axes=[1], keepdims=0), axis=0, keepdims=0)
    y = b.op("SequenceAt", parts, best)
    b.write([[normal(3, 4)], [normal(3, 4)], [normal(3, 4)]], y=(b.op("Log", y), FLOAT))


if __name__ == "__main__":
    for model in (detector, places, rows, words, twice, numbers, branches, turns, steps, growth,
                  bounds, maybe, pieces):
        model()
