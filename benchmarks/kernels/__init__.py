"""The GPU run: are the kernels right, and how fast are they? ``python -m benchmarks.kernels``, or ``make gpu``.

One command, less than eight minutes, on a machine that has torch, triton, transformers, safetensors and numpy. Nothing
else is imported, installed or built. It checks every operator, compiles the kernels ahead of time and reads their
machine code, takes the times, and writes ``benchmarks/results/gpu.md`` and ``gpu.json``.

| file | what |
|---|---|
| ``__main__.py`` | the command |
| ``driver.py`` | runs sections as processes of their own, within their share of the time |
| ``sections.py`` | what a section is, and the loop such a process runs |
| ``records.py`` | what sections hand back |
| ``protocol.py`` | the arithmetic of the timings; ``timers.py`` takes them |
| ``goals.py`` | what a kernel ought to reach |
| ``weights.py``, ``caches.py``, ``products.py`` | random quantized weights and caches, and the layers that are timed |
| ``comparing.py`` | a result against a reference |
| ``linear_checks.py``, ``row_checks.py``, ``cache_checks.py``, ``model_checks.py`` | operators against references |
| ``linear_times.py``, ``attention_times.py``, ``decoding_times.py`` | how long they take |
| ``ahead_of_time.py`` | machine code |
| ``tables.py``, ``machine.py`` | what is written |
"""
