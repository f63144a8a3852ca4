import torch

from qcompiler.artifacts.decisions import Decisions


def test_choices_are_those_of_the_recorded_run():
    scores, other = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 2.0, 1.0]])
    decisions = Decisions()
    with decisions.recording()(0):
        first, chosen = scores.topk(2)
        best = scores.argmax(-1)
    with decisions.holding()(0):
        values, indices = other.topk(2)
        assert torch.equal(indices, chosen)
        assert torch.equal(values, torch.tensor([[1.0, 2.0]]))
        assert torch.equal(other.argmax(-1), best)
        assert torch.equal(other.argmax(-1), torch.tensor([0]))  # chosen more often than recorded
    assert torch.equal(first, torch.tensor([[3.0, 2.0]]))
    assert torch.equal(other.topk(2).indices, torch.tensor([[0, 1]]))


def test_choices_of_another_shape_are_its_own():
    decisions = Decisions()
    with decisions.recording()(0):
        torch.tensor([[1.0, 2.0, 3.0]]).topk(2)
    with decisions.holding()(0):
        assert torch.equal(torch.tensor([[3.0, 2.0, 1.0]]).topk(1).indices, torch.tensor([[0]]))
