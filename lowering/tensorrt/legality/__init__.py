"""What TensorRT's parser and builder refuse, compute differently or do not fuse: rules as data, and their check."""

from qcompiler.lowering.tensorrt.legality.check import CAPABILITIES, RULES, Checked, Finding, check, check_model
from qcompiler.lowering.tensorrt.legality.model import read_model
from qcompiler.lowering.tensorrt.legality.rule import Rule, Verdict

__all__ = ["CAPABILITIES", "RULES", "Checked", "Finding", "Rule", "Verdict", "check", "check_model", "read_model"]
