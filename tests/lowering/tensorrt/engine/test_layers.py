import json

from qcompiler.lowering.tensorrt.engine import Constant, Layer, fused_attentions, fused_linears, parse_layers
from qcompiler.lowering.tensorrt.engine.layers import Tensor

SITES = ("q", "k", "v", "o", "up", "down")


def tensor(name, dims, dtype):
    return f"{{ Name: {name}, Dimensions: [{dims}], Strides: [1], Datatype: {dtype}, Format: (Linear) Row major }}"


def line(name, kind, inputs, constants, outputs, origins=""):
    lists = (
        f"{key}: [{', '.join(items)}]"
        for key, items in {"Inputs": inputs, "Constants": constants, "Outputs": outputs}.items()
    )
    return f"Name: {name}, LayerType: {kind}, {', '.join(lists)}, TacticName: t0, StreamId: 0, Metadata: {origins}"


def test_layers_are_read_from_the_lines_of_a_log():
    text = "\n".join(
        [
            "Layers:",
            line("wait_myl0_0", "wait", [], [], []),
            line(
                "fc, of q [0]_myl0_1",
                "gemm",
                [" " + tensor("x", "1,-1,8", "Half")],
                [" " + tensor("w", "8,8", "Int4"), tensor("s", "", "Half") + " "],
                [" " + tensor("y.1_myl0", "1,-1,8", "Half")],
                "[ONNX Layer: /q/MatMul[0]]\x1f[ONNX Layer: /q/DQ]\x1f[ONNX Layer: /q/DQ]",
            ),
            "something nobody knows: Name: x",
            "Name: cut off in the mid",
            line("fc_myl1_0", "gemm", [tensor("x [profile 1]", "1,1,8", "Half")], [], [tensor("z_myl1", "8", "Half")]),
            line("later_myl1_1", "kgen", [tensor("z_myl1", "8", "Half")], [], [tensor("u_myl1", "8", "Half")]),
            "",
            "I/O Tensors:",
            " Name: x, IOMode: Input, DataType: Half, Dimensions: [1,-1,8]",
        ]
    )
    first, second, third = parse_layers(text)
    assert first == Layer(
        name="fc, of q [0]_myl0_1",
        kind="gemm",
        inputs=(Tensor("x", "Half", (1, -1, 8)),),
        outputs=(Tensor("y.1_myl0", "Half", (1, -1, 8)),),
        constants=(Constant("w", "Int4", (8, 8)), Constant("s", "Half", ())),
        origins=("/q/MatMul[0]", "/q/DQ"),
        profile=0,
        tactic="t0",
    )
    assert [second.profile, third.profile] == [1, 1]  # the third by the graph it belongs to
    assert parse_layers("nothing of the kind") == ()


def test_the_older_form_of_datatypes_is_read():
    old = (
        "Name: Reformatting, LayerType: Reformat, Inputs: [ { Name: x, Location: Device, Dimensions: [2,3], "
        "Format/Datatype: Half }], Outputs: [ { Name: y, Dimensions: [2,3], Format/Datatype: Int8 }], TacticValue: 0x0"
    )
    (layer,) = parse_layers(old)
    assert layer.inputs == (Tensor("x", "Half", (2, 3)),)
    assert layer.outputs == (Tensor("y", "Int8", (2, 3)),)


def test_layers_go_through_json(built):
    assert [Layer.from_dict(json.loads(json.dumps(layer.to_dict()))) for layer in built.layers] == list(built.layers)


def test_every_quantized_linear_layer_is_found_in_both_profiles(built):
    found = fused_linears(built.layers, {site: f"{site}/MatMul" for site in SITES})
    assert {site: tuple(p.profile for p in found[site]) for site in SITES} == dict.fromkeys(SITES, (0, 1))
    assert [p for placements in found.values() for p in placements if not p.fused] == []
    types = {site: {*found[site][0].constants} - {"Half", "Float"} for site in SITES}
    assert types == {"q": {"Int4"}, "k": {"Int4"}, "v": {"Int4"}, "o": {"Int4"}, "up": {"Int8"}, "down": {"FP8"}}
    assert found["up"][0].inputs == ("Int8",)
    assert found["q"][0].reason == ""


def test_sites_that_share_a_layer_know_of_each_other(built):
    found = fused_linears(built.layers, {site: f"{site}/MatMul" for site in SITES})
    decode = {site: found[site][1] for site in "qkv"}
    assert len({placement.layer for placement in decode.values()}) == 1
    assert set(decode["q"].together_with) == {"k", "v"}


def test_a_layer_that_is_dequantized_apart_says_so(built):
    (prefill, decode) = fused_linears(built.layers, {"cast": "cast/MatMul"})["cast"]
    assert (prefill.fused, decode.fused) == (False, True)  # one row at a time, a kernel is generated for it
    assert prefill.kind == "runtime_fusion"
    assert "dequantized from Int4 to Half" in prefill.reason


def test_what_no_layer_names_is_not_fused(built):
    (prefill, _) = fused_linears(built.layers, {"gone": "gone/MatMul"})["gone"]
    assert (prefill.layer, prefill.fused, prefill.reason) == (None, False, "no layer of the engine names it")


def test_a_layer_with_too_few_weights_for_what_it_names_is_not_fused():
    text = line(
        "a_myl0_1",
        "gemm",
        [tensor("x", "8", "Half")],
        [tensor("w", "8,8", "Int4")],
        [tensor("y", "8", "Half")],
        "[ONNX Layer: a]\x1f[ONNX Layer: b]",
    )
    nodes = {"a": "a", "b": "b"}
    assert all(p.fused for (p,) in fused_linears(parse_layers(text), nodes).values())
    assert all(p.fused for (p,) in fused_linears(parse_layers(text), nodes, weights={"a": 32, "b": 32}).values())
    found = fused_linears(parse_layers(text), nodes, weights={"a": 64, "b": 64})
    assert [p.fused for (p,) in found.values()] == [False, False]
    assert "64 quantized weights, of 128" in found["a"][0].reason


def test_a_kernel_that_dequantizes_for_several_products_is_not_what_multiplies():
    """It names the product that its weights, put together, are for."""
    text = "\n".join(
        [
            line(
                "k_myl0_1",
                "kgen",
                [],
                [tensor("w", "8,16", "FP8")],
                [tensor("f", "8,8", "Half"), tensor("h", "8,8", "Half")],
                "[ONNX Layer: a]",
            ),
            line(
                "g_myl0_2",
                "gemm",
                [tensor("x", "1,-1,8", "Half"), tensor("f", "8,8", "Half")],
                [],
                [tensor("y", "1,-1,16", "Half")],
                "[ONNX Layer: a]",
            ),
            line(
                "n_myl0_3",
                "kgen",
                [tensor("y", "1,1,8", "Half")],
                [tensor("v", "8,8", "Int8")],
                [tensor("n", "1,1,8", "Half"), tensor("e", "8,8", "Half")],
                "[ONNX Layer: b]",
            ),
            line(
                "m_myl0_4",
                "kgen",
                [tensor("n", "1,1,8", "Half")],
                [tensor("u", "8,8", "Int8")],
                [tensor("z", "1,1,8", "Half")],
                "[ONNX Layer: c]",
            ),
        ]
    )
    (a,), (b,), (c,) = fused_linears(parse_layers(text), {"a": "a", "b": "b", "c": "c"}).values()
    assert (a.fused, a.layer, a.reason) == (False, "g_myl0_2", "dequantized from FP8 to Half by a kernel of its own")
    assert (b.fused, b.layer) == (False, "n_myl0_3")
    assert b.reason == "dequantized from Int8 to Half by a kernel of its own"
    assert (c.fused, c.layer) == (True, "m_myl0_4")


def test_attention_is_one_kernel_in_each_profile(built):
    prefill, decode = fused_attentions(built.layers, {"layer 0": ["attention"]})["layer 0"]
    assert (prefill.fused, decode.fused) == (True, True)
    assert prefill.layer is not None
    assert prefill.layer.startswith("_gemm_mha_v2")
    assert decode.layer is not None
    assert decode.layer.startswith("_gemv_mha_v1")


def test_attention_in_products_is_decomposed(built):
    (prefill, _) = fused_attentions(built.layers, {"a": ["up/MatMul", "down/MatMul"], "b": ["none"]})["a"]
    assert not prefill.fused
    assert prefill.reason.startswith("decomposed into 2 products")
    (missing, _) = fused_attentions(built.layers, {"b": ["none"]})["b"]
    assert missing.reason == "no layer of the engine names it"
