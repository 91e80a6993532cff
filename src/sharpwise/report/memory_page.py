"""The page of a memory plan: one HTML file, readable without a network."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from sharpwise.blocks import BLOCK_TYPE
from sharpwise.files import write_whole
from sharpwise.memory import MemoryPlan, Planned, size_text
from sharpwise.memory.text import conclusion, estimates, next_command, refusals, title, what_fits
from sharpwise.report import figures
from sharpwise.report.html import card, chart, command, document, notes, table
from sharpwise.report.plot import Figure

ROW = 40  # pixels of a row: its name, below it the bar
COLOURS = {
    "weights": "#0072B2",
    "gradients": "#56B4E9",
    "bf16 copies": "#B3589A",
    "gathered": "#A67C00",
    "state": "#D55E00",
    "activations": "#009E73",
}
Parts = Mapping[str, int]


def write_memory_page(path: str | Path, plan: MemoryPlan, size: int | None = None) -> Path:
    """Write `memory_page` to a file; returns its path."""
    write_whole(Path(path), memory_page(plan, size))
    return Path(path)


def memory_page(plan: MemoryPlan, size: int | None = None) -> str:
    """The whole page as HTML, with everything in it; with `size`, in bytes, it shows what fits."""
    told = list(refusals(plan))
    lines = [*([] if size is None else [what_fits(plan, size)]), title(plan), *estimates(plan)]
    body = [
        "<header>",
        '<p class="kicker">sharpwise memory</p>',
        f"<h1>{escape(conclusion(plan))}</h1>",
        *(f'<p class="lead">{escape(line)}</p>' for line in lines),
        notes(told) if told else "",
        "</header>",
        '<div class="grid">',
    ]
    known = plan.distinct
    if known:
        hint = "One GPU." if size is None else f"One GPU; the line is at {size_text(size)}."
        own = chart(_bars(known, lambda one: _parts(plan, one), COLOURS, size), "all", "memory by optimizer, as bars")
        body.append(card("What a GPU holds", hint, own, wide=True))
        types = chart(_bars(known, _types, figures.TYPE_COLOURS), "state", "state by optimizer and type of block")
        body.append(card("State, by type of block", "Exact, to the byte.", types, wide=True))
        body.append(card("In numbers", "", _numbers(plan, known, size), wide=True))
        body.append(card("State by role", "Bytes.", _roles(plan, known), wide=True))
    if line := next_command(plan):
        hint = "Whether the loss is the same with less state, a comparison says; DATA is from `sharpwise prepare`."
        body.append(card("What to do next", hint, command(line), wide=True))
    return document(f"{plan.model}: memory", "\n".join([*body, "</div>"]))


def _parts(plan: MemoryPlan, one: Planned) -> Parts:
    found = {"weights": plan.weights, "gradients": plan.gradients, "bf16 copies": plan.casts}
    found |= {"gathered": plan.gathered, "state": one.state}
    return found | {"activations": plan.micro_batch * (plan.activations or 0)}


def _types(one: Planned) -> Parts:
    found: dict[str, int] = {}
    for role, count in one.by_role.items():
        kind = str(BLOCK_TYPE[role])  # type: ignore[index]
        found[kind] = found.get(kind, 0) + count
    return found


def _bars(
    known: Sequence[Planned], parts_of: Callable[[Planned], Parts], colours: Mapping[str, str], size: int | None = None
) -> Figure:
    """A bar per combination, the first at the top, of what it is made of."""
    parts = [parts_of(one) for one in known]
    largest = max(max(sum(own.values()) for own in parts), size or 0, 1)
    unit, name = next(
        ((1024**i, n) for i, n in ((4, "TiB"), (3, "GiB"), (2, "MiB")) if largest >= 1024**i), (1024, "KiB")
    )
    figure = figures.figure(name, "", height=58 + ROW * len(known))
    figure.update_layout(
        margin={"l": 10, "r": 14, "t": 8, "b": 48}, bargap=0.62, showlegend=True,
    )  # fmt: skip
    figure.update_yaxes(range=[len(known) - 0.5, -0.75], visible=False)
    figure.update_xaxes(range=[0, 1.02 * largest / unit], showgrid=True, nticks=6)
    for what, colour in colours.items():
        if not any(own.get(what) for own in parts):
            continue
        figure.add_bar(
            x=[own.get(what, 0) / unit for own in parts], y=list(range(len(known))), orientation="h", name=what,
            marker={"color": colour}, hoverinfo="text",
            hovertext=[f"{one.name}: {what} {size_text(own.get(what, 0))}"
                       for one, own in zip(known, parts, strict=True)],
        )  # fmt: skip
    for row, (one, own) in enumerate(zip(known, parts, strict=True)):
        figure.add_annotation(
            xref="paper", x=0, xanchor="left", y=row, yshift=14, font={"size": 12},
            text=f"{figures.text(one.name)}: <b>{size_text(sum(own.values()))}</b>",
        )  # fmt: skip
    if size is not None:
        figure.add_vline(x=size / unit, line={"color": figures.INK, "width": 1.5, "dash": "dash"})
    return figure


def _numbers(plan: MemoryPlan, known: Sequence[Planned], size: int | None) -> str:
    head = ["<th>optimizer</th><th>storage</th>"]
    columns = ["state", "in all", "moved a step", "sent a step"]
    fits = {} if size is None else {id(fit.planned): fit for fit in plan.fits(size)}
    columns += [f"largest micro-batch in {size_text(size)}"] if fits else []
    head += [f'<th class="number">{escape(column)}</th>' for column in columns]
    lines = []
    for one in known:
        cells = [size_text(n) for n in (one.state, plan.total(one), one.moved, plan.sent + one.sent)]
        if fits:
            fit = fits[id(one)]
            cells.append(("yes" if fit.fits else "no") if fit.micro_batch is None else str(fit.micro_batch))
        own = "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
        lines.append(f"<tr><td>{escape(one.optimizer)}</td><td>{escape(one.storage)}</td>{own}</tr>")
    return table("".join(head), lines, "memory by optimizer and storage")


def _roles(plan: MemoryPlan, known: Sequence[Planned]) -> str:
    head = ["<th>optimizer</th>", *(f'<th class="number">{escape(role)}</th>' for role in plan.parameters)]
    own = "".join(f'<td class="number">{count:,}</td>' for count in plan.parameters.values())
    lines = [f"<tr><td>parameters</td>{own}</tr>"]
    for one in known:
        own = "".join(f'<td class="number">{one.by_role.get(role, 0):,}</td>' for role in plan.parameters)
        lines.append(f"<tr><td>{escape(one.name)}</td>{own}</tr>")
    return table("".join(head), lines, "state by role")
