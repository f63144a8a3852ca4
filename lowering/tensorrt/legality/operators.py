"""The operators that NVIDIA's ONNX parser knows by name.

Source: ``OnnxParser.supports_operator`` of tensorrt_rtx 1.7.1.116, asked for every operator of ONNX 1.23;
``tests/lowering/tensorrt/legality/test_rules_and_builder.py`` asks again. The parser looks at names
alone, not at domains.
"""

__all__ = ["CUSTOM", "MICROSOFT", "PLUGINS", "STANDARD"]

_STANDARD = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization BlackmanWindow
Cast CastLike CausalConvWithState Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum
DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather
GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf
IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual LinearAttention Log LogSoftmax Loop LpNormalization
LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot
Or PRelu Pad Pow QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike
Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding Round STFT Scan Scatter
ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign SimplifiedLayerNormalization Sin Sinh Size Slice Softmax
Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh TensorScatter ThresholdedRelu Tile TopK
Transpose Trilu Unsqueeze Upsample Where Xor
"""
STANDARD = frozenset(_STANDARD.split())
"""Of ONNX's own domain; SimplifiedLayerNormalization is ONNX Runtime's, and stands there without being standard."""

_CUSTOM = """
TRT_Attention TRT_BlockDequantize TRT_BlockQuantize TRT_DynamicQuantize TRT_FP4DynamicQuantize
TRT_FP8DequantizeLinear TRT_FP8QuantizeLinear TRT_INT4DequantizeLinear TRT_INT4QuantizeLinear TRT_KVCacheUpdate
TRT_MXFP8DequantizeLinear TRT_MXFP8DynamicQuantize TRT_MXFP8QuantizeLinear TRT_MoE TRT_QuantizedAttention
"""
CUSTOM = frozenset(_CUSTOM.split())
"""TensorRT's own, in the domain "trt" or in none."""

_MICROSOFT = """
DequantizeLinear Gelu MultiHeadAttention QuantizeLinear RotaryEmbedding SimplifiedLayerNormalization
SkipSimplifiedLayerNormalization
"""
MICROSOFT = frozenset(_MICROSOFT.split())
"""Of ONNX Runtime's domain com.microsoft, those that are built as ONNX Runtime computes them."""

PLUGINS = frozenset({"CausalConvWithState", "LinearAttention", "NonZero", "RoiAlign"})
"""Of STANDARD, those that the parser makes with a plugin, which does not come with TensorRT for RTX."""
