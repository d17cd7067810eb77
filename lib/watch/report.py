"""What people read: blocks that notebook cells display, and the HTML pages of a run.

Notebooks call the `show_…` functions. `render_run` turns a run folder, finished or dead, into
`report/index.html` and a page for each executed notebook; `render_all` lists all runs. A page
holds everything it needs and asks the network for nothing. All verdicts and numbers come from
the folder's verdicts, records and summary.
"""

import functools
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from lib import params as params_module
from lib.errors import BadInput
from lib.params import Params
from lib.run import (
    STAGES,
    Check,
    Run,
    Verdict,
    duration,
    read_json,
    read_records,
    shown,
    stage_seconds,
)
from lib.watch import plots

TEMPLATES = Path(__file__).parent / "templates"

STAGE_NAMES = {"setup": "Setup", "overfit": "Overfit", "lr_finder": "LR finder",
               "train": "Train", "analysis": "Analysis"}
DIAGNOSTICS = ("_low", "_high", "_raw", "_relabelled", "uniform_loss", "_random_init")
"""Ends of metric names that serve a check or an interval, not a reader of the index."""

STATUS = {
    "passed": ("✓", "passed", "passed"),
    "failed": ("✕", "failed", "failed"),
    "warning": ("!", "warning", "warning"),
    "info": ("i", "note", "note"),
    "not run": ("○", "not run", "notrun"),
    "incomplete": ("○", "incomplete", "notrun"),
}
"""Status: its glyph, its word, its class in the style sheet."""

HIDDEN_TAGS = {"plumbing", "hide"}
"""Cells with one of these tags are left out of pages, unless they raised."""


# --------------------------------------------------------------------------------------------
# Templates
# --------------------------------------------------------------------------------------------


def _outcome(check: Check) -> str:
    if check.passed:
        return "passed"
    return "failed" if check.severity == "error" else check.severity


def _counted(verdict: Verdict) -> str:
    """How many checks, and how many of them did not pass: `7 checks, 1 warning`."""
    found = [_outcome(check) for check in verdict.checks]
    parts = [f"{len(found)} check{'s' * (len(found) != 1)}"]
    for outcome in ("failed", "warning", "info"):
        count, word = found.count(outcome), STATUS[outcome][1]
        if count:
            parts.append(f"{count} {word}{'s' * (count > 1 and outcome != 'failed')}")
    return ", ".join(parts)


def _as_yaml(value: Any) -> str:
    """A params value as its file would have it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _metric_value(key: str, value: Any) -> str:
    """Shares in per cent, everything else to four digits."""
    is_count = key.endswith(("loss", "false_alarms"))  # boxes a picture, on average
    share = isinstance(value, float) and 0 <= value <= 1 and not is_count
    return f"{100 * value:.2f} %" if share else shown(value)


def _ticks(text: str) -> Any:
    """Text whose `names` are set as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _dollars(value: float) -> str:
    return f"${value:,.2f}" if value >= 0.995 or value == 0 else f"${value:.4f}"


@functools.cache
def _environment():
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.globals.update(STATUS=STATUS, STAGE_NAMES=STAGE_NAMES)
    environment.filters.update(
        shown=_shown_cell, outcome=_outcome, as_yaml=_as_yaml, duration=duration,
        dollars=_dollars, ticks=_ticks, counted=_counted, sort_key=_sort_key,
    )
    for name in ("blocks.css", "page.css", "sort.js"):
        environment.globals[name.replace(".", "_")] = (TEMPLATES / name).read_text()
    return environment


def _shown_cell(value: Any) -> Any:
    """A value as people read it; what renders itself as HTML stays."""
    if hasattr(value, "__html__"):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return shown(value)


def _block(macro: str, *arguments: Any) -> str:
    """One piece of blocks.html.j2, in the element its style sheet dresses."""
    module = _environment().get_template("blocks.html.j2").module
    return f'<div class="sd">{getattr(module, macro)(*arguments)}</div>'


def _write(template: str, path: Path, **values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _environment().get_template(template).render(**values)
    path.write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------------------------
# Displayed by notebook cells
# --------------------------------------------------------------------------------------------

_DRESS = re.compile(r'<style data-sd>.*?</style>|<script data-sd>.*?</script>', re.S)


def display_html(body: str, text: str) -> None:
    """Display HTML together with its style sheet; `text` stands in where HTML cannot be shown."""
    from IPython.display import display

    css = re.sub(r"\s+", " ", _environment().globals["blocks_css"])
    script = ""
    if "sdSort(" in body:
        script = f"<script data-sd>{_environment().globals['sort_js']}</script>"
    data = {"text/html": f"<style data-sd>{css}</style>{script}{body}", "text/plain": text}
    display(data, raw=True)


def show_params(params: Params) -> None:
    """The resolved params: what differs from the defaults first, the rest folded away."""
    changed, sections, total = _grouped(params)
    text = "\n".join(f"{key}: {_as_yaml(value)}" for key, value, _, _ in changed)
    display_html(_block("params", changed, sections, total), text or "all defaults")


def _grouped(params: Params) -> tuple[list, dict[str, list], int]:
    """(rows that differ from the defaults, the other rows by section, rows in all)."""
    rows = params_module.table(params)

    def section(row: tuple) -> str:
        return row[0].partition(".")[0] if "." in row[0] else "run"

    others = groupby((row for row in rows if row[1] == row[2]), section)
    sections = {name: list(group) for name, group in others}
    return [row for row in rows if row[1] != row[2]], sections, len(rows)


def _checks_text(checks: list[Check] | tuple[Check, ...]) -> str:
    return "\n".join(
        f"{STATUS[_outcome(check)][1]}: {check.title}: {shown(check.value)} "
        f"(must be {shown(check.limit)})" for check in checks
    )


def show_checks(checks: list[Check]) -> None:
    """A table of checks: status, what was measured, what it had to be, advice where it failed."""
    display_html(_block("checks_table", checks), _checks_text(checks))


def show_verdict(verdict: Verdict) -> None:
    """The stage's verdict, what failed with its advice, then all checks."""
    name = STAGE_NAMES.get(verdict.stage, verdict.stage)
    text = f"{name} {'passed' if verdict.passed else 'failed'}\n{_checks_text(verdict.checks)}"
    display_html(_block("verdict", verdict, name), text)


def show_table(
    headers: list[str], rows: list[list], caption: str = "", align: list[str] | None = None
) -> None:
    """A table that sorts by a click on a header; columns of numbers are aligned right.

    `align` overrides: "left", "right" or "center" for each column.
    """
    display_html(_table(headers, rows, caption, align), caption or ", ".join(headers))


def _sort_key(cell: Any) -> float | None:
    """The number by which a cell sorts: itself, or the one its text is (`97.8 %`, `$1,200`)."""
    if isinstance(cell, bool):
        return None
    if isinstance(cell, int | float):
        return float(cell)
    text = cell if isinstance(cell, str) else ""
    plain = re.fullmatch(r"([-+]?)\$?(\d[\d,]*\.?\d*(?:e[-+]?\d+)?) ?%?", text)
    return float(plain[1] + plain[2].replace(",", "")) if plain else None


class _Number(float):
    """A number that is shown as its column wants it."""

    def __new__(cls, value: float, text: str):
        number = super().__new__(cls, value)
        number.text = text
        return number

    def __html__(self) -> str:
        return self.text


def _table(headers, rows, caption="", align=None) -> str:
    def is_numeric(column: int) -> bool:
        cells = [row[column] for row in rows if row[column] not in (None, "")]
        return bool(cells) and all(_sort_key(cell) is not None for cell in cells)

    def cells(column: int) -> list:
        """A column of numbers with equally many decimals, as a column is read."""
        values = [row[column] for row in rows]
        texts = [shown(value) for value in values if isinstance(value, float)]
        if not texts or not all(re.fullmatch(r"-?\d+\.?\d*", text) for text in texts):
            return values
        decimals = max(len(text.partition(".")[2]) for text in texts)
        return [_Number(value, f"{value:,.{decimals}f}") if isinstance(value, float) else value
                for value in values]

    align = align or ["right" if is_numeric(i) else "left" for i in range(len(headers))]
    columns = [cells(column) for column in range(len(headers))]
    return _block("table", headers, list(zip(*columns, strict=True)), caption, align)


def show_facts(facts: dict[str, Any]) -> None:
    """Facts as a list of names and values."""
    text = "\n".join(f"{key}: {shown(value)}" for key, value in facts.items())
    display_html(_block("facts", facts), text)


def show_environment(manifest: dict[str, Any]) -> None:
    """What a result depends on: code, versions, machine, data."""
    show_facts(_environment_facts(manifest))


def show_answer(question: str, answer: str) -> None:
    """A heading with the question, and under it the computed answer."""
    from markupsafe import escape

    body = f'<div class="sd"><h3>{escape(question)}</h3><p>{escape(answer)}</p></div>'
    display_html(body, f"{question}\n{answer}")


def show_note(text: str) -> None:
    """A short remark, set apart."""
    from markupsafe import escape

    body = f'<div class="sd"><div class="sd-banner is-note"><p>{escape(text)}</p></div></div>'
    display_html(body, text)


# --------------------------------------------------------------------------------------------
# A run as its report sees it
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """One stage of a run: how it ended, and where its page is."""

    stage: str
    status: str
    """passed, failed or not run; a stage that began and has no verdict has failed."""
    verdict: Verdict | None
    seconds: float | None
    dollars: float
    notebook: Path | None
    """The executed notebook."""
    error: tuple[str, str] | None
    """(name, message) of the error that ended the notebook without a verdict."""
    last_record: float | None
    """Seconds into the run of the stage's last record."""

    @property
    def name(self) -> str:
        return STAGE_NAMES[self.stage]

    @property
    def href(self) -> str | None:
        return f"{self.stage}.html" if self.notebook else None

    @property
    def counted(self) -> str:
        """`7 checks, 1 warning`"""
        if self.verdict is None:
            return "no verdict" if self.status == "failed" else ""
        return _counted(self.verdict)


def _first_error(notebook: Path) -> tuple[str, str] | None:
    """(name, message) of the first error output, or None."""
    import nbformat

    for cell in nbformat.read(notebook, as_version=4).cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                return output.ename, output.evalue
    return None


def _gates(run: Run, records: list[dict], price: float) -> list[Gate]:
    seconds = stage_seconds(records)
    last_record = {row.get("stage"): row["time"] for row in records}
    gates = []
    for stage in STAGES:
        verdict = run.verdict(stage)
        notebook = next(iter(sorted(run.notebooks.glob(f"*_{stage}.ipynb"))), None)
        started = notebook is not None or stage in seconds
        if verdict:
            status = "passed" if verdict.passed else "failed"
        else:
            status = "failed" if started else "not run"
        gates.append(Gate(
            stage, status, verdict, seconds.get(stage), seconds.get(stage, 0) / 3600 * price,
            notebook, _first_error(notebook) if notebook and not verdict else None,
            last_record.get(stage),
        ))
    return gates


def _overall(gates: list[Gate]) -> str:
    statuses = {gate.status for gate in gates}
    if "failed" in statuses:
        return "failed"
    return "incomplete" if "not run" in statuses else "passed"


@dataclass(frozen=True)
class Metric:
    """A metric of the summary as it is shown."""

    name: str
    value: str
    """As it is read."""
    number: Any
    interval: str
    """Its 95 % interval, where the summary has one."""


def _metrics(summary: dict, headline: str) -> tuple[Metric | None, list[Metric]]:
    """(the headline, what stands beside it), as far as the summary has them."""
    values = summary.get("metrics", {})

    def interval(key: str) -> str:
        ends = [values.get(f"{key}_{end}") for end in ("low", "high")]
        return "" if None in ends else " to ".join(_metric_value(key, end) for end in ends)

    found = {
        key: Metric(plots.metric_name(key), _metric_value(key, value), value, interval(key))
        for key, value in values.items()
    }
    beside = [key for key in found if key.startswith("val/") and key != headline
              and not key.endswith(DIAGNOSTICS)]
    beside.append(headline.replace("val/", "train/"))
    return found.get(headline), [found[key] for key in beside if key in found]


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _environment_facts(manifest: dict) -> dict[str, Any]:
    """The manifest as names and values."""
    code, machine = manifest.get("code", {}), manifest.get("machine", {})
    changed = " with uncommitted changes" if code.get("git_diff") else ""
    facts = {
        "Commit": f"{code['git_sha'][:12]}{changed}" if code.get("git_sha") else "not in git",
        "Digest of the code": code.get("digest"),
        "Digest of the params": manifest.get("params_digest"),
        "Seed": manifest.get("seed"),
        "Machine": ", ".join(filter(None, [
            machine.get("cpu"), f"{machine['cores']} cores" if machine.get("cores") else "",
            _gibibytes(machine["memory_bytes"]) if machine.get("memory_bytes") else "",
        ])),
        "Accelerators": machine.get("gpus") or "none",
        "System": machine.get("system"),
        "Host": machine.get("host"),
        "Versions": ", ".join(f"{name} {version}"
                              for name, version in manifest.get("versions", {}).items()),
    }
    for split in manifest.get("data") or []:
        classes = f" in {len(split['per_class']):,} classes" if split.get("per_class") else ""
        facts[f"Data, {split['split']}"] = (
            f"{split['used']:,} of {split['listed']:,} files{classes}, digest {split['digest']}"
        )
    return {key: value for key, value in facts.items() if value not in (None, "")}


# --------------------------------------------------------------------------------------------
# Pages
# --------------------------------------------------------------------------------------------


def render_run(run: Run) -> Path:
    """Write report/<stage>.html for each executed notebook and report/index.html."""
    params = run.params()
    records = list(read_records(run.records_file))
    gates = _gates(run, records, params.machine.dollars_per_hour)
    for gate in gates:
        if gate.notebook:
            render_notebook(gate.notebook, run.report / f"{gate.stage}.html", gate.name,
                            run.name, gates)
    summary = read_json(run.summary_file) or {}
    headline, metrics = _metrics(summary, params.headline)
    manifest = read_json(run.manifest_file) or {}
    changed, sections, total = _grouped(params)
    seconds = [gate.seconds for gate in gates if gate.seconds is not None]
    index = run.report / "index.html"
    _write(
        "run.html.j2", index,
        title=run.name, run_name=run.name, params=params, gates=gates, status=_overall(gates),
        headline=headline, metrics=metrics,
        changed=changed, sections=sections, total=total, total_seconds=sum(seconds),
        total_dollars=sum(gate.dollars for gate in gates),
        findings=[(gate, check) for gate in gates if gate.verdict
                  for check in gate.verdict.failed_checks if check.severity != "error"],
        figures=_figures(records), facts=_environment_facts(manifest),
        diff=manifest.get("code", {}).get("git_diff", ""),
        all_runs=(run.path.parent / "index.html").exists(),
    )
    return index


def _figures(records: list[dict]) -> list[str]:
    """The curves of what was recorded so far."""
    steps = [row for row in records if row["kind"] == "step" and row["stage"] == "train"]
    if not steps:
        return []
    evaluations = [row for row in records if row["kind"] == "eval" and row["stage"] == "train"]
    last = steps[-1]
    figures = [plots.html(lambda: plots.loss_curves(records),
                          f"Loss over {last['step']:,} steps, at the end {shown(last['loss'])}")]
    if evaluations:
        measured = ", ".join(f"{plots.metric_name(key)} {_metric_value(key, value)}"
                             for key, value in evaluations[-1].items() if "/" in key)
        figures.append(plots.html(lambda: plots.metric_curves(records),
                                  f"Validation over the run, at the end {measured}"))
    figures.append(plots.html(lambda: plots.lr_curve(records),
                              f"Learning rate over the run, at the end {shown(last['lr'])}"))
    figures.append(plots.html(lambda: plots.speed(records),
                              "Images a second and share of waiting over the run"))
    return figures


def render_all(outputs: Path) -> Path:
    """Write outputs/index.html: every run folder with a summary, newest first."""
    rows = []
    folders = [path.parent for path in outputs.glob("*/params.yaml")]
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True):
        run = Run(folder)
        try:
            params = run.params()
        except BadInput:
            continue  # of another version of Shakedown: it has its own report
        gates = _gates(run, list(read_records(run.records_file)), params.machine.dollars_per_hour)
        headline, _ = _metrics(read_json(run.summary_file) or {}, params.headline)
        rows.append({
            "name": run.name, "task": params.task, "model": params.model.name,
            "status": _overall(gates), "gates": gates, "headline": headline,
            "failed_at": next((gate.name for gate in gates if gate.status == "failed"), None),
            "seconds": sum(gate.seconds or 0 for gate in gates),
            "dollars": sum(gate.dollars for gate in gates),
            "href": f"{run.name}/report/index.html"
            if (run.report / "index.html").exists() else None,
        })
    index = outputs / "index.html"
    _write("runs.html.j2", index, title="All runs", runs=rows)
    return index


# --------------------------------------------------------------------------------------------
# A notebook's page
# --------------------------------------------------------------------------------------------


def render_notebook(
    executed: Path, html: Path, title: str, run_name: str, links: list[Gate]
) -> None:
    """Turn an executed notebook, also a partial one, into a page of its own.

    `links` are the run's stages for the navigation; the one whose page this is, is marked.
    """
    question, body = _opening(_notebook_body(executed))
    current = next((gate for gate in links if gate.href == html.name), None)
    _write("stage.html.j2", html, title=title, run_name=run_name, gates=links, current=current,
           question=question, body=body, contents=_contents(body))


def _opening(body: str) -> tuple[str, str]:
    """(the notebook's first h1 as plain text, the body without it); it becomes the page's h1.

    Where the notebook has further ones, its headings go down by a level.
    """
    question = ""
    first = re.search(r"<h1\b.*?</h1>", body, re.S)
    if first:
        question, body = _plain(first[0]), body[: first.start()] + body[first.end():]
    if "<h1" in body:
        body = re.sub(r"<(/?)h([1-5])\b", lambda hit: f"<{hit[1]}h{int(hit[2]) + 1}", body)
    return question, body


def _plain(heading: str) -> str:
    """A heading's words, escaped as they are in its HTML."""
    heading = re.sub(r'<a class="anchor-link".*?</a>', "", heading)
    return re.sub(r"<[^>]+>", "", heading).strip()


def _notebook_body(executed: Path) -> str:
    """The notebook's cells as HTML, by nbconvert and our own template."""
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    notebook = nbformat.read(executed, as_version=4)
    notebook.cells = [_tidied(cell) for cell in notebook.cells if not _is_hidden(cell)]
    exporter = HTMLExporter(
        template_name="notebook", extra_template_basedirs=[str(TEMPLATES)],
        config=Config(NbConvertBase={"display_data_priority": [
            "text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg",
            "text/plain",
        ]}),
    )
    body, _ = exporter.from_notebook_node(notebook)
    return body


def _is_hidden(cell) -> bool:
    if any(output.output_type == "error" for output in cell.get("outputs", [])):
        return False
    tags = set(cell.metadata.get("tags", ()))
    # papermill's own banners are red 2 em Helvetica; the page says the same in its own words.
    return bool(tags & HIDDEN_TAGS) or "papermill-error-cell-tag" in tags


def _tidied(cell):
    """The cell without the style sheets that the page has in its head, and without what a
    progress line overwrote by a carriage return."""
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
        elif "text/html" in output.get("data", {}):
            output.data["text/html"] = _DRESS.sub("", output.data["text/html"])
    return cell


def _contents(body: str) -> list[tuple[int, str, str]]:
    """(level, id, text) of the prose's headings below the page's own."""
    found = re.findall(r'<h([23]) id="([^"]+)">(.*?)</h\1>', body, re.S)
    return [(int(level), anchor, _plain(text)) for level, anchor, text in found]
