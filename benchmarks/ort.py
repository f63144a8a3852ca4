"""How fast does ONNX Runtime run a compiled model on this CPU, beside llama.cpp, OpenVINO and PyTorch?

``python -m benchmarks.ort --work DIR``: makes a random Llama, compiles it to four bits in groups of 32, lowers it, and
measures reading a prompt and decoding, in turns, with the same number of threads, in one run; the share of the memory
bandwidth that decoding takes is of a bandwidth measured then, too. ``--model`` takes another model's directory.
llama.cpp (``--llama-cpp``) and OpenVINO (``--openvino``) are interpreters of environments that have them.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import qcompiler as qc
from qcompiler.artifacts import CompileResult
from qcompiler.lowering.onnx import OnnxArtifact
from qcompiler.lowering.ort.reader import OrtArtifact
from qcompiler.protocol import Artifact
from qcompiler.reporting import machine

__all__ = ["Form", "main", "read_bandwidth", "table"]

_HERE = Path(__file__).resolve().parent
_BOOKLM = _HERE.parent / "examples" / "booklm"
_CACHED = "+kv-int8-static"


@dataclass
class Form:
    """What was measured of one form of the model.

    Attributes:
        weight_bytes: of its weights as stored; None where nobody tells.
        divergence: from the original in float32, nats per token; None where it was not measured.
        prefill, decode: tokens per second of each turn, by sequences at once.
    """

    weight_bytes: int | None = None
    divergence: float | None = None
    prefill: dict[int, list[float]] = field(default_factory=dict)
    decode: dict[int, list[float]] = field(default_factory=dict)

    def add(self, batch: int, prefill: float, decode: float) -> None:
        """One turn."""
        self.prefill.setdefault(batch, []).append(prefill)
        self.decode.setdefault(batch, []).append(decode)


def rates(artifact: Artifact, batch: int, prompt: int, steps: int) -> tuple[float, float]:
    """Tokens per second of reading prompts and of decoding behind them; of all sequences together."""
    ids = torch.randint(artifact.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    logits, cache = artifact.prefill(ids)
    read = time.perf_counter() - start
    token = logits[:, -1:].argmax(-1)
    for step in range(-2, steps):
        if step == 0:
            start = time.perf_counter()
        logits, cache = artifact.step(token, cache)
        token = logits[:, -1:].argmax(-1)
    return batch * prompt / read, batch * steps / (time.perf_counter() - start)


def read_bandwidth(size: int = 1 << 28, turns: int = 5) -> float:
    """Bytes per second that float32 sums read, the best of some turns."""
    data = torch.ones(size // 4)
    best = float("inf")
    for _ in range(turns):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return size / best


def table(forms: Mapping[str, Form], bandwidth: float) -> str:
    """Markdown: medians of tokens per second by form, and what decoding one sequence reads of the bandwidth."""
    batches = sorted({batch for form in forms.values() for batch in form.decode})
    head = ["form", "weights, MB", "KL, nats per token"]
    head += [f"{kind}, {batch} at once" for batch in batches for kind in ("prompt", "decoding")] + ["of the bandwidth"]
    lines = [head, ["---"] * len(head)]
    for name, form in forms.items():
        cells = [
            name,
            _or_dash(form.weight_bytes, lambda n: f"{n / 1e6:.1f}"),
            _or_dash(form.divergence, "{:.2g}".format),
        ]
        for batch in batches:
            for found in (form.prefill, form.decode):
                cells.append(f"{statistics.median(found[batch]):.0f}" if batch in found else "–")
        alone = form.decode.get(1)
        has_share = alone is not None and form.weight_bytes is not None
        share = statistics.median(alone or [0.0]) * (form.weight_bytes or 0) / bandwidth
        lines.append([*cells, f"{share:.0%}" if has_share else "–"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _or_dash(value: Any, text: Callable[[Any], str]) -> str:
    return "–" if value is None else text(value)


# --- the model -------------------------------------------------------------------------------------------------------


def random_llama(directory: Path, hidden: int, layers: int, positions: int) -> Path:
    """A random Llama in bfloat16 with the tokenizer that is shipped; made once."""
    import shutil

    import transformers

    if not (directory / "config.json").is_file():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=4096,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=max(1, hidden // 256),
            max_position_embeddings=positions,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(_BOOKLM / name, directory / name)
    return directory


def compiled(model: Path, work: Path, cache: str) -> CompileResult:
    """Four bits in groups of 32; made once."""
    place = work / f"native{cache}"
    if not place.is_dir():
        text = (_BOOKLM.parent / "text" / "calibration.txt").read_text(encoding="utf-8")
        calibration = qc.Calibration.from_text(text, samples=8, length=128)
        overrides = {"*": "w4a16-g32"}
        qc.compile(model, f"w4a16-rtn{cache}", calibration, overrides=overrides, device="cpu").save(place)
    return qc.load(place)


def lowered(result: CompileResult, target: str, directory: Path, **options: Any) -> Path:
    """Where a target's files are; written once, and not compared."""
    if not directory.is_dir():
        qc.lower(result, target, directory, verify=False, **options)
    return directory


def divergence(exact: Artifact, found: Artifact, ids: torch.Tensor) -> float:
    """Of one from the other, nats per token."""
    wanted, got = (artifact.forward(ids).double().log_softmax(-1) for artifact in (exact, found))
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


# --- other programs --------------------------------------------------------------------------------------------------

_LLAMA_CPP = """
import json, sys, time, xllamacpp
path, prompt, steps, threads, turns = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = path, prompt + steps + 8, 1
params.warmup, params.verbosity, params.fit_params = True, 0, False
params.cpuparams.n_threads = threads
server = xllamacpp.Server(params)
for turn in range(turns):
    ids = [3 + (turn * 31 + 7 * i) % 4000 for i in range(prompt)]
    request = {"prompt": ids, "n_predict": steps, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    answer = server.handle_completions({**request, "max_tokens": steps})
    answer = json.loads(answer) if isinstance(answer, str) else answer
    times = answer["timings"]
    print("RATES", times["prompt_per_second"], times["predicted_per_second"], flush=True)
"""
_OPENVINO = """
import sys, time, numpy as np, openvino
path, prompt, steps, threads, turns = sys.argv[1], *map(int, sys.argv[2:])
core = openvino.Core()
model = core.compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
request = model.create_infer_request()
pasts = [port for port in model.inputs if port.any_name.startswith("past_key_values.")]
logits = next(port for port in model.outputs if port.any_name == "logits")
presents = {port.any_name: port for port in model.outputs if port.any_name.startswith("present.")}

def run(ids, length, caches):
    total = length + ids.shape[1]
    feed = {"input_ids": ids, "attention_mask": np.ones((1, total), np.int64)}
    feed["position_ids"] = np.arange(length, total)[None]
    result = request.infer({**feed, **caches}, share_inputs=True)
    kept = {p.any_name: result[presents["present." + p.any_name[16:]]].copy() for p in pasts}
    return result[logits][:, -1:].argmax(-1), kept

for turn in range(turns + 1):
    empty = {p.any_name: np.zeros((1, p.partial_shape[1].get_length(), 0, p.partial_shape[3].get_length()), np.float32)
             for p in pasts}
    start = time.perf_counter()
    token, caches = run(np.random.randint(3, 4000, (1, prompt)), 0, empty)
    read = prompt / (time.perf_counter() - start)
    start = time.perf_counter()
    for step in range(steps):
        token, caches = run(token, prompt + step, caches)
    if turn:
        print("RATES", read, steps / (time.perf_counter() - start), flush=True)
"""


def others(program: str, python: Path, model: Path, options: argparse.Namespace, form: Form) -> None:
    """Lets another program read prompts and decode, in a process of its own."""
    sizes = (options.prompt, options.tokens, options.threads, options.turns)
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    command = [str(python), "-c", program, str(model), *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RATES")]
    if done.returncode or not lines:
        raise SystemExit(f"{python}: {done.stderr.strip().splitlines()[-1:]}")
    for prefill, decode in lines:
        form.add(1, float(prefill), float(decode))


# --- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs the command."""
    options = _options()
    torch.set_num_threads(options.threads)
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    positions = options.prompt + options.tokens + 64
    model = options.model or random_llama(work / "model", options.hidden, options.layers, positions)
    plain, cached = compiled(model, work, ""), compiled(model, work, _CACHED)
    portable = lowered(plain, "onnx", work / "onnx")
    own = lowered(plain, "ort", work / "ort", accuracy_level=0)
    kept = lowered(cached, "ort", work / "ort-cached", accuracy_level=0)
    original = qc.open_artifact(model, exact=False)
    makers: dict[str, Callable[[], Artifact]] = {
        "PyTorch, float32": lambda: original,
        "onnx, exact": lambda: OnnxArtifact(portable, accuracy_level=1, threads=options.threads),
        "onnx, level 4": lambda: OnnxArtifact(portable, accuracy_level=4, threads=options.threads),
        "ort, level 0": lambda: OrtArtifact(own, accuracy_level=0, threads=options.threads),
        "ort, level 4": lambda: OrtArtifact(own, accuracy_level=4, threads=options.threads),
        "ort, level 4, int8 cache": lambda: OrtArtifact(kept, accuracy_level=4, threads=options.threads),
        "kernels (CPU)": lambda: qc.open_artifact(work / "native", engine="kernels", device="cpu"),
    }
    forms: dict[str, Form] = {}
    artifacts = {name: make() for name, make in makers.items()}
    ids = torch.randint(original.vocab_size, (1, min(256, options.prompt)), generator=torch.Generator().manual_seed(1))
    for name, artifact in artifacts.items():
        forms[name] = Form(
            artifact.stored_bytes(), None if artifact is original else divergence(original, artifact, ids)
        )
    bandwidth = read_bandwidth()
    for _ in range(options.turns):
        for batch in options.batches:
            for name, artifact in artifacts.items():
                forms[name].add(batch, *rates(artifact, batch, options.prompt, options.tokens))
    if options.llama_cpp is not None:
        place = lowered(plain, "checkpoint", work / "gguf", format="gguf")
        file = next(place.glob("*.gguf"))
        forms["llama.cpp, Q4_0 of the same codes"] = form = Form(file.stat().st_size)
        others(_LLAMA_CPP, options.llama_cpp, file, options, form)
    if options.openvino is not None:
        forms["OpenVINO, of the target onnx"] = form = Form(forms["onnx, exact"].weight_bytes)
        others(_OPENVINO, options.openvino, portable / "model.onnx", options, form)
    text = _text(forms, bandwidth, options)
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
    (work / "figures.json").write_text(json.dumps({name: vars(form) for name, form in forms.items()}), encoding="utf-8")


def _text(forms: Mapping[str, Form], bandwidth: float, options: argparse.Namespace) -> str:
    described = ", ".join(f"{key} {value}" for key, value in machine().items())
    model = options.model or f"a random Llama of {options.hidden} channels and {options.layers} layers"
    return (
        f"{table(forms, bandwidth)}\nTokens per second of all sequences together, medians of {options.turns} turns, "
        f"{options.threads} threads; prompts of {options.prompt} tokens, {options.tokens} decoded behind them; "
        f"{model}, four bits in groups of 32. Memory is read at {bandwidth / 1e9:.1f} GB/s. {described}.\n"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a directory; what is made stays there for next time")
    parser.add_argument("--model", type=Path, help="a directory to compile, instead of a random Llama")
    parser.add_argument("--hidden", type=int, default=2048, help="channels of the random Llama, a multiple of 256")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="decoded in a turn")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="sequences at once")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-cpp", type=Path, help="python of an environment with xllamacpp")
    parser.add_argument("--openvino", type=Path, help="python of an environment with openvino")
    parser.add_argument("--output", type=Path, help="where the table goes, in Markdown")
    return parser.parse_args()


if __name__ == "__main__":
    main()
