"""From a graph to a module whose layers are the operators of the folders beside this one. In order of reading:

1. `forms` recognises, node by node, what has a kernel.
2. `plan` decides for every node what computes it, and `site_modules` which operator a linear layer becomes.
3. `build` makes the module; `values`, `precision`, `neighbours` and `cached_attention` are parts of that.
4. `model` runs it with growing caches; `cpu_calls`, `captured_step` and `search` make it faster where they can;
   `streamed` runs it in pieces, to compare it once, with a `deferred` member in the place of each weight.

`noise` stands apart: it says how far the result may be from the graph, for the check of parity.
"""
