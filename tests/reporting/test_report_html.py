"""The page is checked by parsing: what it shows, and what it must not hold."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from qcompiler.protocol.pass_base import Skip
from qcompiler.reporting.report import CompileReport
from qcompiler.reporting.report_html import render_report
from tests.reporting.test_report import full_report

VOID = {"meta", "link", "br", "img", "hr", "input", "wbr"}
MANIFEST: dict[str, Any] = {
    "qcompiler": "9.9",
    "seed": 7,
    "recipe": [{"pass": "assign", "options": {"scheme": "w4a16"}}, {"pass": "gptq", "options": {"damping": 0.01}}],
    "provenance": {"source": "models/some-model", "fingerprint": "abc123"},
}
ATTACK = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}{% for %}&amp;"


class Page(HTMLParser):
    """Text, elements and attributes of a page; an element that is not closed is an error."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data


def page(report: CompileReport, manifest: Any = None) -> Page:
    return Page(render_report(report.to_dict(), MANIFEST if manifest is None else manifest))


def test_everything_is_on_the_page() -> None:
    report = full_report()
    report.sites.append(replace(report.sites[0], method="insert-qdq", site="b"))
    report.targets["onnx"]["sites"] = {"a": {"status": "fused", "reason": ""}, "b": {"status": "runs", "reason": "why"}}
    shown = page(report)
    rows = {row[0]: row[1:] for row in shown.rows}
    assert rows["a"] == ["gptq", "int4 g128", "20.5", "0.01", "0.500", "1.50", "damping=0.01, dead=1, 2"]
    assert [row[1:6] for row in shown.rows if row[0] == "b"] == [
        ["rtn", "int8", "–", "–", "–"],
        ["insert-qdq", "int4 g128", "20.5", "0.01", "0.500"],
    ]
    assert rows["head"] == ["assign", "left in float"]
    assert rows["norm_1"] == ["scale", "0.norm_1", "0.q, 0.k", "16", "", "alpha=0.5"]
    assert rows["sweep"] == ["1.0", "–"]
    assert rows["gptq"] == ["damping=0.01"]
    assert rows["bits per weight"] == ["4.80 over 50 parameters"]
    assert rows["output error, ratio to RTN"] == ["median 0.500, worst 0.500; 0 of 2 are worse"]
    assert rows["calibration"] == ["source=text, samples=4"]
    assert rows["seed"] == ["7"]
    assert rows["layers"] == ["2 rewritten, 1 left alone"]
    assert rows["fingerprint of the original"] == ["abc123"]
    assert rows["sites"] == ["1 fused; 1 runs (why)"]
    assert rows["parity"] == ["max_difference=1e-05"]
    for name, value in report.machine.items():
        assert rows[name] == [value]
    for text in ("models/some-model", "qcompiler 9.9", "a note", "y"):
        assert text in shown.text


@pytest.mark.parametrize(("error", "kind"), [(0.01, "good"), (0.03, "bad"), (0.02, "")])
def test_a_layer_that_became_worse_is_marked(error: float, kind: str) -> None:
    report = full_report()
    object.__setattr__(report.sites[0], "output_error", error)
    classes = [value.split() for _, name, value in page(report).attributes if name == "class"]
    assert [words[1] for words in classes if words[:1] == ["number"] and words[1:]] == ([kind] if kind else [])


def attacked(value: Any) -> Any:
    """The same fields with hostile strings for values, and with a hostile key."""
    if isinstance(value, str):
        return value + ATTACK
    if isinstance(value, dict):
        return {key: attacked(item) for key, item in value.items()} | {ATTACK: ATTACK}
    if isinstance(value, list):
        return [attacked(item) for item in value]
    return value


def test_strings_are_inert() -> None:
    report, manifest = attacked(full_report().to_dict()), attacked(MANIFEST)
    report["seconds"].pop(ATTACK)
    report["seconds"]["<script>"] = 1.0
    report["targets"].pop(ATTACK)
    source = render_report(report, manifest)
    shown = Page(source)
    clean = page(full_report())
    assert set(shown.tags) == set(clean.tags)
    assert "script" not in shown.tags
    assert {(tag, name) for tag, name, _ in shown.attributes} == {(tag, name) for tag, name, _ in clean.attributes}
    assert "{{ 7 * 7 }}" in shown.text
    assert shown.text.count("<script>alert(1)</script>") > 20


def test_nothing_comes_from_outside() -> None:
    shown = page(full_report())
    assert not {"script", "link", "img", "iframe", "object", "a"} & set(shown.tags)
    assert not [item for item in shown.attributes if item[1] in ("src", "href", "style") or item[1].startswith("on")]
    source = render_report(full_report().to_dict(), MANIFEST)
    assert "http" not in source.replace("http-equiv", "")
    assert "url(" not in source
    assert "default-src 'none'" in source
    assert "color-scheme: light dark" in source
    assert "prefers-color-scheme: dark" in source


def test_nothing_to_show() -> None:
    assert "A model" in page(CompileReport(), {}).text
    assert Page(render_report({}, {})).text


def test_what_was_planned_is_told_from_what_could_not_be_done() -> None:
    report = full_report()
    report.skipped = [Skip("lm_head", "assign", "output projection", asked=True), Skip("a.b", "gptq", "no rows")]
    source = page(report).text
    hindered, planned = source.index("Could not be rewritten (1)"), source.index("As the recipe says (1)")
    assert hindered < source.index("no rows") < planned < source.index("output projection")
    assert "Asked for" not in source


def test_regions_that_share_nothing_are_no_alarm() -> None:
    report = full_report()
    region = report.regions[0]
    report.regions = [
        {**region, "status": status, "reason": f"is {status}"} for status in ("refused", "found", "folded")
    ]
    source = render_report(report.to_dict(), MANIFEST)
    places = [source.index(text) for text in ("Rewritten (1)", "Found, and left as they are (1)", "Share no scale")]
    assert places == sorted(places)
    assert source.count("<details open>") == 1
    assert 'class="bad"' not in source


def test_lines_end_between_the_parts_of_a_name() -> None:
    report = full_report()
    report.sites[0] = replace(report.sites[0], site="model.layers.0.self_attn.q_proj")
    source = render_report(report.to_dict(), MANIFEST)
    assert "model.<wbr>layers.<wbr>0.<wbr>self_attn.<wbr>q_proj" in source
    assert "anywhere" not in source


def test_every_table_scrolls_by_itself() -> None:
    source = render_report(full_report().to_dict(), MANIFEST)
    tables = [source[: match.start()].rstrip()[-18:] for match in re.finditer("<table", source)]
    assert set(tables) == {'<div class="wide">'}


def test_what_each_target_ships_is_in_the_summary() -> None:
    report = full_report()
    report.targets["onnx"]["bytes"] = 3 << 20
    assert ["shipped: onnx", "3.0 MiB"] in page(report).rows


def test_equal_reports_give_equal_pages() -> None:
    fields = full_report().to_dict()
    again = json.loads(json.dumps(fields))
    assert render_report(fields, MANIFEST) == render_report(again, json.loads(json.dumps(MANIFEST)))
    loaded = CompileReport.from_dict(again).to_dict()
    assert render_report(loaded, MANIFEST) == render_report(fields, MANIFEST)
