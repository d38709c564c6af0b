"""Decoders as text is made with them: one token a step, caches with a dim that has a name.

The decoders are those of transformers.py, in both of its forms. Beside each model lies what
onnxruntime makes of it: the tokens of a greedy continuation, and the last step's scores.
"""
import os

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from common import MODELS
from transformers import SEQUENCE, Composed, Decomposed, Weights, gpt2, llama

FIRST, STEPS = 7, 64


class Named:
    """Caches of any length: what comes in is `past` long, what goes out one longer."""

    def floats(self, name, *shape):
        assert shape[2] == SEQUENCE, "caches are the only floats that come in"
        dims = [*shape[:2], "past", shape[3]]
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
        return name

    def output(self, name, value, *shape):
        if name.startswith("present"):
            shape = (*shape[:2], "past + 1", shape[3])
        super().output(name, value, *shape)


class NamedDecomposed(Named, Decomposed):
    pass


class NamedComposed(Named, Composed):
    pass


def greedy(model):
    """Tokens that onnxruntime puts one after another, and the scores of the last.

    Caches begin with one place of zeros. A token is the best that was not said before: weights that
    are random, and the same for what comes in and what goes out, repeat themselves otherwise. None
    may win by so little that rounding decides.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    shapes = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past")}
    feed = {n: np.zeros([1 if d == "past" else d for d in s], np.float32) for n, s in shapes.items()}
    token, tokens = FIRST, []
    for position in range(STEPS):
        feed["input_ids"] = np.array([[token]], np.int64)
        feed["position_ids"] = np.array([[position]], np.int64)
        outputs = dict(zip(names, session.run(None, feed)))
        logits = outputs.pop("logits")
        scores = logits.ravel().copy()
        scores[[FIRST] + tokens] = -np.inf
        second, first = np.sort(scores)[-2:]
        assert first - second > 1e-4 * first, (model, position, first, second)
        token = int(scores.argmax())
        tokens.append(token)
        feed |= {n.replace("present", "past_key_values"): v for n, v in outputs.items()}
    return np.array(tokens, np.int64), logits


def make(family, build):
    """The twins of a decoder, which must continue alike."""
    weights, stored = Weights(family), None
    for form in (NamedDecomposed, NamedComposed):
        b = form(family, weights, "_step")
        build(b, True)
        model, folder = b.finish(), os.path.join(MODELS, b.name)
        path = os.path.join(folder, "model.onnx")
        onnx.save(model, path)
        found = greedy(path)
        stored = stored or found
        assert (found[0] == stored[0]).all(), (b.name, found[0], stored[0])
        for name, array in zip(("tokens", "logits"), found):
            with open(os.path.join(folder, f"{name}.pb"), "wb") as file:
                file.write(numpy_helper.from_array(array, name).SerializeToString())
        print(f"  {b.name}: {len(model.graph.node)} nodes", flush=True)
    weights.close()


if __name__ == "__main__":
    make("gpt2", gpt2)
    make("llama", llama)
