"""What LUT's two forms cost beside masked autoencoding alone, in FLOPs and in time.

The paper says that the context loss makes a step 18 % longer (section 3), and its hours say 2.13 times (section 5.1).
Prints and writes the table; `--page` measures nothing and sets what was measured into docs/lut.md.
"""

from __future__ import annotations

import datetime
import statistics
import time
from pathlib import Path

from _harness import SMOKE_RESULTS, command, machine, parser, use
from _results import RESULTS, ROOT, Measurement, Row, commit, sources_hash

PAGE = ROOT / "docs" / "lut.md"
BEGIN, END = "<!-- forms: written by benchmarks/lut_forms.py --page -->\n", "<!-- /forms -->"
MODELS = (
    *("masked_autoencoder", "pixel_decoder", "momentum_encoder", "projection_head", "batch_norm"),
    *("backbone", "blocks"),
)
SOURCES = [f"locfast/{name}.py" for name in ("methods/lut", "methods/context_loss", *(f"models/{m}" for m in MODELS))]
SAID = {"by the second": 0.46 / 0.39, "by the hour": (119 / 400) / (223 / 1600)}
"""What the paper's own figures say LUT takes, MAE being 1: seconds a step (section 3), hours an epoch (section 5.1)."""
ALONE, FORMS = "MAE alone", ("paper", "reference")
ROUNDS = 5


def main() -> None:
    known = parser(__doc__)
    known.add_argument("--model", default="vit_base_patch16_224")
    known.add_argument("--batch", type=int, help="images at a time (default 8 on a CPU, 128 on a GPU)")
    known.add_argument("--compile", action="store_true", help="with torch.compile, block by block")
    known.add_argument("--page", action="store_true", help="only write the table of docs/lut.md")
    args = known.parse_args()
    if args.page:
        PAGE.write_text(with_tables(PAGE.read_text(), RESULTS))
        return
    device = use(args.device)
    size, batch = (64, 2) if args.smoke else (224, args.batch or (8 if device.type == "cpu" else 128))
    head, dirty = commit()
    result = Measurement(
        benchmark="lut_forms-compiled" if args.compile else "lut_forms",
        machine=machine(device),
        sources={source: sources_hash(source) for source in SOURCES},
        commit=head,
        dirty=dirty,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command(),
        smoke=args.smoke,
    )
    result.rows = measure(args.model, size, batch, args.device, 2 if args.smoke else ROUNDS, args.compile)
    print("\n".join(table(result)))
    print(f"written to {result.write(args.out or (SMOKE_RESULTS if args.smoke else RESULTS))}")


def measure(model: str, size: int, batch: int, device: str, rounds: int, compiled: bool = False) -> list[Row]:
    """A row for MAE alone and for each form: all of them once in every round, so that they meet the same machine."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from locfast.config.lut import LUTConfig
    from locfast.engine.flops import count_flops
    from locfast.engine.precision import autocast
    from locfast.methods.lut import IMAGE, LUT
    from locfast.random import Keys

    class Alone(LUT):
        """The same networks, without the context."""

        def forward(self, batch, draw):  # type: ignore[no-untyped-def]
            image, visible = batch["views"][IMAGE], draw.visible[:, 0]
            return {"loss": self.reconstruction(self.encode(image, visible, rebuild=True), image, visible)}

    precision = "bf16" if torch.device(device).type == "cuda" else "fp32"
    kinds = {ALONE: (Alone, "paper"), **{form: (LUT, form) for form in FORMS}}
    methods = {
        who: kind(LUTConfig(form=form), model=model, image_size=size).to(device)  # type: ignore[arg-type]
        for who, (kind, form) in kinds.items()
    }
    generator = torch.Generator().manual_seed(0)
    views = {name: torch.randn(batch, 3, size, size, generator=generator).to(device) for name in ("image", "context")}
    keys = Keys(0, torch.zeros(batch, dtype=torch.int64), torch.arange(batch)).to(device)
    draws = {who: method.draw(keys) for who, method in methods.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the counter knows no fused attention of CPUs, and counts a GPU's recomputation
        flops = {who: count_flops(method, {"views": views}, draws[who], precision) for who, method in methods.items()}

    if compiled:
        for method in methods.values():
            method.enable_compile()

    def once(who: str) -> float:
        """Milliseconds of a forward and backward pass."""
        start = time.perf_counter()
        with autocast(torch.device(device), precision):
            loss = methods[who]({"views": views}, draws[who])["loss"]
        loss.backward()
        if precision == "bf16":
            torch.cuda.synchronize()
        taken = 1e3 * (time.perf_counter() - start)
        methods[who].zero_grad(set_to_none=True)
        return taken

    times: dict[str, list[float]] = {who: [] for who in methods}
    for number in range(rounds + 1):
        for who in methods:
            taken = once(who)
            if number:  # the first round sets up
                times[who].append(taken)
    rows = []
    threads = f", CPU threads {torch.get_num_threads()}" if precision == "fp32" else ""
    how = ", compiled" * compiled
    tokens = methods[ALONE].encoder.num_tokens
    for who, found in times.items():
        row = Row(f"{model}, B {batch}, {precision}{threads}{how}", "both", f"locfast {who}", unit="TFLOP/s")
        row.ms = statistics.median(found)
        row.ms_p20, _, _, row.ms_p80 = statistics.quantiles(found, n=5, method="inclusive")
        row.rate = flops[who] / row.ms / 1e9
        row.shape = {"B": batch, "T": tokens, "MFLOP": round(flops[who] / 1e6)}
        ratio = statistics.median(one / alone for one, alone in zip(found, times[ALONE], strict=True))
        row.shape["percent of MAE"] = round(100 * ratio)
        row.note = f"{flops[who] / batch / 1e9:.1f} GFLOP an image; {ratio:.2f} of MAE alone in its round"
        rows.append(row)
    return rows


def table(measurement: Measurement) -> list[str]:
    """A measurement as lines of Markdown."""
    alone, *others = measurement.rows
    lines = [
        "| form | GFLOP an image | FLOPs, MAE alone = 1 | ms (p20, p80) | time in the same round, MAE alone = 1 |",
        "|---|---|---|---|---|",
    ]
    for row in measurement.rows:
        assert row.ms is not None
        image = row.shape["MFLOP"] / row.shape["B"] / 1e3
        lines.append(
            f"| {row.who.removeprefix('locfast ')} | {image:.1f} | {row.shape['MFLOP'] / alone.shape['MFLOP']:.2f} "
            f"| {row.ms:.0f} ({row.ms_p20:.0f}, {row.ms_p80:.0f}) | {row.shape['percent of MAE'] / 100:.2f} |"
        )
    lines += [f"| the paper says, {how} | | | | {ratio:.2f} |" for how, ratio in SAID.items()]
    paper = others[0].shape["MFLOP"] / alone.shape["MFLOP"]
    faster = (paper - 1) / (SAID["by the second"] - 1)
    lines += [
        "",
        f"18 % more time for the paper's form, whose FLOPs are {100 * (paper - 1):.0f} % more, needs the added ones to "
        f"run {faster:.1f} times as fast as those of MAE.",
    ]
    return lines


def with_tables(page: str, results: Path) -> str:
    """`page` with the tables of all machines that have measured, between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    parts = []
    for path in sorted(results.glob("*/lut_forms*.json")):
        measurement = Measurement.read(path)
        if not measurement.smoke:
            told = measurement.machine.get("cpu", measurement.machine["gpu"])
            case = f"{measurement.rows[0].case}, on {told}, torch {measurement.machine['torch']}"
            parts += ["", f"{case}, commit {measurement.commit[:9]}{' with changes' * measurement.dirty}:", ""]
            parts += table(measurement)
    return before + BEGIN + "\n".join([*parts, "", ""]).lstrip("\n") + END + after


if __name__ == "__main__":
    main()
