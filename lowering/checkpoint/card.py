"""The model card: what a checkpoint is, and how it is served. What was lost, the native artifact's report tells."""

from pathlib import Path
from typing import Any

import jinja2

from qcompiler.ir import Graph

__all__ = ["text"]

_CARD = """\
---
library_name: transformers
tags: [qcompiler, quantized{{ ", " + layout if layout }}]
---

# {{ name }}

{{ source }}, quantized by qcompiler; the layout is that of {{ layout }}.

| format of weight and input | layers |
|---|---|
{% for scheme, count in schemes.items() -%}
| {{ scheme }} | {{ count }} |
{% endfor %}
What stays float is as the recipe left it. What each layer lost stands in `report.html` of the native artifact.

## Serving
{% if layout == "gguf" %}
```
llama-server -m PATH/model.gguf
llama-cli -m PATH/model.gguf
```

`PATH` is this directory.
{% else %}
```
vllm serve PATH
python -m sglang.launch_server --model-path PATH
trtllm-serve PATH
```

`PATH` is this directory. Of compressed-tensors, TensorRT-LLM reads 8-bit floats with a scale per channel and token, and
NVFP4; besides, AWQ, GPTQ and ModelOpt.
{% endif -%}
{% if layout == "compressed-tensors" %}
```python
from transformers import AutoModelForCausalLM{{ ", CompressedTensorsConfig" if has_zero_points }}

model = AutoModelForCausalLM.from_pretrained(
    "PATH"{{ ", quantization_config=CompressedTensorsConfig(dequantize=True)" if has_zero_points }}
)
```
{% endif %}"""


def text(graph: Graph, layout: str) -> str:
    """The card of a graph's checkpoint, as Markdown."""
    source = Path(str(graph.provenance.get("source", "a model"))).name
    schemes: dict[str, int] = {}
    for site in graph.sites():
        scheme: Any = graph.schemes.get(site.name)
        if scheme is not None and scheme.weight is not None:
            key = f"{scheme.weight}, {scheme.activation or 'float'}"
            schemes[key] = schemes.get(key, 0) + 1
    weights = [scheme.weight for scheme in graph.schemes.values() if scheme.weight is not None]
    has_zero_points = any(not weight.symmetric for weight in weights)  # transformers unpacks them in this way alone
    fields: dict[str, Any] = {"name": f"{source}, {layout}", "source": source, "layout": layout, "schemes": schemes}
    fields["has_zero_points"] = has_zero_points
    rendered: str = jinja2.Template(_CARD).render(fields)
    return rendered
