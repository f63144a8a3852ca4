"""`render_report`: the report of a compilation as one HTML page, without scripts or anything from outside."""

import json
import re
from collections.abc import Iterable, Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["render_report"]

_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ source }}: compilation report</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --faint: #5f6670; --page: #ffffff; --band: #f3f4f6; --line: #d5d9df;
  --bad: #b42318; --good: #18794e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --faint: #9aa2ad; --page: #16181c; --band: #20242a;
  --line: #363c45; --bad: #ff8a7a; --good: #6fd19c; } }
body { margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: var(--ink); background: var(--page);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin-bottom: 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
p, li { max-width: 60rem; }
.faint { color: var(--faint); }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; }
th, td { padding: .25rem .75rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
.wide td { min-width: 5rem; max-width: 28rem; }
.wide td:first-child { min-width: 12rem; }
thead th { background: var(--band); white-space: nowrap; }
tbody th { font-weight: normal; color: var(--faint); }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.bad { color: var(--bad); }
.good { color: var(--good); }
code { font: 13px/1.5 ui-monospace, monospace; }
pre { background: var(--band); padding: .75rem; overflow-x: auto; }
summary { cursor: pointer; }
@media (max-width: 40rem) { body { margin: 1rem auto; }
  .facts th, .facts td { display: block; border: 0; padding: 0 .25rem; } .facts td { padding-bottom: .5rem; } }
</style>
</head>
<body>
<h1>{{ source | breakable }}</h1>
<p class="faint">Compiled by qcompiler {{ manifest.qcompiler }}{% if recipe %} with
{% for item in recipe %}{{ item["pass"] }}{{ ", " if not loop.last }}{% endfor %}{% endif %}</p>

<h2>Summary</h2>
<div class="wide"><table class="facts"><tbody>
{% for name, value in summary %}<tr><th scope="row">{{ name }}</th><td>{{ value | breakable }}</td></tr>
{% endfor %}</tbody></table></div>

<h2>What next</h2>
<p>In the directory of this page:</p>
<pre><code>qcompiler evaluate . --text FILE --against ORIGINAL
qcompiler generate . --prompt "..."</code></pre>

{% if report.notes %}<h2>Notes</h2>
<ul>{% for note in report.notes %}<li>{{ note }}</li>
{% endfor %}</ul>{% endif %}

<h2>Recipe</h2>
<div class="wide"><table><thead><tr><th>Pass</th><th>Options</th></tr></thead><tbody>
{% for item in recipe %}<tr><td>{{ item["pass"] }}</td><td><code>{{ item.options | pairs | breakable }}</code></td></tr>
{% endfor %}</tbody></table></div>

<h2>Time</h2>
<div class="wide"><table><thead><tr><th>Phase</th><th class="number">Seconds</th>
<th class="number">CPU seconds</th></tr></thead><tbody>
{% for phase, seconds in (report.seconds or {}).items() %}<tr><td>{{ phase }}</td>
<td class="number">{{ seconds | number(1) }}</td>
<td class="number">{{ (report.cpu_seconds or {}).get(phase) | number(1) }}</td></tr>
{% endfor %}</tbody></table></div>

<h2>Layer by layer ({{ sites | length }})</h2>
<p class="faint">SQNR is that of the weight or activation. The output error is the squared error of the layer's output
on the calibration inputs, relative to the output's square; the ratio compares it with round-to-nearest: below 1 is
better.</p>
<div class="wide"><table><thead><tr><th>Layer</th><th>Method</th><th>Scheme</th><th class="number">SQNR, dB</th>
<th class="number">Output error</th><th class="number">Ratio to RTN</th><th class="number">Seconds</th><th>Details</th>
</tr></thead><tbody>
{% for site in sites %}<tr><td><code>{{ site.site | breakable }}</code></td>
<td>{{ site.method }}</td><td>{{ site.scheme }}</td>
<td class="number">{{ site.sqnr_db | number(1) }}</td><td class="number">{{ site.output_error | short }}</td>
<td class="number {{ site.ratio | judgement }}">{{ site.ratio | number(3) }}</td>
<td class="number">{{ site.seconds | number(2) }}</td><td><code>{{ site.details | pairs | breakable }}</code></td></tr>
{% endfor %}</tbody></table></div>

<h2>Left alone ({{ report.skipped | length }})</h2>
{% for title, skips in left_alone %}{% if skips %}<h3>{{ title }} ({{ skips | length }})</h3>
<div class="wide"><table><thead><tr><th>Layer</th><th>By</th><th>Reason</th></tr></thead><tbody>
{% for skip in skips %}<tr><td><code>{{ skip.site | breakable }}</code></td><td>{{ skip.method }}</td>
<td>{{ skip.reason | breakable }}</td></tr>
{% endfor %}</tbody></table></div>{% endif %}{% endfor %}
{% if not report.skipped %}<p>Nothing.</p>{% endif %}

<h2>Regions ({{ report.regions | length }})</h2>
<p class="faint">Groups of weights that may share a scale per channel, or a rotation. That some weights can share none
is a fact about the model, and no fault.</p>
{% for title, regions in regions_by_use %}
<details{{ " open" if loop.first }}><summary>{{ title }} ({{ regions | length }})</summary>
<div class="wide"><table><thead><tr><th>Region</th><th>Kind</th><th>From</th><th>Into</th>
<th class="number">Channels</th><th>Reason</th><th>Details</th></tr></thead><tbody>
{% for region in regions %}<tr><td><code>{{ region.name | breakable }}</code></td><td>{{ region.kind }}</td>
<td><code>{{ region.producers | words | breakable }}</code></td>
<td><code>{{ region.consumers | words | breakable }}</code></td>
<td class="number">{{ region.channels }}</td><td>{{ region.reason | breakable }}</td>
<td><code>{{ region.details | pairs | breakable }}</code></td></tr>
{% endfor %}</tbody></table></div></details>{% endfor %}
{% if not report.regions %}<p>No pass looked for any.</p>{% endif %}

<h2>Not recognised ({{ report.unrecognized | length }})</h2>
{% if report.unrecognized %}<div class="wide"><table><thead><tr><th>What it resembles</th><th>Where</th>
<th>Reason</th></tr></thead><tbody>
{% for item in report.unrecognized %}<tr><td>{{ item.pattern }}</td><td><code>{{ item.node | breakable }}</code></td>
<td>{{ item.reason }}</td></tr>
{% endfor %}</tbody></table></div>{% else %}<p>Nothing.</p>{% endif %}

<h2>Targets</h2>
{% for name, target in targets %}<h3>{{ name }}</h3>
<div class="wide"><table><tbody>
{% for key, value in target %}<tr><th scope="row">{{ key }}</th><td>{{ value | breakable }}</td></tr>
{% endfor %}</tbody></table></div>
{% else %}<p>The native artifact alone.</p>{% endfor %}

<h2>Machine and versions</h2>
<div class="wide"><table class="facts"><tbody>
{% for name, value in (report.machine or {}).items() %}<tr><th scope="row">{{ name }}</th>
<td>{{ value | breakable }}</td></tr>
{% endfor %}</tbody></table></div>
</body>
</html>
"""


def render_report(report: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """One HTML page; every string in it is escaped, equal arguments give an equal page.

    Args:
        report: as `CompileReport.to_dict` gives it; what is missing is left out.
        manifest: of the native artifact: ``qcompiler``, ``recipe``, ``seed``, ``provenance``.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        number=_number, short=_short, pairs=_pairs, words=_words, judgement=_judgement, breakable=_breakable
    )
    sites = [{**site, "ratio": _ratio(site)} for site in report.get("sites") or ()]
    return environment.from_string(_TEMPLATE).render(
        source=(manifest.get("provenance") or {}).get("source") or "A model",
        manifest=manifest,
        recipe=manifest.get("recipe") or [],
        report=report,
        sites=sites,
        summary=_summary(report, manifest, sites),
        left_alone=_left_alone(report.get("skipped") or ()),
        regions_by_use=_by_use(report.get("regions") or ()),
        targets=[(name, _target(target)) for name, target in (report.get("targets") or {}).items()],
    )


def _summary(report: Mapping[str, Any], manifest: Mapping[str, Any], sites: list[dict[str, Any]]) -> list[Any]:
    before, after = report.get("bytes_before"), report.get("bytes_after")
    targets: Mapping[str, Mapping[str, Any]] = report.get("targets") or {}
    rows = [
        ("weights", f"{_mebibytes(before)} → {_mebibytes(after)}"),
        *((f"shipped: {name}", _mebibytes(t["bytes"])) for name, t in targets.items() if t.get("bytes") is not None),
        ("bits per weight", f"{_number(report.get('bits_per_weight'), 2)} over {report.get('parameters'):,} parameters")
        if report.get("parameters")
        else None,
        ("layers", f"{len({s.get('site') for s in sites})} rewritten, {len(report.get('skipped') or ())} left alone"),
        ("seconds", _number((report.get("seconds") or {}).get("total"), 1)),
        ("peak memory", _mebibytes(report.get("peak_rss_bytes"))),
        _held_out(report.get("held_out")),
        ("sweeps", f"{report.get('sweeps')} over {report.get('segments')} segments"),
        ("calibration values on disk", _mebibytes(report.get("bytes_spilled"))),
        ("calibration", _pairs({k: v for k, v in (report.get("calibration") or {}).items() if k != "notes"}) or "none"),
        ("seed", str(manifest.get("seed"))),
        ("fingerprint of the original", str((manifest.get("provenance") or {}).get("fingerprint") or "none")),
    ]
    ratios = [site["ratio"] for site in sites if site["ratio"] is not None]
    if ratios:
        worse = sum(ratio > 1 for ratio in ratios)
        text = f"median {median(ratios):.3f}, worst {max(ratios):.3f}; {worse} of {len(ratios)} are worse"
        rows.append(("output error, ratio to RTN", text))
    return [row for row in rows if row is not None]


def _held_out(found: Mapping[str, Any] | None) -> tuple[str, str] | None:
    if not found:
        return None
    divergence, agreement = _number(found.get("kl_divergence"), 4), _number(found.get("top1_agreement"), 3)
    perplexities = " → ".join(_number(found.get(key), 2) for key in ("reference_perplexity", "perplexity"))
    text = f"KL {divergence} nats per token, perplexity {perplexities}, top-1 agreement {agreement}"
    if found.get("static_cache_kl_divergence") is not None:
        text += f"; with static scales in the cache, KL {_number(found['static_cache_kl_divergence'], 4)}"
    return f"{found.get('tokens')} held-out tokens", text


def _left_alone(skips: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """By whether the recipe says so."""
    planned, hindered = [[skip for skip in skips if bool(skip.get("asked")) is asked] for asked in (True, False)]
    return [("Could not be rewritten", hindered), ("As the recipe says", planned)]


_USES = {"folded": "Rewritten", "found": "Found, and left as they are", "refused": "Share no scale or rotation"}


def _by_use(regions: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """What was done first, what cannot be done last."""
    order = dict.fromkeys([*_USES, *(str(region.get("status")) for region in regions)])
    groups = [(_USES.get(use, use), [r for r in regions if str(r.get("status")) == use]) for use in order]
    return [(title, members) for title, members in groups if members]


def _breakable(text: object) -> "Markup":
    """A text, escaped, that a line may end behind the dots, slashes and commas of."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([./,])(?=\w)", r"\1<wbr>", str(escape(text))))


def _target(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a target's report says, its layers counted by what becomes of them."""
    rows = []
    for key, value in fields.items():
        if key == "sites" and isinstance(value, Mapping):
            counts: dict[str, int] = {}
            for site in value.values():
                status = str(site.get("status")) + (f" ({site['reason']})" if site.get("reason") else "")
                counts[status] = counts.get(status, 0) + 1
            rows.append((key, "; ".join(f"{count} {status}" for status, count in counts.items())))
        elif key in ("bytes", "weight_bytes"):
            rows.append((key.replace("bytes", "size").replace("_", " "), _mebibytes(value)))
        elif isinstance(value, Mapping):
            rows.append((key, _pairs(value)))
        else:
            rows.append((key.replace("_", " "), _words(value)))
    return rows


def _ratio(site: Mapping[str, Any]) -> float | None:
    error, nearest = site.get("output_error"), site.get("rtn_output_error")
    return None if error is None or not nearest else error / nearest


def _judgement(ratio: float | None) -> str:
    return "" if ratio is None or ratio == 1 else "good" if ratio < 1 else "bad"


def _mebibytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:,.1f} MiB"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _pairs(fields: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key}={_words(value)}" for key, value in (fields or {}).items())


def _words(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value))
    return value if isinstance(value, str) else json.dumps(value)
