"""Transformers in the forms that exporters write, each at opset 20 and 23.

At opset 20 attention, RMSNorm, GELU and rotary positions are spelled out, node for node as
torch.onnx (dynamo) writes them: linear layers as MatMul with a Transpose over the weight, attention
scaled on both sides with the IsNaN guard after a softmax that was masked, heads that share keys by
Expand. At opset 23 they are single operators. Both twins, and the prefill and decode steps of a
decoder, read one file of weights, which is a hard link in each folder.
"""
import os
import zlib

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from common import MODELS, Builder, run, save

SEQUENCE, VOCABULARY = 128, 8192


class Weights:
    """Seeded weights by name, in one file that several models refer to."""

    def __init__(self, family):
        self.path = os.path.join(MODELS, f"{family}.weights")
        self.file = open(self.path, "wb")
        self.places = {}

    def place(self, name, shape, scale, shift):
        """Where a weight lies; it is drawn when it is first asked for."""
        if name not in self.places:
            random = np.random.default_rng(zlib.crc32(name.encode()))
            array = random.standard_normal(shape, dtype=np.float32)
            array = array * np.float32(scale) + np.float32(shift)
            offset = self.file.seek(-(-self.file.tell() // 64) * 64)
            self.file.write(array.tobytes())
            self.places[name] = (offset, array.nbytes)
        return self.places[name]

    def close(self):
        """The file goes; the links in the folders of the models stay."""
        self.file.close()
        os.remove(self.path)


class Transformer(Builder):
    """What both forms share."""

    def __init__(self, family, weights, step=""):
        super().__init__(f"{family}{step}_opset{self.OPSET}", self.OPSET)
        self.file, self.shared, self.outputs = weights, {}, []

    def constant(self, array):
        """A number stays one of rank 0."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def weight(self, name, *shape, scale=0.02, shift=0.0):
        """A weight in the shared file."""
        if name not in self.shared:
            offset, length = self.file.place(name, shape, scale, shift)
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": "weights.bin", "offset": offset, "length": length}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            self.weights.append(tensor)
            self.shared[name] = name
        return name

    def given(self, name, array):
        """An input with its value."""
        self.feed[name] = array
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        self.inputs.append(helper.make_tensor_value_info(name, dtype, array.shape))
        return name

    def floats(self, name, *shape):
        """An input of random numbers, the same for both twins."""
        random = np.random.default_rng(zlib.crc32(name.encode()))
        return self.given(name, random.standard_normal(shape, dtype=np.float32))

    def ids(self, name, count, high):
        random = np.random.default_rng(zlib.crc32(name.encode()))
        return self.given(name, random.integers(0, high, (1, count), dtype=np.int64))

    def output(self, name, value, *shape):
        """An output of the model, by its own name."""
        self.nodes.append(helper.make_node("Identity", [value], [name], f"/output/{name}"))
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def ops(self, kind, *args, count, **attributes):
        """A node with several results."""
        name = self.op(kind, *args, **attributes)
        names = [name] + [f"{name}_{k}" for k in range(1, count)]
        del self.nodes[-1].output[:]
        self.nodes[-1].output.extend(names)
        return names

    def reshape(self, x, *shape):
        return self.op("Reshape", x, self.ints(*shape), allowzero=1)

    def linear(self, x, name, inputs, outputs, bias=True):
        weight = self.weight(f"{name}.weight", outputs, inputs, scale=1 / np.sqrt(inputs))
        y = self.op("MatMul", x, self.op("Transpose", weight, perm=[1, 0]))
        return self.op("Add", y, self.weight(f"{name}.bias", outputs)) if bias else y

    def norm(self, x, name, width, epsilon=1e-5):
        gain = self.weight(f"{name}.weight", width, scale=0.1, shift=1)
        shift = self.weight(f"{name}.bias", width, scale=0.1)
        return self.op("LayerNormalization", x, gain, shift, axis=-1, epsilon=epsilon)

    def tanh_gelu(self, x):
        """GPT-2's own, which exporters always spell out."""
        cube = self.op("Mul", self.op("Pow", x, self.number(3)), self.number(0.044715))
        inner = self.op("Mul", self.op("Add", x, cube), self.number(np.sqrt(2 / np.pi)))
        outer = self.op("Add", self.op("Tanh", inner), self.number(1))
        return self.op("Mul", self.op("Mul", x, self.number(0.5)), outer)

    def silu(self, x):
        return self.op("Mul", x, self.op("Sigmoid", x))

    def heads(self, x, count, width):
        """[1, s, count * width] as [1, count, s, width]."""
        apart = self.op("Reshape", x, self.ints(1, -1, count, width))
        return self.op("Transpose", apart, perm=[0, 2, 1, 3])

    def joined(self, x, width):
        """The other way."""
        together = self.op("Transpose", x, perm=[0, 2, 1, 3])
        return self.op("Reshape", together, self.ints(1, -1, width))

    def mask(self, causal):
        """Which keys a query sees, as the exporter writes transformers' masks."""
        lengths = np.ones((1, SEQUENCE), np.int64)
        if not causal:
            lengths[0, SEQUENCE - 17 :] = 0
        given = self.op("Cast", self.given("attention_mask", lengths), to=TensorProto.BOOL)
        index = np.zeros((1, 1, SEQUENCE, SEQUENCE, 2), np.int64)
        index[..., 1] = np.arange(SEQUENCE)
        seen = self.op("GatherND", given, self.constant(index), batch_dims=0)
        allowed = np.ones((1, 1, SEQUENCE, SEQUENCE), bool)
        return self.op("And", self.constant(np.tril(allowed) if causal else allowed), seen)

    def finish(self):
        folder = os.path.join(MODELS, self.name)
        os.makedirs(folder, exist_ok=True)
        link = os.path.join(folder, "weights.bin")
        if os.path.exists(link):
            os.remove(link)
        self.file.file.flush()
        os.link(self.file.path, link)
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, self.weights)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, ir_version=10, opset_imports=opsets)


class Decomposed(Transformer):
    """Opset 20: everything spelled out."""

    OPSET = 20

    def gelu(self, x):
        erf = self.op("Erf", self.op("Div", x, self.number(np.sqrt(2))))
        y = self.op("Mul", x, self.op("Add", erf, self.number(1)))
        return self.op("Mul", y, self.number(0.5))

    def rms(self, x, name, width):
        mean = self.op("ReduceMean", self.op("Pow", x, self.number(2)), self.ints(-1))
        root = self.op("Sqrt", self.op("Add", mean, self.number(1e-6)))
        y = self.op("Mul", x, self.op("Reciprocal", root))
        return self.op("Mul", self.weight(f"{name}.weight", width, scale=0.1, shift=1), y)

    def turns(self, positions, width):
        """Cosines and sines, computed of the positions, and of shape [1, 1, s, width]."""
        powers = 1 / 10000.0 ** (np.arange(0, width, 2, dtype=np.float32) / width)
        powers = self.constant(powers.reshape(1, width // 2, 1).astype(np.float32))
        row = self.op("Cast", self.op("Unsqueeze", positions, self.ints(1)), to=TensorProto.FLOAT)
        angles = self.op("Transpose", self.op("MatMul", powers, row), perm=[0, 2, 1])
        angles = self.op("Concat", angles, angles, axis=-1)
        turn = lambda f: self.op("Mul", self.op(f, angles), self.number(1))
        return [self.op("Unsqueeze", turn(f), self.ints(1)) for f in ("Cos", "Sin")]

    def rope(self, x, turns, width):
        ends = [(0, width // 2), (width // 2, 2**63 - 1)]
        cut = lambda e: self.op("Slice", x, self.ints(e[0]), self.ints(e[1]), self.ints(3))
        first, second = map(cut, ends)
        turned = self.op("Concat", self.op("Neg", second), first, axis=-1)
        return self.op("Add", self.op("Mul", x, turns[0]), self.op("Mul", turned, turns[1]))

    def attention(self, q, k, v, shape, past=None, mask=None, causal=False):
        """Queries, keys and values of rank 3; returns the same, and keys and values as they are."""
        heads, own, width = shape
        q = self.heads(q, heads, width) if isinstance(q, str) else q[0]
        k = self.heads(k, own, width) if isinstance(k, str) else k[0]
        v = self.heads(v, own, width)
        if past:
            k, v = (self.op("Concat", p, x, axis=-2) for p, x in zip(past, (k, v)))
        kept = (k, v)
        if own != heads:
            k, v = (self.shared_heads(x, heads, own, width) for x in kept)
        y = self.scaled(q, k, v, heads, width, mask)
        return self.joined(y, heads * width), *kept

    def shared_heads(self, x, heads, own, width):
        apart = self.op("Unsqueeze", x, self.ints(2))
        spread = self.op("Expand", apart, self.ints(1, 1, heads // own, 1, 1))
        return self.op("Reshape", spread, self.ints(1, heads, -1, width))

    def scaled(self, q, k, v, heads, width, mask):
        scale = self.number(np.sqrt(1 / np.sqrt(width)))
        flat = self.op("Reshape", k, self.ints(heads, -1, width))
        flipped = self.op("Transpose", flat, perm=[0, 2, 1])
        k = self.op("Reshape", flipped, self.ints(1, heads, width, -1))
        scores = self.op("MatMul", self.op("Mul", q, scale), self.op("Mul", k, scale))
        if mask is None:
            return self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        bias = self.op("Where", mask, self.number(0), self.number(-np.inf))
        shares = self.op("Softmax", self.op("Add", scores, bias), axis=-1)
        shares = self.op("Where", self.op("IsNaN", shares), self.number(0), shares)
        return self.op("MatMul", shares, v)


class Composed(Transformer):
    """Opset 23: single operators."""

    OPSET = 23

    def gelu(self, x):
        return self.op("Gelu", x)

    def tanh_gelu(self, x):
        return self.op("Gelu", x, approximate="tanh")

    def rms(self, x, name, width):
        gain = self.weight(f"{name}.weight", width, scale=0.1, shift=1)
        return self.op("RMSNormalization", x, gain, axis=-1, epsilon=1e-6)

    def turns(self, positions, width):
        powers = 1 / 10000.0 ** (np.arange(0, width, 2) / width)
        angles = np.arange(2 * SEQUENCE)[:, None] * powers
        tables = (np.cos(angles), np.sin(angles))
        return [self.constant(t.astype(np.float32)) for t in tables] + [positions]

    def rope(self, x, turns, width):
        return self.op("RotaryEmbedding", x, *turns)

    def attention(self, q, k, v, shape, past=None, mask=None, causal=False):
        heads, own, width = shape
        flat = isinstance(q, str)  # operands of rank 3, with the heads in an attribute
        attributes = {"is_causal": 1} if causal else {}
        if flat:
            attributes |= {"q_num_heads": heads, "kv_num_heads": own}
        else:
            q, k, v = q[0], k[0], self.heads(v, own, width)
        args = [q, k, v, "" if causal or mask is None else mask, *(past or ())]
        y, *kept = self.ops("Attention", *args, count=3, **attributes)
        return y if flat else self.joined(y, heads * width), *kept


def bert(b, layers, width, heads):
    ids, mask = b.ids("input_ids", SEQUENCE, VOCABULARY), b.mask(False)
    kinds = b.given("token_type_ids", np.arange(SEQUENCE, dtype=np.int64)[None] // 64)
    table = lambda name, rows: b.weight(f"{name}.weight", rows, width, scale=0.5)
    x = b.op("Gather", table("words", VOCABULARY), ids, axis=0)
    x = b.op("Add", x, b.op("Gather", table("kinds", 2), kinds, axis=0))
    places = b.constant(np.arange(SEQUENCE, dtype=np.int64)[None])
    x = b.op("Add", x, b.op("Gather", table("places", 512), places, axis=0))
    x = b.norm(x, "norm", width, 1e-12)
    for i in range(layers):
        q, k, v = (b.linear(x, f"{i}.{p}", width, width) for p in "qkv")
        y, *_ = b.attention(q, k, v, (heads, heads, width // heads), mask=mask)
        x = b.norm(b.op("Add", b.linear(y, f"{i}.o", width, width), x), f"{i}.n1", width, 1e-12)
        y = b.gelu(b.linear(x, f"{i}.up", width, 4 * width))
        y = b.linear(y, f"{i}.down", 4 * width, width)
        x = b.norm(b.op("Add", y, x), f"{i}.n2", width, 1e-12)
    b.output("last_hidden_state", x, 1, SEQUENCE, width)
    first = b.op("Gather", x, b.constant(np.array(0, np.int64)), axis=1)
    weight = b.weight("pooler.weight", width, width, scale=1 / np.sqrt(width))
    pooled = b.op("Gemm", first, weight, b.weight("pooler.bias", width), transB=1)
    b.output("pooler_output", b.op("Tanh", pooled), 1, width)


def cached(b, layer, heads, width):
    """The keys and values of the tokens before, as inputs."""
    names = (f"past_key_values.{layer}.{p}" for p in ("key", "value"))
    return [b.floats(name, 1, heads, SEQUENCE, width) for name in names]


def gpt2(b, decode, layers=12, width=768, heads=12):
    """Linear layers of GPT-2 are Gemms over [tokens, width]."""
    rows = 1 if decode else SEQUENCE
    size = width // heads

    def gemm(x, name, inputs, outputs):
        weight = b.weight(f"{name}.weight", inputs, outputs, scale=1 / np.sqrt(inputs))
        y = b.op("Gemm", b.reshape(x, -1, inputs), weight, b.weight(f"{name}.bias", outputs))
        return b.reshape(y, 1, rows, outputs)

    ids = b.ids("input_ids", rows, VOCABULARY)
    places = np.arange(rows, dtype=np.int64)[None] + (SEQUENCE if decode else 0)
    places = b.given("position_ids", places) if decode else b.constant(places)
    mask = None if decode else b.mask(True)
    words = b.weight("words", VOCABULARY, width, scale=0.5)
    x = b.op("Gather", words, ids, axis=0)
    x = b.op("Add", x, b.op("Gather", b.weight("places", 1024, width, scale=0.5), places, axis=0))
    for i in range(layers):
        past = cached(b, i, heads, size) if decode else None
        y = gemm(b.norm(x, f"{i}.n1", width), f"{i}.qkv", width, 3 * width)
        q, k, v = b.ops("Split", y, b.ints(width, width, width), count=3, axis=2)
        shape = (heads, heads, size)
        y, key, value = b.attention(q, k, v, shape, past, mask, causal=not decode)
        x = b.op("Add", gemm(y, f"{i}.o", width, width), x)
        y = b.tanh_gelu(gemm(b.norm(x, f"{i}.n2", width), f"{i}.up", width, 4 * width))
        x = b.op("Add", x, gemm(y, f"{i}.down", 4 * width, width))
        for name, kept in (("key", key), ("value", value)):
            total = rows + (SEQUENCE if decode else 0)
            b.output(f"present.{i}.{name}", kept, 1, heads, total, size)
    x = b.norm(x, "norm", width)
    y = b.op("MatMul", x, b.op("Transpose", words, perm=[1, 0]))
    b.output("logits", y, 1, rows, VOCABULARY)


def llama(b, decode, layers=4, width=512, heads=8, own=2, hidden=1408, vocabulary=4096):
    rows, size = 1 if decode else SEQUENCE, width // heads
    ids = b.ids("input_ids", rows, vocabulary)
    places = np.arange(rows, dtype=np.int64)[None] + (SEQUENCE if decode else 0)
    places = b.given("position_ids", places)
    mask = None if decode else b.mask(True)
    x = b.op("Gather", b.weight("words", vocabulary, width, scale=0.5), ids, axis=0)
    turns = b.turns(places, size)
    for i in range(layers):
        past = cached(b, i, own, size) if decode else None
        y = b.rms(x, f"{i}.n1", width)
        project = lambda p, n: b.linear(y, f"{i}.{p}", width, n * size, bias=False)
        q, k = (b.heads(project(p, n), n, size) for p, n in (("q", heads), ("k", own)))
        v = project("v", own)
        q, k = b.rope(q, turns, size), b.rope(k, turns, size)
        y, key, value = b.attention([q], [k], v, (heads, own, size), past, mask, not decode)
        x = b.op("Add", x, b.linear(y, f"{i}.o", width, width, bias=False))
        y = b.rms(x, f"{i}.n2", width)
        gate = b.silu(b.linear(y, f"{i}.gate", width, hidden, bias=False))
        y = b.op("Mul", gate, b.linear(y, f"{i}.up", width, hidden, bias=False))
        x = b.op("Add", x, b.linear(y, f"{i}.down", hidden, width, bias=False))
        for name, kept in (("key", key), ("value", value)):
            total = rows + (SEQUENCE if decode else 0)
            b.output(f"present.{i}.{name}", kept, 1, own, total, size)
    y = b.linear(b.rms(x, "norm", width), "head", width, vocabulary, bias=False)
    b.output("logits", y, 1, rows, vocabulary)


def vit(b, layers=12, width=768, heads=12, patches=196):
    """Queries, keys and values come of one product, as torch's own attention layer has it."""
    size, rows = width // heads, patches + 1
    image = b.floats("pixel_values", 1, 3, 224, 224)
    kernel = b.weight("patch.weight", width, 3, 16, 16, scale=1 / np.sqrt(768))
    x = b.op("Conv", image, kernel, b.weight("patch.bias", width), strides=[16, 16])
    x = b.op("Transpose", b.reshape(x, 1, width, patches), perm=[0, 2, 1])
    x = b.op("Concat", b.weight("class", 1, 1, width), x, axis=1)
    x = b.op("Add", x, b.weight("places", 1, rows, width))
    for i in range(layers):
        y = b.op("Transpose", b.norm(x, f"{i}.n1", width, 1e-6), perm=[1, 0, 2])
        y = b.reshape(b.linear(y, f"{i}.qkv", width, 3 * width), rows, 1, 3, width)
        y = b.op("Transpose", b.op("Unsqueeze", y, b.ints(0)), perm=[3, 1, 2, 0, 4])
        y = b.op("Squeeze", y, b.ints(3))
        part = lambda k: b.op("Gather", y, b.constant(np.array(k, np.int64)), axis=0)
        apart = lambda k: b.op("Transpose", b.reshape(part(k), rows, heads, size), perm=[1, 0, 2])
        q, k, v = (b.reshape(apart(k), 1, heads, rows, size) for k in range(3))
        y = b.unmasked(q, k, v, heads, size)
        y = b.reshape(b.op("Transpose", y, perm=[2, 0, 1, 3]), rows, width)
        weight = b.weight(f"{i}.o.weight", width, width, scale=1 / np.sqrt(width))
        y = b.op("Gemm", y, weight, b.weight(f"{i}.o.bias", width), transB=1)
        y = b.op("Transpose", b.reshape(y, rows, 1, width), perm=[1, 0, 2])
        x = b.op("Add", y, x)
        y = b.gelu(b.linear(b.norm(x, f"{i}.n2", width, 1e-6), f"{i}.up", width, 4 * width))
        x = b.op("Add", x, b.linear(y, f"{i}.down", 4 * width, width))
    first = b.op("Gather", b.norm(x, "norm", width, 1e-6), b.constant(np.array(0)), axis=1)
    weight = b.weight("head.weight", 1000, width, scale=1 / np.sqrt(width))
    b.output("logits", b.op("Gemm", first, weight, b.weight("head.bias", 1000), transB=1), 1, 1000)


def whisper(b, layers=6, width=512, heads=8, frames=3000):
    size, rows = width // heads, frames // 2
    x = b.floats("input_features", 1, 80, frames)
    for k, (inputs, stride) in enumerate(((80, 1), (width, 2))):
        kernel = b.weight(f"conv{k}.weight", width, inputs, 3, scale=1 / np.sqrt(3 * inputs))
        bias = b.weight(f"conv{k}.bias", width)
        x = b.gelu(b.op("Conv", x, kernel, bias, pads=[1, 1], strides=[stride]))
    x = b.op("Add", b.op("Transpose", x, perm=[0, 2, 1]), b.weight("places", rows, width))
    for i in range(layers):
        y = b.norm(x, f"{i}.n1", width)
        parts = [b.linear(y, f"{i}.{p}", width, width, bias=p != "k") for p in "qkv"]
        q, k, v = (b.heads(p, heads, size) for p in parts)
        y = b.joined(b.unmasked(q, k, v, heads, size), width)
        x = b.op("Add", x, b.linear(y, f"{i}.o", width, width))
        y = b.gelu(b.linear(b.norm(x, f"{i}.n2", width), f"{i}.up", width, 4 * width))
        x = b.op("Add", x, b.linear(y, f"{i}.down", 4 * width, width))
    b.output("last_hidden_state", b.norm(x, "norm", width), 1, rows, width)


Decomposed.unmasked = lambda b, q, k, v, heads, size: b.scaled(q, k, v, heads, size, None)
Composed.unmasked = lambda b, q, k, v, heads, size: b.op("Attention", q, k, v)


def make(family, steps):
    """The twins of a family; outputs are those of opset 20 by onnxruntime, for both."""
    weights = Weights(family)
    for step, build in steps.items():
        stored = None
        for form in (Decomposed, Composed):
            b = form(family, weights, step)
            build(b)
            model = b.finish()
            folder = os.path.join(MODELS, b.name)
            if stored is None:
                stored = save(b.name, model, b.feed)
                continue
            save(b.name, model, b.feed, stored)
            names = [v.name for v in model.graph.output]
            outputs = run(os.path.join(folder, "model.onnx"), names, b.feed)
            for name, x, y in zip(names, outputs, stored):
                far = np.abs(x - y).max() / np.abs(y).max()
                assert x.shape == y.shape and far < 1e-4, (b.name, name, x.shape, y.shape, far)
    weights.close()


if __name__ == "__main__":
    os.makedirs(MODELS, exist_ok=True)
    make("minilm", {"": lambda b: bert(b, 6, 384, 12)})
    make("bert_base", {"": lambda b: bert(b, 12, 768, 12)})
    for family, decoder in (("gpt2", gpt2), ("llama", llama)):
        steps = {"_prefill": False, "_decode": True}
        make(family, {s: lambda b, d=d, f=decoder: f(b, d) for s, d in steps.items()})
    make("vit_b16", {"": vit})
    make("whisper_encoder", {"": whisper})
