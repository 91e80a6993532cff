"""The page of a demo: one HTML file with everything in it, readable without a network."""

import json
from html import escape
from pathlib import Path

from sharpwise.compare import charts
from sharpwise.compare.summary import Result, arm_names, best_run, caveats, headline, rows, subtitle
from sharpwise.files import write_whole
from sharpwise.report.blocks import block_table
from sharpwise.report.skeleton import PAGE_NAME, card, chart, document, facts, notes, table
from sharpwise.report.words import moment

RESULT_NAME = "result.json"


def write(result: Result, folder: Path) -> Path:
    """Write the page and the result beside it into `folder`, both or neither half-written; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    page = render(result)
    write_whole(folder / RESULT_NAME, json.dumps(result, allow_nan=False, indent=1) + "\n")
    write_whole(folder / PAGE_NAME, page)
    return folder / PAGE_NAME


def render(result: Result) -> str:
    """The whole page as HTML."""
    body = "\n".join(
        (
            "<header>",
            '<p class="kicker">sharpwise demo: one transformer, three optimizers, the same learning rates</p>',
            f"<h1>{escape(headline(result))}</h1>",
            f'<p class="lead">{escape(subtitle(result))}</p>',
            notes(caveats(result)),
            "</header>",
            '<div class="grid">',
            card(
                "Which learning rate?",
                "Each point is a whole run. Filled: the best of its arm.",
                chart(charts.sensitivity(result), "sensitivity", "Final validation loss against learning rate"),
            ),
            card(
                "Loss along the way",
                "Averaged over short stretches. Thick: the best learning rate of each arm; thin: the others.",
                chart(charts.loss_curves(result), "loss", "Training loss against tokens"),
            ),
            card(
                "Results",
                "Validation loss in nats per token, on the same tokens for every run. Speed is that of one thread, by "
                "the quickest tenth of the steps.",
                _results(result),
            ),
            card("What was run", "", _environment(result)),
            card("Learning rate of each block", _rates_hint(result), _rates(result), wide=True),
            card(
                "Block map",
                f"What each parameter is taken for, and {_varied_words(result)}. Equal layers share one row.",
                _block_table(result),
                wide=True,
            ),
            "</div>",
        )
    )
    return document("sharpwise demo", body)


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
    return table(f'<th scope="col"></th>{head}', lines, "Results")


def _rates_hint(result: Result) -> str:
    return (
        "Best run of each arm, all on one scale: the scheduled learning rate times the factor of the "
        f"block. All end at {result['settings']['floor']:.0%} of their peak."
    )


def _rates(result: Result) -> str:
    parts = []
    for i, arm in enumerate(arm_names(result)):
        figure, best = charts.learning_rates(result, arm), best_run(result, arm)
        drawn = (
            '<p class="hint">No run reached its end.</p>'
            if figure is None
            else chart(figure, f"rates-{i}", f"Learning rates of {arm}")
        )
        lr = f", lr {best.lr:g}" if best else ""
        parts.append(f"<div><h3>{escape(arm + lr)}</h3>{drawn}</div>")
    return f'<div class="three">{"".join(parts)}</div>'


def _varied(result: Result) -> list[str]:
    """Arms whose blocks have different learning rates."""
    return [arm for arm in arm_names(result) if any(block["multipliers"][arm] != 1.0 for block in result["blocks"])]


def _varied_words(result: Result) -> str:
    varied = _varied(result)
    return f"the factor on its learning rate under {' and '.join(varied)}" if varied else "its size"


def _block_table(result: Result) -> str:
    varied = _varied(result)
    factors = {arm: f"lr factor, {arm}" if len(varied) > 1 else "lr factor" for arm in varied}
    return block_table(result["blocks"], factors)


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
        ("date", moment(environment["date"])),
    ]
    text = facts(items, code=(arm["name"] for arm in result["arms"]))
    return f'{text}<p class="hint">All numbers: <a href="{RESULT_NAME}">{RESULT_NAME}</a></p>'
