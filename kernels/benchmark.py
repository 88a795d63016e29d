"""Check, then time, every backend of the scans.

    python kernels/benchmark.py                                 all operators, on the GPU
    python kernels/benchmark.py --operators cross_selective_scan --backends cuda --rows tiny
    python kernels/benchmark.py --markdown docs/kernels.md      also write the tables
    python kernels/benchmark.py --device cpu                    small sizes, the reference

A backend's output and every gradient are first compared with the reference in float64, at the batch that is timed
(two images carry a gradient, and the reference sees these two); what is wrong is not timed, and the exit status is 1.
A time is the median over runs, between CUDA events, each run after the L2 cache was overwritten.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

import vmamba_kernels as vk
from vmamba_kernels.private import keep_gpu_busy

ROUTES = vk.ROUTES
TITLE = "# Speed of the scans"
BY_PYTORCH = ("layer_norm", "add_layer_norm", "depthwise_conv", "gelu_mlp")  # whose reference is PyTorch's own
COLUMNS = (
    "row", "backend", "fwd ms", "x exp floor", "x memory floor", "exp rate", "bandwidth",
    "fwd+bwd ms", "x exp floor", "x memory floor", "original fwd", "original fwd+bwd", "peak MiB", "saved / x",
)  # fmt: skip
LEGEND = """\
Every row was first compared with the reference in float64, output and all gradients.  Medians between CUDA events, the
L2 cache overwritten before each run, launches queued ahead.  Floors of the forward pass: one exp2 for each position,
channel, state and route at the measured rate; x read and y written once at the measured bandwidth.  Of both passes: two
exp2; x read twice, dy once, y and dx written.  `exp rate` and `bandwidth` are the forward floors' shares of the time.
`original`: the released kernels on an H200, and how many times faster this is.  `peak`: memory of one forward and
backward above the inputs.  `saved / x`: kept for the backward pass, x included, in sizes of x."""


@dataclass(frozen=True)
class Row:
    """One size of one operator; `original` is what the released kernels took on an H200, ms forward and both."""

    name: str
    operator: str
    batch: int
    side: int
    dim: int  # channels of one route
    states: int
    rank: int  # of the step projection; heads for cross_ssd
    original: tuple[float, float] | None = None

    @property
    def length(self) -> int:
        return self.side * self.side

    @property
    def text(self) -> str:
        return f"{self.name}: {self.batch} x {self.side}x{self.side}, D={self.dim}, N={self.states}"


def _stages(name: str, operator: str, states: int, dim: int, rank: int, original: tuple) -> list[Row]:
    return [
        Row(f"{name} stage {i + 1}", operator, 128, 56 >> i, dim << i, states, rank << i, times)
        for i, times in enumerate(original)
    ]


ROWS = [
    *_stages("tiny_s1l8", "cross_selective_scan", 1, 96, 6, ((3.17, 8.84), (1.40, 4.22), (0.73, 2.45))),
    *_stages("tiny", "cross_selective_scan", 16, 192, 6, ((16.1, 64.8), (6.84, 24.7), (3.87, 13.9))),
    Row("tiny_s1l8 one 224", "cross_selective_scan", 1, 56, 96, 1, 6),
    Row("tiny_s1l8 one 1024", "cross_selective_scan", 1, 256, 96, 1, 6),
    Row("tiny one 224", "cross_selective_scan", 1, 56, 192, 16, 6),
    Row("tiny one 1024", "cross_selective_scan", 1, 256, 192, 16, 6),
    Row("tiny_s1l8 stage 1", "selective_scan", 128, 56, 96, 1, 0),
    Row("tiny stage 1", "selective_scan", 128, 56, 192, 16, 0),
    Row("tiny one 1024", "selective_scan", 1, 256, 192, 16, 0),
    *_stages("tiny_m2", "cross_ssd", 64, 96, 6, (None, None, None)),
    Row("tiny_m2 one 1024", "cross_ssd", 1, 256, 96, 64, 6),
    *_stages("pixels of", "layer_norm", 0, 96, 1, (None, None, None)),
    *_stages("sums of", "add_layer_norm", 0, 96, 1, (None, None, None)),
    *_stages("3x3 and SiLU of", "depthwise_conv", 0, 96, 1, (None, None, None)),
    *_stages("MLP of", "gelu_mlp", 0, 96, 1, (None, None, None)),
]
SMALL_ROWS = [
    Row("small", "cross_selective_scan", 2, 14, 32, 1, 2),
    Row("small", "cross_selective_scan", 2, 14, 32, 16, 2),
    Row("small", "selective_scan", 2, 14, 32, 16, 0),
    Row("small", "cross_ssd", 2, 14, 32, 16, 2),
    Row("small", "layer_norm", 2, 14, 32, 0, 1),
    Row("small", "add_layer_norm", 2, 14, 32, 0, 1),
    Row("small", "depthwise_conv", 2, 14, 32, 0, 1),
    Row("small", "gelu_mlp", 2, 14, 32, 0, 1),
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", default=list(vk.registry.PREFERENCE), choices=vk.registry.PREFERENCE)
    parser.add_argument("--backends", nargs="+", help="default: all that can serve the call but the reference")
    parser.add_argument("--rows", default="", help="only rows whose name contains this, as 'tiny stage' or 'one'")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for small sizes (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="instead of each row's own")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here to time on; --device cpu times the reference at small sizes.")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    machine = Machine.measure() if device.type == "cuda" else None
    rows = [r for r in (ROWS if machine else SMALL_ROWS) if r.operator in args.operators and args.rows in r.name]
    if not rows:
        raise SystemExit(f"No row of {', '.join(args.operators)} has '{args.rows}' in its name.")

    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        if args.markdown.exists() and not args.markdown.read_text().startswith(TITLE):
            sys.exit(f"'{args.markdown}' is no page of this program and would be written over; choose another file")
    head = _heading(args, device, machine)
    print(head, flush=True)
    tables: dict[str, list[tuple[str, ...]]] = {}
    wrong = 0
    for row in rows:
        if args.batch:
            row = replace(row, batch=args.batch, original=None)
        case = Case(row, getattr(torch, args.dtype), device)
        for backend in args.backends or case.servers():
            try:
                errors = case.errors(backend)
                bad = {name: error for name, error in errors.items() if not error < case.tolerance}
                if bad:
                    wrong += 1
                    cells = ("WRONG, not timed: " + ", ".join(f"{name} {error:.1e}" for name, error in bad.items()),)
                else:
                    cells = case.measure(backend, machine, args.repeats)
            except torch.OutOfMemoryError:
                cells = ("out of memory",)
            except vk.BackendError as error:
                cells = (str(error),)
            line = (row.text, backend, *cells)
            tables.setdefault(row.operator, []).append(line)
            print(f"{row.operator:21}", " | ".join(line), flush=True)
    if args.markdown:
        args.markdown.write_text(_markdown(head, tables))
    return 1 if wrong else 0


@dataclass(frozen=True)
class Machine:
    """The two ceilings of a GPU, measured: bytes/s of a copy (read and written), exp2/s."""

    bandwidth: float
    exp_rate: float
    l2: int

    @classmethod
    def measure(cls) -> "Machine":
        import exp_rate  # needs Triton, hence not where there is no GPU

        properties = torch.cuda.get_device_properties()
        source = torch.randn(1 << 28, device="cuda")  # 1 GiB
        target = torch.empty_like(source)
        copy = _median_ms(lambda: target.copy_(source), 20, None)
        programs, steps = 64 * properties.multi_processor_count, 4096
        exp = _median_ms(lambda: exp_rate.launch(target, programs, steps), 5, None)
        exponentials = exp_rate.launch(target, programs, steps)
        return cls(2 * source.nbytes / copy * 1e3, exponentials / exp * 1e3, properties.L2_cache_size)


class Case:
    """The inputs of one row, what they must give, and the measurements."""

    def __init__(self, row: Row, dtype: torch.dtype, device: torch.device):
        torch.manual_seed(0)
        self.row, self.dtype, self.device = row, dtype, device
        self.operator: Callable[..., Tensor] = getattr(vk, row.operator)
        routes, dim, states = len(ROUTES), row.dim, row.states

        def low(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

        def full(*shape: int, shift: float = 0.0) -> Tensor:
            return (torch.randn(shape, device=device) + shift).requires_grad_()

        def decay(*shape: int) -> Tensor:
            return (-torch.rand(shape, device=device) * states - 0.5).requires_grad_()

        if row.operator == "selective_scan":
            self.inputs = dict(
                u=low(row.batch, routes * dim, row.length),
                delta=low(row.batch, routes * dim, row.length),
                A=decay(routes * dim, states),
                B=low(row.batch, routes, states, row.length),
                C=low(row.batch, routes, states, row.length),
                D=full(routes * dim),
                delta_bias=full(routes * dim, shift=-3.0),
            )
            self.batched = ("u", "delta", "B", "C")
        elif row.operator == "layer_norm":
            self.inputs = dict(x=low(row.batch, row.side, row.side, dim), weight=full(dim), bias=full(dim))
            self.batched = ("x",)
        elif row.operator == "add_layer_norm":  # x in float32, as under autocast
            image = (row.batch, row.side, row.side, dim)
            self.inputs = dict(x=full(*image), branch=low(*image), weight=full(dim), bias=full(dim))
            self.batched = ("x", "branch")
        elif row.operator == "depthwise_conv":
            self.inputs = dict(x=low(row.batch, row.side, row.side, dim), weight=full(dim, 1, 3, 3), bias=full(dim))
            self.batched = ("x",)
        elif row.operator == "gelu_mlp":
            self.inputs = dict(
                x=low(row.batch, row.side, row.side, dim),
                weight1=low(4 * dim, dim, scale=dim**-0.5),
                bias1=low(4 * dim),
                weight2=low(dim, 4 * dim, scale=(4 * dim) ** -0.5),
                bias2=low(dim),
            )
            self.batched = ("x",)
        else:
            self.inputs = dict(
                x=low(row.batch, row.side, row.side, dim),
                x_proj_weight=low(routes, row.rank + 2 * states, dim, scale=dim**-0.5),
            )
            if row.operator == "cross_selective_scan":
                self.inputs |= dict(
                    dt_weight=low(routes, dim, row.rank, scale=row.rank**-0.5),
                    dt_bias=full(routes, dim, shift=-3.0),
                    A=decay(routes, dim, states),
                    D=full(routes, dim),
                )
            else:
                self.inputs |= dict(
                    dt_bias=full(routes, row.rank, shift=-3.0),
                    A=decay(routes, row.rank),
                    D=full(routes, row.rank, dim // row.rank),
                )
            self.batched = ("x",)
        self.first = next(iter(self.inputs.values()))
        self.checked = min(2, row.batch)
        # The gradient is zero beyond the images that are checked: then those alone give the weights' gradients.
        self.dy = torch.randn_like(self.first)
        self.dy_checked = self.dy.clone()
        self.dy_checked[self.checked :] = 0
        self.expected: dict[str, Tensor] | None = None
        self.tolerance = 1e-2 if dtype != torch.float32 else 1e-6 * row.length**0.5

    def servers(self) -> list[str]:
        """Backends that can serve this case; without the reference where there is another, unless it is PyTorch's."""
        call = vk.Call(
            self.row.operator, self.first.device, self.dtype, self.first.dtype,
            self.row.dim, self.row.states, self.row.rank, ROUTES if self.row.operator.startswith("cross") else (),
            side=3 if self.row.operator == "depthwise_conv" else 0,
        )  # fmt: skip
        able = [name for name in vk.backends(self.row.operator) if vk.registry.why_not(name, call) is None]
        if self.row.operator in BY_PYTORCH:
            return able
        return [name for name in able if name != "reference"] or able

    def errors(self, backend: str) -> dict[str, float]:
        """Relative errors of the output and of every gradient, in the Euclidean norm."""
        if self.expected is None:
            exact = {
                name: (t[: self.checked] if name in self.batched else t).detach().double().requires_grad_()
                for name, t in self.inputs.items()
            }
            self.expected = self._step(exact, self.dy[: self.checked], "reference")
        out = self._step(self.inputs, self.dy_checked, backend)

        def error(name: str) -> float:
            t, expected = out[name].double(), self.expected[name]
            if name in self.batched or name == "y":
                t, rest = t[: self.checked], t[self.checked :]
                if name != "y" and rest.count_nonzero():
                    return float("inf")
            return ((t - expected).norm() / expected.norm()).item()

        return {name: error(name) for name in out}

    def _step(self, inputs: dict[str, Tensor], dy: Tensor, backend: str) -> dict[str, Tensor]:
        y, grads = self._both(inputs, dy, backend)
        return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}

    def _forward(self, inputs: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        halves = self.row.operator == "add_layer_norm" and inputs["x"].dtype != torch.float64
        options = {"out_dtype": self.dtype} if halves else {}
        if self.row.operator == "depthwise_conv":
            options = {"silu": True}
        out = self.operator(**inputs, **options, backend=backend)
        return out if isinstance(out, tuple) else (out,)

    def _both(self, inputs: dict[str, Tensor], dy: Tensor, backend: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The last result and all gradients; `dy` is that of every result."""
        out = self._forward(inputs, backend)
        return out[-1], torch.autograd.grad(out, list(inputs.values()), [dy.to(y.dtype) for y in out])

    def measure(self, backend: str, machine: Machine | None, repeats: int) -> tuple[str, ...]:
        """The table's cells after row and backend."""

        def forward() -> None:
            with torch.no_grad():
                self._forward(self.inputs, backend)

        def both() -> None:
            self._both(self.inputs, self.dy, backend)

        fwd, fwd_bwd = (_median_ms(f, repeats, machine) for f in (forward, both))
        if machine is None:
            return f"{fwd:.3g}", *["-"] * 4, f"{fwd_bwd:.3g}", *["-"] * 6
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = self._forward(self.inputs, backend)
        x_bytes = self.first.nbytes
        saved = torch.cuda.memory_allocated() - before - sum(y.nbytes for y in out) + x_bytes  # x itself is kept, too
        torch.autograd.grad(out, list(self.inputs.values()), [self.dy.to(y.dtype) for y in out])
        peak = torch.cuda.max_memory_allocated() - before
        row = self.row
        exponentials = row.batch * len(ROUTES) * row.length * row.dim * row.states
        exp_ms = exponentials / machine.exp_rate * 1e3
        memory_ms = 2 * x_bytes / machine.bandwidth * 1e3
        exp_floor = exp_ms if row.operator.endswith("selective_scan") else None
        return (
            f"{fwd:.3f}", _ratio(fwd, exp_floor), _ratio(fwd, memory_ms),
            _share(exp_floor, fwd), _share(memory_ms, fwd),
            f"{fwd_bwd:.3f}", _ratio(fwd_bwd, exp_floor and 2 * exp_floor), _ratio(fwd_bwd, 2.5 * memory_ms),
            *(("-", "-") if row.original is None else (_gain(row.original[0], fwd), _gain(row.original[1], fwd_bwd))),
            f"{peak / 2**20:.0f}", f"{saved / x_bytes:.2f}",
        )  # fmt: skip


def _ratio(time_ms: float, floor_ms: float | None) -> str:
    return "-" if floor_ms is None else f"{time_ms / floor_ms:.1f}"


def _share(floor_ms: float | None, time_ms: float) -> str:
    return "-" if floor_ms is None else f"{100 * floor_ms / time_ms:.0f}%"


def _gain(original_ms: float, time_ms: float) -> str:
    return f"{original_ms:g} ({original_ms / time_ms:.1f}x)"


def _median_ms(function: Callable[[], object], repeats: int, machine: Machine | None) -> float:
    """Median time of `function`.  With a machine, its L2 is overwritten before each run; the GPU sleeps meanwhile, so
    that all launches are queued when the clock starts and the time is the GPU's alone."""
    for _ in range(3):
        function()
    if not torch.cuda.is_available():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)
    flush = torch.empty(4 * machine.l2 if machine else 4, dtype=torch.uint8, device="cuda")
    events = []
    for _ in range(repeats):
        flush.zero_()
        keep_gpu_busy(4_000_000)  # cycles, about 2 ms
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        events.append((start, end))
        torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def _heading(args: argparse.Namespace, device: torch.device, machine: Machine | None) -> str:
    where = torch.cuda.get_device_name(device) if machine else "a CPU"
    text = f"{where}, torch {torch.__version__}, {args.dtype} in and out, {date.today()}."
    if machine:
        text += (
            f"  Measured ceilings: copy {machine.bandwidth / 1e12:.2f} TB/s, exp2 {machine.exp_rate / 1e12:.2f} T/s."
        )
    return text


def _markdown(head: str, tables: dict[str, list[tuple[str, ...]]]) -> str:
    command = "python " + " ".join(sys.argv)
    parts = [f"{TITLE}\n\nWritten by `{command}`.  {head}\n\n{LEGEND}"]
    for operator, lines in tables.items():
        table = [COLUMNS, ("---",) * len(COLUMNS), *(line + ("",) * (len(COLUMNS) - len(line)) for line in lines)]
        parts.append(f"## {operator}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in table))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
