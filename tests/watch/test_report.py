"""Pages say what the run folder says, ask the network for nothing, and survive dead runs."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict

import nbformat
import papermill
import pytest

from lib.params import Params
from lib.run import STAGES, Check, open_run, write_json
from lib.watch import report

PARAMS = Params.model_validate_json(json.dumps({
    "model": {"name": "resnet18"}, "train": {"epochs": 3, "batch_size": 64},
    "machine": {"dollars_per_hour": 7.2},
}))
GOOD = Check("top1", "Validation accuracy", 0.9778, "at least 0.95", True)
WARNING = Check("wait", "Time spent waiting for data", 0.31, "below 0.05", False, "warning",
                "Raise `data.num_workers`.")
BAD = Check("lr", "Learning rate of the params", 50.0, "below 0.81", False, "error",
            "Set optim.lr <below> the divergence.")


def records_of(stages):
    rows, time = [], 0.0
    for stage in stages:
        rows.append({"kind": "event", "stage": stage, "event": "stage started", "time": time})
        for step in range(1, 31 if stage == "train" else 1):
            rows.append({"kind": "step", "stage": stage, "step": step, "time": time + step,
                         "loss": 2 / step, "lr": 0.1, "epoch": step / 10, "images": 64,
                         "seconds": 0.2, "wait": 0.01})
        metrics = {"val/top1": 0.9778, "val/top1_low": 0.957, "val/top1_high": 0.989,
                   "val/top5": 0.99, "val/top1_relabelled": 0.98, "train/top1": 0.995}
        if stage in ("train", "analysis"):
            rows.append({"kind": "eval", "stage": stage, "step": 30, "time": time + 40} | metrics)
        time += 50
        rows.append({"kind": "event", "stage": stage, "event": "stage finished", "time": time})
    return rows


def notebook_of(*cells):
    """A notebook of ("md" | source, outputs, tags)."""
    made = nbformat.v4.new_notebook()
    for source, outputs, tags in cells:
        if source.startswith("#"):
            made.cells.append(nbformat.v4.new_markdown_cell(source))
        else:
            made.cells.append(nbformat.v4.new_code_cell(
                source, outputs=outputs, execution_count=1, metadata={"tags": tags}))
    return made


def raised(name, message, traceback=()):
    return nbformat.v4.new_output("error", ename=name, evalue=message,
                                  traceback=[*traceback, f"{name}: {message}"])


def printed(text):
    return nbformat.v4.new_output("stream", text=text)


def make_run(path, verdicts, stages=None, last_cell=None, params=PARAMS):
    """A run folder with these {stage: checks}; `stages` began, the last of them ends so."""
    stages = list(verdicts if stages is None else stages)
    run = open_run(params, path, "test")
    run.unlock()
    run.records_file.write_text("".join(json.dumps(row) + "\n" for row in records_of(stages)))
    for stage, checks in verdicts.items():
        passed = all(check.passed or check.severity != "error" for check in checks)
        write_json(run.verdicts / f"{stage}.json",
                   {"stage": stage, "passed": passed, "checks": [asdict(c) for c in checks]})
    run.write_summary()
    run.notebooks.mkdir()
    for stage in stages:
        cells = [(f"# Is {stage} good?\n\nProse.\n\n## A part", [], []),
                 ("print(1)", [printed("said\n")], [])]
        if last_cell and stage == stages[-1]:
            cells.append(last_cell)
        number = STAGES.index(stage)
        nbformat.write(notebook_of(*cells), run.notebooks / f"{number:02}_{stage}.ipynb")
    return run


@pytest.fixture(scope="module")
def passed_run(tmp_path_factory):
    verdicts = {stage: [GOOD] for stage in STAGES} | {"train": [GOOD, WARNING]}
    run = make_run(tmp_path_factory.mktemp("outputs") / "fine_run", verdicts)
    report.render_run(run)
    return run


def index_of(run):
    return (run.report / "index.html").read_text()


def words(page):
    """What a reader sees of a page."""
    page = re.sub(r"<(style|script).*?</\1>", " ", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def assert_self_contained(page):
    assert not re.search(r"""(?:src|srcset|href|action)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert not re.search(r"url\(\s*[\"']?(?!data:)|@import", page)
    assert "require" not in page and "MathJax" not in page
    assert len(page) < 5_000_000


# -- the index of a run -----------------------------------------------------------------------


def test_index_of_a_passed_run_links_five_pages_and_states_its_numbers(passed_run):
    page, said = index_of(passed_run), words(index_of(passed_run))
    for stage in STAGES:
        assert f'href="{stage}.html"' in page
        assert (passed_run.report / f"{stage}.html").is_file()
    assert "Passed all 5 gates" in said and "Failed at" not in said
    assert "validation top-1 95.70 % to 98.90 %, with 95 % confidence 97.78 %" in said
    assert "training top-1 99.50 %" in said and "relabelled" not in said
    # 5 stages of 50 s at $7.2 an hour
    assert "4 min 10 s" in said and "$0.5000" in said and "at $7.20 an hour" in said


def test_index_shows_curves_findings_params_and_environment(passed_run):
    page, said = index_of(passed_run), words(index_of(passed_run))
    assert page.count('class="sd sd-figure"') == 4
    assert "Train: Time spent waiting for data , 0.31 (must be below 0.05)" in said
    assert "Raise <code>data.num_workers</code>." in page
    assert "model.name resnet18 resnet50" in said
    assert "params as the defaults have them" in said
    manifest = json.loads(passed_run.manifest_file.read_text())
    assert manifest["params_digest"] in said and manifest["versions"]["torch"] in said


def test_no_page_asks_the_network_and_every_picture_has_words(passed_run):
    report.render_all(passed_run.path.parent)
    pages = [*passed_run.report.glob("*.html"), passed_run.path.parent / "index.html"]
    assert len(pages) == 7
    for path in pages:
        page = path.read_text()
        assert_self_contained(page)
        assert all(re.search(r'alt="[^"]', image) for image in re.findall(r"<img[^>]*>", page))
        assert page.count("<h1") == 1 and 'name="viewport"' in page
        for link in re.findall(r'href="([^"#]+)', page):
            assert link == "data:," or (path.parent / link).is_file(), link


def test_index_of_a_failed_run_begins_with_why(tmp_path):
    run = make_run(tmp_path / "bad", {"setup": [GOOD], "overfit": [GOOD], "lr_finder": [GOOD, BAD]})
    report.render_run(run)
    page = index_of(run)
    said = words(page)
    assert "Failed at LR finder 2 checks, 1 failed" in said
    why = "Learning rate of the params : 50 (must be below 0.81) Set optim.lr &lt;below&gt; the"
    assert why in said and said.index(why) < said.index("not run")
    assert "Passed" not in said
    assert 'href="lr_finder.html"' in page
    for stage in ("train", "analysis"):
        assert f'href="{stage}.html"' not in page and not (run.report / f"{stage}.html").exists()
    assert said.count("○ not run") == 2


def test_index_of_a_crashed_run_quotes_the_error(tmp_path):
    cell = ("boom()", [raised("ZeroDivisionError", "division by <zero>", ["frame 1"])], [])
    run = make_run(tmp_path / "crash", {"setup": [GOOD]}, ["setup", "overfit"], cell)
    report.render_run(run)
    assert "Failed at Overfit no verdict ZeroDivisionError : division by &lt;zero&gt;" in words(
        index_of(run))
    assert 'href="overfit.html#error"' in index_of(run)
    page = (run.report / "overfit.html").read_text()
    assert 'id="error"' in page and "<summary>Traceback</summary>" in page
    assert "Stopped here: ZeroDivisionError" in page


def test_a_killed_stage_is_not_taken_for_a_passed_one(tmp_path):
    run = make_run(tmp_path / "killed", {"setup": [GOOD]}, ["setup", "overfit"])
    report.render_run(run)
    said = words(index_of(run))
    assert "Failed at Overfit no verdict" in said and "its process was ended from outside" in said


def test_a_run_of_some_stages_is_incomplete(tmp_path):
    run = make_run(tmp_path / "part", {"setup": [GOOD], "overfit": [GOOD]})
    report.render_run(run)
    said = words(index_of(run))
    assert "Incomplete: 2 of 5 gates passed" in said and "Failed" not in said


def test_a_folder_with_params_alone_is_rendered(tmp_path):
    run = open_run(PARAMS, tmp_path / "empty", "test")
    run.unlock()
    report.render_run(run)
    assert "Incomplete: 0 of 5 gates passed" in words(index_of(run))


def test_last_evaluation_is_not_passed_off_as_the_analysis(tmp_path):
    run = make_run(tmp_path / "unfinished", {stage: [GOOD] for stage in STAGES[:3]}, STAGES[:4])
    report.render_run(run)
    assert "validation top-1, last evaluation" in words(index_of(run))


def test_the_list_of_runs(tmp_path):
    for name, verdicts in {"one": {stage: [GOOD] for stage in STAGES},
                           "two": {"setup": [GOOD], "overfit": [BAD]}}.items():
        report.render_run(make_run(tmp_path / name, verdicts))
    (tmp_path / "no_run").mkdir()
    page = report.render_all(tmp_path).read_text()
    said = words(page)
    assert 'href="one/report/index.html"' in page and 'href="two/report/index.html"' in page
    assert "2 in this folder 1 passed" in said and "no_run" not in said
    assert "failed at Overfit" in said and "97.78 % validation top-1" in said


# -- a notebook's page ------------------------------------------------------------------------


def page_of(tmp_path, *cells):
    source, target = tmp_path / "00_setup.ipynb", tmp_path / "setup.html"
    nbformat.write(notebook_of(*cells), source)
    report.render_notebook(source, target, "Setup", "a_run", [])
    return target.read_text()


def test_the_notebook_s_question_is_the_page_s_title(tmp_path):
    page = page_of(tmp_path, ("# Is it `a` & good?\n\nYes.", [], []), ("## Why `lr`?", [], []))
    assert page.count("<h1") == 1 and "<h1>Is it a &amp; good?</h1>" in page
    anchor = re.search(r'<a href="#([^"]+)">Why lr\?</a>', page)[1]
    assert f'<h2 id="{anchor}">' in page


def test_several_questions_become_sections(tmp_path):
    page = page_of(tmp_path, ("# First?", [], []), ("# Second?", [], []), ("## Part", [], []))
    assert page.count("<h1") == 1
    assert re.search(r"<h2[^>]*>Second\?", page) and re.search(r"<h3[^>]*>Part", page)


def test_code_is_folded_but_there(tmp_path):
    page = page_of(tmp_path, ("answer = 41 + 1", [], []))
    folded = re.search(r"<details class=\"code\">.*?</details>", page, re.S)[0]
    assert words(folded) == "code answer = 41 + 1" and " open" not in folded[:30]


def test_plumbing_is_hidden_unless_it_raised(tmp_path):
    page = page_of(
        tmp_path, ("secret = 1", [printed("noise")], ["plumbing"]), ("other = 2", [], ["hide"]),
        ("shown = 3", [raised("ValueError", "it broke")], ["hide"]),
    )
    said = words(page)
    assert "secret" not in said and "noise" not in said and "other" not in said
    assert "shown = 3" in said and "it broke" in said


def test_an_error_of_ours_is_one_line(tmp_path):
    page = page_of(tmp_path, ("go()", [raised("BadInput", "data/x: no such folder")], []))
    assert "Stopped here: BadInput data/x: no such folder" in words(page)
    assert "Traceback" not in page


def test_progress_lines_show_their_last_state(tmp_path):
    page = page_of(tmp_path, ("go()", [printed("step 1\rstep 2\rstep 3\ndone\r\n")], []))
    said = words(page)
    assert "step 3" in said and "done" in said and "step 1" not in said and "step 2" not in said


# -- what notebook cells display, through a real kernel ---------------------------------------

EXECUTED = """
from lib.params import Params
from lib.run import Check, Verdict
from lib.watch import plots, report

report.show_params(Params())
--
bad = Check("a", "Falls", 3.14159, "below 2", False, "error", "Lower `optim.lr` & retry.")
report.show_verdict(Verdict("lr_finder", (bad, Check("b", "Same", True, "yes", True))))
report.show_checks([Check("c", "Wait", 0.5, "below 0.1", False, "warning", "More workers.")])
--
rows = [["<b>", 12345, 0.5, "9.1 %"], ["c", 7, 0.9667, "10 %"], ["d", 1, 1.0, "$1,200"]]
report.show_table(["class", "right", "share", "text"], rows)
report.show_facts({"a step": 0.123456, "<x>": None})
report.show_note("Mind the <gap>")
--
plots.show(lambda: plots.schedule([0, 1], [0.1, 0.2]), alt="the schedule")
--
from lib.errors import GateFailed

raise GateFailed("lr_finder: Falls: 3.142, must be below 2")
--
print("never")
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A page of a notebook that papermill ran and that raised in its last cell but one."""
    folder = tmp_path_factory.mktemp("executed")
    made = nbformat.v4.new_notebook(metadata={"kernelspec": {
        "name": "python3", "display_name": "Python 3", "language": "python"}})
    made.cells = [nbformat.v4.new_code_cell(source.strip()) for source in EXECUTED.split("--")]
    nbformat.write(made, folder / "source.ipynb")
    with pytest.raises(papermill.PapermillExecutionError, match="GateFailed"):
        papermill.execute_notebook(folder / "source.ipynb", folder / "done.ipynb", cwd=".",
                                   progress_bar=False)
    report.render_notebook(folder / "done.ipynb", folder / "setup.html", "Setup", "a_run", [])
    return (folder / "setup.html").read_text()


def test_the_shown_blocks_reach_the_page(executed):
    said = words(executed)
    assert "No param differs from its default." in said
    assert "LR finder failed 2 checks, 1 failed" in said
    assert "Falls : 3.142 (must be below 2) Lower optim.lr &amp; retry." in said
    assert "! warning Wait More workers. 0.5 below 0.1" in said
    assert "&lt;b&gt; 12,345 0.5000" in said and "c 7 0.9667" in said and "d 1 1.0000" in said
    assert "a step 0.1235 &lt;x&gt; none" in said
    assert "Mind the &lt;gap&gt;" in said
    assert 'alt="the schedule"' in executed


def test_numbers_sort_as_numbers_and_stand_right(executed):
    assert '<td class="sd-right" data-sort="12345.0">12,345</td>' in executed
    assert 'data-sort="0.5">0.5000' in executed
    assert 'data-sort="9.1">9.1 %' in executed and 'data-sort="1200.0">$1,200' in executed


def test_style_and_script_are_in_the_page_once(executed):
    assert executed.count("<style") == 1
    assert executed.count("window.sdSort =") == 1
    assert_self_contained(executed)


def test_a_failed_gate_is_not_a_crash(executed):
    said = words(executed)
    assert "The verdict is “failed”, so the pipeline stops here." in said
    assert "Stopped here" not in said and "An Exception was encountered" not in said
    assert "code (not run)" in said and "Helvetica;" not in executed


# -- in a browser -----------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_tables_sort_by_a_click(executed, tmp_path):
    click = (
        "<script>var b = [...document.querySelectorAll('.sd-sort')].find(b => b.textContent =="
        " 'right'); b.click(); var rows = [...b.closest('table').tBodies[0].rows];"
        "var up = rows.map(r => r.cells[1].textContent).join(); b.click();"
        "rows = [...b.closest('table').tBodies[0].rows];"
        "document.title = 'up ' + up + ' down ' + rows.map(r => r.cells[1].textContent).join();"
        "</script></body>"
    )
    page = tmp_path / "page.html"
    page.write_text(executed.replace("</body>", click))
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu",
         "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
         "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "<title>up 1,7,12,345 down 12,345,7,1</title>" in done.stdout


def test_a_neighbour_of_another_version_does_not_spoil_the_list_of_runs(passed_run):
    """A run folder whose params this version does not know is passed over, not an error."""
    other = passed_run.path.parent / "from_another_version"
    other.mkdir()
    (other / "params.yaml").write_text("task: classify\nno_such_key: 1\n")
    page = report.render_all(passed_run.path.parent).read_text()
    assert passed_run.name in page and "from_another_version" not in page


def test_a_count_below_one_is_no_share():
    assert report._metric_value("val/mAP50", 0.1) == "10.00 %"
    assert "%" not in report._metric_value("val/false_alarms", 0.1)
