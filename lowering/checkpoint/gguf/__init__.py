"""The layout of GGUF, which llama.cpp reads: one file ``model.gguf`` with tensors, settings and tokenizer.

| file | what |
|---|---|
| ``layout`` | which schemes blocks hold, and what becomes of a layer |
| ``blocks`` | codes and scales as blocks of 32 weights |
| ``architectures`` | which models have a place there, and the names and order of their tensors |
| ``metadata`` | the settings of a model |
| ``vocabulary`` | its tokenizer |
| ``file`` | all of them, written one tensor at a time |
"""

from qcompiler.lowering.checkpoint.gguf.file import FILE, check_model, save
from qcompiler.lowering.checkpoint.gguf.layout import add_layer, supports
from qcompiler.lowering.checkpoint.layout import Layout
from qcompiler.numerics import Scheme

__all__ = ["FILE", "LAYOUT", "check_model", "supports"]

LAYOUT = Layout(
    supports,
    add_layer,
    supports_table=lambda spec, width: supports(Scheme(spec), width),
    ties_codes=True,
    check_model=check_model,
    save=save,
)
