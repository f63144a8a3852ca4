"""Keys and values kept as codes: what is in the cache, against loops written out, and what runs with it."""

import pytest
import torch
from torch import Tensor

import qcompiler as qc
from qcompiler.artifacts.calibration import Calibration
from qcompiler.artifacts.native import NativeArtifact, load_native
from qcompiler.ir.feeding import feed
from qcompiler.ir.graph import Graph, is_op
from qcompiler.ir.kv_cache import float_caches, kept_range
from qcompiler.numerics.arithmetic import sqnr_db
from qcompiler.passes import RTN, Assign, QuantizeKVCache
from qcompiler.protocol.pass_base import (
    Pass,
)
from tests.models import canonical_graph, copy_graph
from tests.tiny_graphs import interpret, language_model

ops = torch.ops.qcompiler
CPU = torch.device("cpu")
FORMATS = {
    "int8": QuantizeKVCache("int8"),
    "int8-asym": QuantizeKVCache("int8", symmetric=False, group_size=4),
    "fp8": QuantizeKVCache("fp8"),
    "int4": QuantizeKVCache("int4"),
    "int4-sym": QuantizeKVCache("int4", symmetric=True, group_size=-1),
    "int4-rotated": QuantizeKVCache("int4", rotate=True, group_size=2),
    "int8-static": QuantizeKVCache("int8", scales="static"),
    "int4-static": QuantizeKVCache("int4", scales="static", rotate=True),
    "fp8-static": QuantizeKVCache("fp8", scales="static"),
    "mixed": QuantizeKVCache("int4", keys="int8"),
    "values": QuantizeKVCache("fp8", keys="float"),
}
each_format = pytest.mark.parametrize("quantizer", FORMATS.values(), ids=FORMATS.keys())


def quantized(graph: Graph, *passes: Pass, seed: int = 0) -> qc.CompileResult:
    vocabulary = int(graph.signature.outputs[0].shape[-1])
    ids = torch.randint(vocabulary, (24, 12), generator=torch.Generator().manual_seed(seed))
    return qc.compile(graph, list(passes), Calibration.from_tokens(ids))


def tokens(graph: Graph, *shape: int) -> Tensor:
    vocabulary = int(graph.signature.outputs[0].shape[-1])
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(5))


def cached(artifact: NativeArtifact, ids: Tensor) -> Tensor:
    """Logits of a prefill of three tokens and of every further one."""
    logits, cache = artifact.prefill(ids[:, :3])
    pieces = [logits]
    for place in range(3, ids.shape[1]):
        logits, cache = artifact.step(ids[:, place : place + 1], cache)
        pieces.append(logits)
    return torch.cat(pieces, dim=1)


# --- what the cache holds ---------------------------------------------------------------------------------------------


def naive_codes(new: Tensor, dtype: str, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of ``[B, H, S, D]``: one token, head and group at a time, in Python numbers."""
    bits = 4 if dtype == "int4" else 8
    codes, scales = torch.zeros(new.shape), torch.zeros(*new.shape[:3], new.shape[3] // group)
    zeros = torch.zeros_like(scales)
    for b in range(new.shape[0]):
        for h in range(new.shape[1]):
            for s in range(new.shape[2]):
                for g in range(new.shape[3] // group):
                    place = (b, h, s, slice(g * group, (g + 1) * group))
                    values = new[place]
                    largest = float(values.abs().max())
                    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
                    span = largest / (448 if dtype == "fp8" else 2 ** (bits - 1) - 1)
                    if not symmetric:
                        span = (high - low) / (2**bits - 1)
                    scale = torch.tensor(max(span, 2.0**-23)).half().float()
                    scales[b, h, s, g] = scale
                    if dtype == "fp8":
                        codes[place] = (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
                        continue
                    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
                    if not symmetric:
                        zeros[b, h, s, g] = min(max(round(-low / float(scale)), 0), most)
                    for d in range(group):
                        code = round(float(values[d] / scale)) + int(zeros[b, h, s, g])
                        codes[b, h, s, g * group + d] = min(max(code, least), most)
    return codes, scales, zeros


@pytest.mark.parametrize(
    ("quantizer", "dtype", "group", "symmetric"),
    [
        (QuantizeKVCache("int8"), "int8", 4, True),
        (QuantizeKVCache("fp8"), "fp8", 4, True),
        (QuantizeKVCache("int4", group_size=2), "int4", 2, False),
        (QuantizeKVCache("int4", symmetric=True), "int4", 4, True),
        (QuantizeKVCache("int8", symmetric=False), "int8", 4, False),
    ],
)
def test_the_cache_holds_what_a_loop_makes_of_keys_and_values(quantizer, dtype, group, symmetric):
    graph = language_model()
    ids = tokens(graph, 2, 5)
    before = interpret(graph, feed(graph, ids))
    caches = float_caches(graph)[:2]  # of the first layer: nothing is rounded ahead
    new = [before[cache.new.name] for cache in caches]
    graph = quantized(graph, quantizer).graph
    after = interpret(graph, feed(graph, ids))
    ports = dict(zip((port.name for port in graph.signature.outputs), graph.outputs, strict=True))
    for cache, values in zip(caches, new, strict=True):
        part = cache.part
        codes, scales, zeros = naive_codes(values, dtype, group, symmetric)
        spread = [tensor.repeat_interleave(group, dim=-1) for tensor in (scales, zeros)]
        assert torch.equal(after[cache.append.name], (codes - spread[1]) * spread[0])  # what attention reads
        kept = after[ports[f"present.0.{part}"].name]
        if dtype == "int4":
            assert kept.dtype == torch.uint8
            shifted = (codes + (8 if symmetric else 0)).to(torch.uint8)
            codes, kept = shifted[..., ::2] + 16 * shifted[..., 1::2], kept
        assert torch.equal(kept.float(), codes.float())
        assert torch.equal(after[ports[f"present.0.{part}_scale"].name].float(), scales)
        if not symmetric:
            assert torch.equal(after[ports[f"present.0.{part}_zero_point"].name].float(), zeros)
        assert (f"present.0.{part}_zero_point" in ports) is not symmetric


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@each_format
def test_decoding_is_the_whole_run(family, quantizer):
    """Grouped heads, a window shorter than the text, a cache without rotary embeddings."""
    graph = copy_graph(canonical_graph(family))
    result = quantized(graph, quantizer)
    graph, artifact = result.graph, result.artifact()
    ids = tokens(graph, 2, 9)
    whole, exact = artifact.forward(ids), NativeArtifact(copy_graph(canonical_graph(family))).forward(ids)
    # What is cached differs in the last bit between the two, which may tip a code: as far as rounding goes at most.
    torch.testing.assert_close(cached(artifact, ids), whole, rtol=0, atol=2e-3 * float(whole.abs().max()))
    assert 8 < sqnr_db(exact, whole) < 60


@each_format
def test_codes_in_the_cache_stay_as_they_are(quantizer):
    """Quantizing what was dequantized gives the same codes, and a longer cache begins with the shorter one."""
    graph = copy_graph(canonical_graph("llama"))
    result = quantized(graph, quantizer)
    graph, artifact = result.graph, result.artifact()
    ids = tokens(graph, 2, 6)
    _, cache = artifact.prefill(ids[:, :5])
    shorter = [value.clone() for value in cache.values]
    _, cache = artifact.step(ids[:, 5:], cache)
    assert len(cache.values) == len([port for port in graph.signature.inputs if port.role == "past"])
    for before, after in zip(shorter, cache.values, strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(after[:, :, :5].float(), before.float())


@pytest.mark.parametrize("scale", [2.0**-23, 1e-4, 0.013, 1.0, 711.0, 65504.0])
@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.int8, 8), (torch.uint8, 8), (torch.uint8, 4), (torch.int8, 4), (torch.float8_e4m3fn, 8)]
)
def test_quantize_undoes_dequantize_exactly(dtype, bits, scale):
    """For every code and any scale that float16 has; so a runtime may go through floats to append."""
    signed = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(torch.int8)
    codes = torch.arange(2**bits).to(torch.uint8) if dtype == torch.uint8 else signed
    if dtype == torch.float8_e4m3fn:
        codes = torch.arange(256).to(torch.uint8).view(dtype)
        codes = codes[codes.float().isfinite()]
    scales = torch.tensor(scale).half().float().expand(1)
    zero = torch.tensor([3], dtype=torch.uint8) if dtype == torch.uint8 else None
    values = ops.dequantize(
        codes[None], scales[None], None if zero is None else zero[None], -1, len(codes), torch.float32
    )
    again = ops.quantize(values, scales[None], None if zero is None else zero[None], -1, len(codes), dtype, bits)
    assert torch.equal(again.float(), codes[None].float())


def test_rotation_changes_no_product_and_helps_where_channels_differ():
    graph = language_model(width=32, heads=2, kv_heads=1)
    names = [name for name in graph.weight_names() if name.endswith("k.weight")]
    for name in names:  # two channels of the keys much larger than the others
        factor = torch.ones(16, 1)
        factor[::9] = 12.0
        graph.weights.set(name, graph.weights.read(name) * factor)
    ids = tokens(graph, 2, 9)
    exact = NativeArtifact(copy_graph(graph)).forward(ids)
    errors = {}
    for rotate in (False, True):
        copy = copy_graph(graph)
        copy = quantized(copy, QuantizeKVCache("int4", values="float", group_size=-1, rotate=rotate)).graph
        assert sum(is_op(node, ops.hadamard.default) for node in copy.fx.nodes) == (4 if rotate else 0)
        unrounded = NativeArtifact(copy, round_activations=False)
        torch.testing.assert_close(unrounded.forward(ids), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
        torch.testing.assert_close(cached(unrounded, ids), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
        errors[rotate] = float((NativeArtifact(copy).forward(ids) - exact).square().sum())
    assert errors[True] < 0.7 * errors[False]


# --- ports, reports, storage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantizer", "dtype", "width", "extra", "size"),
    [
        (QuantizeKVCache("int8"), "int8", 8, {"scale": ("float16", 1)}, 8 + 2),
        (QuantizeKVCache("fp8", scales="static"), "float8_e4m3fn", 8, {}, 8),
        (
            QuantizeKVCache("int4", group_size=4),
            "uint8",
            4,
            {"scale": ("float16", 2), "zero_point": ("uint8", 2)},
            4 + 2 * 3,
        ),
    ],
)
def test_ports_become_small(quantizer, dtype, width, extra, size):
    graph = copy_graph(canonical_graph("llama"))
    assert graph.signature.cache_bytes_per_token == 2 * 2 * 2 * 8 * 4  # layers, parts, heads, channels, bytes
    result = quantized(graph, quantizer)
    graph = result.graph
    ports = {port.name: port for port in (*graph.signature.inputs, *graph.signature.outputs)}
    for name, total in (("past_key_values", "past_sequence"), ("present", "past_sequence + sequence")):
        for layer in range(2):
            for part in ("key", "value"):
                port = ports[f"{name}.{layer}.{part}"]
                assert (port.dtype, port.shape) == (dtype, ("batch", 2, total, width))
                for kind, (kind_dtype, groups) in extra.items():
                    port = ports[f"{name}.{layer}.{part}_{kind}"]
                    assert (port.dtype, port.shape) == (kind_dtype, ("batch", 2, total, groups))
    assert len(ports) == 4 + 2 * 4 * (1 + len(extra))
    assert graph.signature.cache_bytes_per_token == 2 * 2 * 2 * size
    assert result.report.cache_bytes_per_token == result.artifact().cache_bytes_per_token == 2 * 2 * 2 * size
    assert sum(site.details["bytes_per_token"] for site in result.report.sites) == 2 * 2 * 2 * size


def test_reports_name_form_and_error_of_every_cache():
    graph = copy_graph(canonical_graph("llama"))
    new = {cache.name: cache.new.name for cache in float_caches(graph)}
    plain = copy_graph(graph)
    result = quantized(graph, QuantizeKVCache("int8"))
    graph, report = result.graph, result.report
    assert [site.site for site in report.sites] == list(new)
    assert {site.method for site in report.sites} == {"quantize-kv-cache"}
    assert report.sites[0].scheme == "cache int8 per token symmetric"
    ids = torch.randint(61, (24, 12), generator=torch.Generator().manual_seed(0))
    values = interpret(plain, feed(plain, ids))[new["cache.0.key"]]
    scale, _ = ops.choose_block_qparams(values, torch.int8, 8)
    codes = ops.quantize(values, scale, None, -1, 8, torch.int8)
    rounded = ops.dequantize(codes, scale.float(), None, -1, 8, torch.float32)
    assert report.sites[0].sqnr_db == pytest.approx(sqnr_db(values, rounded), abs=0.3)
    assert report.sites[0].details["form"] == "per_token"
    for site in report.sites:
        assert site.sqnr_db == site.details["per_token_sqnr_db"] > 35
        assert 25 < site.details["static_sqnr_db"] < 60


@each_format
def test_ranges_of_channels_are_kept_in_either_form(quantizer, tmp_path):
    graph = copy_graph(canonical_graph("llama"))
    plain = copy_graph(graph)
    result = quantized(graph, quantizer)
    graph = result.graph
    result.save(tmp_path / "out")
    ids = torch.randint(61, (24, 12), generator=torch.Generator().manual_seed(0))[:-2]
    stored, _, _ = load_native(tmp_path / "out")
    cache = next(cache for cache in float_caches(plain) if cache.name == "cache.0.value")
    values = interpret(plain, feed(plain, ids))[cache.new.name]
    low, high = kept_range(stored, 0, "value")
    assert low.shape == high.shape == (2, 8)
    torch.testing.assert_close(low, values.amin((0, 2)), rtol=0.3, atol=0.3)  # of almost the same rows
    assert bool((low < high).all())
    assert kept_range(plain, 0, "value") is None


@each_format
def test_round_trip(quantizer, tmp_path):
    graph = copy_graph(canonical_graph("llama"))
    result = quantized(graph, Assign("w8a16"), quantizer, RTN())
    graph = result.graph
    result.save(tmp_path / "out")
    loaded = qc.load(tmp_path / "out")
    ids = tokens(graph, 2, 6)
    assert loaded.graph.signature == graph.signature
    assert torch.equal(cached(loaded.artifact(), ids), cached(result.artifact(), ids))
    assert loaded.report.cache_bytes_per_token == graph.signature.cache_bytes_per_token
    assert loaded.artifact().has_quantized_cache


def test_a_text_is_generated_with_the_cache():
    from qcompiler.artifacts.generation import stream_tokens

    graph = copy_graph(canonical_graph("llama"))
    result = quantized(graph, QuantizeKVCache("int8"))
    graph, artifact = result.graph, result.artifact()
    ids = tokens(graph, 5)
    found = list(stream_tokens(artifact, ids, max_new_tokens=4))
    for token in found:
        assert token == int(artifact.forward(ids[None])[0, -1].argmax())
        ids = torch.cat((ids, torch.tensor([token])))
