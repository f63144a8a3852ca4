"""The ``checkpoint`` target: a directory as engines load it, in the layout of a quantization library.

| file | what |
|---|---|
| ``target`` | `CheckpointTarget`: what is taken, how a directory is written, and who reads it |
| ``layers`` | the layers that are quantized, and what is refused of them in any layout |
| ``caches`` | where the scales of quantized caches belong |
| ``experts`` | mixtures of experts, which checkpoints have matrix by matrix |
| ``contents`` | what of a graph goes into a checkpoint, under the names that its engine knows |
| ``layout`` | `Layout`: what each of the following tells the target |
| ``compressed_tensors``, ``gptq``, ``awq``, ``modelopt`` | a layout each: tensors, ``quantization_config`` |
| ``streamed`` | what is written, run by transformers with one module in memory |
| ``readers`` | engines that read it, each in a process of its own |
| ``card``, ``serving`` | the ``README.md`` beside the weights, and the engines that take them |
| ``gguf`` | a layout in one file with settings and tokenizer, which llama.cpp reads |
"""

from qcompiler.lowering.checkpoint.target import CheckpointTarget

__all__ = ["CheckpointTarget"]
