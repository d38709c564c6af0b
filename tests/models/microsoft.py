"""Cases of onnxruntime's own operators, with what it says of them."""
import os
import shutil

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from common import MODELS, save

RANDOM = np.random.default_rng(20261127)


def normal(*shape):
    return RANDOM.standard_normal(shape, dtype=np.float32)


def case(name, op, inputs, outputs=1, fixed=(), first=False, **attributes):
    """One node: operands by position (None is absent), of which those named in `fixed` are
    constants of the model. Only the first output is kept where that is asked for."""
    names = ["" if array is None else f"x{k}" for k, array in enumerate(inputs)]
    given = {n: a for n, a in zip(names, inputs) if n}
    results = [f"y{k}" if keep else "" for k, keep in enumerate(outputs)] \
        if isinstance(outputs, (list, tuple)) else [f"y{k}" for k in range(outputs)]
    node = helper.make_node(op, names, results, op.lower(), domain="com.microsoft", **attributes)
    kind = lambda a: helper.np_dtype_to_tensor_dtype(a.dtype)
    ports = [helper.make_tensor_value_info(n, kind(a), a.shape) for n, a in given.items()
             if n not in fixed]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in results if n]
    weights = [numpy_helper.from_array(given[n], n) for n in fixed]
    graph = helper.make_graph([node], name, ports, ends, weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    shutil.rmtree(os.path.join(MODELS, name), ignore_errors=True)
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    save(name, model, {n: a for n, a in given.items() if n not in fixed})
    if first:
        for k in range(1, len(results)):
            os.remove(os.path.join(MODELS, name, f"output_{k}.pb"))


def functions():
    x, bias = normal(3, 5, 16), normal(16)
    case("fast_gelu", "FastGelu", [x])
    case("fast_gelu_bias", "FastGelu", [x, bias])
    case("bias_gelu", "BiasGelu", [x, bias])
    case("quick_gelu", "QuickGelu", [x], alpha=1.3)


def norms():
    x, skip = normal(2, 7, 32), normal(2, 7, 32)
    gamma, beta, bias = normal(32), normal(32), normal(32)
    sums = [1, 0, 0, 1]
    case("skip_layer_norm", "SkipLayerNormalization", [x, skip, gamma, beta], epsilon=1e-5)
    case("skip_layer_norm_bias", "SkipLayerNormalization", [x, skip, gamma, beta, bias], sums)
    case("skip_layer_norm_repeats", "SkipLayerNormalization", [x, skip[:1], gamma, beta])
    case("skip_rms_norm", "SkipSimplifiedLayerNormalization", [x, skip, gamma], sums, epsilon=1e-6)
    case("skip_rms_norm_bias", "SkipSimplifiedLayerNormalization", [x, skip, gamma, bias], sums)


def tables(length, half):
    angle = np.arange(length)[:, None] / 100 ** (np.arange(half) / half)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotary():
    cos, sin = tables(20, 8)
    positions = np.array([[3, 4, 5], [0, 1, 2]], np.int64)
    case("rotary_wide", "RotaryEmbedding", [normal(2, 3, 64), positions, cos, sin])
    case("rotary_offset", "RotaryEmbedding", [normal(2, 3, 64), np.array([4], np.int64), cos, sin])
    heads = normal(2, 4, 3, 16)
    case("rotary_heads", "RotaryEmbedding", [heads, positions, cos, sin], interleaved=1)
    part = [normal(2, 3, 4 * 24), positions, cos, sin]
    case("rotary_part", "RotaryEmbedding", part, num_heads=4, rotary_embedding_dim=16)


def multi_head():
    q, k, v = normal(2, 5, 32), normal(2, 7, 32), normal(2, 7, 48)
    op = "MultiHeadAttention"
    case("heads", op, [q, k, v], num_heads=4)
    case("heads_bias", op, [q, k, v, normal(32 + 32 + 48)], num_heads=4)
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3], np.int32)
    case("heads_mask", op, [q, k, v, None, mask], num_heads=4)
    case("heads_lengths", op, [q, k, v, None, np.array([7, 3], np.int32)], num_heads=4)
    case("heads_added", op, [q, k, v, None, None, normal(1, 4, 5, 7)], num_heads=4, scale=0.2)
    own = [normal(2, 5, 32) for _ in range(3)]
    case("heads_causal", op, own, num_heads=4, unidirectional=1)
    past = [normal(2, 4, 6, 8), normal(2, 4, 6, 8)]
    case("heads_past", op, own + [None, None, None] + past, 3, num_heads=4)
    ready = [q, normal(2, 4, 7, 8), normal(2, 4, 7, 8)]
    case("heads_ready", op, ready, num_heads=4)


def grouped():
    op, heads = "GroupQueryAttention", {"num_heads": 4, "kv_num_heads": 2}
    total = lambda n: np.array(n, np.int32)

    def run(name, steps, past, lengths, rotary=False, packed=False, **attributes):
        batch = len(lengths)
        q, k, v = normal(batch, steps, 64), normal(batch, steps, 32), normal(batch, steps, 32)
        qkv = [np.concatenate([q, k, v], 2), None, None] if packed else [q, k, v]
        caches = [normal(batch, 2, past, 16), normal(batch, 2, past, 16)]
        ends = np.array(lengths, np.int32) - 1
        inputs = qkv + caches + [ends, total(past + steps)]
        if rotary:
            inputs += tables(40, 8)
            attributes["do_rotary"] = 1
        case(name, op, inputs, 3, fixed=["x6"], **heads, **attributes)

    run("grouped_prompt", 6, 0, [6, 6])
    run("grouped_prompt_short", 6, 0, [6, 4])
    run("grouped_step", 1, 9, [10, 10])
    run("grouped_rotary", 6, 0, [6, 6], rotary=True)
    run("grouped_rotary_step", 1, 9, [10, 10], rotary=True, rotary_interleaved=1)
    run("grouped_packed", 1, 9, [10], rotary=True, packed=True)
    run("grouped_window", 6, 0, [6], local_window_size=3)
    run("grouped_cap", 6, 0, [6], softcap=5.0, scale=0.3)
    # What lies behind the end of a short batch in a cache is nobody's business.
    run("grouped_ragged", 1, 9, [10, 6], rotary=True, first=True)


def bits():
    op = "MatMulNBits"

    def run(name, n, k, bits, block, zeros, bias=False):
        blocks = -(-k // block)
        packed = RANDOM.integers(0, 256, (n, blocks, block * bits // 8), np.uint8)
        scales = np.abs(normal(n * blocks)) * 0.1
        inputs = [normal(3, 2, k), packed, scales.astype(np.float32)]
        if zeros:
            inputs.append(RANDOM.integers(0, 256, n * -(-blocks * bits // 8), np.uint8))
        if bias:
            inputs += [None] * (5 - len(inputs)) + [normal(n)]
        fixed = [f"x{i}" for i in range(1, len(inputs)) if inputs[i] is not None]
        case(name, op, inputs, fixed=fixed, N=n, K=k, bits=bits, block_size=block)

    run("bits_4", 24, 64, 4, 32, False)
    run("bits_4_zeros", 24, 96, 4, 32, True)
    run("bits_4_rest", 17, 50, 4, 16, True)
    run("bits_8", 12, 64, 8, 32, True)
    run("bits_4_bias", 24, 64, 4, 64, False, bias=True)


functions()
norms()
rotary()
multi_head()
grouped()
bits()
