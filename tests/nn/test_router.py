"""The choice that every query makes among heads."""

import copy
import pickle

import pytest
import torch

from lineara.nn.router import Router


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def made(top_k=1, *, dim=7, heads=5):
    router = Router(dim, heads, top_k, dtype=torch.float64)
    return router, torch.randn(2, 13, dim, dtype=torch.float64)


def test_the_gate_is_the_probability_of_the_likeliest_heads_relative_to_an_even_choice():
    for top_k in (1, 3, 5):
        router, query = made(top_k)
        gate = router(query, None).mT
        probability = (query @ router.logits.weight.mT + router.logits.bias).softmax(-1)
        least = probability.sort(-1, descending=True).values[..., top_k - 1, None]
        expected = torch.where(probability >= least, 5 * probability, 0.0)
        torch.testing.assert_close(gate, expected, rtol=1e-12, atol=1e-12)
        assert ((gate > 0).sum(-1) == top_k).all()


def test_what_was_decided_is_told():
    router, query = made(2)
    assert router.last is None
    gate = router(query, None).mT
    routing = router.last
    assert (gate.gather(2, routing.choice) > 0).all()
    assert routing.choice.shape == (2, 13, 2)
    torch.testing.assert_close(routing.load, (gate > 0).double().mean((0, 1)) / 2)
    mean = routing.probability.mean((0, 1))
    torch.testing.assert_close(routing.load_balancing, 5 * (routing.load * mean).sum())
    assert not routing.probability.requires_grad
    assert not routing.load.requires_grad


def test_an_even_choice_has_load_balancing_of_one_and_a_collapsed_one_of_the_number_of_heads():
    router, query = made(5)
    router(query, None)
    torch.testing.assert_close(router.last.load_balancing, torch.tensor(1.0, dtype=torch.float64))
    router, query = made(1)
    with torch.no_grad():
        router.logits.weight.zero_()
        router.logits.bias.copy_(torch.tensor([0.0, 0.0, 50.0, 0.0, 0.0]))
    router(query, None)
    torch.testing.assert_close(router.last.load_balancing, torch.tensor(5.0, dtype=torch.float64))
    assert router.last.load.tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]


def test_masked_queries_are_not_counted_whatever_they_hold():
    router, query = made(1)
    mask = torch.rand(2, 13) > 0.4
    router(query, mask)
    expected = router.last
    router(query.masked_fill(~mask[:, :, None], torch.nan), mask)
    torch.testing.assert_close(router.last.load, expected.load)
    torch.testing.assert_close(router.last.load_balancing, expected.load_balancing)
    router(query, torch.zeros_like(mask))
    assert router.last.load_balancing == 0


def test_its_gradient_lowers_the_load_of_the_fullest_head():
    router, query = made(1)
    with torch.no_grad():
        router.logits.bias[3] += 1.0
    router(query, None)
    before = router.last
    for _ in range(200):
        gate = router(query, None)  # whose graph the term is part of
        (gradient,) = torch.autograd.grad(router.last.load_balancing, router.logits.bias)
        with torch.no_grad():
            router.logits.bias -= gradient
        del gate
    assert before.load.argmax() == 3
    assert before.load[3] > 0.3
    assert router.last.load[3] < before.load[3] - 0.1


def test_copies_and_pickles_take_the_weights_and_leave_the_decision():
    router, query = made()
    router(query, None)
    for other in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert other.last is None
        assert torch.equal(other(query, None), router(query, None))
    assert router.last is not None
    assert set(router.state_dict()) == {"logits.weight", "logits.bias"}


def test_half_precision_counts_beyond_what_it_can_hold():
    router = Router(7, 2, 1, dtype=torch.bfloat16)
    with torch.no_grad():
        router.logits.weight.zero_()
        router.logits.bias.copy_(torch.tensor([1.0, 0.0]))
    gate = router(torch.zeros(3, 1001, 7, dtype=torch.bfloat16), torch.arange(1001).expand(3, -1) < 1000)
    expected = 2 * torch.tensor(1.0).sigmoid()
    assert gate.dtype == torch.bfloat16
    assert router.last.load.tolist() == [1.0, 0.0]
    torch.testing.assert_close(router.last.load_balancing, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("top_k", "error", "sentence"),
    [
        (0, ValueError, "top_k must be at least 1 and at most num_heads=5, got 0"),
        (6, ValueError, "top_k must be at least 1 and at most num_heads=5, got 6"),
        (1.0, TypeError, "top_k must be an integer, got 1.0"),
        (True, TypeError, "top_k must be an integer, got True"),
    ],
)
def test_an_impossible_top_k_is_refused(top_k, error, sentence):
    with pytest.raises(error, match=sentence):
        made(top_k)
