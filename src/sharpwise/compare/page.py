"""The page of a demo: one HTML file with everything in it, readable without a network."""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from sharpwise.compare import charts
from sharpwise.compare.summary import Result, arm_names, best_run, caveats, headline, rows, subtitle

PAGE_NAME, RESULT_NAME = "index.html", "result.json"


def write(result: Result, folder: Path) -> Path:
    """Write the page and the result beside it into `folder`, both or neither half-written; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    page = render(result)
    _replace(folder / RESULT_NAME, json.dumps(result, allow_nan=False, indent=1) + "\n")
    _replace(folder / PAGE_NAME, page)
    return folder / PAGE_NAME


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # a temporary file is private
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def render(result: Result) -> str:
    """The whole page as HTML."""
    body = "\n".join(
        (
            "<header>",
            '<p class="kicker">sharpwise demo: one transformer, three optimizers, the same learning rates</p>',
            f"<h1>{escape(headline(result))}</h1>",
            f'<p class="lead">{escape(subtitle(result))}</p>',
            _list(caveats(result)),
            "</header>",
            '<div class="grid">',
            _card(
                "Which learning rate?",
                "Each point is a whole run. Filled: the best of its arm.",
                _chart(charts.sensitivity(result), "sensitivity", "Final validation loss against learning rate"),
            ),
            _card(
                "Loss along the way",
                "Averaged over short stretches. Thick: the best learning rate of each arm; thin: the others.",
                _chart(charts.loss_curves(result), "loss", "Training loss against tokens"),
            ),
            _card(
                "Results",
                "Validation loss in nats per token, on the same tokens for every run. Speed is that of one thread, by "
                "the quickest tenth of the steps.",
                _results(result),
            ),
            _card("What was run", "", _environment(result)),
            _card("Learning rate of each block", _rates_hint(result), _rates(result), wide=True),
            _card(
                "Block map",
                f"What each parameter is taken for, and {_varied_words(result)}. Equal layers share one row.",
                _block_table(result),
                wide=True,
            ),
            "</div>",
        )
    )
    style = files("sharpwise.compare").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>sharpwise demo</title>\n<style>\n{style}</style>\n"
        f"<script>{get_plotlyjs()}</script>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _card(title: str, hint: str, content: str, *, wide: bool = False) -> str:
    hint = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    return f'<section class="card{" wide" * wide}">\n<h2>{escape(title)}</h2>\n{hint}\n{content}\n</section>'


def _list(items: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'


def _chart(figure: go.Figure, name: str, label: str) -> str:
    html: str = figure.to_html(
        include_plotlyjs=False,
        full_html=False,
        div_id=f"chart-{name}",
        config={"responsive": True, "displayModeBar": False},
    )
    return f'<div role="img" aria-label="{escape(label)}">{html}</div>'


def _results(result: Result) -> str:
    arms = arm_names(result)
    best = {b.arm: f"final loss, lr {b.lr:g}" for b in (best_run(result, arm) for arm in arms) if b}
    head = "".join(
        f'<th class="number arm" scope="col" style="color:{charts.arm_colour(result, arm)}">{escape(arm)}</th>'
        for arm in arms
    )
    lines = []
    for label, texts in rows(result):
        cells = "".join(
            f'<td class="number{" best" * (best.get(arm) == label or label == "best")}">{escape(text)}</td>'
            for arm, text in zip(arms, texts, strict=True)
        )
        rule = ' class="rule"' if label in ("best", "tokens/s") else ""
        lines.append(f'<tr{rule}><th scope="row">{escape(label)}</th>{cells}</tr>')
    return _table(f'<th scope="col"></th>{head}', lines, "Results")


def _rates_hint(result: Result) -> str:
    return (
        "Best run of each arm, all on one scale: the scheduled learning rate times the factor of the "
        f"block. All end at {result['settings']['floor']:.0%} of their peak."
    )


def _rates(result: Result) -> str:
    parts = []
    for i, arm in enumerate(arm_names(result)):
        figure, best = charts.learning_rates(result, arm), best_run(result, arm)
        chart = (
            '<p class="hint">No run reached its end.</p>'
            if figure is None
            else _chart(figure, f"rates-{i}", f"Learning rates of {arm}")
        )
        lr = f", lr {best.lr:g}" if best else ""
        parts.append(f"<div><h3>{escape(arm + lr)}</h3>{chart}</div>")
    return f'<div class="three">{"".join(parts)}</div>'


def _varied(result: Result) -> list[str]:
    """Arms whose blocks have different learning rates."""
    return [arm for arm in arm_names(result) if any(block["multipliers"][arm] != 1.0 for block in result["blocks"])]


def _varied_words(result: Result) -> str:
    varied = _varied(result)
    return f"the factor on its learning rate under {' and '.join(varied)}" if varied else "its size"


def _block_table(result: Result) -> str:
    varied = _varied(result)
    head = "".join(
        f'<th scope="col"{css}>{escape(text)}</th>'
        for text, css in (
            ("parameter", ""),
            ("role", ""),
            ("type", ' class="roomy"'),
            ("rows", ' class="roomy"'),
            ("heads", ' class="number roomy"'),
            ("shape", ' class="roomy"'),
            ("size", ' class="number"'),
            *((f"lr factor, {arm}" if len(varied) > 1 else "lr factor", ' class="number arm"') for arm in varied),
        )
    )
    lines = []
    for name, count, block in _collapsed(result["blocks"]):
        tied = "".join(f"<br>= {_code(other)}" for other in block["tied"])
        factors = "".join(f'<td class="number">{block["multipliers"][arm]:g}</td>' for arm in varied)
        heads = "" if block["heads"] is None else block["heads"]
        shape = " x ".join(map(str, block["shape"]))
        lines.append(
            f'<tr><td>{_code(name)}{tied}</td><td>{block["role"]}</td><td class="roomy">{block["type"]}</td>'
            f'<td class="roomy">{escape(block["rows"])}</td><td class="number roomy">{heads}</td>'
            f'<td class="roomy">{shape}</td><td class="number">{block["parameters"] * count:,}</td>{factors}</tr>'
        )
    return _table(head, lines, "Block map")


def _code(name: str) -> str:
    """A name that may break after its dots."""
    return f"<code>{escape(name).replace('.', '.<wbr>')}</code>"


def _collapsed(blocks: Iterable[dict[str, Any]]) -> list[tuple[str, int, dict[str, Any]]]:
    """One row for all layers that are alike: the name with the range of layers, how many they are, and the first."""
    from sharpwise.blocks.names import number_ranges

    groups: dict[tuple[str, ...], list[tuple[int, dict[str, Any]]]] = {}
    for block in blocks:
        found = re.search(r"(?<=\.)\d+(?=\.)", block["name"])
        stem = block["name"] if found is None else f"{block['name'][: found.start()]}\0{block['name'][found.end() :]}"
        alike = {key: value for key, value in block.items() if key != "name"}
        groups.setdefault((stem, json.dumps(alike)), []).append((int(found.group()) if found else -1, block))
    return [
        (stem.replace("\0", number_ranges(number for number, _ in members)), len(members), members[0][1])
        for (stem, _), members in groups.items()
    ]


def _table(head: str, lines: Iterable[str], label: str) -> str:
    # Focusable, so that a keyboard can scroll it where it is wider than the screen.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _environment(result: Result) -> str:
    model, data, settings, environment = (result[key] for key in ("model", "data", "settings", "environment"))
    common = ", ".join(
        f"{key}={tuple(value) if isinstance(value, list) else value}" for key, value in result["common"].items()
    )
    items = [
        (
            "model",
            f"{model['family']}, {model['n_layer']} layers, width {model['n_embd']}, {model['n_head']} heads, "
            f"{model['parameters']:,} parameters ({model['non_embedding_parameters']:,} without embeddings)",
        ),
        (
            "text",
            f"{data['source']}: {data['documents']:,} documents, {data['bytes'] / 1e6:.1f} MB, SHA-256 "
            f"{str(data['sha256'])[:12]}",
        ),
        (
            "tokens",
            f"byte-level BPE of {data['vocabulary']:,}, {data['bytes_per_token']:.2f} bytes a token; "
            f"{data['train_tokens']:,} to train on, validation in other documents",
        ),
        (
            "run",
            f"{settings['steps']:,} steps of {settings['sequences']} x {settings['context']} tokens, warm-up "
            f"{settings['warmup']} steps, cosine to {settings['floor']:g} of the peak, seed {settings['seed']}",
        ),
        *((arm["name"], arm["code"]) for arm in result["arms"]),
        ("for all", common),
        (
            "machine",
            f"{environment['platform']}, {environment['cpus']} CPUs, {environment['processes']} runs at a time, "
            f"{environment['threads_per_process']} thread each, {environment['matrix_products']}",
        ),
        (
            "software",
            f"sharpwise {environment['sharpwise']}, torch {environment['torch']}, transformers "
            f"{environment['transformers']}, Python {environment['python']}",
        ),
        ("date", environment["date"].replace("T", " ").replace("+00:00", " UTC")),
    ]
    names = {arm["name"] for arm in result["arms"]}
    text = "".join(
        f"<dt>{escape(key)}</dt><dd>{f'<code>{escape(value)}</code>' if key in names else escape(value)}</dd>"
        for key, value in items
    )
    return f'<dl>{text}</dl><p class="hint">All numbers: <a href="{RESULT_NAME}">{RESULT_NAME}</a></p>'
