"""Small ONNX graphs of operators and types of all kinds, as text."""

from dataclasses import dataclass

import onnx

MICROSOFT, TENSORRT, MINE = ', "com.microsoft": 1', ', "trt": 1', ', "my": 1'
TENTH = 11878  # 0.1 as the bits of a float16, which ONNX's text wants
MINUS = 44646  # -0.1


@dataclass(frozen=True)
class Operator:
    """A graph in ONNX's text; ``builds``: what the builder says of it."""

    name: str
    text: str
    opset: int = 23
    domains: str = ""
    sm: int = 89

    def __str__(self) -> str:
        return self.name

    @property
    def model(self) -> onnx.ModelProto:
        head = f'<ir_version: 11, opset_import: ["" : {self.opset}{self.domains}]>'
        return onnx.parser.parse_model(f"{head}\ng {self.text}")


def port(dtype: str, sm: int = 89) -> Operator:
    return Operator(f"port {dtype} {sm}", f"({dtype}[b,4] x) => ({dtype}[b,4] y) {{ y = Identity(x) }}", sm=sm)


def cast(dtype: str) -> Operator:
    number = onnx.TensorProto.DataType.Value(dtype)
    body = f"a = Cast<to={number}>(x)\n y = Cast<to=10>(a)"
    return Operator(f"cast {dtype}", f"(float16[b,4] x) => (float16[b,4] y) {{ {body} }}")


def half(name: str, body: str, constants: str = "", opset: int = 23, domains: str = "") -> Operator:
    listed = f"<{constants}> " if constants else ""
    return Operator(name, f"(float16[b,4] x) => (float16[b,4] y) {listed}{{ {body} }}", opset, domains)


def quantize(name: str, out: str, body: str, more: str = "", scale: int = TENTH) -> Operator:
    constants = f"<float16 s = {{{scale}}}{more}>"
    return Operator(name, f"(float16[b,4] x) => ({out}[b,4] y) {constants} {{ {body} }}")


TYPES = "float float16 bfloat16 double int8 uint8 int16 uint16 int32 int64 uint32 uint64 bool float8e4m3fn float8e5m2"
OPERATORS = (
    *(port(dtype) for dtype in f"{TYPES} int4 uint4 float4e2m1 string complex64".split()),
    *(port("float4e2m1", 120), port("bfloat16", 75), port("float8e4m3fn", 86), port("int4", 75)),
    *(cast(dtype) for dtype in ("DOUBLE", "INT16", "UINT8", "UINT32", "UINT64", "INT8", "FLOAT8E5M2", "BOOL", "INT4")),
    half("int16 constant", "y = Identity(x)", "int16[1] c = {1}"),
    half("string constant", "y = Identity(x)", 'string[1] c = {"a"}'),
    half("uint8 constant", "a = Cast<to=10>(c)\n y = Mul(x, a)", "uint8 c = {2}"),
    half("double constant", "a = Cast<to=11>(x)\n d = Mul(a, c)\n y = Cast<to=10>(d)", "double c = {2.0}"),
    Operator("DynamicQuantizeLinear", "(float[b,4] x) => (uint8[b,4] y) { y, s, z = DynamicQuantizeLinear(x) }"),
    Operator("BitwiseAnd", "(int32[b,4] x) => (int32[b,4] y) { y = BitwiseAnd(x, x) }"),
    Operator("MatMulInteger", "(int8[b,4] x, int8[4,4] w) => (int32[b,4] y) { y = MatMulInteger(x, w) }"),
    Operator("Compress", "(float16[b,4] x, bool[b] c) => (float16[t,4] y) { y = Compress<axis=0>(x, c) }"),
    Operator("NonZero", "(float16[b,4] x) => (int64[2,t] y) { y = NonZero(x) }"),
    half("Swish", "y = Swish(x)", opset=24),
    half("Gelu", "y = Gelu(x)"),
    half("unknown operator", "y = Foo(x)"),
    half("unknown domain", "y = my.Foo(x)", domains=MINE),
    half("known name elsewhere", "y = my.Sigmoid(x)", domains=MINE),
    half("microsoft Gelu", "y = com.microsoft.Gelu(x)", domains=MICROSOFT),
    half("microsoft FastGelu", "y = com.microsoft.FastGelu(x)", domains=MICROSOFT),
    half("microsoft QuickGelu", "y = com.microsoft.QuickGelu(x)", domains=MICROSOFT),
    half("SimplifiedLayerNormalization", "y = SimplifiedLayerNormalization(x, w)", "float16[4] w = {1,1,1,1}"),
    half(
        "SkipSimplifiedLayerNormalization",
        "a = Unsqueeze(x, i)\n d = com.microsoft.SkipSimplifiedLayerNormalization(a, a, w)\n y = Squeeze(d, i)",
        "float16[4] w = {1,1,1,1}, int64[1] i = {0}",
        domains=MICROSOFT,
    ),
    Operator(
        "microsoft Attention",
        "(float16[b,s,4] x, float16[4,12] w, float16[12] c) => (float16[b,s,4] y) "
        "{ y = com.microsoft.Attention<num_heads=2>(x, w, c) }",
        domains=MICROSOFT,
    ),
    Operator(
        "GroupQueryAttention",
        "(float16[b,s,64] q, float16[b,p,64] k, float16[b,p,64] v, float16[b,1,p,64] pk, float16[b,1,p,64] pv, "
        "int32[b] n, int32 t) => (float16[b,s,64] y) { y, a, c = com.microsoft.GroupQueryAttention"
        "<num_heads=1, kv_num_heads=1, scale=0.1>(q, k, v, pk, pv, n, t) }",
        domains=MICROSOFT,
    ),
    Operator(
        "MatMulNBits",
        "(float16[b,32] x, uint8[4,1,16] w, float16[4] s) => (float16[b,4] y) "
        "{ y = com.microsoft.MatMulNBits<K=32, N=4, bits=4, block_size=32>(x, w, s) }",
        domains=MICROSOFT,
    ),
    quantize("Q to int8", "int8", "y = QuantizeLinear<output_dtype=3>(x, s)"),
    quantize("Q to fp8", "float8e4m3fn", "y = QuantizeLinear<output_dtype=17>(x, s)"),
    quantize("Q to int4", "int4", "y = QuantizeLinear<output_dtype=22>(x, s)"),
    quantize("Q to uint8", "uint8", "y = QuantizeLinear<output_dtype=2>(x, s)"),
    quantize("Q to e5m2", "float8e5m2", "y = QuantizeLinear<output_dtype=19>(x, s)"),
    quantize("Q by default", "uint8", "y = QuantizeLinear(x, s)"),
    quantize(
        "Q, uint8 zero", "float16", "q = QuantizeLinear(x, s, z)\n y = DequantizeLinear(q, s, z)", ", uint8 z = {0}"
    ),
    quantize(
        "Q, uint8 128", "float16", "q = QuantizeLinear(x, s, z)\n y = DequantizeLinear(q, s, z)", ", uint8 z = {128}"
    ),
    quantize("Q, zero and output_dtype", "int8", "y = QuantizeLinear<output_dtype=3>(x, s, z)", ", int8 z = {0}"),
    quantize("Q, zero cast", "int8", "z = Cast<to=3>(i)\n y = QuantizeLinear(x, s, z)", ", int32 i = {0}"),
    quantize("Q, one cast", "int8", "z = Cast<to=3>(i)\n y = QuantizeLinear(x, s, z)", ", int32 i = {1}"),
    quantize("Q, negative", "int8", "y = QuantizeLinear<output_dtype=3>(x, s)", scale=MINUS),
    Operator(
        "Q, zero point given",
        f"(float16[b,4] x, int8 z) => (int8[b,4] y) <float16 s = {{{TENTH}}}> {{ y = QuantizeLinear(x, s, z) }}",
    ),
    Operator(
        "Q, scale given", "(float16[b,4] x, float16 s) => (int8[b,4] y) { y = QuantizeLinear<output_dtype=3>(x, s) }"
    ),
    Operator(
        "Q of int32", "(int32[b,4] x) => (int8[b,4] y) <float s = {0.1}> { y = QuantizeLinear<output_dtype=3>(x, s) }"
    ),
    half(
        "DQ of int32",
        "d = DequantizeLinear(c, s)\n h = Cast<to=10>(d)\n y = Add(x, h)",
        "float s = {0.1}, int32[4] c = {1,2,3,4}",
    ),
    Operator(
        "DQ of a uint8 port",
        f"(uint8[b,4] x) => (float16[b,4] y) <float16 s = {{{TENTH}}}, uint8 z = {{128}}> "
        "{ y = DequantizeLinear(x, s, z) }",
    ),
    Operator("cast of a uint8 port", "(uint8[b,4] x) => (float16[b,4] y) { y = Cast<to=10>(x) }"),
    *(
        Operator(
            f"cache {dtype}", f"({dtype}[b,4] x, {dtype}[b,4] z) => ({dtype}[b,8] y) {{ y = Concat<axis=1>(x, z) }}"
        )
        for dtype in ("float16", "int8", "uint8")
    ),
    *(
        Operator(
            f"TensorScatter {dtype}",
            f"({dtype}[b,2,16,4] c, {dtype}[b,2,s,4] u, int64[b] i) => ({dtype}[b,2,16,4] y) "
            "{ y = TensorScatter(c,u,i) }",
            24,
        )
        for dtype in ("float16", "int8")
    ),
    Operator("nine dimensions", "(float16[b,1,1,1,1,1,1,1,4] x) => (float16[b,1,1,1,1,1,1,1,4] y) { y = Relu(x) }"),
    Operator("eight dimensions", "(float16[b,1,1,1,1,1,1,4] x) => (float16[b,1,1,1,1,1,1,4] y) { y = Relu(x) }"),
    Operator(
        "If",
        "(float16[b,4] x, bool c) => (float16[b,4] y) { y = If(c) "
        "<then_branch = t () => (float16[b,4] p) { p = Relu(x) }, "
        "else_branch = e () => (float16[b,4] n) { n = Neg(x) }> }",
    ),
    Operator(
        "unknown inside of If",
        "(float16[b,4] x, bool c) => (float16[b,4] y) { y = If(c) "
        "<then_branch = t () => (float16[b,4] p) { p = Foo(x) }, "
        "else_branch = e () => (float16[b,4] n) { n = Neg(x) }> }",
    ),
    Operator("axes given", "(float16[b,4] x, int64[1] i) => (float16[b,1] y) { y = ReduceMax<keepdims=1>(x, i) }"),
    half(
        "three scales for four channels",
        "q = QuantizeLinear<axis=1, output_dtype=3>(x, s)\n y = DequantizeLinear<axis=1>(q, s)",
        f"float16[3] s = {{{TENTH},{TENTH},{TENTH}}}",
    ),
    Operator(
        "scales of E8M0",
        "(float8e4m3fn[b,4] x) => (float16[b,4] y) <float8e8m0 s = {127}> "
        "{ y = DequantizeLinear<output_dtype=10>(x, s) }",
        24,
    ),
    Operator("too small", "(float16[2,4] x) => (float16[3,3] y) <int64[2] i = {3,3}> { y = Reshape(x, i) }"),
    half("three results", "y, m, d = LayerNormalization(x, w)", "float16[4] w = {1,1,1,1}"),
    half("ScatterND add", 'y = ScatterND<reduction="add">(x, i, x)', "int64[1,1] i = {0}"),
    half(
        "int8 constant gathered",
        "a = Gather(c, i)\n h = Cast<to=10>(a)\n y = Add(x, h)",
        "int8[4] c = {1,2,3,4}, int64 i = {0}",
    ),
    quantize("fp8 cast", "float16", "q = QuantizeLinear<output_dtype=17>(x, s)\n y = Cast<to=10>(q)"),
    quantize(
        "int4 transposed",
        "float16",
        "q = QuantizeLinear<output_dtype=22>(x, s)\n "
        "t = Transpose<perm=[1,0]>(q)\n d = DequantizeLinear(t, s)\n y = Transpose<perm=[1,0]>(d)",
    ),
    quantize(
        "fp8 zero",
        "float16",
        "z = Cast<to=17>(i)\n q = QuantizeLinear(x, s, z)\n y = DequantizeLinear(q, s, z)",
        ", float i = {1}",
    ),
    *(half(f"opset {opset}", "y = Relu(x)", opset=opset) for opset in (13, 17, 21, 22, 25, 26, 28)),
)
