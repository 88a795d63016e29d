"""What ONNX makes of the operators that `vmamba_kernels.graph` leaves whole.  Imported where onnxscript is."""

import torch
from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op

import vmamba_kernels.graph  # noqa: F401  (defines the operators)


@script(op, default_opset=op)
def recurrence(decay: FLOAT, inputs: FLOAT, C: FLOAT, start: FLOAT) -> FLOAT:
    @graph()
    def step(h, d, u, c):
        after = op.Add(op.Mul(d, h), u)
        y = op.Mul(c, after)
        return after, y

    last, outputs = op.Scan(start, decay, inputs, C, body=step, num_scan_inputs=3)
    return outputs


@script(op, default_opset=op)
def selective_steps(delta: FLOAT, inputs: FLOAT, A: FLOAT, B: FLOAT, C: FLOAT, start: FLOAT) -> FLOAT:
    @graph()
    def step(h, d, u, b, c):
        after = op.Add(op.Mul(op.Exp(op.Mul(d, A)), h), op.Mul(u, b))
        y = op.MatMul(c, after)
        return after, y

    last, outputs = op.Scan(start, delta, inputs, B, C, body=step, num_scan_inputs=4)
    return outputs


TRANSLATIONS = {
    torch.ops.vmamba.recurrence.default: recurrence,
    torch.ops.vmamba.selective_steps.default: selective_steps,
}
