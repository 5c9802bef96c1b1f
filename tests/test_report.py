"""Tables from results files, and the page in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny import run_script

from lit_gpt.metrics import Metrics
from lit_gpt.report import (
    COMMONSENSE,
    read_evaluation,
    read_run,
    release_table,
    replace_between_marks,
    score_table,
    write_page,
)

BROWSER = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


def write_run(folder: Path, shift: float = 0.0) -> Path:
    """Five steps, two validations, and the results of the last checkpoint."""
    folder.mkdir(parents=True)
    metrics = Metrics(folder, 0)
    for step in range(1, 6):
        metrics.log(step, tokens=step * 1_000_000, loss=5 / step + shift, tokens_per_s=1000, learning_rate=1e-3)
    metrics.log(3, tokens=3_000_000, val_loss=2.0 + shift, **{"val_loss/code": 1.0, "eval/commonsense": 0.3})
    metrics.log(5, tokens=5_000_000, val_loss=1.5 + shift, loss=float("nan"))
    metrics.close()
    results = {}
    for i, task in enumerate(COMMONSENSE):
        metric = "acc" if task in ("winogrande", "boolq") else "acc_norm"
        results[f"{task}_local"] = {"acc,none": 0.1, f"{metric},none": 0.4 + i / 100, f"{metric}_stderr,none": 0.02}
    about = dict(checkpoint=f"{folder}/step-00000005", step=5, tokens=5_000_000, date="2026-01-02 03:04 UTC", limit=200)
    (folder / "step-00000005").mkdir()
    (folder / "step-00000005" / "results.json").write_text(json.dumps({"results": results, "config": about}))
    return folder


def test_tables_say_what_the_results_files_say(tmp_path):
    runs = [read_run(write_run(tmp_path / "run"))]
    release = release_table(runs).splitlines()
    assert release[0] == "| Date | Checkpoint | Tokens | Step | Commonsense Avg |"
    assert release[2] == "| 2026-01-02 | run/step-00000005 | 5M | 5 | 43.00 (200 questions a task) |"
    row = score_table(runs, COMMONSENSE, mean=True).splitlines()[2]
    assert row.startswith("| run/step-00000005 | 5M | 40.00 ± 2.00 | 41.00 ± 2.00 |") and row.endswith("| 43.00 |")
    assert score_table(runs, {"mmlu": "MMLU"}, mean=False) == ""


def test_report_updates_tables_in_place_and_overlays_runs(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", shift=0.5)
    page = tmp_path / "EVAL.md"
    marks = "".join(f"## {n}\n<!-- {n} -->\nold\n<!-- /{n} -->\n" for n in ("releases", "commonsense", "instruct"))
    page.write_text(f"before\n{marks}after\n")
    flags = ("--runs", f"[{tmp_path / 'a'}, {tmp_path / 'b'}]", "--out", tmp_path / "out", "--update", page)
    assert run_script("report.py", *flags) == 0
    once = page.read_text()
    assert once.startswith("before") and once.endswith("after\n") and "old" not in once and "43.00" in once
    assert run_script("report.py", *flags) == 0 and page.read_text() == once
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.html", "loss.png", "scores.png", "tables.md"}
    assert "<!-- instruct -->\n\nNone yet.\n\n<!-- /instruct -->" in once
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert "avg" in tables and "MMLU" not in tables, "a table without rows"
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_named(tmp_path):
    assert "is no run" in run_script("report.py", "--runs", f"[{tmp_path}]", "--out", tmp_path / "out")
    assert "--runs or --results" in run_script("report.py", "--out", tmp_path / "out")
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(ValueError, match="results.json"):
        read_evaluation(tmp_path / "results.json")
    with pytest.raises(ValueError, match="<!-- releases -->"):
        replace_between_marks("nothing here", "releases", "x")


def test_a_page_is_whole_and_names_cannot_break_it(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    run.name = "</script><b>bold"
    write_page([run], tmp_path / "page.html", refresh_s=30)
    text = (tmp_path / "page.html").read_text()
    assert '<meta http-equiv="refresh" content="30">' in text
    assert text.count("</script>") == 1 and not re.search(r"""(src|href)\s*=\s*["']|https?://(?!www.w3.org)""", text)
    data = json.loads(re.search(r"const data = (.*);\n", text)[1])
    assert data["runs"][0]["name"] == run.name and data["runs"][0]["loss"][0] == [1_000_000, 5.0]
    assert [p.name for p in tmp_path.iterdir() if p.suffix in (".html", ".tmp")] == ["page.html"]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page_from_the_disk(width, tmp_path):
    write_page([read_run(write_run(tmp_path / "run"))], tmp_path / "page.html")
    # What a script on the page sees once it is drawn: charts, and whether it is wider than the window.
    probe = "<script>document.title = 'wide ' + (document.documentElement.scrollWidth - innerWidth)</script></body>"
    page = (tmp_path / "page.html").read_text().replace("</body>", probe)
    (tmp_path / "page.html").write_text(page)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += [f"--window-size={width},900", "--dump-dom", f"file://{tmp_path / 'page.html'}"]
    dom = subprocess.run([BROWSER, *flags], capture_output=True, text=True, timeout=200).stdout
    assert dom.count("<svg") == 5  # loss, average, domains, speed, learning rate; no gradient norm was logged
    assert '<h1 id="title">run</h1>' in dom and "run/step-00000005" in dom and "43.00 (200 a task)" in dom
    assert int(re.search(r"<title>wide (-?\d+)</title>", dom)[1]) <= 0
