"""The model card: what a checkpoint is, how it was made, what was lost, and how it is served."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from qcompiler.ir import Graph, cache_formats
from qcompiler.protocol import Compilation

__all__ = ["text"]

_CARD = """\
---
library_name: transformers
tags: [qcompiler, quantized, {{ layout }}]
---

# {{ name }}

{{ source }}, quantized by qcompiler; the layout is that of {{ layout }}. {{ megabytes }} MB of weights.

| format of weight and input | layers |
|---|---|
{% for scheme, count in schemes.items() -%}
| {{ scheme }} | {{ count }} |
{% endfor %}{% if caches %}
Keys and values are cached in {{ caches | join(" and ") }}; their scales lie beside the weights.
{% endif %}
What stays float is as the recipe left it. What each layer lost stands in `report.html` of the native artifact.
{% if recipe %}
## Recipe

{% for item in recipe -%}
{{ loop.index }}. `{{ item }}`
{% endfor %}
{{ calibration }}
{% endif -%}
{% if held_out %}
## Measured

On {{ held_out.tokens }} tokens that calibration did not see, before it was written in this layout:

| | original | this model |
|---|---|---|
| perplexity | {{ "%.2f" | format(held_out.reference_perplexity) }} | {{ "%.2f" | format(held_out.perplexity) }} |
| KL divergence from the original, nats per token | 0 | {{ "%.4f" | format(held_out.kl_divergence) }} |
| most likely token as in the original | 1 | {{ "%.3f" | format(held_out.top1_agreement) }} |
{% endif %}
## Serving
{% if commands %}
`PATH` is this directory.

```
{% for engine, command in commands.items() -%}
{{ command.ljust(width) }}  # {{ engine }}
{% endfor -%}
```
{% else %}
No engine is known to have kernels for these formats in this layout.
{% endif -%}
{% if layout == "compressed-tensors" %}
```python
from transformers import AutoModelForCausalLM{{ ", CompressedTensorsConfig" if has_zero_points }}

model = AutoModelForCausalLM.from_pretrained(
    "PATH"{{ ", quantization_config=CompressedTensorsConfig(dequantize=True)" if has_zero_points }}
)
```
{% endif %}"""


def text(graph: Graph, layout: str, compilation: Compilation, commands: Mapping[str, str], weight_bytes: int) -> str:
    """The card of a graph's checkpoint, as Markdown.

    Args:
        graph: what is written.
        layout: the library whose layout it has.
        compilation: how the graph was made.
        commands: those that serve it, by engine (`serving_commands`).
        weight_bytes: of all tensors.
    """
    source = Path(str(graph.provenance.get("source", "a model"))).name
    schemes: dict[str, int] = {}
    for site in graph.sites():
        scheme: Any = graph.schemes.get(site.name)
        if scheme is not None and scheme.weight is not None:
            key = f"{scheme.weight}, {scheme.activation or 'float'}"
            schemes[key] = schemes.get(key, 0) + 1
    weights = [scheme.weight for scheme in graph.schemes.values() if scheme.weight is not None]
    rendered: str = jinja2.Template(_CARD).render(
        name=f"{source}, {layout}",
        source=source,
        layout=layout,
        schemes=schemes,
        megabytes=f"{weight_bytes / 1e6:,.1f}",
        recipe=[_call(item) for item in compilation.recipe],
        calibration=_calibration(compilation.calibration),
        held_out=compilation.held_out,
        caches=[str(spec) for spec in cache_formats(graph)],
        commands=commands,
        width=max(map(len, commands.values()), default=0),
        has_zero_points=any(not weight.symmetric for weight in weights),  # transformers unpacks them in this way alone
    )
    return rendered


def _call(item: Mapping[str, Any]) -> str:
    """A pass and its options, without those that say nothing."""
    options: Mapping[str, Any] = item.get("options") or {}
    said = [f"{name}={json.dumps(value)}" for name, value in options.items() if value not in (None, {})]
    return f"{item['pass']}({', '.join(said)})"


def _calibration(found: Mapping[str, Any] | None) -> str:
    if found is None or found.get("use") == "measurement":
        return "Nothing in it is calibrated."
    kinds = {"text": "of a text", "tokens": "that were given", "self-generated": "that the model generated itself"}
    kind = kinds.get(str(found["source"]), str(found["source"]))
    return f"Calibrated on {found['samples']} rows of up to {found['length']} tokens {kind}."
