"""The artifact protocol, and what an implementation promises."""

import torch

from qcompiler.artifacts.hf import HFArtifact
from qcompiler.protocol.artifact import Artifact


def test_original_model_is_an_artifact(booklm):
    assert isinstance(HFArtifact(booklm), Artifact)


def test_protocol_refuses_what_lacks_a_method():
    class NoStep:
        vocab_size, max_positions, has_cache, path, provenance = 8, None, False, None, {}

        def forward(self, ids): ...
        def prefill(self, ids): ...
        def stored_bytes(self): ...
        def bits_per_weight(self): ...

    assert not isinstance(NoStep(), Artifact)


def test_cache_gives_the_logits_of_the_whole_sequence(booklm):
    artifact = HFArtifact(booklm)
    ids = torch.randint(artifact.vocab_size, (2, 12))
    whole = artifact.forward(ids)
    assert whole.dtype == torch.float32
    assert whole.shape == (2, 12, artifact.vocab_size)
    first, cache = artifact.prefill(ids[:, :7])
    second, cache = artifact.step(ids[:, 7:9], cache)
    third, cache = artifact.step(ids[:, 9:], cache)
    torch.testing.assert_close(torch.cat((first, second, third), dim=1), whole, atol=2e-4, rtol=1e-4)
