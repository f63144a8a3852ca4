"""Hugging Face directories as they are: the original model as an artifact, its tokenizer, its limits."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import InputError, MissingDependencyError, UnsupportedModelError, WeightError
from qcompiler.frontend import build_on_meta, fingerprint_directory, read_config
from qcompiler.storage import WeightStore, companion_files, left_behind, no_directory

__all__ = ["HFArtifact", "companion_losses", "has_tokenizer", "load_tokenizer", "read_limits"]

_log = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "*.model",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


class HFArtifact:
    """The model of a Hugging Face directory, run by transformers in float32.

    Args:
        path: a directory with ``config.json`` and safetensors. Nothing is downloaded.
        trust_remote_code: run modelling code the directory brings along.
        device: where it runs.

    Raises:
        InputError: no such directory, a missing or broken configuration, or a model that does not predict next tokens
            (an encoder, or one with an encoder).
        UnsupportedModelError: a quantized checkpoint that transformers would load as if its codes were weights, or a
            model that transformers cannot build.
        WeightError: a damaged checkpoint, or one that lacks parameters of the model.
    """

    def __init__(
        self, path: str | Path, *, trust_remote_code: bool = False, device: str | torch.device = "cpu"
    ) -> None:
        self.path: Path = Path(path)
        self._trust_remote_code = trust_remote_code
        config = read_config(self.path)
        _refuse_ignored_quantization(self.path, config)
        store = WeightStore.from_directory(self.path)
        if "quantization_config" not in config:
            _refuse_codes_as_weights(self.path, store)
        with contextlib.suppress(UnsupportedModelError):  # what transformers says of it itself comes below
            build_on_meta(self.path, config, trust_remote_code, stored_bytes=store.stored_bytes())
        self._device = torch.device(device)
        self._model, missing, unused = self._read_model(store)
        text_config = self._model.config.get_text_config()
        self.vocab_size: int = int(text_config.vocab_size)
        self.max_positions: int | None = getattr(text_config, "max_position_embeddings", None)
        self.provenance: Mapping[str, object] = {"source": str(self.path), "config": config}
        self.cache_bytes_per_token: int | None = None
        self.has_cache: bool = self._probe()
        if missing:
            raise WeightError(
                "the checkpoint lacks parameters of the model",
                where=self.path,
                got=f"{len(missing)} missing: {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}",
                expected="every parameter of " + type(self._model).__name__,
                remedy="use a checkpoint that was saved with its language-model head",
            )
        self._stored_bytes = sum(store.info(name).nbytes for name in store.names() if name not in unused)
        self._parameters = _parameter_count(self._model, config, trust_remote_code)

    def _read_model(self, store: WeightStore) -> tuple[Any, list[str], frozenset[str]]:
        """The model, parameters that the checkpoint lacks, and tensors that the model does not use."""
        model, missing, unused = _load(self.path, store, self._trust_remote_code)
        return model.to(self._device), missing, unused

    def fingerprint(self) -> str:
        """What the manifest of a model compiled from this directory holds.

        Raises:
            QCompilerError: if nothing could be compiled from it.
        """
        return fingerprint_directory(self.path, trust_remote_code=self._trust_remote_code)

    def _probe(self) -> bool:
        """Whether the model has a cache; refuses one whose earlier logits depend on later tokens."""
        ids = torch.arange(4).expand(2, 4).clone() % self.vocab_size
        ids[1, -1] = (ids[1, -1] + 1) % self.vocab_size
        with torch.inference_mode():
            output = self._model(input_ids=ids.to(self._device), use_cache=True)
        earlier = output.logits[:, :-1].float()
        if (earlier[0] - earlier[1]).abs().max() > 1e-4 * earlier.abs().max():
            raise InputError(
                "this model is not a causal language model",
                where=self.path,
                got="its logits depend on later tokens, as an encoder's do",
                expected="a model that predicts each token from those before it",
                remedy="perplexity, KL divergence and generation are not defined for it",
            )
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self.cache_bytes_per_token = _bytes_per_token(cache)
        return cache is not None

    def forward(self, ids: Tensor) -> Tensor:
        """float32 logits ``[batch, length, vocab]`` of int64 ``[batch, length]``, without a cache."""
        with torch.inference_mode():
            return self._model(input_ids=ids.to(self._device), use_cache=False).logits.float()  # type: ignore[no-any-return]

    def prefill(self, ids: Tensor) -> tuple[Tensor, object]:
        """Logits of ``ids``, and transformers' cache."""
        return self.step(ids, None)

    def step(self, ids: Tensor, cache: object) -> tuple[Tensor, object]:
        """Logits of ``ids`` appended to the cache; the cache is changed in place."""
        with torch.inference_mode():
            output = self._model(input_ids=ids.to(self._device), past_key_values=cache, use_cache=True)
        return output.logits.float(), output.past_key_values

    def stored_bytes(self) -> int:
        """Bytes of the tensors of the checkpoint, without those that the model does not use (a vision tower)."""
        return self._stored_bytes

    def bits_per_weight(self) -> float:
        """Stored bits divided by the model's parameters (tied ones counted once)."""
        return 8 * self._stored_bytes / self._parameters


def _bytes_per_token(cache: Any) -> int | None:
    """What one token takes in a cache of transformers; None for a kind that is not of keys and values."""
    layers = getattr(cache, "layers", None) or ()
    total = 0
    for tensor in (getattr(layer, part, None) for layer in layers for part in ("keys", "values")):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            return None
        total += tensor.shape[1] * tensor.shape[3] * tensor.element_size()
    return total or None


def load_tokenizer(path: str | Path, *, vocab_size: int | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a directory.

    Args:
        path: a directory with tokenizer files. Nothing is downloaded.
        vocab_size: of the model; a tokenizer that knows larger ids is refused. Fewer ids are fine: models pad theirs.
        trust_remote_code: run tokenizer code the directory brings along.

    Raises:
        InputError: no such directory, no tokenizer in it, a broken one, or one that does not fit the model.
    """
    from transformers import AutoTokenizer

    directory = Path(path)
    if not directory.is_dir():
        raise no_directory(directory)
    if not has_tokenizer(directory):
        raise InputError(
            "the directory has no tokenizer",
            where=directory,
            expected="tokenizer.json or another tokenizer file",
            remedy="copy the tokenizer's files beside the model, or give token ids instead of text",
        )
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
            tokenizer("a")  # some of what its files say is read no earlier
            largest = max(tokenizer.get_vocab().values(), default=-1)
    except Exception as error:  # what a broken file raises depends on the kind of tokenizer
        raise InputError("the tokenizer cannot be loaded", where=directory, got=_shortened(error)) from error
    if vocab_size is not None and largest >= vocab_size:
        raise InputError(
            "the tokenizer does not fit the model",
            where=directory,
            got=f"token ids up to {largest}",
            expected=f"ids below the model's vocabulary of {vocab_size}",
            remedy="use the tokenizer the model was trained with",
        )
    return tokenizer


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a file that a tokenizer is loaded from."""
    return any(next(directory.glob(pattern), None) for pattern in _TOKENIZER_FILES)


def companion_losses(path: str | Path, trust_remote_code: bool = False) -> list[str]:
    """What of a model directory will not be beside the compiled model, a sentence each.

    That what travels is all the tokenizer needs is tried: it is loaded from those files alone.
    """
    directory, losses = Path(path), []
    if others := left_behind(directory):
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        losses.append(f"files of the source that are not copied: {', '.join(others[:8])}{more}")
    companions = companion_files(directory)
    if any(fnmatch(name, pattern) for name in companions for pattern in _TOKENIZER_FILES):
        with tempfile.TemporaryDirectory() as place:
            for name, file in companions.items():
                (Path(place) / name).parent.mkdir(exist_ok=True)
                (Path(place) / name).symlink_to(file.resolve())
            try:
                load_tokenizer(place, trust_remote_code=trust_remote_code)
            except InputError as error:
                losses.append(f"the tokenizer does not load from the files that are copied: {error.got or error.what}")
    return losses


def read_limits(path: str | Path, *, trust_remote_code: bool = False) -> tuple[int, int | None]:
    """Vocabulary size and longest sequence (None: no limit) of the model in a directory; no weight is read.

    Raises:
        InputError: no such directory, or a missing or broken configuration.
    """
    text_config = _read_auto_config(Path(path), trust_remote_code).get_text_config()
    return int(text_config.vocab_size), getattr(text_config, "max_position_embeddings", None)


def _read_auto_config(directory: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    read_config(directory)
    try:
        with _quiet():
            return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(
            "config.json does not describe a model that transformers knows",
            where=directory / "config.json",
            got=_shortened(error),
        ) from error


def _load(directory: Path, store: WeightStore, trust_remote_code: bool) -> tuple[Any, list[str], frozenset[str]]:
    """The model in float32, the parameters the checkpoint did not give, and the tensors the model does not use."""
    from transformers import AutoModelForCausalLM

    config = _read_auto_config(directory, trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError("this model has an encoder", where=directory, expected="a decoder-only language model")
    try:
        with _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
            )
    except ImportError as error:
        raise MissingDependencyError(
            "transformers needs another package to load this model", where=directory, got=_shortened(error)
        ) from error
    except RuntimeError as error:
        raise WeightError("the checkpoint does not fit the model", where=directory, got=_shortened(error)) from error
    except Exception as error:  # a configuration can make transformers' own code fail in any way
        if "Unrecognized configuration class" not in str(error):
            raise UnsupportedModelError(
                "transformers cannot load this model", where=directory, got=_shortened(error)
            ) from error
        raise InputError(
            "this model is not a causal language model",
            where=directory,
            got=config.model_type,
            expected="a model that predicts each token from those before it",
        ) from error
    mismatched = sorted(set(info["mismatched_keys"]) - _decompress(model, store, info["mismatched_keys"]))
    if mismatched:
        name, stored, declared = mismatched[0]
        raise WeightError(
            "the checkpoint does not fit config.json",
            where=f"{directory}: {name}",
            got=list(stored),
            expected=list(declared),
            remedy="use the configuration that belongs to these weights",
        )
    if info["unexpected_keys"]:
        unexpected = sorted(info["unexpected_keys"])
        _log.warning("%s: %d tensors belong to no parameter, such as %s", directory, len(unexpected), unexpected[0])
    return model.eval().requires_grad_(False), sorted(info["missing_keys"]), frozenset(info["unexpected_keys"])


def _decompress(
    model: Any, store: WeightStore, mismatched: Collection[tuple[str, Any, Any]]
) -> set[tuple[str, Any, Any]]:
    """Makes float weights in float32 of a model that compressed-tensors would decompress as it first runs.

    transformers expects zero points of packed weights unpacked, though its own decompression takes them packed, and
    gives weights of 4-bit floats in bfloat16, which no layer in float32 takes.

    Returns:
        What it set right of what was mismatched: zero points.
    """
    if not hasattr(model, "ct_decompress_hook"):
        return set()
    settled = {item for item in mismatched if item[0].endswith(".weight_zero_point")}
    for name, *_ in settled:
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, torch.nn.Parameter(store.read(name), requires_grad=False))
    with _quiet():
        model.hf_quantizer.compressor.decompress_model(model)
    torch.nn.Module.float(model)  # its own method refuses quantized models
    return settled


def _refuse_ignored_quantization(directory: Path, config: dict[str, Any]) -> None:
    """Refuses quantized checkpoints whose codes transformers would load as if they were the weights."""
    declared = config.get("quantization_config")
    if declared is not None and not isinstance(declared, dict):
        raise InputError("quantization_config is not an object", where=directory / "config.json", got=declared)
    if declared is None and (directory / "hf_quant_config.json").is_file():
        got = "quantized as hf_quant_config.json says, which transformers does not read"
    elif declared is not None and not _is_known_to_transformers(declared):
        got = f"quant_method {declared.get('quant_method')!r}, which transformers skips with a warning"
    else:
        return
    raise UnsupportedModelError(
        "this checkpoint is quantized in a format that transformers would read as plain weights",
        where=directory,
        got=got,
        expected="a float checkpoint, or a quantization that transformers implements",
        remedy="use the original model",
    )


def _is_known_to_transformers(declared: dict[str, Any]) -> bool:
    from transformers.quantizers.auto import AutoHfQuantizer

    method = declared.get("quant_method")
    if not isinstance(method, str | None):
        return False
    if method is None and not (declared.get("load_in_8bit") or declared.get("load_in_4bit")):
        return False
    with _quiet():
        return bool(AutoHfQuantizer.supports_quant_method(declared))


def _refuse_codes_as_weights(directory: Path, store: WeightStore) -> None:
    """Refuses codes that nothing declares: transformers would take them at face value."""
    for name in store.names():
        info = store.info(name)
        if name.endswith(".weight") and len(info.shape) == 2 and info.dtype not in ("float32", "float16", "bfloat16"):
            raise UnsupportedModelError(
                "a weight is stored as codes, but config.json declares no quantization",
                where=f"{directory}: {name}",
                got=info.dtype,
                expected="float32, float16 or bfloat16",
                remedy="use the original model",
            )


def _parameter_count(model: Any, config: dict[str, Any], trust_remote_code: bool) -> int:
    """Parameters of the original model, tied ones once; a quantized one is built again without its quantization."""
    if "quantization_config" not in config:
        return sum(p.numel() for p in model.parameters())
    from transformers import AutoModelForCausalLM

    own = model.config.to_dict()  # of the language model alone, where config.json has more
    plain = type(model.config).from_dict({k: v for k, v in own.items() if k != "quantization_config"})
    with torch.device("meta"), _quiet():
        skeleton = AutoModelForCausalLM.from_config(plain, trust_remote_code=trust_remote_code)
    return sum(p.numel() for p in skeleton.parameters())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No advice from transformers and no progress bars, its own or of what it calls; errors still are exceptions."""
    from transformers.utils import logging as hf_logging

    verbosity, has_bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if has_bar:
            hf_logging.enable_progress_bar()


def _shortened(error: Exception) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message if len(message) <= 300 else message[:297] + '...'}"
