"""Networks with the geometry of the state: what moves with the fields, what does not depend on the domain, and what is refused."""

import pytest
import torch

from pnpda_nb.core import stream
from pnpda_nb.flow_matching import ConvolutionNetwork, DenseNetwork, PyramidNetwork
from pnpda_nb.flow_matching.field_networks import walls

TAU = torch.full((1,), 0.4)


def shaken(network):
    with torch.no_grad():
        for parameter in network.last.parameters():
            parameter.normal_(generator=stream(7, "last")).mul_(0.1)
    return network.eval().requires_grad_(False)


def all_kinds(dim: int = 24):
    yield "dense", DenseNetwork(3, 2, stream(1), dim=dim, width=16)
    for boundary in ("ring", "walls"):
        yield f"convolution {boundary}", ConvolutionNetwork(3, 2, stream(1), boundary=boundary, width=8, dilations=(1, 2))
        yield f"pyramid {boundary}", PyramidNetwork(3, 2, stream(1), boundary=boundary, width=8, levels=3)


KINDS = dict(all_kinds())


@pytest.mark.parametrize("kind", KINDS)
def test_that_an_untrained_network_answers_zero_and_a_shaken_one_depends_on_every_field_and_on_pseudo_time(kind):
    network = KINDS[kind]
    fields = torch.randn(2, 5, 3, 24, generator=stream(2))
    assert torch.equal(network(fields, TAU), torch.zeros(2, 5, 2, 24))
    network = shaken(dict(all_kinds())[kind])
    answer = network(fields, TAU)
    for channel in range(3):
        other = fields.clone()
        other[..., channel, :] += 1
        assert (network(other, TAU) - answer).abs().max() > 1e-4
    assert (network(fields, TAU / 2) - answer).abs().max() > 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_that_a_batch_is_answered_state_by_state_with_pseudo_times_of_its_own(kind):
    network = shaken(dict(all_kinds())[kind])
    fields, tau = torch.randn(4, 3, 24, generator=stream(3)), torch.rand(4, 1, generator=stream(4))
    together = network(fields, tau)
    alone = torch.stack([network(f, t) for f, t in zip(fields, tau)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shift", [4, 8, 20])
def test_that_a_pyramid_on_a_ring_turns_with_its_fields_by_multiples_of_its_coarsest_step(shift):
    network = shaken(PyramidNetwork(3, 2, stream(1), boundary="ring", width=8, levels=3))
    fields = torch.randn(2, 3, 24, generator=stream(5))
    torch.testing.assert_close(network(fields.roll(shift, -1), TAU), network(fields, TAU).roll(shift, -1), rtol=1e-4, atol=1e-6)
    assert (network(fields.roll(1, -1), TAU) - network(fields, TAU).roll(1, -1)).abs().max() > 1e-4


def test_that_a_dilated_ring_turns_by_any_number_of_points():
    network = shaken(ConvolutionNetwork(3, 2, stream(1), boundary="ring", width=8, dilations=(1, 2)))
    fields = torch.randn(2, 3, 24, generator=stream(5))
    for shift in (1, 5):
        torch.testing.assert_close(network(fields.roll(shift, -1), TAU), network(fields, TAU).roll(shift, -1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["convolution walls", "pyramid walls"])
def test_that_the_same_weights_run_between_walls_that_are_further_apart(kind):
    network = shaken(dict(all_kinds())[kind])
    for dim in (17, 24, 101):
        assert network(torch.randn(2, 3, dim, generator=stream(6)), TAU).shape == (2, 2, dim)


def test_that_nearness_to_a_wall_does_not_depend_on_the_other_wall():
    near, far = walls(30, 8.0), walls(200, 8.0)
    assert torch.equal(near[0], far[0, :30]) and torch.equal(near[1], far[1, -30:])


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: ConvolutionNetwork(3, 1, stream(1), kernel=4), "kernel"),
        (lambda: PyramidNetwork(3, 1, stream(1), boundary="sphere"), "boundary"),
        (lambda: PyramidNetwork(3, 1, stream(1), levels=0), "levels"),
        (lambda: DenseNetwork(0, 1, stream(1), dim=3), "channels"),
        (lambda: ConvolutionNetwork(3, 1, stream(1), dilations=(8,))(torch.zeros(1, 3, 10), TAU), "fields"),
        (lambda: PyramidNetwork(3, 1, stream(1), levels=3)(torch.zeros(1, 3, 10), TAU), "fields"),
    ],
)
def test_that_what_cannot_be_is_refused_in_one_line(make, name):
    with pytest.raises(ValueError, match=f"^{name}: expected") as error:
        make()
    assert "\n" not in str(error.value)
